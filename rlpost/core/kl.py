"""KL(policy || reference) from sampled tokens, and which gradient each estimator has. Axes: B rows, T positions.

With d = log pi - log ref at a sampled token, k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
(http://joschu.net/blog/kl-approx.html). The mean of k1 and of k3 is the KL; of their gradients neither is the gradient
of the KL, because the tokens are drawn from the policy that moves ("On a few pitfalls in KL divergence gradient
estimation for RL", https://arxiv.org/abs/2506.09477). What descending each does, token by token:

    k1 in the loss     grad log pi, of mean zero: the reference has no say. Refused by the recipe.
    k1 in the reward   d as a cost of the token, by the policy gradient: the gradient of KL(policy || reference).
    k2 in the loss     d grad log pi: the same gradient, for this token alone.
    k3 in the loss     (1 - ref / pi) grad log pi: the gradient of KL(reference || policy), bounded above.

The losses count each token for itself; the reward counts for a token also what the tokens after it cost, and is
therefore the gradient of the KL between whole responses.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rlpost.core.losses import masked_log_ratio


def kl_terms(
    logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor, *, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """The estimator at each token, 0 off the mask. k3 in the loss is GRPO's, eq. 4 of
    https://arxiv.org/abs/2402.03300."""
    log_ratio_BT = masked_log_ratio(logprobs_BT, reference_logprobs_BT.detach(), mask_BT)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    return (-log_ratio_BT).exp() - 1 + log_ratio_BT


def kl_to_go(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """sum over s >= t of (log pi_s - log ref_s), without gradient: the cost in KL of a token and all that follow it.

    Subtracted from the advantage it makes the policy gradient that of reward - coefficient x KL, as in REINFORCE++
    (https://arxiv.org/abs/2501.03262).
    """
    cost_BT = kl_terms(logprobs_BT.detach(), reference_logprobs_BT, mask_BT, estimator="k1")
    return cost_BT.flip(-1).cumsum(-1).flip(-1)
