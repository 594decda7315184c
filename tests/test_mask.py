"""The mask of an update: exactly its entries, controls of its size, and a file that says what it was made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlpost import cli, exit_codes
from rlpost.analysis.mask import Selection, write_mask
from rlpost.core.subnetwork import complement_mask, principal_mask, random_mask
from rlpost.engines.mask_file import MaskFile

EMBEDDING, Q, NORM = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return path


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {EMBEDDING: torch.randn(13, 10), Q: torch.randn(20, 10), NORM: torch.ones(10)}


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor]]:
    """A fifth of q, 7 entries of the embedding and nothing of the norm change; every other entry by a hundredth of what
    bfloat16 tells apart."""
    before = weights()
    masks = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in before.items()}
    masks[Q][torch.rand(20, 10) < 0.2] = True
    masks[EMBEDDING].view(-1)[::20] = True
    before = {name: tensor.bfloat16().float() for name, tensor in before.items()}
    after = {name: torch.where(masks[name], t + 1, t * (1 + 2**-15)) for name, t in before.items()}
    return save(tmp_path / "before", before), save(tmp_path / "after", after), masks


def made(planted: tuple[Path, Path, dict[str, Tensor]], output: Path, **selection: Any) -> dict[str, Tensor]:
    coverage = write_mask(str(planted[0]), str(planted[1]), output, Selection(**selection))
    file = MaskFile(output)
    masks = {name: file.mask(name) for name in file.shapes}
    assert coverage == {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    return masks


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_writes_what_changed_bit_for_bit_and_what_it_was_made_of(
    planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, expected = planted
    arguments = ["mask", str(before), str(after), "-o"]
    assert cli.main([*arguments, str(tmp_path / "a")]) == cli.main([*arguments, str(tmp_path / "b")]) == 0
    count = sum(int(mask.sum()) for mask in expected.values())
    assert f"a: {count} of 340 entries ({count / 340:.2%}), in 2 of 3 weights" in capsys.readouterr().out
    file = MaskFile(tmp_path / "a")
    assert same({name: file.mask(name) for name in file.shapes}, expected)
    assert {"before": str(before), "after": str(after), "select": "update", "dtype": "bfloat16"}.items() <= (
        file.provenance.items()
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert cli.main([*arguments, str(tmp_path / "a")]) == exit_codes.USAGE
    assert "is there already" in capsys.readouterr().err


def test_what_changed_is_asked_in_the_dtype_that_is_served(
    planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    masks = made(planted, tmp_path / "mask", dtype=torch.float32)
    assert all(mask.all() for mask in masks.values())


def test_controls_are_of_the_updates_size_in_each_weight(
    planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, _, update = planted
    random = made(planted, tmp_path / "random", control="random", seed=3)
    for name, mask in update.items():
        assert torch.equal(random[name], random_mask(mask.shape, count=int(mask.sum()), seed=3, name=name))
    outside = made(planted, tmp_path / "complement", control="complement", seed=3)
    for name, mask in update.items():
        assert torch.equal(outside[name], complement_mask(mask, seed=3, name=name))
        assert outside[name].sum() == mask.sum() and not (outside[name] & mask).any()
    assert not same(random, made(planted, tmp_path / "other", control="random", seed=4))


def test_principal_and_small_entries_are_as_many_as_the_updates_or_a_given_share(
    planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Of the weights before; principal ones of the matrices of layers alone."""
    before, (_, _, update) = {name: t.bfloat16().float() for name, t in weights().items()}, planted
    count = int(update[Q].sum())
    for density, expected in ((None, count / 200), (0.3, 0.3)):
        principal = made(planted, tmp_path / f"principal-{density}", select="principal", rank=2, density=density)
        assert torch.equal(principal[Q], principal_mask(before[Q], rank=2, density=expected))
        assert principal[Q].sum() == round(200 * expected) and not principal[EMBEDDING].any()
        assert not principal[NORM].any()
        small = made(planted, tmp_path / f"small-{density}", select="low_magnitude", density=density)
        for name, weight in before.items():
            wanted = int(update[name].sum()) if density is None else round(0.3 * weight.numel())
            inside, outside = weight[small[name]].abs(), weight[~small[name]].abs()
            assert len(inside) == wanted
            assert not wanted or inside.max() <= outside.min()


def test_the_command_knows_every_selection(planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    arguments = ["mask", str(planted[0]), str(planted[1]), "-o"]
    cases: dict[str, tuple[list[str], dict[str, Any]]] = {
        "a": (["--principal", "2", "--density", "0.1"], {"select": "principal", "rank": 2, "density": 0.1}),
        "b": (["--low-magnitude", "--complement", "--seed", "5"], {"select": "low_magnitude", "control": "complement"}),
        "c": (["--random", "--dtype", "float32"], {"control": "random", "dtype": "float32"}),
    }
    for name, (options, expected) in cases.items():
        assert cli.main([*arguments, str(tmp_path / name), *options]) == 0
        assert expected.items() <= MaskFile(tmp_path / name).provenance.items()
    assert MaskFile(tmp_path / "b").provenance["seed"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0.5"], "density = 0.5 with select = 'update': .*an update has its own"),
        (["--low-magnitude", "--density", "1.5"], "density = 1.5 with select = 'low_magnitude'"),
        (["--principal", "0"], "rank = 0 with select = 'principal'"),
    ],
)
def test_a_selection_without_meaning_is_refused(
    options: list[str],
    message: str,
    planted: tuple[Path, Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["mask", str(planted[0]), str(planted[1]), "-o", str(tmp_path / "m"), *options]) == exit_codes.USAGE
    assert re.search(message, capsys.readouterr().err)


def test_a_mask_that_would_be_of_no_use_is_not_written(
    planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    before = planted[0]
    with pytest.raises(ValueError, match=r"no entry is selected: .* are the same in bfloat16"):
        write_mask(str(before), str(before), tmp_path / "mask")
    wider = save(tmp_path / "wider", weights() | {EMBEDDING: torch.ones(15, 10)})
    with pytest.raises(ValueError, match=r"embed_tokens.weight has rows in one of .* a mask fits one model"):
        write_mask(str(before), str(wider), tmp_path / "mask")
    assert not list(tmp_path.glob("mask*"))


def test_what_is_no_file_of_masks_is_named(planted: tuple[Path, Path, dict[str, Tensor]], tmp_path: Path) -> None:
    made(planted, tmp_path / "mask")
    data = (tmp_path / "mask").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-2])
    cases = {
        tmp_path / "nowhere": "nowhere is no file of masks: `rlpost mask` writes",
        tmp_path / "cut": "cut is damaged .*: copy it again",
        planted[0] / "model.safetensors": "holds tensors but no masks",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            MaskFile(path)
