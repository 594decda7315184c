"""Studies: what may stand in one, which runs it makes, and figures by hand from runs that were planted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlpost import cli, exit_codes
from rlpost.config import RecipeError
from rlpost.recipe import load_recipe
from rlpost.run_directory import claim
from rlpost.study import runs
from rlpost.study.page import over_text
from rlpost.study.plan import PlannedRun, Study, load_study
from rlpost.study.results import Over

ROOT = Path(__file__).parents[1]
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"

STUDY = """
recipe = "{recipe}"
directory = "{directory}"
seeds = [0, 1]
set = ["stage=[{{name='math', data='math', steps=2}}]"]

[start]
stage = "warmup"

[[arm]]
name = "full run"

[[arm]]
name = "its part"
of = "full run"
set = ["stage.math.lr=1e-3", "stage.math.subnetwork={{select='update', before='{{start}}', after='{{of}}'}}"]
"""


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    def write(*replacements: tuple[str, str]) -> Path:
        text = STUDY.format(recipe=ROOT / "recipes" / "quickstart.toml", directory=tmp_path / "runs")
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "two.toml"
        path.write_text(text)
        return path

    return write


def test_every_run_of_a_study_begins_with_its_start_and_those_of_an_arm_with_its_end(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = load_study(write_study())
    start = tmp_path / "runs" / "start" / "exports" / "warmup"
    assert [(run.arm, run.seed) for run in study.runs] == [
        ("full run", 0),
        ("its part", 0),
        ("full run", 1),
        ("its part", 1),
    ]
    part = load_recipe(study.recipe, study.runs[3].overrides)
    assert part.model.path == str(start) and part.seed == 1 and part.run_dir == tmp_path / "runs" / "its-part" / "1"
    subnetwork = part.stage[0].subnetwork
    assert subnetwork is not None and part.stage[0].lr == 1e-3
    assert (subnetwork.before, subnetwork.after) == (  # type: ignore[union-attr]
        str(start),
        str(tmp_path / "runs" / "full-run" / "1" / "exports" / "math"),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "its part"', 'name = "full run"', "two arms are named 'full run'"),
        ('name = "its part"', 'name = "full: run"', "differ in punctuation alone"),
        ('of = "full run"', 'of = "another"', "is of 'another', which is no earlier arm"),
        ('of = "full run"\n', "", r"uses \{of\} and is of no arm"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "name one twice"),
        ("seeds = [0, 1]", "seedz = [0, 1]", "did you mean 'seeds'"),
        ("stage.math.lr", "stage.math.lrr", "arm 'its part': .*did you mean 'lr'"),
        ('stage = "warmup"', 'stage = "cooldown"', "start.stage = 'cooldown' is no stage"),
        (
            "seeds = [0, 1]",
            "goal = {eval='math', accuracy=0.8}",
            'goal is of what is learned: add measure = "learning"',
        ),
        (
            "seeds = [0, 1]",
            "measure = 'learning'\ngoal = {eval='maths', accuracy=0.8}",
            r"goal.eval = 'maths' is no eval set of arm 'full run'; those are \['math', 'code'\]",
        ),
        (
            "lr=1e-3",
            "subnetwork={{select='file', path='{samples}'}}",
            r"'its part' uses \{samples\} and none are drawn",
        ),
        ("seeds = [0, 1]", "samples = ['evel=[]']", "samples: evel: .* did you mean 'eval'"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_before_a_run_starts(
    write_study: Callable[..., Path], old: str, new: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(write_study((old, new)))


STUDIES = [path for kind in ("curriculum", "subnetwork") for path in sorted((ROOT / "recipes" / kind).glob("*.toml"))]


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies_are_whole(file: Path) -> None:
    study = load_study(file)
    assert len(study.runs) >= 6 and study.directory.parts[0] == "runs"
    assert f"rlpost study recipes/{file.relative_to(ROOT / 'recipes')}" in file.read_text()


def plant(study: Study, run: PlannedRun) -> None:
    """A finished run. The full run of seed s changes entries 0 to 3 + s of q by one spacing; its part only entry 0."""
    q = torch.ones(4, 4)
    if run.arm != "start":
        q.view(-1)[: 4 + run.seed if run.arm == "full run" else 1] = 1 + 2**-7
    run.directory.mkdir(parents=True)
    claim(run.directory, load_recipe(study.recipe, run.overrides))
    run.model.mkdir(parents=True)
    save_file({Q: q, NORM: torch.ones(4)}, run.model / "model.safetensors")
    rows = [{"eval": "math", "accuracy": 0.5}, {"eval": "math", "accuracy": 0.8 + run.seed / 10}]
    (run.directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.directory / "events.jsonl").write_text('{"event": "run_end", "error": null}\n')


def test_figures_are_means_over_seeds_with_their_controls(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[str] = []

    def make(study: Study, run: PlannedRun) -> None:
        made.append(f"{run.arm} {run.seed}")
        plant(study, run)

    monkeypatch.setattr(runs, "_make", make)
    assert cli.main(["study", str(write_study())]) == 0
    assert made == ["start 0", "full run 0", "its part 0", "full run 1", "its part 1"]
    full, part = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert full["accuracy"]["math"] == [0.5, {"seeds": [0.8, 0.9]}]
    assert full["unchanged"]["seeds"] == full["unchanged_as_stored"]["seeds"] == [16 / 20, 15 / 20]
    assert full["shared"]["seeds"] == [1.0]  # all that the first seed changed
    assert full["agreement"] is None
    assert part["unchanged"]["seeds"] == [19 / 20] * 2
    # Entry 0 agrees and three (then four) others do not; the seeds differ in one entry; four (then five) from the start.
    assert part["agreement"]["tuned"]["seeds"] == [17 / 20, 16 / 20]
    assert part["agreement"]["other_seed"]["seeds"] == [19 / 20] * 2
    assert part["agreement"]["untouched"]["seeds"] == [16 / 20, 15 / 20]
    page = (tmp_path / "runs" / "study.html").read_text()
    assert "77.5 ± 3.5" in page and 'href="full-run/report.html"' in page and "http" not in page.split("<svg", 1)[0]
    assert (tmp_path / "runs" / "full-run" / "report.html").exists()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("full run"))
    assert "85.0 ± 7.1" in line and "77.5 ± 3.5" in line
    made.clear()
    assert cli.main(["study", str(write_study())]) == 0
    assert not made and "full run, seed 1: done before" in capsys.readouterr().out
    assert cli.main(["study", str(write_study(("lr=1e-3", "lr=1e-4")))]) == exit_codes.USAGE
    assert "began with other settings of ['stage']" in capsys.readouterr().err and not made


def plant_learning(study: Study, run: PlannedRun) -> None:
    """A finished run: a supervised step, then two of 32 rollouts and 2,000 + 100 x seed tokens each."""
    run.directory.mkdir(parents=True)
    claim(run.directory, load_recipe(study.recipe, run.overrides))
    counts = {"timing_s/step": 2.0, "perf/rollouts_per_s": 16.0, "perf/tokens_per_s": 1000.0 + 50 * run.seed}
    rows = [
        {"step": 1, "stage": "warm", "response_length/mean": 9.0, **counts},
        {"step": 2, "reward/mean": 0.5, "reward/frac_zero_std": 0.25, "actor/entropy": 0.9, **counts},
        {"step": 3, "reward/mean": 0.5, "reward/frac_zero_std": 0.5 + run.seed / 4, **counts},
    ]
    rows[2] |= {"actor/entropy": 0.3} if run.seed else {}  # a step whose groups all lacked signal has none
    evals = [(0, 0.4), (2, 0.85 if run.seed else 0.7), (3, 0.9 if run.seed else 0.75)]
    for name, content in (
        ("metrics", rows),
        ("eval", [{"eval": "math", "step": step, "accuracy": accuracy} for step, accuracy in evals]),
        ("events", [{"event": "run_end", "error": None}]),
    ):
        (run.directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def test_what_an_arm_learned_is_told_with_what_it_cost(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seed 1 meets the goal at its first sampled step, after 2,100 tokens; seed 0 never does."""
    monkeypatch.setattr(runs, "_make", plant_learning)
    learning = ("seeds = [0, 1]", "seeds = [0, 1]\nmeasure = 'learning'\ngoal = {eval='math', accuracy=0.8}")
    assert cli.main(["study", str(write_study(learning))]) == 0
    first = json.loads((tmp_path / "runs" / "results.json").read_text())[0]
    assert first["name"] == "full run" and first["accuracy"]["math"] == [0.4, {"seeds": [0.75, 0.9]}]
    assert first["rollouts"]["seeds"] == [64, 64] and first["tokens"]["seeds"] == [4000, 4200]
    assert first["goal_tokens"] == [None, 2100]
    assert first["without_signal"]["seeds"] == [(0.25 + 0.5) / 2, (0.25 + 0.75) / 2]
    assert first["entropy"]["seeds"] == [0.3]
    assert first["eval_curves"]["math"] == [
        {"at": 0, "value": {"seeds": [0.4, 0.4]}},
        {"at": 2050, "value": {"seeds": [0.7, 0.85]}},
        {"at": 4100, "value": {"seeds": [0.75, 0.9]}},
    ]
    assert first["step_curves"]["reward/frac_zero_std"] == [
        {"at": 32, "value": {"seeds": [0.25, 0.25]}},
        {"at": 64, "value": {"seeds": [0.5, 0.75]}},
    ]
    page = (tmp_path / "runs" / "study.html").read_text()
    assert "82.5 ± 10.6" in page and "k tokens to math 80 %" in page and page.count("<svg") == 3
    line = capsys.readouterr().out.split("no signal")[1].splitlines()[1]
    assert line.split() == ["full", "run", "4", "2", "(1", "of", "2", "seeds)", "43.8", "±", "8.8", "0.300"]


