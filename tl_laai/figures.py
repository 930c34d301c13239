"""Pictures drawn from rows alone: rows in, matplotlib out, no model and no torch.

The kinds of rows are told in `tl_laai.rows`. A figure never averages over what it does not name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from tl_laai.canvas import (
    COLOURS,
    DASHES,
    MARKERS,
    WIDTH,
    count,
    dress,
    given_or_new,
    label_axis,
    legend_height,
    legend_outside,
    line_looks,
    panel_above,
    percent_axis,
    save,
    styled,
    weaker_to_the_right,
    wrap,
)
from tl_laai.heatmaps import attribution_map, delta_heatmaps
from tl_laai.rows import Row, checked, number, read_rows, values_of

__all__ = [
    "ablation_bars",
    "attribution_map",
    "delta_heatmaps",
    "draw",
    "layer_sweep",
    "read_rows",
    "regularisation_path",
    "save",
]

# variant -> what it is called, its colour, its hatch
_BARS = {
    "without": ("without this head", "#0072B2", ""),
    "only": ("this head alone", "#E69F00", "////"),
    "cumulative": ("this head and those before it", "#56B4E9", "...."),
    "zero": ("model's own output zeroed", "#CC79A7", "xxxx"),
    "mean": ("model's own output at its mean", "#FFFFFF", "\\\\\\\\"),
}
_LINES = {"all": ("whole intervention", "-"), "none": ("no intervention", ":")}
_NAMED_HEADS = 12  # more lines than this cannot be told apart


@styled
def layer_sweep(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Exact match against layer, a line a task and their average: Figure 1 of the paper.

    Lines are means over seeds; the band of the average (or of a lone task) is from the lowest to
    the highest seed. The average is drawn only where every task has a fit with that seed.

    Example:
        >>> layer_sweep(read_rows("figures/figure1.jsonl"))  # doctest: +SKIP

    Args:
        rows: Rows of kind "sweep" with one penalty.
        ax: Where to draw, or None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: There are no rows, or they break the schema.
    """
    rows = checked(rows, "sweep")
    tasks, layers, seeds = (values_of(rows, field) for field in ("task", "layer", "seed"))
    scores = np.full((len(tasks), len(layers), len(seeds)), np.nan)
    for row in rows:
        place = (tasks.index(row["task"]), layers.index(row["layer"]), seeds.index(row["seed"]))
        scores[place] = 100 * number(row, "exact_match")
    ax = given_or_new(ax, 2.1 + legend_height([*(wrap(task, 48) for task in tasks), "average"]))
    means = np.ma.masked_invalid(scores).mean(axis=2)
    if len(tasks) > 1:
        for i, task in enumerate(tasks):
            ax.plot(layers, means[i], **line_looks(i), label=wrap(task, 48))
    average = np.ma.masked_invalid(scores.mean(axis=0))
    label = "average" if len(tasks) > 1 else wrap(tasks[0], 48)
    alone = len(layers) == 1
    marker = "o" if alone else None  # a line needs two
    ax.plot(
        layers, average.mean(axis=1), color="black", linewidth=2.2, marker=marker, label=label,
        zorder=3,
    )  # fmt: skip
    ax.fill_between(
        layers, average.min(axis=1), average.max(axis=1), color="black", alpha=0.18, linewidth=0
    )
    ax.set(xlabel="layer", ylabel="exact match (%)")
    percent_axis(ax, np.ma.masked_invalid(scores))
    ax.xaxis.set_major_locator(FixedLocator(layers) if alone else MaxNLocator(integer=True))
    notes = [f"n = {_range(rows, 'n')} held-out examples, {count(len(seeds), 'seed')}"]
    notes += ["band: lowest to highest seed"] * (len(seeds) > 1)
    if rows[0]["penalty"] != "none":
        notes.append(f"penalty: {rows[0]['penalty']}")
    if n_missing := int(np.isnan(scores).sum()):
        notes.append(f"{n_missing} of {scores.size} fits missing")
    if len(statuses := Counter(row["status"] for row in rows)) > 1:
        told = ", ".join(f"{n} {name}" for name, n in sorted(statuses.items()))
        notes.append(f"fits: {told}")
    ax.set_title(wrap("; ".join(notes)), loc="left")
    legend_outside(ax)
    return dress(ax)


