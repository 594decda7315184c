"""Problems by how a model did on them: the samples that `rlpost eval` drew say which of them a stage trains on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rlpost.config import KeepConfig, RecipeError
from rlpost.data.prompts import Prompts

KEYS = ("model", "prompt_id", "problem", "fingerprint", "outcome", "answer", "num_tokens")


@dataclass(slots=True)
class Attempts:
    """What the samples of one problem come to."""

    num: int = 0
    num_right: int = 0
    num_tokens: int = 0
    wrong_votes: Counter[str] = field(default_factory=Counter)
    fingerprints: dict[str, str] = field(default_factory=dict)
    """By the prompt's id: of all that its samples depend on."""

    def reason_against(self, config: KeepConfig) -> str | None:
        """Why the problem is left out; None when it is kept."""
        (least, most), (shortest, longest) = config.solved, config.tokens
        solved, tokens = self.num_right / self.num, self.num_tokens / self.num
        if solved < least:
            return "solved_too_seldom"
        if solved > most:
            return "solved_too_often"
        # All right answers are one, as the verifier has found them equal; a tie is no majority.
        if config.majority and self.num_right <= max(self.wrong_votes.values(), default=0):
            return "majority_wrong"
        if tokens < shortest:
            return "responses_too_short"
        return "responses_too_long" if tokens > longest else None


def read_attempts(config: KeepConfig) -> dict[int, Attempts]:
    """The samples of one model, by `Prompt.problem` as a number.

    Raises:
        RecipeError: when the file is not there or not what `rlpost eval` writes, has samples of other models but not of this
            one, or has a problem under two settings.
    """
    path = Path(config.samples)
    if not path.is_file():
        raise RecipeError(f"keep.samples: no file at {path}: give the samples.jsonl that `rlpost eval` wrote")
    attempts: dict[int, Attempts] = {}
    models: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):  # a kill cut it short
                break
            try:
                model, prompt_id, problem, fingerprint, outcome, answer, num_tokens = map(json.loads(line).get, KEYS)
                key = int(problem, 16)
            except (ValueError, TypeError, AttributeError):
                raise RecipeError(
                    f"keep.samples: {path}, line {number} is no sample with the digest of its problem: draw them with"
                    " `rlpost eval` into another directory"
                ) from None
            models.add(model)
            if config.model not in (None, model):
                continue
            if config.model is None and len(models) > 1:
                raise RecipeError(f"keep.samples: {path} has samples of {sorted(models)}: name one with keep.model")
            found = attempts.setdefault(key, Attempts())
            if found.fingerprints.setdefault(prompt_id, fingerprint) != fingerprint:
                raise RecipeError(
                    f"keep.samples: {path} has samples of {prompt_id!r} by other weights of {model!r}, or under another"
                    " temperature, token limit or seed: draw those that count into another directory"
                )
            found.num += 1
            found.num_tokens += num_tokens
            if outcome == "correct":
                found.num_right += 1
            elif answer is not None:
                found.wrong_votes[answer] += 1
    if config.model is not None and not attempts:
        raise RecipeError(
            f"keep.samples: {path} has no samples of keep.model = {config.model!r}; it has {sorted(models)}"
        )
    return attempts


def keep(prompts: Prompts, config: KeepConfig, *, stage: str, data: str) -> Prompts:
    """The prompts that a stage trains on; `left_out` counts the others.

    Raises:
        RecipeError: when the samples cannot be used, a prompt has none, or no prompt is left.
    """
    attempts = read_attempts(config)
    found = [attempts.get(problem) for problem in prompts.problems_P.tolist()]
    if missing := [index for index, each in enumerate(found) if each is None]:
        first = prompts[missing[0]]
        same_id = any(first.id in each.fingerprints for each in attempts.values())
        why = f" (those of {first.id!r} are of another text or reference)" if same_id else ""
        raise RecipeError(
            f"stage {stage!r}: {len(missing)} of {len(prompts)} prompts of data {data!r} have no samples in"
            f" {config.samples}{why}. Draw them: give a recipe an [[eval]] with data = {data!r}, num_prompts ="
            f" {len(prompts)} and samples = 16, and run `rlpost eval RECIPE MODEL -o {Path(config.samples).parent}`"
        )
    reasons_P = np.array([each.reason_against(config) or "" for each in found if each is not None])
    kept = replace(prompts, left_out={})
    for reason in sorted(set(reasons_P.tolist()) - {""}):
        kept = kept.without(reasons_P == reason, reason)
        reasons_P = reasons_P[reasons_P != reason]
    if not len(kept):
        raise RecipeError(
            f"stage {stage!r}: no prompt of data {data!r} is kept; left out: {dict(kept.left_out)}. Widen keep.solved ="
            f" {list(config.solved)} or keep.tokens = {list(config.tokens)}"
        )
    return kept
