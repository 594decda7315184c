"""Preference pairs from a data set: a prompt, the response to prefer, and the one to prefer it to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rlpost.config import PairData, RecipeError
from rlpost.data.sources import TokenizerLike, check_filled, fill, prompt_ids, read_rows, response_ids
from rlpost.types import Prompt


def load_pairs(
    config: PairData, tokenizer: TokenizerLike, *, max_response_tokens: int
) -> tuple[list[Prompt], Mapping[str, int]]:
    """Pairs in the order of the data, and how many were left out for which reason.

    Left out are pairs that could teach nothing, or something wrong: a prompt or response that is too long (it is never
    cut: what is cut off may be the answer), an empty response, two equal responses, and what the adapter can make nothing of.

    Raises:
        RecipeError: when the file, a column or the template is wrong, or no pair is left.
    """
    rows = read_rows(config, columns=(config.chosen, config.rejected))
    prompts: list[Prompt] = []
    left_out: Counter[str] = Counter()
    for index, row in enumerate(rows):
        if reason := row.get("left_out"):
            left_out[reason] += 1
            continue
        check_filled(row, index, config)
        token_ids = prompt_ids(fill(config.prompt, row), config, tokenizer)
        chosen, rejected = (str(row[column] or "") for column in (config.chosen, config.rejected))
        chosen_ids, rejected_ids = response_ids(chosen, tokenizer), response_ids(rejected, tokenizer)
        if len(token_ids) > config.max_prompt_tokens:
            left_out["prompt_too_long"] += 1
        elif not chosen.strip() or not rejected.strip():
            left_out["empty_response"] += 1
        elif chosen_ids == rejected_ids:
            left_out["equal_responses"] += 1
        elif max(len(chosen_ids), len(rejected_ids)) > max_response_tokens:
            left_out["response_too_long"] += 1
        else:
            prompts.append(
                Prompt(
                    id=str(row.get("id") or f"{Path(config.path).name}/{index}"),
                    token_ids=token_ids,
                    task="preference",
                    reference={},
                    demonstration_ids=chosen_ids,
                    rejected_ids=rejected_ids,
                )
            )
        if len(prompts) == config.max_prompts:
            break
    if not prompts:
        raise RecipeError(
            f"{config.path}: no pair is left; left out: {dict(left_out)}. Raise max_response_tokens ="
            f" {max_response_tokens} of the stage or max_prompt_tokens = {config.max_prompt_tokens} of the data"
        )
    return prompts, left_out
