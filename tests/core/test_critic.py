"""GAE and the critic's loss: by hand, against the textbook's loop, and as part of the policy gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlpost.core.batching import collate
from rlpost.core.critic import Critic, Values, gae, returns, token_rewards, value_loss
from rlpost.core.metrics import Tally, critic_metrics
from rlpost.core.objective import PolicyGradient, credit, critic_loss_and_tally, loss_and_tally, step_denominator
from rlpost.types import Rollout, TrainingBatch, VersionSpan
from tests.core.conftest import make_batch, rows_of, summary

ALL = torch.ones(1, 3, dtype=torch.bool)
KL_IN_THE_REWARD = {"kl_coef": 0.5, "kl_place": "reward", "kl_estimator": "k1"}


def loop(
    rewards: Sequence[float], values: Sequence[float], bootstrap: float, *, gamma: float, decay: float
) -> list[float]:
    """GAE as textbooks write it, backwards over the tokens of one response."""
    advantages, following, running = [], bootstrap, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        running = reward + gamma * following - value + gamma * decay * running
        advantages.append(running)
        following = value
    return advantages[::-1]


def random_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, bootstraps, mask, in float64: stretches of every length and place, one row without any."""
    generator = torch.Generator().manual_seed(0)
    starts, ends = torch.tensor([0, 3, 1, 8, 5, 2]), torch.tensor([11, 7, 2, 11, 5, 10])
    positions = torch.arange(11)
    mask = (positions >= starts[:, None]) & (positions < ends[:, None])
    rewards, values = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    return torch.where(mask, rewards, 0.0), values, torch.randn(6, generator=generator, dtype=torch.float64), mask


# -- advantages and returns --------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """gamma = lambda = 1/2, reward 1 at the end, values 0.5, 0.2, 0.6: deltas -0.4, 0.1, 0.4, and each advantage is its
    delta and a quarter of the next advantage."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.2, 0.6]])
    ours = gae(rewards, values, torch.zeros(1), ALL, gamma=0.5, decay=0.5)
    torch.testing.assert_close(ours, torch.tensor([[-0.35, 0.2, 0.4]]))


def test_gae_by_hand_of_a_response_that_goes_on() -> None:
    """No reward, a last state worth 0.8: at gamma = lambda = 1 each token's advantage is 0.8 - V."""
    ours = gae(torch.zeros(1, 3), torch.tensor([[0.5, 0.2, 0.6]]), torch.tensor([0.8]), ALL, gamma=1.0, decay=1.0)
    torch.testing.assert_close(ours, torch.tensor([[0.3, 0.6, 0.2]]))


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.9, 1.0), (0.99, 0.0)])
def test_gae_is_the_loop_over_every_response(gamma: float, decay: float) -> None:
    rewards, values, bootstrap, mask = random_case()
    ours = gae(rewards, values, bootstrap, mask, gamma=gamma, decay=decay)
    for row in range(6):
        on = mask[row]
        tokens = rewards[row, on].tolist(), values[row, on].tolist(), float(bootstrap[row])
        assert ours[row, on].tolist() == pytest.approx(loop(*tokens, gamma=gamma, decay=decay), abs=1e-12)
    assert not ours[~mask].any()


def test_the_return_is_gae_with_lambda_1_plus_the_value() -> None:
    rewards, values, bootstrap, mask = random_case()
    advantages = gae(rewards, values, bootstrap, mask, gamma=0.9, decay=1.0)
    expected = torch.where(mask, advantages + values, 0.0)
    torch.testing.assert_close(returns(rewards, bootstrap, mask, gamma=0.9), expected)


def test_rewards_by_hand() -> None:
    """Reward 2 at the last token on the mask, a cost at each; an empty row gets none."""
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    costs = torch.tensor([[9.0, 0.1, 0.2, 9.0]] * 2)
    ours = token_rewards(torch.tensor([2.0, 2.0]), costs, mask)
    torch.testing.assert_close(ours, torch.tensor([[0.0, -0.1, 1.8, 0.0], [0.0] * 4]))


def test_a_mask_with_a_gap_is_refused() -> None:
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(AssertionError, match="gap"):
        gae(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1), mask, gamma=1.0, decay=1.0)


def test_tokens_too_old_to_train_change_nothing_for_the_others() -> None:
    """They are the beginning of a response, and advantages look ahead."""
    rewards, values, bootstrap, mask = random_case()
    younger = mask & (torch.arange(11) >= 4)
    ours, whole = (gae(rewards, values, bootstrap, m, gamma=0.9, decay=0.8) for m in (younger, mask))
    assert torch.equal(ours[younger], whole[younger]) and younger.sum() < mask.sum()


# -- the critic's loss -------------------------------------------------------------------------------------------------


