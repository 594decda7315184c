"""How figures look: one palette and style, panels in a grid, one legend above them; and how they become files.

Equal figures give equal bytes. None goes through pyplot, whose list of open ones is the whole process's.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

WIDTH = 9.0
"""Inches of every figure: 864 pixels of a page."""
INK, MUTED, RULE = "#1d2430", "#66707f", "#d9dee5"
# Wong's palette, which any colour vision tells apart.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
UPDATES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
MARKERS = ("o", "s", "^", "v", "P", "X", "*")
KINDS = {
    "q": (BLUE, "-"),
    "k": (SKY, "-"),
    "v": (GREEN, "-"),
    "o": ("#332288", "-"),
    "gate": (VERMILION, "--"),
    "up": (ORANGE, "--"),
    "down": (PURPLE, "--"),
    "embedding": (MUTED, ":"),
    "head": (INK, ":"),
}
OBSERVED = {"marker": "o", "ls": "", "color": BLUE, "ms": 6}
OBSERVED_TOO = {"marker": "o", "ls": "", "color": GREEN, "ms": 6}
EXPECTED = {"marker": "D", "ls": "", "mfc": "white", "mec": VERMILION, "mew": 1.5, "ms": 7}
SEQUENTIAL = LinearSegmentedColormap.from_list("share", ("#f3f7fb", "#a9cbe3", "#4f94c4", "#15609f", "#082c5c"))
MASK = LinearSegmentedColormap.from_list("mask", ("#f6f7f9", "#8b93a0", "#10151d"))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlpost",
    "text.parse_math": False,  # paths may hold dollars
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}


def write_figures(drawn: Mapping[str, Figure], directory: Path) -> None:
    """NAME.svg and NAME.png, at 200 dots per inch, of each."""
    directory.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        (directory / f"{name}.svg").write_text(svg(figure), encoding="utf-8")
        (directory / f"{name}.png").write_bytes(png(figure, dpi=200))


def png(figure: Figure, *, dpi: int = 120) -> bytes:
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def svg(figure: Figure) -> str:
    """One <svg> element, ready for a page as for a file; text stays text."""
    stream, layout = io.StringIO(), figure.get_layout_engine()
    assert layout is not None
    with style():
        # savefig would draw everything once to find the layout, and once more.
        FigureCanvasSVG(figure)
        layout.execute(figure)
        figure.set_layout_engine(None)
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.set_layout_engine(layout)
    _, start, rest = stream.getvalue().partition("<svg ")
    # Names of groups, which nothing refers to, recur in every figure of a page.
    return start + re.sub(r'<g id="[^"]*"', "<g", rest)


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a path; whoever shows the text may have the font
        yield


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def clip(name: str, length: int = 44) -> str:
    return name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[1 - length :]


def grid(count: int, *, widest: int = 3) -> tuple[int, int]:
    """Panels down and across: up to three beside each other, four as two by two."""
    across = min(count, widest, 2 if count == 4 else 3)
    return math.ceil(count / across), across


def trim(axes: NDArray[Any], count: int, label: str) -> None:
    """No panel where nothing is drawn; labels below the last one of every column."""
    for index, ax in enumerate(axes.flat):
        if index >= count:
            ax.remove()
        elif index >= count - axes.shape[1]:
            ax.set_xlabel(label)
            ax.tick_params(labelbottom=True)


def color_bar(part: Any, axes: Sequence[Axes], colors: ScalarMappable, label: str, *, aspect: int) -> None:
    bar = part.colorbar(colors, ax=list(axes), aspect=aspect, pad=0.015, ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))
    bar.set_label(label)
    bar.outline.set_visible(False)


def power(value: float) -> str:
    """0.1, but 1e-3."""
    return f"{value:g}" if value >= 0.01 else f"1e{round(math.log10(value))}"


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Above the panels, in as many columns as there is room for."""
    if not handles:  # spectra of an update that changed nothing
        return
    pixels = [48 + 6.6 * len(handle.get_label()) for handle in handles]
    columns = len(handles) if sum(pixels) <= 96 * WIDTH else max(1, int(96 * WIDTH / max(pixels)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handletextpad=0.4, columnspacing=1.4)
    figure.set_figheight(figure.get_figheight() + 0.19 * (math.ceil(len(handles) / columns) - 1))
