"""Heat maps: the values of Delta head by head, and attribution over layers and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tl_laai.canvas import (
    DIVERGING,
    count,
    dress,
    given_or_new,
    hatched,
    label_axis,
    new_figure,
    styled,
    wrap,
)
from tl_laai.metrics import sparsity
from tl_laai.rows import Row, checked, values_of

_PANELS_A_ROW = 3


@styled
def delta_heatmaps(rows: Sequence[Row], axes: Sequence[Axes] | None = None) -> tuple[Axes, ...]:
    """The values of Delta, a row a head, a panel a penalty, on one scale: Figure 2 of the paper.

    Example:
        >>> without, regularised = delta_heatmaps(rows)  # doctest: +SKIP

    Args:
        rows: Rows of kind "delta" of one model, task and layer; penalty "none" is drawn first.
        axes: Where to draw, one for each penalty, or None for a new figure.

    Returns:
        The axes, one for each penalty.

    Raises:
        ValueError: There are no rows, they break the schema, a panel lacks a head, or the number of
            axes is not that of penalties.
    """
    rows = checked(rows, "delta")
    penalties = sorted(values_of(rows, "penalty"), key=lambda text: (text != "none", text))
    heads = values_of(rows, "head")
    if axes is not None and len(axes) != len(penalties):
        raise ValueError(f"axes holds {len(axes)} axes, but rows hold penalties {penalties}.")
    panels = []
    for penalty in penalties:
        found = {row["head"]: row["values"] for row in rows if row["penalty"] == penalty}
        sizes = {len(values) for values in found.values()}
        if len(sizes) != 1 or sizes == {0} or sorted(found) != heads:
            raise ValueError(
                f"rows with penalty {penalty!r} are not one delta: heads {sorted(found)} of "
                f"{heads}, with {sorted(sizes)} values a head."
            )
        panels.append(np.array([found[head] for head in heads], dtype=np.float64))
    if axes is None:
        n_columns = min(len(penalties), _PANELS_A_ROW)
        n_rows = math.ceil(len(penalties) / n_columns)
        figure = new_figure(n_rows * min(max(1.4 + 0.16 * len(heads), 2.1), 4.0))
        grid = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).flatten()
        for empty in grid[len(penalties) :]:
            empty.set_axis_off()
        axes = tuple(grid[: len(penalties)])
        title = f"{rows[0]['model']}, {rows[0]['task']}, layer {rows[0]['layer']}"
        figure.suptitle(wrap(title, 55), x=0.02, ha="left")
    limit = max(float(np.abs(panel).max()) for panel in panels) or 1.0
    scale: dict[str, Any] = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    for ax, penalty, panel in zip(axes, penalties, panels, strict=True):
        image = ax.imshow(panel, aspect="auto", interpolation="none", **scale)
        for place in np.flatnonzero(~panel.any(axis=1)):
            ax.add_patch(hatched((-0.5, place - 0.5), panel.shape[1]))
        counts = sparsity(panel)
        name = "no penalty" if penalty == "none" else penalty
        lines = (
            name,
            f"{counts.n_heads_nonzero} of {count(counts.n_heads, 'head')} left",
            f"{100 * counts.share_zero:.1f} % of entries zero",
        )
        ax.set_title(
            "\n".join(wrap(line, 54 // min(len(penalties), _PANELS_A_ROW)) for line in lines),
            loc="left",
        )
        ax.set_xlabel("dimension")
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        label_axis(ax.yaxis, heads)
        dress(ax)
    for ax in axes[::_PANELS_A_ROW]:
        ax.set_ylabel("head")
    zero = [ax for ax, panel in zip(axes, panels, strict=True) if not panel.any(axis=1).all()]
    label = "value of Delta" + ("; hatched: head exactly zero" if zero else "")
    bar = axes[0].figure.colorbar(image, ax=list(axes), orientation="horizontal", aspect=40)
    bar.set_label(label, size=7)
    bar.ax.tick_params(labelsize=7)
    return tuple(axes)


@styled
def attribution_map(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """A heat map of every head's attribution, layers across and heads down; the largest framed.

    Example:
        >>> attribution_map(read_rows("figures/attribution.jsonl"))  # doctest: +SKIP

    Args:
        rows: Rows of kind "attribution" of one model and task.
        ax: Where to draw, or None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: There are no rows, or they break the schema.
    """
    rows = checked(rows, "attribution")
    layers, heads = values_of(rows, "layer"), values_of(rows, "head")
    values = np.full((len(heads), len(layers)), np.nan)
    for row in rows:
        values[heads.index(row["head"]), layers.index(row["layer"])] = row["value"]
    ax = given_or_new(ax, min(1.5 + 0.11 * len(heads), 4.0))
    image = ax.imshow(values, aspect="auto", interpolation="none", cmap="cividis")
    for head, layer in np.argwhere(np.isnan(values)):
        ax.add_patch(hatched((layer - 0.5, head - 0.5), 1))
    head, layer = np.unravel_index(np.nanargmax(values), values.shape)
    corner = (layer - 0.5, head - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=2.4, zorder=3))
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.0, zorder=4))
    largest = f"largest (framed): layer {layers[layer]}, head {heads[head]}"
    ax.set_title(wrap(f"{rows[0]['model']}, {rows[0]['task']}; {largest}"), loc="left")
    ax.set(xlabel="layer", ylabel="head")
    label_axis(ax.xaxis, layers, 20)
    label_axis(ax.yaxis, heads)
    bar = ax.figure.colorbar(image, ax=ax, orientation="horizontal", aspect=40)
    bar.set_label("attribution" + "; hatched: no row" * bool(np.isnan(values).any()), size=7)
    bar.ax.tick_params(labelsize=7)
    return dress(ax)
