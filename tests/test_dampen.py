"""`rlpost dampen`: a directory like the tuned one, its intruders smaller, everything else byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlpost import cli, exit_codes
from rlpost.core.intruders import dampened

Q, EMBEDDING, NORM = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    before = {Q: torch.randn(30, 20) / 10, EMBEDDING: torch.randn(30, 20), NORM: torch.ones(20)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name in (Q, EMBEDDING):
        after[name] += torch.outer(torch.randn(30), torch.randn(20))
    for name, tensors in (("before", before), ("after", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    return tmp_path / "before", tmp_path / "after"


def test_matrices_of_layers_are_dampened_and_the_rest_is_copied(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        cli.main(["dampen", *map(str, pair), "-o", str(out), "--scale", "0.3", "--top", "3", "--epsilon", "0.6"]) == 0
    )
    before, after = (load_file(path / "model.safetensors") for path in pair)
    expected, num_found = dampened(before[Q], after[Q], 0.3, k=3, epsilon=0.6)
    written = load_file(out / "model.safetensors")
    assert num_found >= 1 and torch.equal(written[Q], expected) and not torch.equal(written[Q], after[Q])
    assert torch.equal(written[EMBEDDING], after[EMBEDDING]) and torch.equal(written[NORM], after[NORM])
    assert json.loads((out / "config.json").read_text()) == {"name": "after"}
    assert f"{num_found} intruder dimensions in 1 of 1 matrices, scaled to 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "1"], "scale = 1"),
        (["--scale", "-0.1"], "scale = -0.1"),
        (["--epsilon", "0"], "epsilon = 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dampen", *map(str, pair), "-o", str(tmp_path / "out"), *options]) == exit_codes.USAGE
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["dampen", *map(str, pair), "-o", str(pair[0])]) == exit_codes.USAGE
    assert "is there already" in capsys.readouterr().err
