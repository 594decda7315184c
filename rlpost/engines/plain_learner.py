"""The learner in plain PyTorch: float32, one rank, one rollout at a time. What every other learner is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlpost.core.batching import collate
from rlpost.core.metrics import StepReport, Tally
from rlpost.core.objective import StageSpec, loss_and_tally, trained_units
from rlpost.engines.forward import Scorer, load_policy
from rlpost.types import Rollout


class PlainLearner:
    """Executable specification of `LearnerEngine`.

    Rollouts are trained in the order they come, each alone (a pair of them together, where the objective is one of
    pairs), so the gradient of a step does not depend, not even in its last bit, on how its rollouts were cut into calls
    of `accumulate`.
    """

    def __init__(self, model_path: Path, *, serve_dtype: torch.dtype = torch.float32) -> None:
        self._model_path, self._serve_dtype = model_path, serve_dtype
        self._scorer = Scorer(load_policy(model_path, torch.float32)).train()
        self._optimizer = torch.optim.AdamW(self._scorer.parameters(), lr=0.0)
        self._spec: StageSpec | None = None
        self._reference: Scorer | None = None
        self._tallies: list[Tally] = []

    def begin_stage(self, spec: StageSpec) -> None:
        self._apply(spec)
        self._optimizer.state.clear()
        self._optimizer.zero_grad()
        if spec.objective.needs_reference:
            self._reference = self._frozen_copy(self._scorer.policy.state_dict())

    def accumulate(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        *,
        learner_version: int,
        max_staleness: int | None,
    ) -> None:
        spec = self._spec
        assert spec is not None, "begin_stage comes first"
        for unit in trained_units(spec.objective, rollouts, advantages):
            batch = collate(
                [rollouts[row] for row in unit],
                [advantages[row] for row in unit],
                aggregation=spec.objective.aggregation,
                learner_version=learner_version,
                max_staleness=max_staleness,
            )
            inputs = (batch.token_ids_BT, batch.loss_mask_BT, spec.temperature)
            with torch.no_grad():
                reference_BT = self._reference(*inputs)[0] if self._reference is not None else None
            loss, tally = loss_and_tally(spec.objective, batch, *self._scorer(*inputs), reference_BT)
            loss.backward()
            self._tallies.append(tally)

    def step(self, *, denominator: float, lr: float) -> StepReport:
        """See `LearnerEngine.step`.

        Raises:
            RuntimeError: when the gradient is not finite; the weights are then unchanged.
        """
        assert self._spec is not None, "begin_stage comes first"
        parameters = list(self._scorer.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= denominator
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._spec.optimizer.max_grad_norm))
        check_finite(norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        report = StepReport(grad_norm=norm, tally=Tally.merge(self._tallies))
        self._tallies = []
        return report

    def weights(self) -> Mapping[str, Tensor]:
        named = self._scorer.policy.named_parameters()
        return {name: p.detach().to(self._serve_dtype, copy=True) for name, p in named}

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        state = {
            "policy": self._scorer.policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "reference": None if self._reference is None else self._reference.policy.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, path / "plain-learner.pt")

    def load(self, path: Path) -> None:
        spec = self._spec
        assert spec is not None, "begin_stage comes first"
        state = torch.load(path / "plain-learner.pt", weights_only=True)
        self._scorer.policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._apply(spec)
        if state["reference"] is not None:
            self._reference = self._frozen_copy(state["reference"])
        torch.set_rng_state(state["rng"])

    def _apply(self, spec: StageSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec, self._reference, self._tallies = spec, None, []
        apply_optimizer_spec(self._optimizer, spec)

    def _frozen_copy(self, state: Mapping[str, Tensor]) -> Scorer:
        copy = load_policy(self._model_path, torch.float32)
        copy.load_state_dict(state)
        return Scorer(copy).requires_grad_(False)


def apply_optimizer_spec(optimizer: torch.optim.Optimizer, spec: StageSpec) -> None:
    for group in optimizer.param_groups:
        group["betas"] = spec.optimizer.betas
        group["eps"] = spec.optimizer.eps
        group["weight_decay"] = spec.optimizer.weight_decay


def check_finite(grad_norm: float) -> None:
    """Raises RuntimeError when a step's gradient holds an infinity or NaN."""
    if not 0 <= grad_norm < float("inf"):
        raise RuntimeError(
            f"the gradient's norm is {grad_norm}: the run has diverged, and would again from its last checkpoint."
            " Begin in another run_dir with a lower lr or a smaller max_grad_norm"
        )
