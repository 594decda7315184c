"""An analysis as one HTML file that needs nothing else: words, figures, tables (report.html has the text)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from rlpost import __version__
from rlpost.analysis.figures import History, figures
from rlpost.analysis.measure import PRINCIPAL, TOP, Analysis, Pooled, Update, WeightRow, by_kind, by_layer, pool
from rlpost.analysis.names import printable, short_names
from rlpost.analysis.style import power, svg
from rlpost.core.overlap import NUM_BINS
from rlpost.core.sparsity import RELATIVE

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an entry; 1 of any other dtype of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """An update as the template reads it."""

    label: str
    after: str
    kinds: Mapping[str, Pooled]
    layers: Mapping[int, Pooled]
    rows: tuple[WeightRow, ...]

    @property
    def all(self) -> Pooled:
        return self.kinds["all"]


def write_report(path: Path, analysis: Analysis, *, history: History = ()) -> None:
    """
    Args:
        history: rows of the analysis.jsonl of the run that made the versions, drawn as curves.
    """
    path.write_text(render_report(analysis, history=history), encoding="utf-8")


def render_report(analysis: Analysis, *, history: History = ()) -> str:
    """The page; equal analyses give equal ones."""
    labels = short_names([update.after for update in analysis.updates])
    updates = [_shown(update, label) for update, label in zip(analysis.updates, labels, strict=True)]
    pairs = itertools.combinations(updates, 2)
    rows = analysis.updates[0].rows
    return template(Path(__file__).with_name("report.html")).render(
        before=printable(analysis.before),
        updates=updates,
        comparisons=[(*pair, found) for pair, found in zip(pairs, analysis.comparisons, strict=True)],
        dtypes=sorted({row.dtype for row in rows}),
        num_bytes=sum(row.sparsity.numel * WIDTHS.get(row.dtype, 1) for row in rows),
        figures={name: Markup(svg(figure)) for name, figure in figures(analysis, history).items()},
        top=TOP,
        principal=PRINCIPAL,
        relative=power(RELATIVE),
        num_bins=NUM_BINS,
        version=__version__,
    )


def _shown(update: Update, label: str) -> _Shown:
    return _Shown(
        label=label,
        after=printable(update.after),
        kinds={kind: pool(rows) for kind, rows in by_kind(update.rows).items()},
        layers={layer: pool(rows) for layer, rows in by_layer(update.rows).items()},
        rows=update.rows,
    )


def template(file: Path) -> jinja2.Template:
    """A page's, with filters for figures; it may include page.css."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "small": _small,
        "size": _size,
        "count": _count,
        "cosine": _cosine,
    }
    return environment.get_template(file.name)


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _points(share: float) -> str:
    """A difference of shares in words: 3.2 points more."""
    return f"{abs(100 * share):.1f} points {'more' if share > 0 else 'fewer'}"


def _small(value: float | None) -> str:
    return "" if value is None else "0" if not value else f"{value:.2e}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:z.3f}"


def _size(num_bytes: int) -> str:
    power = min(int(math.log(max(num_bytes, 1), 1000)), 4)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
