"""The report and the other files of an analysis: their numbers are its own, and the page needs nothing else."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlpost import cli, exit_codes
from rlpost.analysis.figures import figures
from rlpost.analysis.measure import Analysis, analyze, by_kind, by_layer, plain, pool
from rlpost.analysis.names import short_names
from rlpost.analysis.output import flat_table, write_analysis
from rlpost.analysis.report import render_report, write_report
from rlpost.analysis.style import svg, write_figures

HOSTILE = "<script>alert('$x$')</script>&"
HISTORY = [
    {"step": step, "stage": "math" if step < 3 else "code", "unchanged": 0.99, "unchanged_since_start": 1 - 0.1 * step,
     "ever_moved": 0.1 * step, "returned": 0.05 * step}
    for step in range(1, 6)
]  # fmt: skip


def weights() -> dict[str, Tensor]:
    """Two layers of q, up and a norm; an embedding; bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (40, 12), "model.norm.weight": (12,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (12, 12),
            f"model.layers.{layer}.mlp.up_proj.weight": (24, 12),
            f"model.layers.{layer}.input_layernorm.weight": (12,),
        }
    return {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()}


def moved(seed: int, density: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(before.shape, generator=generator) < density, before * 1.5, before)
        for name, before in weights().items()
    }


def save(path: Path, tensors: dict[str, Tensor]) -> str:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    return str(path)


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str, str]:
    return (
        save(tmp_path / "before", weights()),
        save(tmp_path / "a" / "math", moved(1, 0.3)),
        save(tmp_path / "b" / "math", moved(2, 0.1)),
    )


@pytest.fixture
def analysis(places: tuple[str, str, str]) -> Analysis:
    before, *after = places
    return analyze(before, after, spectra=True)


