"""`rlpost eval`: what is drawn and kept, and what the report makes of it. On the plain pair, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlpost import cli
from rlpost.config import KeepConfig, Recipe, RecipeError
from rlpost.data.answers import stated_answer
from rlpost.data.difficulty import keep
from rlpost.data.prompts import Prompts
from rlpost.engines.plain_sampler import PlainSampler
from rlpost.engines.scratch import build_model
from rlpost.eval_report import EvalSample, SetResult, figures, render
from rlpost.evaluate import Candidate, evaluate_models
from rlpost.pipeline import evaluation as in_run
from rlpost.pipeline.controller import RunSettings
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import GroupRequest, Serving, WorkerLost
from rlpost.recipe import load_recipe
from rlpost.stages import load_eval_sets
from rlpost.types import Judgement, Prompt, Rollout, RolloutGroup
from rlpost.workers.local import LocalSampler, LocalVerifier

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


def make_recipe(*overrides: str) -> Recipe:
    """Two eval sets of the same generated arithmetic, of four and three tokens a response."""
    given = ["data.code_heldout.families=['arithmetic']"]
    for name, tokens in (("math", 4), ("code", 3)):
        given += [f"eval.{name}.num_prompts=3", f"eval.{name}.samples=2", f"eval.{name}.max_response_tokens={tokens}"]
    return load_recipe(QUICKSTART, [*given, *overrides])


def parity(group: RolloutGroup, rollout: Rollout) -> Judgement:
    even = int(rollout.token_ids[rollout.loss_mask].sum()) % 2 == 0
    return Judgement(reward=float(even), outcome="correct" if even else "wrong")


class Dying(LocalSampler):
    async def sample(self, request: GroupRequest) -> Any:
        raise WorkerLost(self.name, f"sampling of {request.prompt.id}", "the process died")


class Plain:
    """Serves any model on one plain sampler; an even sum of response tokens is right. Counts what it is asked for.

    Args:
        dies_after: the verifier, for good: after so many responses.
        loses_samplers: so many die, one after another, each at the first group it is asked for.
    """

    def __init__(self, *, dies_after: int | None = None, loses_samplers: int = 0) -> None:
        self.served: list[str] = []
        self.num_drawn = 0
        self._dies_after, self._loses_samplers = dies_after, loses_samplers

    @contextlib.contextmanager
    def __call__(self, candidate: Candidate) -> Iterator[Serving]:
        self.served.append(candidate.label)
        self._path = candidate.path
        self.samplers = [self._sampler()]
        self.verifier = LocalVerifier(self._judge)
        yield self

    def _sampler(self) -> LocalSampler:
        self._loses_samplers -= 1
        return (Dying if self._loses_samplers >= 0 else LocalSampler)("sampler-0", PlainSampler(self._path))

    async def restart(self, sampler: LocalSampler) -> LocalSampler:
        return self._sampler()

    async def fetch(self, handle: RolloutGroup) -> RolloutGroup:
        return handle

    def _judge(self, group: RolloutGroup, rollout: Rollout) -> Judgement:
        if self.num_drawn == self._dies_after:
            raise WorkerLost("verifier", "judging", "the process died")
        self.num_drawn += 1
        return parity(group, rollout)


@pytest.fixture
def evaluation(tiny_model: Path, tmp_path: Path) -> Any:
    """evaluation(recipe, plain, *models): exit code, results, rows, and what was printed."""

    def run(recipe: Recipe, plain: Plain, *models: Path) -> tuple[int, Any, list[Any], str]:
        out, text = tmp_path / "out", io.StringIO()
        names = [str(model) for model in models or (tiny_model,)]
        code = evaluate_models(recipe, names, out, Console(file=text, width=80), serve=plain)
        results = json.loads((out / "results.json").read_text()) if code == 0 else None
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        return code, results, rows, text.getvalue()

    return run


def test_a_model_is_evaluated_as_a_run_evaluates_its_versions(evaluation: Any, tiny_model: Path) -> None:
    """The same draws, so the same figures as the row a run would write."""
    recipe, plain = make_recipe("eval.math.samples=4"), Plain()
    code, results, rows, _ = evaluation(recipe, plain)
    assert code == 0 and plain.num_drawn == len(rows) == 3 * 4 + 3 * 2
    eval_set = load_eval_sets(recipe, tiny_model)[0]
    found = results["evals"]["math"]["models"]["A"]
    settings = RunSettings(seed=recipe.seed, limits=Limits())
    with plain(Candidate(label="A", name="", path=tiny_model, fingerprint="")) as serving:
        samples = asyncio.run(in_run.evaluate(eval_set, serving.samplers[0], serving, settings, num_samplers=1))
    row = in_run.figures(eval_set, samples)
    assert row["pass_at"] == {k: pytest.approx(found["pass_at"][str(k)]) for k in (2, 4)}
    responses = {(row["prompt_id"], row["number"]): row["response"] for row in rows if row["eval"] == "math"}
    assert responses == {(prompt, s.number): s.response for prompt, group in samples.items() for s in group}
    assert (row["accuracy"], row["accuracy_se"]) == (found["pass_at"]["1"]["mean"], found["pass_at"]["1"]["se"])
    assert row["response_length_mean"] == found["response_length_mean"] and row["outcomes"] == found["outcomes"]
    assert 0 < row["accuracy"] < 1


def test_nothing_is_drawn_twice_and_more_samples_are_drawn_beside_those_there(evaluation: Any) -> None:
    _, before, rows, text = evaluation(make_recipe(), Plain())
    assert "6 of 6 samples to draw" in text
    again = Plain()
    _, after, _, _ = evaluation(make_recipe(), again)
    assert (again.served, again.num_drawn) == ([], 0) and after == before

    more = Plain()
    _, _, grown, _ = evaluation(make_recipe("eval.math.samples=3", "eval.math.num_prompts=4"), more)
    assert more.num_drawn == 3 + 3 and grown[: len(rows)] == rows
    fresh = Plain()
    _, smaller, _, _ = evaluation(make_recipe(), fresh)
    assert fresh.num_drawn == 0 and smaller == before, "samples beyond those asked for are left out"


def test_a_stage_keeps_problems_by_the_samples_that_were_drawn(
    evaluation: Any, tiny_model: Path, tmp_path: Path
) -> None:
    _, _, rows, _ = evaluation(make_recipe("eval.math.samples=4"), Plain())
    (eval_set, _) = load_eval_sets(make_recipe(), tiny_model)
    config = KeepConfig(samples=str(tmp_path / "out" / "samples.jsonl"), solved=(0.5, 1.0))
    with pytest.raises(RecipeError, match=r"by other weights of .*, or under another temperature, token limit"):
        keep(Prompts.listed(eval_set.prompts), config, stage="s", data="d")
    rows = [row for row in rows if row["eval"] == "math"]
    Path(config.samples).write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = Counter(row["prompt_id"] for row in rows if row["outcome"] == "correct")
    kept = keep(Prompts.listed(eval_set.prompts), config, stage="s", data="d")
    assert [p.id for p in kept] == [p.id for p in eval_set.prompts if right[p.id] >= 2] and 0 < len(kept) < 3


def test_sets_that_share_problems_share_their_samples(evaluation: Any) -> None:
    plain = Plain()
    _, results, _, _ = evaluation(make_recipe("eval.code.max_response_tokens=4", "eval.code.num_prompts=4"), plain)
    assert plain.num_drawn == 8
    assert results["evals"]["code"]["models"]["A"]["num_problems"] == 4


@pytest.mark.parametrize("change", ["seed=1", "eval.math.temperature=0.5", "eval.math.max_response_tokens=5"])
def test_samples_of_other_settings_are_not_taken_for_these(evaluation: Any, change: str) -> None:
    evaluation(make_recipe("eval.code.num_prompts=1"), Plain())
    changed = Plain()
    evaluation(make_recipe("eval.code.num_prompts=1", change), changed)
    assert changed.num_drawn == (8 if change == "seed=1" else 6)


def test_samples_of_a_model_that_has_changed_are_not_taken_for_its_own(
    evaluation: Any, tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    evaluation(make_recipe(), Plain(), tiny_model)
    same = Plain()
    evaluation(make_recipe(), same, copy)
    assert same.num_drawn == 0, "where a model lies does not matter"
    shutil.rmtree(copy)
    build_model(copy, hidden_size=64, num_layers=2, num_heads=2, vocab_size=300, seed=1)
    other = Plain()
    evaluation(make_recipe(), other, copy)
    assert other.num_drawn == 12


def test_an_evaluation_that_is_cut_short_goes_on_where_it_was(evaluation: Any, tmp_path: Path) -> None:
    code, _, rows, text = evaluation(make_recipe(), Plain(dies_after=7))
    assert code == 1 and "verifier was lost" in text and "goes on from there" in text
    assert len(rows) == 6, "whole groups only"
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write('{"model": "cut off')
    rest = Plain()
    code, results, rows, _ = evaluation(make_recipe(), rest)
    assert (code, rest.num_drawn, len(rows)) == (0, 6, 12)
    assert results["evals"]["code"]["models"]["A"]["num_problems"] == 3


def test_a_lost_sampler_is_replaced_within_the_budget_of_restarts(evaluation: Any, tmp_path: Path) -> None:
    _, whole, rows, _ = evaluation(make_recipe(), Plain())
    shutil.rmtree(tmp_path / "out")
    loses = Plain(loses_samplers=3)
    code, results, again, text = evaluation(make_recipe(), loses)
    assert (
        (code, loses.num_drawn) == (0, 12) and results == whole and sorted(map(repr, again)) == sorted(map(repr, rows))
    )
    assert text.count("sampler-0 was lost during sampling") == 3 and "sampler-0 is back" in text
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").touch()
    code, _, again, text = evaluation(make_recipe(), Plain(loses_samplers=4))
    assert (code, again) == (1, []) and "the evaluation stopped: sampler-0 was lost" in text.replace("\n", " ")


def test_two_models_are_compared_problem_by_problem(evaluation: Any, tiny_model: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "other", hidden_size=64, num_layers=2, num_heads=2, vocab_size=300, seed=1)
    _, results, _, text = evaluation(make_recipe(), Plain(), tiny_model, tmp_path / "other")
    found = results["evals"]["math"]
    means = {label: model["pass_at"]["1"]["mean"] for label, model in found["models"].items()}
    assert found["differences"]["B"]["mean"] == pytest.approx(means["B"] - means["A"])
    assert "B - A: " in text and f"B = {tmp_path / 'other'}" in text.replace("\n", "")


def test_a_run_is_evaluated_by_what_it_exported_last(evaluation: Any, tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "exports" / "second")
    events = [{"event": "export", "path": f"/elsewhere/exports/{stage}"} for stage in ("first", "second")]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    _, results, _, _ = evaluation(make_recipe(), Plain(), run)
    assert results["models"][0]["path"] == str(run / "exports" / "second")
    (run / "events.jsonl").write_text('{"event": "run_start"}\n')
    with pytest.raises(RecipeError, match="has not exported a model yet"):
        evaluation(make_recipe(), Plain(), run)


# -- the report --------------------------------------------------------------------------------------------------------


def make_group(*answers: str, tokens: int = 10) -> list[EvalSample]:
    """Samples of a problem whose answer is 7; "-" states none, and is cut off."""
    return [
        EvalSample(
            outcome="correct" if answer == "7" else "no_answer" if answer == "-" else "wrong",
            answer=None if answer == "-" else answer,
            num_tokens=tokens + index,
            finish_reason="length" if answer == "-" else "stop",
        )
        for index, answer in enumerate(answers)
    ]


BEFORE = {"p": make_group("7", "7", "3", "-"), "q": make_group("1", "7", "1", "1", tokens=50)}
AFTER = {"p": make_group("7", "7", "7", "7"), "q": make_group("1", "7", "7", "2", tokens=50)}


def make_result(**samples: dict[str, list[EvalSample]]) -> SetResult:
    return SetResult(name="math", num_samples=4, temperature=0.6, samples=samples)


def test_figures_by_hand() -> None:
    """p has 2 of 4 right, q 1 of 4. pass@2: 1 - 1/6 and 1 - 3/6. maj@4: p has 7 twice and 3 once, q has 1 three times."""
    found = figures(make_result(A=BEFORE))["models"]["A"]
    assert found["pass_at"][1] == {"mean": pytest.approx(0.375), "se": pytest.approx(0.125)}
    assert {k: v["mean"] for k, v in found["pass_at"].items()} == pytest.approx({1: 0.375, 2: 2 / 3, 4: 1})
    assert found["majority_at"][4]["mean"] == 0.5
    assert found["truncated_share"] == 1 / 8 and found["outcomes"] == {"correct": 3, "wrong": 4, "no_answer": 1}
    # Two samples in each bucket, of one problem each.
    lengths = [(b["tokens_from"], b["tokens_to"], b["num_samples"], b["mean"]) for b in found["by_length"]]
    assert lengths == [(10, 11, 2, 1), (12, 49, 2, 0), (50, 51, 2, 0.5), (52, 53, 2, 0)]
    kinds = [(b["first_model"], b["num_problems"], b["mean"]) for b in found["by_difficulty"]]
    assert kinds == [("at most 1/4", 1, 0.25), ("at most 3/4", 1, 0.5)]


def test_a_difference_by_hand() -> None:
    """p gains 2 of 4, q 1 of 4: 0.375 on average, error 0.125; of the 4 assignments of signs to 2 and 1, 2 are as far."""
    found = figures(make_result(A=BEFORE, B=AFTER))
    difference = {"num_problems": 2, "mean": 0.375, "se": 0.125, "num_better": 2, "num_worse": 0, "p_value": 0.5}
    assert found["differences"] == {"B": pytest.approx(difference)}
    assert [b["mean"] for b in found["models"]["B"]["by_difficulty"]] == [0.5, 1], "kinds are by the first model"


def test_models_with_other_problems_are_compared_on_those_they_share() -> None:
    found = figures(make_result(A=BEFORE, B={"p": AFTER["p"], "r": AFTER["q"]}, C={"s": AFTER["q"]}))["differences"]
    assert (found["B"]["num_problems"], found["B"]["mean"]) == (1, 0.5) and found["C"] == {"num_problems": 0}


def test_programs_have_no_majority() -> None:
    code = [EvalSample(outcome="wrong", answer=None, num_tokens=3, finish_reason="stop")] * 4
    result = make_result(A={"p": code})
    assert figures(result)["models"]["A"]["majority_at"] == {} and "maj@" not in text_of(result)


def text_of(result: SetResult) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_80_columns_with_any_number_of_models() -> None:
    text = text_of(make_result(**{label: BEFORE if label < "C" else AFTER for label in "ABCDEF"}))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert (
        text.count("pass@4 (best of 4)") == 2 and "C - A: +37.5 +- 12.5 points on 2 problems, 2 better, 0 worse" in text
    )
    rows = [line.split("  ") for line in text.splitlines() if line.startswith("pass@1")]
    assert [cell.strip() for cell in rows[0] if cell.strip()] == [
        "pass@1",
        *["37.5 +- 12.5"] * 2,
        *["75.0 +- 25.0"] * 2,
    ]


def test_every_key_is_documented() -> None:
    text = (QUICKSTART.parents[1] / "docs" / "evaluation.md").read_text()
    found = figures(make_result(A=BEFORE, B=AFTER))
    keys = {key for key in found if key not in ("models", "differences")}
    keys |= {f"models/<m>/{key}" for key in found["models"]["A"]}
    missing = {key for key in keys if f"`{key}`" not in text and f"`{key}/<k>`" not in text}
    missing |= {key for key in found["differences"]["B"] if key not in text}
    assert not missing


@pytest.mark.parametrize(
    ("response", "vote"),
    [(r"So \boxed{1/2}", "1/2"), (r"\boxed{0.50}", "1/2"), (r"\boxed{\dfrac{1}{2}}", "1/2"), (r"\boxed{x + 1}", "x+1")],
)
def test_answers_that_are_plainly_the_same_vote_together(response: str, vote: str) -> None:
    math, code = (Prompt(id="p", token_ids=(1,), task=task, reference={}) for task in ("math", "code"))
    assert stated_answer(math, response) == vote
    assert stated_answer(math, "I do not know") is None and stated_answer(code, response) is None


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_line_tells_models_from_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("rlpost.evaluate.evaluate_models", lambda *given: asked.append(given) or 0)
    output = ["-o", str(tmp_path)]
    assert cli.main(["eval", str(QUICKSTART), "one", "seed=3", "two", "--samples", "5", *output]) == 0
    recipe, models, out, _ = asked[0]
    assert (recipe.seed, models, out) == (3, ["one", "two"], tmp_path)
    assert [item.samples for item in recipe.eval] == [5, 5]
    assert cli.main(["eval", str(QUICKSTART), "seed=3", *output]) == 2
    assert cli.main(["eval", str(QUICKSTART), "one", "--samples", "0", *output]) == 2
    errors = capsys.readouterr().err
    assert "give at least one model" in errors and "eval.0.samples" in errors and len(asked) == 1


def test_a_model_that_is_not_there_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    plain = Plain()
    with pytest.raises(RecipeError, match="is no directory"):
        evaluate_models(make_recipe(), [str(tmp_path / "absent" / "a" / "b")], tmp_path / "out", Console(), serve=plain)
    assert not plain.served and not (tmp_path / "out").exists()


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_the_command_serves_a_model_and_then_reports_from_what_it_kept(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = [f"eval.{name}.{key}" for name in ("math", "code") for key in ("num_prompts=6", "max_response_tokens=8")]
    command = [sys.executable, "-m", "rlpost.cli", "eval", str(QUICKSTART), str(tiny_model), *small, "--samples=4"]
    command += ["-o", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 6 * 4 and len({row["response"] for row in rows}) > 24
    assert {row["eval"] for row in rows} == {"math", "code"}
    assert all(
        1 <= row["num_tokens"] <= 8 and (row["finish_reason"] == "stop" or row["num_tokens"] == 8) for row in rows
    )
    assert not any(row["outcome"] == "verifier_error" for row in rows)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "to draw" in first.stdout and "to draw" not in second.stdout
    assert second.stdout == first.stdout[first.stdout.index("A = ") :]