@pytest.mark.parametrize(
    ("supervised", "num_figures", "num_dashed"), [({"its part"}, 3, 2), ({"full run", "its part"}, 1, 0)]
)
def test_an_arm_that_learns_from_given_responses_alone_stands_beside_others(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    supervised: set[str],
    num_figures: int,
    num_dashed: int,
) -> None:
    """It meets the goal with seed 1, and no sampled token took it there. Dashed: the goal, and where it ended."""

    def make(study: Study, run: PlannedRun) -> None:
        plant_learning(study, run)
        if run.arm in supervised:
            metrics = run.directory / "metrics.jsonl"
            metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])

    monkeypatch.setattr(runs, "_make", make)
    learning = ("seeds = [0, 1]", "seeds = [0, 1]\nmeasure = 'learning'\ngoal = {eval='math', accuracy=0.8}")
    assert cli.main(["study", str(write_study(learning))]) == 0
    part = json.loads((tmp_path / "runs" / "results.json").read_text())[1]
    assert part["accuracy"]["math"] == [0.4, {"seeds": [0.75, 0.9]}]
    assert part["rollouts"]["seeds"] == part["tokens"]["seeds"] == [0, 0] and part["goal_tokens"] == [None, 0]
    assert part["without_signal"] is None and part["entropy"] is None and not any(part["step_curves"].values())
    line = capsys.readouterr().out.split("no signal")[1].splitlines()[2]
    assert line.split() == ["its", "part", "-", "-", "(1", "of", "2", "seeds)", "-", "-"]
    page = (tmp_path / "runs" / "study.html").read_text()
    assert page.count("<svg") == num_figures and page.count("<td>-</td>") == 4 * len(supervised)
    assert page.count("stroke-dasharray") == num_dashed