def test_the_value_loss_and_its_figures_by_hand() -> None:
    """Errors 0.5 (weight 1) and -1, 1 (weight 2): 0.125 + 2 (0.5 + 0.5), gradients weight x error. Returns 1, 0, 2 have
    variance 2/3; errors 1/2, -1, 1 have 2.25 / 3 - 1 / 36."""
    values = torch.tensor([[1.5, 9.0], [-1.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    loss, tally = value_loss(values, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 2.0]), mask)
    loss.backward()
    assert float(loss.detach()) == 2.125
    assert values.grad is not None and values.grad.tolist() == [[0.5, 0.0], [-2.0, 2.0]]
    expected = {
        "critic/loss": 2.125 / 3,
        "critic/value_mean": 3.5 / 3,
        "critic/explained_variance": 1 - (2.25 / 3 - 1 / 36) / (2 / 3),
    }
    assert critic_metrics(tally) == pytest.approx(expected)


@pytest.mark.parametrize(("values", "explained"), [([1.0, 0.0, 2.0], 1.0), ([7.0, 7.0, 7.0], 0.0)])
def test_explained_variance_is_1_when_foreseen_and_0_for_a_constant(values: list[float], explained: float) -> None:
    tally = value_loss(torch.tensor([values]), torch.tensor([[1.0, 0.0, 2.0]]), torch.ones(1), ALL)[1]
    assert critic_metrics(tally)["critic/explained_variance"] == pytest.approx(explained)


def test_where_all_returns_are_equal_no_variance_can_be_explained() -> None:
    tally = value_loss(torch.randn(1, 3), torch.full((1, 3), 0.7), torch.ones(1), ALL)[1]
    assert "critic/explained_variance" not in critic_metrics(tally)
    assert critic_metrics(Tally()) == {}


# -- as an objective ---------------------------------------------------------------------------------------------------


def random_batch(aggregation: str = "token_mean") -> tuple[TrainingBatch, Tensor, Tensor, Values]:
    """Batch with rewards, log-probs, reference log-probs and values, in float64; rows 1 and 3 were cut at the limit."""
    rewards, values, end, mask = random_case()
    generator = torch.Generator().manual_seed(1)
    sampler, *noises = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64) / 3
    batch = make_batch(
        (sampler - 2).tolist(),
        mask.int().tolist(),
        rewards.sum(-1).tolist(),
        aggregation=aggregation,
        truncated=[False, True, False, True, False, False],
        dtype=torch.float64,
    )
    of_tokens = Values(torch.where(mask, values, 0.0), end)
    return batch, batch.sampler_logprobs_BT + noises[0], batch.sampler_logprobs_BT + noises[1], of_tokens


def gradients(
    objective: PolicyGradient, batch: TrainingBatch, logprobs: Tensor, reference: Tensor, values: Values
) -> tuple[Tensor, Tensor, Tally]:
    """Of the policy's loss in the log-probs and of the critic's in the values of tokens; neither has any other."""
    leaf, tokens, end = (x.clone().requires_grad_() for x in (logprobs, *values))
    loss, tally = loss_and_tally(objective, batch, leaf, torch.zeros_like(leaf), reference, Values(tokens, end))
    loss.backward()
    assert tokens.grad is None and end.grad is None and leaf.grad is not None
    of_policy, leaf.grad = leaf.grad, None
    critic_loss, critic_tally = critic_loss_and_tally(objective, batch, Values(tokens, end), leaf, reference)
    critic_loss.backward()
    assert leaf.grad is None and end.grad is None and tokens.grad is not None
    return of_policy, tokens.grad, Tally.merge([tally, critic_tally])