class Tables(HTMLParser):
    """Every table of a page, as rows of the texts of their cells; and every value of an attribute that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def with_heading(self, first: str, column: str) -> list[list[list[str]]]:
        """Tables whose first column has that heading, and which have that column."""
        return [table for table in self.tables if table[0][0] == first and column in table[0]]


def column(table: Sequence[Sequence[str]], name: str) -> dict[str, str]:
    index = table[0].index(name)
    return {row[0]: row[index] for row in table[1:]}


def test_tables_of_the_page_are_the_analysis(analysis: Analysis) -> None:
    page = Tables(render_report(analysis))
    entries, directions = page.with_heading("kind", "absorption null"), page.with_heading("kind", "entropy rank")
    layers, single = page.with_heading("layer", "absorption null"), page.with_heading("weight", "unchanged")
    assert len(entries) == len(directions) == len(layers) == len(single) == 2, "one for each update"
    for index, update in enumerate(analysis.updates):
        kinds = {kind: pool(rows) for kind, rows in by_kind(update.rows).items()}
        assert column(entries[index], "unchanged") == {
            k: f"{100 * p.sparsity.unchanged:.2f} %" for k, p in kinds.items()
        }
        assert column(entries[index], "absorption null") == {
            kind: f"{100 * found.sparsity.predicted / found.sparsity.numel:.2f} %" for kind, found in kinds.items()
        }
        for heading, name in {"entropy rank": "entropy", "rounding null": "null_numerical"}.items():
            assert column(directions[index], heading) == {
                kind: f"{100 * getattr(found.spectrum, name):.1f} %" for kind, found in kinds.items() if found.spectrum
            }
        assert column(layers[index], "unchanged") == {
            str(layer): f"{100 * pool(rows).sparsity.unchanged:.2f} %" for layer, rows in by_layer(update.rows).items()
        }
        assert column(single[index], "rms update") == {
            row.name: f"{row.sparsity.rms_update:.2e}" if row.sparsity.rms_update else "0" for row in update.rows
        }
    (overlap,) = [table for table in page.tables if "Jaccard" in table[0]]
    found = analysis.comparisons[0].overlaps["q"]
    (q_row,) = [row for row in overlap if row[0] == "q"]
    expected = [found.of_first(n) for n in (found.both, found.uniform, found.matched)]
    assert q_row[3:6] == [f"{100 * share:.1f} %" for share in expected]
    (agreement,) = [table for table in page.tables if "cosine of the updates" in table[1]]
    agreed, left = analysis.comparisons[0].agreements["q"], [by_kind(u.rows)["q"] for u in analysis.updates]
    (q_row,) = [row for row in agreement if row[0] == "q"]
    pairs = [agreed.difference, *(pool(rows).sparsity for rows in left)]
    expected = [share for pair in pairs for share in (pair.unchanged, pair.share(pair.within[1e-5]))]
    assert q_row[1:] == [*(f"{100 * share:.1f} %" for share in expected), f"{agreed.cosine:.3f}"]
    masks = [table for table in page.tables if "principal, of what changed" in table[0]]
    for table, update in zip(masks, analysis.updates, strict=True):
        spectrum = pool(update.rows).spectrum
        assert spectrum is not None
        expected = [spectrum.principal.of_first(spectrum.principal.uniform)]
        for shared in (spectrum.principal, spectrum.low_magnitude):
            expected += [shared.of_first(shared.both), shared.of_first(shared.matched)]
        assert table[-1][2:] == [f"{100 * share:.1f} %" for share in expected]


def test_what_is_pooled_is_worked_by_hand(tmp_path: Path) -> None:
    """Of a [2, 4] and a [6, 4] matrix one row each changes in one entry: 6 of 8 rows and 6 of 8 columns are untouched. Spread
    evenly, (7/8)^4 of the rows of the first and (23/24)^4 of the second would be."""
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    before = {name: torch.zeros(rows, 4) for name, rows in zip(names, (2, 6), strict=True)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        tensor[0, 0] = 1.0
    (update,) = analyze(save(tmp_path / "0", before), [save(tmp_path / "1", after)], spectra=True).updates
    found = pool(update.rows)
    assert found.untouched is not None and (found.untouched.rows, found.untouched.columns) == (6 / 8, 6 / 8)
    assert found.untouched.chance_rows == pytest.approx((2 * (7 / 8) ** 4 + 6 * (23 / 24) ** 4) / 8)
    assert found.untouched.chance_columns == pytest.approx((4 * (7 / 8) ** 2 + 4 * (23 / 24) ** 6) / 8)
    assert found.rank == (1 / 2 + 1 / 4) / 2
    assert found.spectrum is not None and found.spectrum.shift is None, "there was no spectrum to shift"
    assert pool([]).untouched is None and pool([]).spectrum is None


def test_the_page_needs_nothing_but_itself(analysis: Analysis) -> None:
    text = render_report(analysis, history=HISTORY)
    page = Tables(text)
    assert page.loads and all(value.startswith(("#", "data:")) for value in page.loads)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.startswith("<!DOCTYPE html>") and page.tags.count("svg") == page.tags.count("figure") == 11


def test_what_a_user_named_is_shown_and_never_run(tmp_path: Path) -> None:
    before = save(tmp_path / HOSTILE / "before", weights())
    after = [save(tmp_path / f"{n}" / HOSTILE, moved(n, 0.2)) for n in (1, 2)]
    text = render_report(analyze(before, after))
    assert "<script" not in text and "&lt;script&gt;alert(" in text
    assert "script" not in Tables(text).tags
    assert ">1/&lt;script&gt;alert('$x$')&lt;" in text, "in a figure, dollars are no mathematics"


def test_equal_analyses_give_equal_pages(places: tuple[str, str, str], analysis: Analysis, tmp_path: Path) -> None:
    before, *after = places
    for name, again in (("first", analysis), ("second", analyze(before, after, spectra=True))):
        write_report(tmp_path / name, again, history=HISTORY)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_figure_is_written_as_png_and_svg_and_the_same_each_time(analysis: Analysis, tmp_path: Path) -> None:
    drawn = figures(analysis, HISTORY)
    entries, directions = (
        ["unchanged", "predicted", "tolerances", "untouched", "masks"],
        ["ranks", "null_ranks", "spectra"],
    )
    assert list(drawn) == [*entries, *directions, "principal", "overlaps", "history"]
    for directory in ("first", "second"):
        again = figures(analysis, HISTORY)
        write_figures({name: again[name] for name in ("tolerances", "masks")}, tmp_path / directory)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert files.keys() == {"tolerances.png", "tolerances.svg", "masks.png", "masks.svg"}
    assert files["masks.png"].startswith(b"\x89PNG") and files["masks.svg"].startswith(b"<svg ")


def test_a_figure_says_its_numbers_as_text(analysis: Analysis) -> None:
    """The tolerance ladder of one update writes its shares at its points; a heat map of two layers writes them in its cells."""
    one = Analysis(before=analysis.before, updates=analysis.updates[:1], comparisons=())
    drawn = figures(one)
    total = pool(one.updates[0].rows).sparsity
    ladder = svg(drawn["tolerances"])
    assert (
        f">{100 * total.unchanged:.1f}</text>" in ladder
        and f">{100 * total.share(total.within[1e-4]):.1f}</text>" in ladder
    )
    q_rows = [row for row in one.updates[0].rows if row.kind == "q"]
    cells = re.findall(r">(\d+\.\d)</text>", svg(drawn["unchanged"]))
    assert {f"{100 * row.sparsity.unchanged:.1f}" for row in q_rows} <= set(cells)


def test_only_figures_with_data_are_drawn(places: tuple[str, str, str], tmp_path: Path) -> None:
    before, after, _ = places
    entries = ["unchanged", "predicted", "tolerances", "untouched", "masks"]
    assert list(figures(analyze(before, [after]))) == entries
    ranked = analyze(before, [after], rank=True)
    page = render_report(ranked)
    assert list(figures(ranked)) == [*entries, "ranks"] and "entropy rank" not in page
    (ranks,) = [table for table in Tables(page).tables if table[0] == ["kind", "rank"]]
    assert ranks[1:] == [
        [kind, f"{100 * found.rank:.1f} %"]
        for kind, rows in by_kind(ranked.updates[0].rows).items()
        if (found := pool(rows)).rank is not None
    ]
    vectors = [
        save(tmp_path / name, {"norm.weight": torch.full((4,), value)}) for name, value in (("c", 1.0), ("d", 2.0))
    ]
    flat = analyze(vectors[0], vectors[1:], spectra=True)
    assert list(figures(flat)) == ["predicted", "tolerances"]
    assert "in no layers" in render_report(flat)
    same = render_report(analyze(before, [before], spectra=True))
    assert "No entry changed." in same


def test_rows_for_a_notebook_are_those_of_the_json(analysis: Analysis, tmp_path: Path) -> None:
    for suffix in ("json", "csv", "parquet"):
        write_analysis(tmp_path / f"figures.{suffix}", analysis)
    content = json.loads((tmp_path / "figures.json").read_text())
    expected = [flat(after, row) for after, update in content["updates"].items() for row in update["weights"]]
    table = pyarrow.parquet.read_table(tmp_path / "figures.parquet")
    for found, row in zip(table.to_pylist(), expected, strict=True):
        assert {key: found[key] for key in row} == row
        assert all(found[key] is None for key in found.keys() - row.keys() - {"before"}), (
            "of a norm, what has no spectrum"
        )
    with (tmp_path / "figures.csv").open() as stream:
        read = list(csv.DictReader(stream))
    assert list(read[0]) == table.column_names
    for found, row in zip(read, expected, strict=True):
        assert {key: parsed(found[key], value) for key, value in row.items()} == row


def flat(after: str, row: dict[str, Any]) -> dict[str, Any]:
    """What of a weight's entry in the JSON is in its flat row."""
    counts, spectrum = row["sparsity"], row["spectrum"]
    keys = ("name", "kind", "layer", "dtype", "untouched_rows", "untouched_columns")
    shares = ("numel", "bit_equal", "unchanged", "predicted", "within_relative", "squared_update", "rms_update")
    return {
        "after": after,
        **{key: row[key] for key in keys},
        "shape": " x ".join(map(str, row["shape"])),
        **{key: counts[key] for key in shares},
        **{f"within_{tolerance}": count for tolerance, count in counts["within"].items()},
        **{f"rank_{key}": value for key, value in (spectrum or {"ranks": {}})["ranks"].items()},
        "rank_numerical": row["rank"],
        **(_flat_spectrum(spectrum) if spectrum is not None else {}),
    }