def test_samples_of_the_start_are_drawn_at_each_seed_before_the_arms_that_read_them(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(runs, "_call", lambda command, name: calls.append((name, command)))
    samples = "samples = [\"eval=[{name='pool', data='math', max_response_tokens=32}]\"]\n\n[start]"
    study = load_study(write_study(("[start]", samples), ("lr=1e-3", "subnetwork={{select='file', path='{samples}'}}")))
    runs.make_runs(study, lambda line: None)
    assert [name for name, _ in calls][:4] == [
        "start, seed 0",
        "samples, seed 0",
        "samples, seed 1",
        "full run, seed 0",
    ]
    command = calls[2][1]
    place = tmp_path / "runs" / "samples" / "1"
    assert command[3:6] == ["eval", str(study.recipe), str(study.start.model)] and command[-2:] == ["-o", str(place)]
    assert "seed=1" in command and any("name='pool'" in word for word in command)
    assert any(f"path='{place / 'samples.jsonl'}'" in word for word in calls[-1][1])


def test_a_run_that_fails_is_named_with_the_end_of_its_output(
    write_study: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The start's recipe is whole; its model cannot be built."""
    path = write_study(('stage = "warmup"', 'stage = "warmup"\nset = ["model.build.num_heads=3"]'))
    assert cli.main(["study", str(path)]) == exit_codes.FAILED
    out = capsys.readouterr().out
    assert "start, seed 0, ended with code 2" in out and "model.build" in out


def test_an_interrupt_reaches_the_run_once_and_ends_the_study(write_study: Callable[..., Path], tmp_path: Path) -> None:
    """The run is a process that notes each signal, and ends as an interrupted run does."""
    notes = tmp_path / "notes"
    child = f"""
import signal, sys, time
def note(number, frame):
    open({str(notes)!r}, "a").write(str(int(number)) + "\\n"); time.sleep(1); sys.exit({exit_codes.INTERRUPTED})
signal.signal(signal.SIGINT, note)
open({str(notes)!r}, "w").write("ready\\n")
time.sleep(30)
"""
    parent = f"""
import sys
from pathlib import Path
from rlpost.study import runs
from rlpost.study.plan import load_study
study = load_study(Path({str(write_study())!r}))
real = runs.subprocess.Popen
runs.subprocess.Popen = lambda command, **options: real([sys.executable, "-c", {child!r}], **options)
try:
    runs.make_runs(study, print)
except KeyboardInterrupt:
    sys.exit({exit_codes.INTERRUPTED})
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not notes.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(30) == exit_codes.INTERRUPTED
    assert notes.read_text().split() == ["ready", str(int(signal.SIGINT))]


def test_a_figure_of_one_seed_has_no_spread() -> None:
    assert over_text(Over((0.5,))) == "50.0" and over_text(Over((0.5, 0.6))) == "55.0 ± 7.1" and over_text(None) == "-"
