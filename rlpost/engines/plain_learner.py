"""The learner in plain PyTorch: float32, one rank, one rollout at a time. What every other learner is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlpost.core.batching import collate
from rlpost.core.critic import Values
from rlpost.core.metrics import StepReport, Tally
from rlpost.core.objective import StageSpec, critic_loss_and_tally, critic_of, loss_and_tally, trained_units
from rlpost.core.subnetwork import Coverage, coverage
from rlpost.engines.base import WeightSection
from rlpost.engines.forward import Scorer, copy_policy, load_policy
from rlpost.engines.lora import Adapter, checkpoint_weights, unmerged
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.optimizers import apply_settings, make_optimizer
from rlpost.engines.pretrained import PeftAdapter
from rlpost.engines.reference import Reference, Score
from rlpost.engines.subnetwork import Masks, check_trains_something, hold_gradients
from rlpost.engines.value_model import ValueModel
from rlpost.types import Rollout


class PlainLearner:
    """Executable specification of `LearnerEngine`.

    Rollouts are trained in the order they come, each alone (a pair of them together, where the objective is one of
    pairs), so the gradient of a step does not depend, not even in its last bit, on how its rollouts were cut into calls
    of `accumulate`.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        serve_dtype: torch.dtype = torch.float32,
        lora: LoraSpec | None = None,
        serve_adapter: bool = False,
    ) -> None:
        """
        Args:
            serve_adapter: samplers have the adapter beside the base; False: merged into it.
        """
        self._model_path, self._serve_dtype, self._serve_adapter = model_path, serve_dtype, serve_adapter
        policy = load_policy(model_path, torch.float32)
        self._adapter = None if lora is None else Adapter(policy, lora)
        self._scorer = Scorer(policy).train()
        self._trained = [p for p in self._scorer.parameters() if p.requires_grad]
        self._spec: StageSpec | None = None
        self._reference: Reference | None = None
        self._critic: ValueModel | None = None
        self._critic_optimizer: torch.optim.Optimizer | None = None
        self._tallies: list[Tally] = []
        self._masks: dict[str, Tensor] = {}
        self._held: Sequence[RemovableHandle] = ()

    def begin_stage(self, spec: StageSpec) -> Coverage:
        self._optimizer, self._entries = make_optimizer(self._trained, type(spec.optimizer))
        self._optimizer.zero_grad()
        self._apply(spec)
        if self._adapter is not None:
            self._adapter.renew(spec.adapter_seed)
        elif spec.objective.needs_reference:
            self._refer_to_copy(self._values(), spec)
        self._critic, self._critic_optimizer = None, None
        if critic_of(spec.objective) is not None:
            self._critic = ValueModel(copy_policy(self._model_path, torch.float32, self._values())).train()
            self._critic_optimizer, self._critic_entries = make_optimizer(
                self._critic.parameters(), type(spec.optimizer)
            )
            apply_settings(spec.optimizer, self._critic_optimizer, self._critic_entries)
        masks: dict[str, Tensor] = {}
        if spec.subnetwork is not None:
            made = Masks(spec.subnetwork, self._scorer.policy, serve_dtype=self._serve_dtype)
            masks = {name: made.mask_of(name, value) for name, value in self._values().items()}
            check_trains_something(masks, spec.subnetwork)
        return self._train_only(masks)

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
            rows = (batch.token_ids_BT, batch.lengths_B, batch.loss_mask_BT)
            reference_BT = None if self._reference is None else self._reference(*rows, batch.temperatures_B)
            logprobs_BT, entropies_BT = self._scorer(*rows, batch.temperatures_B)
            values = None
            if self._critic is not None:
                values = Values(*self._critic(*rows))
                loss, tally = critic_loss_and_tally(spec.objective, batch, values, logprobs_BT, reference_BT)
                loss.backward()
                self._tallies.append(tally)
            loss, tally = loss_and_tally(spec.objective, batch, logprobs_BT, entropies_BT, reference_BT, values)
            loss.backward()
            self._tallies.append(tally)

    def step(self, *, denominator: float, lr: float) -> StepReport:
        """See `LearnerEngine.step`.

        Raises:
            RuntimeError: when a gradient, the policy's or its critic's, is not finite; the weights it was for are then unchanged.
        """
        assert self._spec is not None, "begin_stage comes first"
        norm = self._divide_and_clip(self._trained, denominator)
        critic_norm = None if self._critic is None else self._divide_and_clip(self._critic.parameters(), denominator)
        check_finite(norm, critic_norm)
        _update(self._optimizer, lr)
        if self._critic_optimizer is not None and (critic := critic_of(self._spec.objective)):
            _update(self._critic_optimizer, critic.lr)
        report = StepReport(grad_norm=norm, tally=Tally.merge(self._tallies), critic_grad_norm=critic_norm)
        self._tallies = []
        return report

    def _divide_and_clip(self, trained: Iterable[nn.Parameter], denominator: float) -> float:
        """Turn the accumulated gradient into the step's; returns its norm before clipping."""
        assert self._spec is not None, "begin_stage comes first"
        parameters = list(trained)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= denominator
        return float(nn.utils.clip_grad_norm_(parameters, self._spec.optimizer.max_grad_norm))

    def sections(self) -> Iterator[WeightSection]:
        for name, value in self._served():
            values_N = value.flatten().to(self._serve_dtype)
            yield WeightSection(name=name, shape=tuple(value.shape), start=0, values_N=values_N)

    @property
    def reads_alone(self) -> bool:
        return True

    def weights(self) -> Mapping[str, Tensor]:
        return {name: value.to(self._serve_dtype, copy=True) for name, value in self._values().items()}

    def adapter(self) -> PeftAdapter | None:
        return None if self._adapter is None else self._adapter.export()

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        state = {
            "policy": self._scorer.policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "reference": copy.policy.state_dict() if isinstance(copy := self._referred(), Scorer) else None,
            "lora": self._lora(),
            "masks": self._masks,
            "rng": torch.get_rng_state(),
        }
        if self._critic is not None and self._critic_optimizer is not None:
            state["critic"] = self._critic.state_dict(), self._critic_optimizer.state_dict()
        torch.save(state, path / "plain-learner.pt")

    def load(self, path: Path) -> None:
        spec = self._spec
        assert spec is not None, "begin_stage comes first"
        state = torch.load(path / "plain-learner.pt", weights_only=True)
        if state["lora"] != self._lora():
            raise ValueError(
                f"{path} was saved with lora = {state['lora']} and this learner has lora = {self._lora()}: resume with"
                f" lora = {state['lora']}"
            )
        self._scorer.policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._apply(spec)
        if state["reference"] is not None:
            self._refer_to_copy(state["reference"], spec)
        if self._critic is not None and self._critic_optimizer is not None:
            critic, critic_optimizer = state["critic"]
            self._critic.load_state_dict(critic)
            self._critic_optimizer.load_state_dict(critic_optimizer)
            apply_settings(spec.optimizer, self._critic_optimizer, self._critic_entries)
        self._train_only(state["masks"])
        torch.set_rng_state(state["rng"])

    def _apply(self, spec: StageSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec, self._tallies, self._reference = spec, [], None
        if self._adapter is not None and spec.objective.needs_reference:
            self._reference = Reference(self._score_without_adapter, remember=spec.responses_recur)
        apply_settings(spec.optimizer, self._optimizer, self._entries)

    def _train_only(self, masks: dict[str, Tensor]) -> Coverage:
        for handle in self._held:
            handle.remove()
        named = dict(self._scorer.policy.named_parameters())
        self._masks, self._held = masks, hold_gradients(named, masks)
        self._entries.masks = {named[name]: mask for name, mask in masks.items()}
        return coverage(masks)

    def _served(self) -> Iterator[tuple[str, Tensor]]:
        if self._serve_adapter:
            return ((name, factor * p.detach()) for name, p, factor in unmerged(self._scorer.policy))
        return ((weight.name, weight.value()) for weight in checkpoint_weights(self._scorer.policy))

    def _values(self) -> dict[str, Tensor]:
        return {weight.name: weight.value() for weight in checkpoint_weights(self._scorer.policy)}

    def _lora(self) -> str | None:
        return None if self._adapter is None else str(self._adapter.spec)

    def _score_without_adapter(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        assert self._adapter is not None
        with self._adapter.off():
            return self._scorer(*inputs)

    def _refer_to_copy(self, state: Mapping[str, Tensor], spec: StageSpec) -> None:
        copy = Scorer(copy_policy(self._model_path, torch.float32, state)).requires_grad_(False)
        self._reference = Reference(copy, remember=spec.responses_recur)

    def _referred(self) -> Score | None:
        return None if self._reference is None else self._reference.score


def _update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def check_finite(grad_norm: float, critic_grad_norm: float | None = None) -> None:
    """Raises RuntimeError when a step's gradient, the policy's or the critic's, holds an infinity or NaN."""
    for of, norm, lr in (("", grad_norm, "lr"), ("critic's ", critic_grad_norm, "critic.lr")):
        if norm is not None and not 0 <= norm < float("inf"):
            raise RuntimeError(
                f"the {of}gradient's norm is {norm}: the run has diverged, and would again from its last checkpoint."
                f" Begin in another run_dir with a lower {lr} or a smaller max_grad_norm"
            )
