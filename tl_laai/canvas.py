"""How every figure looks: one style at column width, fixed inks, legends outside, whole files.

Colours are those of Okabe and Ito ("Color universal design", 2008), with markers, dashes and
hatches beside them. matplotlib's global state is left as found.
"""

from __future__ import annotations

import functools
import io
import math
import os
import textwrap
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Affine2DBase, ScaledTranslation, blended_transform_factory

_P = ParamSpec("_P")
_T = TypeVar("_T")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_white_orange", ["#00395A", "#0072B2", "#FFFFFF", "#D55E00", "#6B2F00"]
)
WIDTH = 3.3
_STYLE = {
    "font.size": 7.0,
    "axes.titlesize": 7.0,
    "axes.labelsize": 7.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "figure.titlesize": 7.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "svg.hashsalt": "tl_laai",
}
# Left to itself matplotlib stamps the date, and no two runs agree.
_METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a function in our style whatever the caller's is, which is as before afterwards."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with style.context(_STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return styled


@styled
def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes.

    What the figure's layout has arranged stays where it is from then on.

    Example:
        >>> save(draw(rows), "figure1.pdf")  # doctest: +SKIP

    Args:
        figure: Any matplotlib figure.
        path: Ends in .png (200 dots an inch), .svg or .pdf; its folder is made when it is missing.

    Raises:
        ValueError: `path` ends otherwise.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise ValueError(f"path is {str(path)!r}; end it in one of {', '.join(_METADATA)}.")
    # A figure with a layout keeps its width; in another nothing outside the axes may be cut off.
    bounds: str | None = "tight"
    if figure.get_layout_engine() is not None:
        # Every drawing moves the layout a little nearer to rest, so the next would differ.
        bounds = None
        for _ in range(2):
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
    picture = io.BytesIO()
    figure.savefig(
        picture, format=suffix[1:], dpi=200, metadata=_METADATA[suffix], bbox_inches=bounds
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of this height and width in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def given_or_new(ax: Axes | None, height: float, width: float = WIDTH) -> Axes:
    """The caller's axes, or those of a new figure."""
    return new_figure(height, width).subplots() if ax is None else ax


def panel_above(ax: Axes) -> Axes:
    """A panel as wide as `ax` above it, of fixed height: else no layout would come to rest."""
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(0, 1, cast(Affine2DBase, ax.transAxes))
    across_and_up = blended_transform_factory(ax.transAxes, inches)
    panel = ax.inset_axes((0.0, 0.12, 1.0, 0.75), transform=across_and_up, sharex=ax)
    panel.tick_params(labelbottom=False)
    return panel


def weaker_to_the_right(ax: Axes, ratios: Sequence[float]) -> None:
    """A falling logarithmic axis, with a place for zero where there is such a point."""
    low, high = min((ratio for ratio in ratios if ratio > 0), default=1.0), max(ratios)
    if min(ratios) > 0:
        ax.set_xscale("log")
    else:
        ax.set_xscale("symlog", linthresh=low, linscale=0.5)
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(max(high, low))) + 1)
    factors = (1, 2, 5) if len(tens) <= 4 else (1,)
    marks = [factor * 10.0**power for power in tens for factor in factors]
    marks = [mark for mark in marks if 0.999 * low <= mark <= 1.001 * max(high, low)]
    marks += [ratio for ratio in (low, 0.0) if ratio in ratios and (not marks or ratio == 0)]
    ax.xaxis.set_major_locator(FixedLocator(marks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    ax.set_xlim(1.07 * max(high, low), low / 1.07 if min(ratios) > 0 else -0.1 * low)


def percent_axis(ax: Axes, scores: Any) -> None:
    """An axis of percentages from 0 up to 100, or to the next ten above low scores."""
    top = min(100.0, max(20.0, 10 * math.ceil(float(np.ma.filled(np.ma.max(scores), 0)) / 10)))
    ax.set_ylim(-0.03 * top, 1.03 * top)


def dress(ax: Axes) -> Axes:
    """Fix what matplotlib would read from the style in force when the figure is saved."""
    ax.tick_params(labelsize=7, width=0.6, length=2.5)
    ax.xaxis.label.set_fontsize(7)
    ax.yaxis.label.set_fontsize(7)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def line_looks(i: int) -> dict[str, Any]:
    """The looks of line `i`: colours, markers and dashes turn at different lengths."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 0.9,
        "markersize": 2.8,
    }


def hatched(corner: tuple[float, float], width: int) -> Rectangle:
    """One row, or a piece of one, that says: nothing here."""
    return Rectangle(
        corner, width, 1, facecolor="#F2F2F2", edgecolor="#8C8C8C", hatch="//////", linewidth=0.0
    )


def label_axis(axis: Any, labels: Sequence[int], most: int = 16) -> None:
    """Write labels at 0, 1, 2, ...: all of them, or every second, third, ... where they crowd."""
    step = -(-len(labels) // most) or 1
    axis.set_ticks(range(0, len(labels), step), labels=[str(label) for label in labels[::step]])


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 3 if longest <= 9 else 2 if longest <= 18 else 1


def legend_height(labels: Sequence[str]) -> float:
    """Inches that a legend of these labels takes."""
    return 0.14 * math.ceil(sum(1 + text.count("\n") for text in labels) / _legend_columns(labels))


def legend_outside(ax: Axes, title: str | None = None, *, above: bool = False) -> None:
    """A legend outside the axes, where it covers nothing: below the axis label, or on top."""
    handles, labels = ax.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    place: Literal["lower left", "upper right", "upper center"] = "upper center"
    anchor = (0.5, 0.0)
    if above:
        place, anchor = "lower left", (0.0, 1.0)
    elif max(map(len, entries), default=0) > 34:  # too wide for the middle: grows to the left
        place, anchor = "upper right", (1.0, 0.0)
    points = ScaledTranslation(0, (2 if above else -27) / 72, ax.figure.dpi_scale_trans)
    legend = ax.legend(
        list(entries.values()),
        list(entries),
        ncols=_legend_columns(list(entries)),
        title=title,
        loc=place,
        bbox_to_anchor=anchor,
        bbox_transform=ax.transAxes + points,
        borderaxespad=0.0,
        borderpad=0.0,
        handlelength=2.4,
        handletextpad=0.5,
        columnspacing=1.0,
        labelspacing=0.3,
    )
    legend.get_title().set_fontsize(7)


def count(n: int, noun: str) -> str:
    """A number with its noun in the right number."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def wrap(text: str, width: int = 50) -> str:
    """Text in lines of at most `width` letters, names kept whole, dollars no signs of maths."""
    filled = textwrap.fill(text, width, break_on_hyphens=False).replace("$", r"\$")
    return f" {filled}" if filled.startswith("_") else filled  # legends leave such labels out