def _flat_spectrum(spectrum: dict[str, Any]) -> dict[str, Any]:
    counts = ("both", "uniform", "matched")
    return {
        **{key: spectrum[key] for key in ("shift", "smallest_cosine", "intruders")},
        **{f"null_rank_{key}": spectrum["null_ranks"][key] for key in ("numerical", "entropy")},
        **{f"{entries}_{key}": spectrum[entries][key] for entries in ("principal", "low_magnitude") for key in counts},
    }


def parsed(text: str, like: Any) -> Any:
    return None if text == "" else type(like)(text)


def test_the_columns_are_the_same_without_spectra(places: tuple[str, str, str], analysis: Analysis) -> None:
    before, after, _ = places
    plain_table, full = flat_table(analyze(before, [after])), flat_table(analysis)
    assert plain_table.schema == full.schema == flat_table(analyze(before, [after], rank=True)).schema
    assert plain_table["rank_entropy"].null_count == len(plain_table)


def test_every_column_is_documented(analysis: Analysis) -> None:
    text = (
        (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().split("## `rlpost analyze")[1].split("\n## ")[0]
    )
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert [name for cell in cells for name in re.findall(r"`(\S+)`", cell)] == flat_table(analysis).column_names


def test_the_command_writes_each_format_that_is_asked_for(
    places: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [tmp_path / f"out.{suffix}" for suffix in ("html", "json", "csv", "parquet")]
    before, after, _ = places
    arguments = ["analyze", before, after, "--figures", str(tmp_path / "figures")]
    assert cli.main([*arguments, *(part for path in outputs for part in ("-o", str(path)))]) == 0
    assert all(path.stat().st_size for path in outputs)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(figures(analyze(before, [after])))
    assert json.loads(outputs[1].read_text()) == json.loads(json.dumps(plain(analyze(before, [after]))))
    assert outputs[0].read_text() == render_report(analyze(before, [after]))
    lines = capsys.readouterr().out.split("update, by layer")[1].splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"]


@pytest.mark.parametrize("name", ["figures.pdf", "figures", "nowhere/figures.json"])
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["-o", str(tmp_path / "good.json"), "-o", str(tmp_path / name)]
    assert cli.main(["analyze", "no_model", "no_model", *asked]) == exit_codes.USAGE
    message = capsys.readouterr().err
    assert "no directory to write to" in message if "nowhere" in name else ".json, .html, .csv, .parquet" in message


def test_thirty_two_layers_fit_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 4) for layer in range(32)}
    after = {name: tensor + torch.eye(4) for name, tensor in before.items()}
    assert cli.main(["analyze", save(tmp_path / "0", before), save(tmp_path / "1", after), "--spectra"]) == 0
    text = capsys.readouterr().out
    lines = text.split("update, by layer")[1].splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [[str(layer), "75.00"] for layer in range(32)]
    assert max(map(len, text.split("update, by entry")[1].splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text, "no column was cut"


def test_short_names_are_as_long_as_it_takes() -> None:
    assert short_names(["runs/a/exports/math"]) == ["math"]
    assert short_names(["runs/a/exports/math", "runs/b/exports/math"]) == ["a/exports/math", "b/exports/math"]
    assert short_names(["x/math", "x/math", "code"]) == ["math (1)", "math (2)", "code"]
    assert short_names(["/", "run@3", "\udcff"]) == ["/", "run@3", "\\udcff"]