@styled
def regularisation_path(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """Head norms as the penalty weakens, in the order in which heads enter; exact match above.

    A point that was found by the best of several walks is drawn where there is one, else the walk
    down from `lambda_max`; exact match is shown for every walk. Every seed has its own lines.

    Example:
        >>> regularisation_path(read_rows("figures/path.jsonl"))  # doctest: +SKIP

    Args:
        rows: Rows of kind "path" of one task and layer.
        ax: Where to draw (a panel is added above it), or None for a new figure.

    Returns:
        The axes of the norms; the panel of exact match is `ax.child_axes[0]`.

    Raises:
        ValueError: There are no rows, they break the schema, or heads differ in number.
    """
    rows = sorted(checked(rows, "path"), key=lambda row: -_ratio(row))
    n_heads = {len(row["norms"]) for row in rows}
    if len(n_heads) != 1 or n_heads == {0}:
        raise ValueError(f"rows hold norms of {sorted(n_heads)} heads; give those of one model.")
    ways = [way for way in ("best", "down", "up") if way in values_of(rows, "direction")]
    seeds = values_of(rows, "seed")
    walks = {
        (w, s): [r for r in rows if (r["direction"], r["seed"]) == (w, s)]
        for w in ways
        for s in seeds
    }
    entered = {
        head: max(
            (_ratio(r) for r in rows if r["direction"] == ways[0] and r["norms"][head] > 0),
            default=-math.inf,
        )
        for head in range(n_heads.pop())
    }
    order = sorted(entered, key=lambda head: (-entered[head], head))
    names = {
        head: f"head {head}: " + ("never" if entered[head] < 0 else f"{entered[head]:.3g}")
        for head in order[:_NAMED_HEADS]
    }
    ax = given_or_new(ax, 3.2 + legend_height(list(names.values())))
    panel = panel_above(ax)
    for (way, _seed), walk in walks.items():
        x = [_ratio(row) for row in walk]
        scores = np.ma.masked_invalid([100 * number(row, "exact_match") for row in walk])
        place = ("best", "down", "up").index(way)
        panel.plot(
            x,
            scores,
            color=("black", COLOURS[0], COLOURS[5])[place],
            label=way,
            marker=MARKERS[place],
            linestyle=DASHES[place],
            linewidth=1.0,
        )
        for i, head in enumerate(order if way == ways[0] else []):
            looks = line_looks(i) if head in names else {"color": "#BBBBBB", "zorder": 1}
            ax.plot(x, [row["norms"][head] for row in walk], **looks, label=names.get(head))
    ax.set(xlabel="lambda / lambda_max (weaker to the right)", ylabel="norm of the head's Delta")
    panel.set(ylabel="exact\nmatch (%)", ylim=(-5, 105))
    weaker_to_the_right(ax, [_ratio(row) for row in rows])
    notes = [rows[0]["task"], f"layer {rows[0]['layer']}", count(len(seeds), "seed")]
    notes += [f"n = {_range(rows, 'n')} held-out examples", f"walk: {', '.join(ways)}"]
    panel.set_title(wrap("; ".join(notes)), loc="left", pad=16 if len(ways) > 1 else 6)
    if len(ways) > 1:
        legend_outside(panel, above=True)
    title = "head: largest lambda / lambda_max with norm > 0"
    title += " (any seed)" * (len(seeds) > 1)
    if len(order) > len(names):
        title += f"; grey: the {len(order) - len(names)} that enter last"
    legend_outside(ax, wrap(title))
    dress(panel)
    return dress(ax)


@styled
def ablation_bars(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """What each head of an intervention carries: exact match in bars, surprisal above.

    Heads stand in the order of the cumulative rows, strongest first. Lines across show the whole
    intervention and none. A bar that is missing in the rows is left out.

    Example:
        >>> ablation_bars(read_rows("figures/ablation.jsonl"))  # doctest: +SKIP

    Args:
        rows: Rows of kind "ablation" of one task and layer.
        ax: Where to draw (a panel is added above it), or None for a new figure.

    Returns:
        The axes of exact match; the panel of the answers' surprisal is `ax.child_axes[0]`.

    Raises:
        ValueError: There are no rows, they break the schema, or a row names the wrong number of
            heads.
    """
    drawn = (*_LINES, *_BARS)  # in this order, whatever the rows'
    rows = sorted(checked(rows, "ablation"), key=lambda row: drawn.index(row["variant"]))
    bars = [row for row in rows if row["variant"] in _BARS]
    for row in bars:
        if not row["heads"] or (row["variant"] != "cumulative" and len(row["heads"]) > 1):
            wanted = "at least one head" if row["variant"] == "cumulative" else "one head"
            raise ValueError(
                f"heads is {row['heads']} in a row of variant {row['variant']!r}; give {wanted}."
            )
    cumulative = [row["heads"] for row in bars if row["variant"] == "cumulative"]
    order: list[int] = max(cumulative, key=len, default=[])
    order = [*order, *sorted({row["heads"][-1] for row in bars} - set(order))]
    variants = [variant for variant in _BARS if variant in {row["variant"] for row in bars}]
    width = 0.84 / max(len(variants), 1)
    ax = given_or_new(ax, 3.2 + 0.13 * len(variants), width=WIDTH * (1 if len(order) <= 12 else 2))
    panel = panel_above(ax)
    for target, field, unit in ((ax, "exact_match", 100.0), (panel, "loss", 1.0)):
        for row in rows:
            height = unit * number(row, field)
            if math.isnan(height):
                continue
            if row["variant"] in _LINES:
                label, dashes = _LINES[row["variant"]]
                target.axhline(height, color="black", linestyle=dashes, label=label)
            else:
                label, colour, hatch = _BARS[row["variant"]]
                place = order.index(row["heads"][-1]) - 0.42
                place += (variants.index(row["variant"]) + 0.5) * width
                target.bar(
                    place,
                    height,
                    width,
                    facecolor=colour,
                    hatch=hatch,
                    edgecolor="black",
                    linewidth=0.4,
                    label=label,
                )
    ax.set(xlabel="head, strongest first", ylabel="exact match (%)", ylim=(0, 103))
    ax.set_xlim(-0.6, len(order) - 0.4)
    label_axis(ax.xaxis, order, 32)
    panel.set(ylabel="surprisal (nats)")
    notes = (
        f"{rows[0]['task']}; layer {rows[0]['layer']}; n = {_range(rows, 'n')} held-out examples"
    )
    panel.set_title(wrap(notes), loc="left")
    legend_outside(ax)
    dress(panel)
    return dress(ax)


_DRAWN_BY: dict[str, Callable[[Sequence[Row]], Axes | tuple[Axes, ...]]] = {
    "sweep": layer_sweep,
    "delta": delta_heatmaps,
    "path": regularisation_path,
    "attribution": attribution_map,
    "ablation": ablation_bars,
}


def draw(rows: Sequence[Row], kind: str | None = None) -> Figure:
    """Draw the figure that rows are for.

    Example:
        >>> save(draw(read_rows("figures/figure1.jsonl")), "figures/figure1.png")  # doctest: +SKIP

    Args:
        rows: Rows of one kind, or of several when `kind` says which to draw.
        kind: "sweep", "delta", "path", "attribution" or "ablation"; None takes the rows' own.

    Returns:
        A new figure.

    Raises:
        ValueError: There are no rows of that kind, they are of several kinds and none was chosen,
            or they break its schema.
    """
    if kind is None:
        kinds = sorted({str(row.get("kind")) for row in rows})
        if len(kinds) > 1:
            raise ValueError(f"rows are of several kinds, {kinds}; say which by kind (--kind).")
        kind = kinds[0] if kinds else "sweep"
    else:
        rows = [row for row in rows if row.get("kind") == kind]
    if kind not in _DRAWN_BY:
        raise ValueError(f"kind is {kind!r}, which no figure draws; known: {sorted(_DRAWN_BY)}.")
    axes = _DRAWN_BY[kind](rows)
    figure = (axes[0] if isinstance(axes, tuple) else axes).get_figure()
    if not isinstance(figure, Figure):
        raise TypeError(f"{kind} rows were drawn on {figure!r}, which is no figure.")
    return figure


def _ratio(row: Row) -> float:
    if row["lambda_max"] <= 0 or row["lambda"] < 0:
        raise ValueError(
            f"lambda is {row['lambda']!r} and lambda_max is {row['lambda_max']!r} in a row of kind "
            "'path'; give lambda >= 0 and lambda_max > 0."
        )
    return float(row["lambda"] / row["lambda_max"])


def _range(rows: Sequence[Row], field: str) -> str:
    low, high = min(row[field] for row in rows), max(row[field] for row in rows)
    return str(low) if low == high else f"{low} to {high}"
