"""From a verdict to what the pipeline trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reward.shaping import shape
from rlpost.types import Judgement


def shape_judgement(
    judgement: Judgement, response: str, num_tokens: int, shaping: Mapping[str, Any] | None
) -> Judgement:
    """`judgement` with the reward and parts of `reward.shaping.shape`; as it is without `shaping`, or where nobody judged."""
    if shaping is None or judgement.outcome == "verifier_error":
        return judgement
    reward, parts = shape(judgement.parts, response, num_tokens=num_tokens, table=shaping)
    return dataclasses.replace(judgement, reward=reward, parts=parts)