VARIANTS = {
    "ppo": PolicyGradient(advantage=Critic(lr=1.0, gae_gamma=0.9, gae_lambda=0.8)),
    "by sequence": PolicyGradient(advantage=Critic(lr=1.0), aggregation="sequence_mean"),
    "bootstrapped": PolicyGradient(advantage=Critic(lr=1.0), truncated="bootstrap", proximal="learner"),
    "kl in the reward": PolicyGradient(advantage=Critic(lr=1.0, gae_lambda=0.9), **KL_IN_THE_REWARD),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_parts_in_any_order_add_up_to_the_whole(objective: PolicyGradient, cut: int) -> None:
    batch, logprobs, reference, values = random_batch(objective.aggregation)
    whole = gradients(objective, batch, logprobs, reference, values)
    parts = [
        gradients(objective, rows_of(batch, rows), logprobs[rows], reference[rows], Values(*(v[rows] for v in values)))
        for rows in (slice(start, start + cut) for start in range(0, 6, cut))
    ]
    *of_parts, tallies = zip(*parts, strict=True)
    *of_whole, tally = whole
    for found, expected in zip(of_parts, of_whole, strict=True):
        torch.testing.assert_close(torch.cat(found), expected)
        assert expected.abs().sum() > 0
    assert Tally.merge(reversed(tallies)).sums == pytest.approx(tally.sums)


@pytest.mark.parametrize("poison", [float("-inf"), float("nan"), 1e30])
@pytest.mark.parametrize("objective", VARIANTS.values(), ids=VARIANTS)
def test_nothing_off_the_mask_reaches_gradients_or_figures(objective: PolicyGradient, poison: float) -> None:
    batch, logprobs, reference, values = random_batch(objective.aggregation)
    expected = gradients(objective, batch, logprobs, reference, values)
    off = ~batch.loss_mask_BT
    poisoned = dataclasses.replace(batch, sampler_logprobs_BT=batch.sampler_logprobs_BT.masked_fill(off, poison))
    logprobs, reference, tokens = (x.masked_fill(off, poison) for x in (logprobs, reference, values.tokens_BT))
    ours = gradients(objective, poisoned, logprobs, reference, Values(tokens, values.end_B))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert ours[2].sums == expected[2].sums


@pytest.mark.parametrize("kl", [{}, KL_IN_THE_REWARD], ids=["plain", "kl in the reward"])
def test_a_critic_that_expects_nothing_leaves_the_policy_gradient_of_the_reward(kl: dict[str, object]) -> None:
    """V = 0, gamma = lambda = 1: every token's advantage is the rollout's reward (less KL to go), as without a critic."""
    batch, logprobs, reference, values = random_batch()
    nothing = Values(*(torch.zeros_like(v) for v in values))
    ours = gradients(PolicyGradient(advantage=Critic(lr=1.0), **kl), batch, logprobs, reference, nothing)[0]  # type: ignore[arg-type]
    leaf = logprobs.clone().requires_grad_()
    without = PolicyGradient(advantage="group_mean", **kl)  # type: ignore[arg-type]
    loss_and_tally(without, batch, leaf, torch.zeros_like(leaf), reference)[0].backward()
    torch.testing.assert_close(ours, leaf.grad)


def test_a_right_guess_of_every_return_leaves_no_gradient() -> None:
    """KL in the reward included: what a token will cost can be foreseen."""
    objective = VARIANTS["kl in the reward"]
    batch, logprobs, reference, _ = random_batch()
    cost = objective.kl_coef * (logprobs - reference)
    rewards = token_rewards(batch.advantages_B, cost, batch.loss_mask_BT)
    foreseen = returns(rewards, torch.zeros(6), batch.loss_mask_BT, gamma=1.0)
    of_policy, of_critic, _ = gradients(objective, batch, logprobs, reference, Values(foreseen, torch.zeros(6)))
    assert of_critic.abs().max() < 1e-12 and of_policy.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("truncated", "policy", "critic"), [("train", [-0.8, -0.3], [-0.8, -0.3]), ("bootstrap", [-0.4, 0.1], [-0.4, 0.1])]
)
def test_a_cut_response_has_ended_or_goes_on_as_told(truncated: str, policy: list[float], critic: list[float]) -> None:
    """Reward 1, values 0.2 and 0.7, 0.6 after the end, on policy. Ended: the return is 1. Going on: 0.6, and no reward."""
    objective = PolicyGradient(advantage=Critic(lr=1.0), truncated=truncated)  # type: ignore[arg-type]
    values = Values(torch.tensor([[0.2, 0.7]]), torch.tensor([0.6]))
    sampler = torch.tensor([[-1.0, -2.0]])
    cut = make_batch(sampler.tolist(), [[1, 1]], [1.0], truncated=[True])
    ours = gradients(objective, cut, sampler, sampler, values)
    torch.testing.assert_close(ours[0], torch.tensor([policy]))
    torch.testing.assert_close(ours[1], torch.tensor([critic]))
    whole = gradients(objective, dataclasses.replace(cut, truncated_B=torch.tensor([False])), sampler, sampler, values)
    torch.testing.assert_close(whole[0], torch.tensor([[-0.8, -0.3]]))


def test_a_rollout_cut_at_the_limit_is_laid_out_as_such() -> None:
    def rollout(finish_reason: str) -> Rollout:
        return Rollout(
            token_ids=torch.tensor([5, 6]),
            loss_mask=torch.tensor([False, True]),
            sampler_logprobs=torch.tensor([0.0, -1.0]),
            temperature=1.0,
            spans=(VersionSpan(version=0, start=0, end=1),),
            finish_reason=finish_reason,
            text="",
        )

    rollouts = [rollout("stop"), rollout("length")]
    batch = collate(rollouts, [1.0, 0.0], aggregation="token_mean", learner_version=0, max_staleness=0)
    assert batch.truncated_B.tolist() == [False, True]


def test_the_credit_of_a_rollout_is_its_reward_and_all_of_them_count() -> None:
    objective = PolicyGradient(advantage=Critic(lr=1.0))
    assert credit(objective, [0.0], ["stop"]) == (0.0,) and credit(objective, [1.0, 1.0], ["stop"] * 2) == (1.0, 1.0)
    assert objective.has_gradient(0.0)
    group = summary((3, "length"))
    denominators = {
        truncated: step_denominator(
            dataclasses.replace(objective, truncated=truncated),  # type: ignore[arg-type]
            [group, dataclasses.replace(group, finish_reasons_G=("stop",))],
            [(1.0,), (0.0,)],
            max_response_tokens=3,
        )
        for truncated in ("train", "bootstrap", "mask")
    }
    assert denominators == {"train": 6.0, "bootstrap": 6.0, "mask": 3.0}
    assert math.isfinite(sum(denominators.values()))
