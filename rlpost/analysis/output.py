"""An analysis in files, each in the format that its suffix names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rlpost.analysis.measure import Analysis, Update, WeightRow, plain
from rlpost.analysis.names import printable
from rlpost.core.sparsity import TOLERANCES
from rlpost.core.spectrum import Ranks

FORMATS = (".json", ".html", ".csv", ".parquet")
RANKS = [field.name for field in fields(Ranks)]
SETS = ("principal", "low_magnitude")
"""Of entries, that those which changed are held against."""
FLOATS = {
    "rank_stable", "rank_entropy", "null_rank_entropy", "shift", "smallest_cosine",
    *(f"{name}_{chance}" for name in SETS for chance in ("uniform", "matched")),
}  # fmt: skip
"""Of the columns that may be empty."""


def check_output(path: Path) -> None:
    """Raises ValueError when `write_analysis` could not write there."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: an analysis is written as {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no directory to write to")


def write_analysis(path: Path, analysis: Analysis) -> None:
    """.json: every figure; .csv and .parquet: `flat_table`; .html: a report. `check_output` has passed the path."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(plain(analysis), indent=2) + "\n")
        case ".csv":
            pyarrow.csv.write_csv(flat_table(analysis), path)
        case ".parquet":
            pyarrow.parquet.write_table(flat_table(analysis), path)
        case _:
            from rlpost.analysis.report import write_report  # matplotlib takes a second

            write_report(path, analysis)


def flat_table(analysis: Analysis) -> pyarrow.Table:
    """A row per weight and update; the columns, which docs/metrics.md explains, are always the same."""
    rows = [_flat(analysis, update, row) for update in analysis.updates for row in update.rows]
    return pyarrow.table({name: _column(name, [row[name] for row in rows]) for name in rows[0]} if rows else {})


def _flat(analysis: Analysis, update: Update, row: WeightRow) -> dict[str, Any]:
    counts, spectrum = row.sparsity, row.spectrum
    return {
        "before": printable(analysis.before),
        "after": printable(update.after),
        "name": row.name,
        "kind": row.kind,
        "layer": row.layer,
        "shape": " x ".join(map(str, row.shape)),
        "dtype": row.dtype,
        "numel": counts.numel,
        "unchanged": counts.unchanged,
        "bit_equal": counts.bit_equal,
        **{f"within_{tolerance:g}": counts.within[tolerance] for tolerance in TOLERANCES},
        "within_relative": counts.within_relative,
        "predicted": counts.predicted,
        "squared_update": counts.squared_update,
        "rms_update": counts.rms_update,
        "untouched_rows": row.untouched_rows,
        "untouched_columns": row.untouched_columns,
        **{f"rank_{name}": spectrum and getattr(spectrum.ranks, name) for name in RANKS},
        "rank_numerical": row.rank,
        "null_rank_numerical": spectrum and spectrum.null_ranks.numerical,
        "null_rank_entropy": spectrum and spectrum.null_ranks.entropy,
        **{name: spectrum and getattr(spectrum, name) for name in ("shift", "smallest_cosine", "intruders")},
        **{
            f"{name}_{count}": spectrum and getattr(getattr(spectrum, name), count)
            for name in SETS
            for count in ("both", "uniform", "matched")
        },
    }


def _column(name: str, values: Sequence[Any]) -> pyarrow.Array:
    if any(value is not None for value in values):
        return pyarrow.array(values)
    return pyarrow.nulls(len(values), pyarrow.float64() if name in FLOATS else pyarrow.int64())
