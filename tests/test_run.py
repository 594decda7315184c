"""What a run does at its edges, without any engine: claiming its directory, finding its cluster, being interrupted."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from rlpost import cli, run, run_directory, stages
from rlpost.config import FileEntries, Recipe, RecipeError, UpdatedEntries
from rlpost.engines.mask_file import write_masks
from rlpost.engines.pretrained import StoredTensors
from rlpost.pipeline.buffer import Position
from rlpost.recipe import build_recipe
from rlpost.tracking import RunTracker, WandbOptions
from rlpost.workers import cluster

QUIET = Console(file=io.StringIO())


def recipe(run_dir: Path, **changes: Any) -> Recipe:
    tree = {
        "name": "t",
        "run_dir": str(run_dir),
        "model": {"build": {"hidden_size": 64, "num_layers": 1, "num_heads": 1}},
        "data": {"math": {"source": "generated", "families": ["arithmetic"]}},
        "stage": [
            {
                "name": "warm",
                "data": "math",
                "algo": {"name": "sft"},
                "steps": 3,
                "prompts_per_step": 4,
                "max_response_tokens": 16,
                "lr": 1e-3,
            }
        ],
    }
    return build_recipe(tree | changes)


# -- the run directory -------------------------------------------------------------------------------------------------


def open_directory(run_dir: Path, *, resume: bool, **changes: Any) -> Any:
    return run_directory.open_run_directory(recipe(run_dir, **changes), run_dir, resume=resume, console=QUIET)


def test_a_directory_is_free_until_it_is_claimed_and_belongs_to_its_recipe_from_then_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(RecipeError, match="nothing to resume"):
        open_directory(run_dir, resume=True)
    open_directory(run_dir, resume=False)
    open_directory(run_dir, resume=False)  # the first attempt failed before it had anything to lose
    run_directory.claim(run_dir, recipe(run_dir))
    with pytest.raises(RecipeError, match=r"already holds a run: continue it with --resume"):
        open_directory(run_dir, resume=False)
    assert open_directory(run_dir, resume=True) is None
    with pytest.raises(RecipeError, match=r"differs from the one this run began with in \['seed'\]"):
        open_directory(run_dir, resume=True, seed=7)
    (run_dir / "recipe.json").write_text("{")
    with pytest.raises(RecipeError, match=r"recipe.json is damaged .* another run_dir"):
        open_directory(run_dir, resume=True)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"run_dir = .*file cannot be written \(File exists\): choose another"):
        open_directory(tmp_path / "file", resume=False)


def test_a_model_left_by_an_attempt_with_other_sizes_is_not_used(tmp_path: Path) -> None:
    run_directory.model_directory(recipe(tmp_path), tmp_path, resume=False)
    wider = recipe(tmp_path, model={"build": {"hidden_size": 128, "num_layers": 1, "num_heads": 1}})
    config = run_directory.model_directory(wider, tmp_path, resume=False) / "config.json"
    assert json.loads(config.read_text())["hidden_size"] == 128
    unfit = recipe(tmp_path, model={"build": {"hidden_size": 65, "num_layers": 1, "num_heads": 1}})
    with pytest.raises(RecipeError, match=r"model.build: hidden_size = 65 .* use hidden_size = 32 or 64"):
        run_directory.model_directory(unfit, tmp_path, resume=False)


def test_a_subnetwork_read_from_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    model = run_directory.model_directory(given, tmp_path / "a", resume=False)
    wider = recipe(tmp_path, model={"build": {"hidden_size": 128, "num_layers": 1, "num_heads": 1}})
    other = run_directory.model_directory(wider, tmp_path / "b", resume=False)

    def check(after: Path) -> None:
        subnetwork = UpdatedEntries(select="update", before=str(model), after=str(after))
        stage = given.stage[0].model_copy(update={"subnetwork": subnetwork})
        run_directory.check_subnetworks(given.model_copy(update={"stage": (stage,)}), model)

    check(model)
    with pytest.raises(RecipeError, match=r"subnetwork.after: .* is of shape .* in .*b/model, and of .* in the policy"):
        check(other)
    with pytest.raises(RecipeError, match=r"subnetwork.after: .*nowhere holds no weights of the model in"):
        check(tmp_path / "nowhere")


def test_a_file_of_masks_that_no_stage_could_train_on_is_refused_before_anything_starts(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    model = run_directory.model_directory(given, tmp_path / "a", resume=False)
    stored = StoredTensors(model)
    shapes = {name: stored.shape(name) for name in stored.names}
    last = stored.names[-1]

    def check(name: str, masks: Mapping[str, torch.Size], value: bool) -> None:
        path = tmp_path / name
        write_masks(masks, lambda weight: torch.full(masks[weight], value), path, provenance={})
        subnetwork = FileEntries(select="file", path=str(path))
        stage = given.stage[0].model_copy(update={"subnetwork": subnetwork})
        run_directory.check_subnetworks(given.model_copy(update={"stage": (stage,)}), model)

    check("whole", shapes, True)
    with pytest.raises(RecipeError, match=r"stage .*: subnetwork.path: .*none selects no entry"):
        check("none", shapes, False)
    with pytest.raises(RecipeError, match=rf"subnetwork.path: .*few holds no mask of {last}, which is of"):
        check("few", {name: shape for name, shape in shapes.items() if name != last}, True)
    with pytest.raises(RecipeError, match=rf"other holds a mask of shape \(3,\) of {last}, which is of"):
        check("other", shapes | {last: torch.Size([3])}, True)
    subnetwork = FileEntries(select="file", path=str(tmp_path / "nowhere"))
    stage = given.stage[0].model_copy(update={"subnetwork": subnetwork})
    with pytest.raises(RecipeError, match=r"subnetwork.path: .*nowhere is no file of masks"):
        run_directory.check_subnetworks(given.model_copy(update={"stage": (stage,)}), model)


def test_a_learner_elsewhere_is_given_the_whole_path_of_a_subnetwork(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stages._settings(FileEntries(select="file", path="a/masks"))["path"] == str(tmp_path / "a/masks")
    update = stages._settings(UpdatedEntries(select="update", before="b", after="/c"))
    assert (update["before"], update["after"]) == (str(tmp_path / "b"), "/c")


# -- the cluster -------------------------------------------------------------------------------------------------------


def test_a_cluster_that_does_not_answer_is_found_out_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster.check_answers(address)
        cluster.check_answers(f"ray://{address}")
    with pytest.raises(RecipeError, match=rf"ray_address = '{address}' does not answer .*ray start --head"):
        cluster.check_answers(address)
    cluster.check_answers("auto")


# -- interrupts --------------------------------------------------------------------------------------------------------


class Interrupted:
    """A controller whose run ends only when cancelled, at step 7, and its checkpoints; sends signals on cue."""

    def __init__(self, *, while_running: int, while_saving: int = 0) -> None:
        self.workers = SimpleNamespace(learner=None)
        self.last_step: int | None = None
        self.saved: list[int] = []
        self._while_running, self._while_saving = while_running, while_saving

    def position(self) -> Position:
        return Position(step=7, next_ordinals=(28,), pending=((),))

    async def run(self) -> None:
        await self._signal(self._while_running)
        await asyncio.sleep(30)

    async def write(self, position: Position, learner: Any) -> None:
        await self._signal(self._while_saving)
        self.saved.append(position.step)
        self.last_step = position.step

    async def _signal(self, times: int) -> None:
        for index in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                if index == times - 1:
                    raise


@pytest.mark.parametrize(
    ("first_step", "while_running", "while_saving", "saved"),
    [(5, 1, 0, [7]), (7, 1, 0, []), (5, 2, 0, []), (5, 1, 1, [])],
    ids=["saves", "nothing new", "twice: the step may be cut in two", "again while it saves"],
)
def test_one_interrupt_saves_what_is_new_and_a_second_leaves_it(
    first_step: int, while_running: int, while_saving: int, saved: list[int]
) -> None:
    fake: Any = Interrupted(while_running=while_running, while_saving=while_saving)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run._until_interrupted(fake, fake, first_step, QUIET))
    assert fake.saved == saved


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "rlpost: interrupted\n"),
        (RecipeError("no such thing"), 2, "rlpost: no such thing"),
        (OSError(28, "No space left on device", "x/y"), 1, "No space left on device: 'x/y'"),
    ],
)
def test_every_end_has_its_exit_code_and_no_traceback(
    end: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(*args: Any, **kwargs: Any) -> int:
        raise end

    monkeypatch.setattr(cli.signal, "signal", lambda *args: None)
    monkeypatch.setattr(run, "run_recipe", ends)
    monkeypatch.setattr("rlpost.plan.check_resources", lambda *args: None)
    assert cli.main(["train", "recipes/quickstart.toml"]) == code
    assert message in capsys.readouterr().err


def test_a_summary_of_what_is_no_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda *args: None)
    assert cli.main(["summary", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    (tmp_path / "events.jsonl").write_text('{"event": "run_start", "time": 1.0, "resumed_at": null}\n!\n')
    assert cli.main(["summary", str(tmp_path)]) == 2
    assert "events.jsonl, line 2 is not JSON" in capsys.readouterr().err


def test_a_run_that_a_full_disk_ended_can_still_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = RunTracker(tmp_path, name="t", config={}, wandb=WandbOptions(mode="disabled"), console=QUIET)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    tracker.close("OSError: No space left on device")
