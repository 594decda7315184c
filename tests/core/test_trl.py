"""The objectives against TRL's own loss functions on the same tensors: values and gradients to 1e-6."""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlpost.core.kto import KTO
from rlpost.core.objective import Objective, PolicyGradient, loss_and_tally, step_denominator
from rlpost.core.preference import Preference
from rlpost.types import TrainingBatch
from tests.core.conftest import make_batch, summary

pytestmark = [
    pytest.mark.trl,
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM", "ignore:.*script_method"),
]

NUM_ROWS, LENGTH = 6, 9


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="trl is not installed: pip install --no-deps trl==1.16.0")


def case(aggregation: str) -> tuple[TrainingBatch, Tensor, Tensor, Tensor]:
    """Rows of 1 to 9 response tokens: batch, log-probs under the policy, under p, under the reference."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.tensor([9, 1, 5, 7, 2, 9])[:, None]
    sampler = -3 * torch.rand(NUM_ROWS, LENGTH, generator=generator)
    noise = [torch.randn(NUM_ROWS, LENGTH, generator=generator) / 3 for _ in range(3)]
    advantages = torch.randn(NUM_ROWS, generator=generator).tolist()
    batch = make_batch(sampler.tolist(), mask.tolist(), advantages, aggregation=aggregation)
    return batch, sampler + noise[0], sampler + noise[1], sampler + noise[2]


def ours(objective: Objective, batch: TrainingBatch, logprobs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    lengths = tuple(batch.loss_mask_BT.sum(-1).tolist())
    group = summary(*((length, "stop") for length in lengths))
    leaf = logprobs.clone().requires_grad_()
    reference_BT = reference if objective.needs_reference else None
    loss, _ = loss_and_tally(objective, batch, leaf, torch.zeros_like(leaf), reference_BT)
    groups, advantages = [group], [batch.advantages_B.tolist()]
    if isinstance(objective, Preference):  # a pair is a group
        groups, advantages = [group] * (NUM_ROWS // 2), [[1.0, -1.0]] * (NUM_ROWS // 2)
    loss = loss / step_denominator(objective, groups, advantages, max_response_tokens=LENGTH)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def theirs(
    trl: Any, batch: TrainingBatch, logprobs: Tensor, inputs: dict[str, Tensor], **settings: Any
) -> tuple[Tensor, Tensor]:
    """`GRPOTrainer._compute_loss` with everything around the formula stubbed."""
    leaf = logprobs.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    )
    trainer.__dict__.update(settings)
    ids = torch.zeros(NUM_ROWS, LENGTH, dtype=torch.int64)
    mask = batch.loss_mask_BT.int()
    loss = trl.GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": batch.advantages_B,
            "num_items_in_batch": mask.sum(),
            **inputs,
        },
    )
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


CASES: dict[str, tuple[PolicyGradient, dict[str, Any]]] = {
    "grpo": (PolicyGradient(aggregation="sequence_mean", clip_high=0.2), {"loss_type": "grpo", "epsilon_high": 0.2}),
    "dr_grpo": (PolicyGradient(aggregation="constant"), {"loss_type": "dr_grpo"}),
    "dapo": (PolicyGradient(), {"loss_type": "dapo"}),
    "gspo": (
        PolicyGradient(ratio_level="sequence", aggregation="sequence_mean", clip_low=0.1, clip_high=0.1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1},
    ),
    "cispo": (PolicyGradient(clip="cispo", clip_low=1.0, clip_high=0.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "k3": (PolicyGradient(kl_coef=0.3), {"beta": 0.3}),
}


@pytest.mark.parametrize(("objective", "settings"), CASES.values(), ids=CASES)
def test_loss_and_gradient_are_trls(trl: Any, objective: PolicyGradient, settings: dict[str, Any]) -> None:
    batch, logprobs, _, reference = case(objective.aggregation)
    inputs = {"old_per_token_logps": batch.sampler_logprobs_BT, "ref_per_token_logps": reference}
    expected = theirs(trl, batch, logprobs, inputs, **settings)
    torch.testing.assert_close(ours(objective, batch, logprobs, reference), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("form", ["truncated", "masked"])
def test_decoupled_weights_are_trls_vllm_correction(trl: Any, form: str, level: str) -> None:
    """TRL multiplies by a ratio p / b made beforehand, cut or zeroed at its cap, with p the policy at the step's start."""
    objective = PolicyGradient(proximal="learner", weight_form=form, weight_level=level, weight_high=1.3)  # type: ignore[arg-type]
    batch, logprobs, _, reference = case("token_mean")
    log_ratio = (logprobs - batch.sampler_logprobs_BT) * batch.loss_mask_BT
    ratio = (log_ratio if level == "token" else log_ratio.sum(-1, keepdim=True)).exp()
    ratio = ratio.clamp(max=1.3) if form == "truncated" else ratio.masked_fill(ratio > 1.3, 0.0)
    expected = theirs(
        trl,
        batch,
        logprobs,
        {"old_per_token_logps": logprobs, "importance_sampling_ratio": ratio},
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    torch.testing.assert_close(ours(objective, batch, logprobs, reference), expected, rtol=1e-6, atol=1e-7)


# -- preference --------------------------------------------------------------------------------------------------------


def paired(rows_BT: Tensor) -> Tensor:
    """TRL's order: every chosen row, then every rejected one; and a prompt token before, which its shift drops."""
    return torch.cat([rows_BT[0::2], rows_BT[1::2]])


class _Model:
    """Hands out given log-probs where TRL calls a model."""

    training = True

    def __init__(self, logprobs: Tensor, mask: Tensor) -> None:
        self._logprobs, self._mask = logprobs, mask

    def __call__(self, **_: Any) -> Any:
        zeros = torch.zeros(self._mask.shape)
        return SimpleNamespace(
            log_probs=self._logprobs * self._mask,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=self._mask.bool(),
            aux_loss=None,
        )


@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo_are_trls(trl: Any, loss: str, theirs: str) -> None:
    batch, logprobs, _, reference = case("token_mean")
    mask = paired(batch.loss_mask_BT.int())
    leaf = logprobs.clone().requires_grad_()
    model = _Model(paired(leaf), mask)
    ref_chosen, ref_rejected = (paired(reference) * mask).sum(-1).chunk(2)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[theirs],
        loss_weights=[1.0],
        label_smoothing=0.0,
        beta=0.3,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    with_prompt = torch.cat([torch.zeros(NUM_ROWS, 1, dtype=mask.dtype), mask], dim=-1)
    inputs = {
        "input_ids": torch.zeros(NUM_ROWS, LENGTH + 1, dtype=torch.int64),
        "attention_mask": torch.ones(NUM_ROWS, LENGTH + 1),
        "completion_mask": with_prompt,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    value = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    value.backward()
    expected = (value.detach(), leaf.grad)
    objective = Preference(loss=loss, beta=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(ours(objective, batch, logprobs, reference), expected, rtol=1e-6, atol=1e-7)


def mean_logprobs(batch: TrainingBatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    mask = batch.loss_mask_BT
    means = torch.where(mask, logprobs, 0.0).sum(-1) / mask.sum(-1)
    return means[0::2], means[1::2]


def test_simpo_is_trls(trl: Any) -> None:
    cpo = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    batch, logprobs, _, reference = case("token_mean")
    leaf = logprobs.clone().requires_grad_()
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        beta=2.0,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    value = cpo.CPOTrainer.cpo_loss(trainer, *mean_logprobs(batch, leaf))[0].mean()
    value.backward()
    objective = Preference(loss="simpo", beta=2.0, gamma=0.5, label_smoothing=0.1)
    expected = (value.detach(), leaf.grad)
    torch.testing.assert_close(ours(objective, batch, logprobs, reference), expected, rtol=1e-6, atol=1e-7)


def test_the_odds_ratio_term_of_orpo_is_trls(trl: Any) -> None:
    orpo = importlib.import_module("trl.experimental.orpo.orpo_trainer")
    batch, logprobs, _, reference = case("token_mean")
    leaf = (logprobs - 0.5).requires_grad_()
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    value = -orpo.ORPOTrainer.odds_ratio_loss(trainer, *mean_logprobs(batch, leaf))[0].mean()
    value.backward()
    objective = Preference(loss="orpo", beta=0.3)
    expected = (value.detach(), leaf.grad)
    torch.testing.assert_close(ours(objective, batch, leaf.detach(), reference), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls_where_its_reference_point_is_0(trl: Any, loss: str) -> None:
    """TRL's kto bounds its estimate of the reference point below at 0: this one is -1."""
    batch, logprobs, _, reference = case("token_mean")
    mask, leaf = batch.loss_mask_BT.int(), logprobs.clone().requires_grad_()
    model = _Model(leaf, mask)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss == "kto",
        _compute_kl_logps=lambda *_: torch.zeros(NUM_ROWS),
        loss_type=loss,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(NUM_ROWS, LENGTH + 1, dtype=torch.int64),
        "attention_mask": torch.ones(NUM_ROWS, LENGTH + 1),
        "completion_mask": torch.cat([torch.zeros(NUM_ROWS, 1, dtype=mask.dtype), mask], dim=-1),
        "label": batch.advantages_B > 0,
        "ref_logps": (reference * mask).sum(-1),
        "ref_KL_logps": torch.ones(NUM_ROWS),
    }
    value = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
    value.backward()
    expected = (value.detach(), leaf.grad)
    objective = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    assert 0 < int(inputs["label"].sum()) < NUM_ROWS
    torch.testing.assert_close(ours(objective, batch, logprobs, reference), expected, rtol=1e-6, atol=1e-7)
