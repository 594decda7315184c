"""Who goes where, and what a node must have, on clusters that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlpost.config import LearnerConfig, RecipeError, SamplerConfig
from rlpost.workers import placement
from rlpost.workers.placement import Node, check_nodes, place


def node(name: str, *, cores: int, gpus: int = 0) -> Node:
    return Node(id=f"{ord(name):056x}", name=name, cores=cores, gpus=gpus)


def placed(learner: Mapping[str, Any], sampler: Mapping[str, Any], nodes: list[Node]) -> str:
    """Names of the nodes: of the ranks, of the samplers, of evaluators if any, of the verifier."""
    found = place(LearnerConfig(**learner), SamplerConfig(**sampler), nodes)
    assert len(found.named()) == len(found.ranks) + len(found.samplers) + len(found.evaluators) + 1
    groups = (found.ranks, found.samplers, found.evaluators, [found.verifier])
    return " ".join("".join(n.name for n in group) for group in groups if group)


def test_workers_on_cpus_are_spread_so_that_none_lacks_a_core() -> None:
    nodes = [node("a", cores=2), node("b", cores=1)]
    assert placed({}, {}, nodes) == "a a b"
    assert placed({"threads": 2}, {}, nodes) == "a b a"
    assert placed({"ranks": 2, "threads": 1}, {}, nodes) == "aa b a"
    assert placed({"ranks": 3}, {"workers": 2}, [node("a", cores=2), node("b", cores=3)]) == "bbb aa a"


def test_ranks_share_a_node_and_samplers_take_the_gpus_that_are_left() -> None:
    gpu = {"gpus_per_rank": 1}
    nodes = [node("h", cores=64), node("a", cores=32, gpus=4), node("b", cores=32, gpus=4)]
    assert placed({"ranks": 4} | gpu, {"workers": 4, "gpus": 1}, nodes) == "aaaa bbbb h"
    assert placed({"ranks": 6} | gpu, {"workers": 2, "gpus": 1}, nodes) == "aaaabb bb h"
    assert placed({"ranks": 2} | gpu, {"workers": 4, "eval_workers": 2, "gpus": 1}, nodes) == "aa bbab ab h"
    # The verifier goes to the head only because that has the most cores.
    assert placed({"ranks": 2} | gpu, {"workers": 1, "gpus": 1}, [node("h", cores=4), *nodes[1:]]).endswith("b")


def test_a_gpu_worker_takes_a_gpu_even_where_cores_are_short() -> None:
    nodes = [node("a", cores=1, gpus=2), node("b", cores=64, gpus=1)]
    assert placed({"ranks": 1, "gpus_per_rank": 1}, {"workers": 2, "gpus": 1, "threads": 8}, nodes) == "a ba b"


def test_two_halves_of_a_gpu_go_where_one_is_left() -> None:
    """The only GPU takes both. With "b" beside it the sampler has one to itself, and a second one takes the half left."""
    half = {"gpus": 0.5, "kv_cache_mib": 1}
    nodes = [node("h", cores=64), node("a", cores=8, gpus=1)]
    assert placed({"gpus_per_rank": 0.5}, half, nodes) == "a a h"
    nodes = [*nodes, node("b", cores=4, gpus=1)]
    assert placed({"gpus_per_rank": 0.5}, half, nodes) == "a b h"
    assert placed({"gpus_per_rank": 1}, half | {"workers": 2}, nodes) == "a bb h"


def test_a_node_that_lacks_something_says_what_and_where_it_would_have_to_be(tmp_path: Path) -> None:
    mark, model, code = tmp_path / "mark", tmp_path / "model", placement.code_checksum()
    fault = placement._fault
    assert f"does not see run_dir = {tmp_path}:" in str(fault(mark, model, code))
    mark.touch()
    model.mkdir()
    assert f"does not see the model at {model}: give model.path on, or HF_HOME to" in str(fault(mark, model, code))
    (model / "config.json").write_text("{}")
    assert fault(mark, model, code) is None
    assert "has another rlpost, at" in str(fault(mark, model, code[::-1]))


def test_every_node_that_cannot_take_part_is_named_and_no_mark_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's part is played by a call that answers at once, on a machine where another disk is mounted."""
    asked: list[str] = []

    class Look:
        def options(self, **options: Any) -> Look:
            asked.append(chr(int(options["scheduling_strategy"].node_id, 16)))
            return self

        def remote(self, mark: Path, model_path: Path, code: str) -> str | None:
            assert mark.is_file()
            return placement._fault(tmp_path / "other" / mark.name if asked[-1] == "b" else mark, model_path, code)

    monkeypatch.setattr(placement.ray, "remote", lambda function: Look())
    monkeypatch.setattr(placement.ray, "get", lambda answer, timeout: answer)
    (tmp_path / "config.json").write_text("{}")
    nodes = [node("a", cores=1), node("b", cores=1), node("c", cores=1)]
    with pytest.raises(RecipeError, match=r"not every node .* can take part:\nb does not see run_dir[^\n]*$"):
        check_nodes(nodes, run_dir=tmp_path, model_path=tmp_path)
    assert asked == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
