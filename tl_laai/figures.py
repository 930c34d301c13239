"""Pictures drawn from rows alone: rows in, matplotlib out, no model and no torch.

A row is a plain dict, one JSON object a line of a file, and says its `kind`:

- `sweep`, a fit: `task`, `layer`, `seed`, `penalty` ("none" or its text), `exact_match` (a share,
  or null), `n` (held-out examples), `status` (of the solver);
- `delta`, a head: `model`, `task`, `layer`, `head`, `penalty`, `values` (`[d_head]`), `norm`;
- `path`, a point: `task`, `layer`, `seed`, `direction` ("down", "up" or "best"), `lambda`,
  `lambda_max`, `norms` (`[n_heads]`), `exact_match`, `n`, `objective`, `loss`, `status`;
- `attribution`, a head of a layer: `model`, `task`, `layer`, `head`, `value`;
- `ablation`, a variant: `task`, `layer`, `variant`, `heads`, `exact_match`, `n`, `loss`. The
  intervention in "all" its heads, or not at all ("none"); "without" one head, with "only" one, or
  "cumulative" with its strongest ones, strongest first; or the model's own output of one head
  replaced by "zero" or its "mean".

More fields may stand in a row. A row that breaks its schema, that comes twice, or that belongs to
another picture is refused: a figure never averages over what it does not name. Sizes are for
print at column width, 3.3 inches; colours are those of Okabe and Ito ("Color universal design",
2008), with markers and hatches beside them.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import textwrap
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, cast

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2DBase, ScaledTranslation, blended_transform_factory

from tl_laai.metrics import sparsity

Row: TypeAlias = Mapping[str, Any]
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Schema:
    """What rows of one kind must hold, have in common, and have no two of."""

    fields: dict[str, Any]  # a type, or the texts allowed
    common: tuple[str, ...]
    unique: tuple[str, ...]


# variant -> what it is called, its colour, its hatch
_BARS = {
    "without": ("without this head", "#0072B2", ""),
    "only": ("this head alone", "#E69F00", "////"),
    "cumulative": ("this head and those before it", "#56B4E9", "...."),
    "zero": ("model's own output zeroed", "#CC79A7", "xxxx"),
    "mean": ("model's own output at its mean", "#FFFFFF", "\\\\\\\\"),
}
_LINES = {"all": ("whole intervention", "-"), "none": ("no intervention", ":")}
_SCORED = {"exact_match": float, "n": int}
_HEAD = {"model": str, "task": str, "layer": int, "head": int}
_SCHEMAS = {
    "sweep": _Schema(
        {"task": str, "layer": int, "seed": int, "penalty": str, **_SCORED, "status": str},
        common=("penalty",),
        unique=("task", "layer", "seed"),
    ),
    "delta": _Schema(
        {**_HEAD, "penalty": str, "values": list, "norm": float},
        common=("model", "task", "layer"),
        unique=("penalty", "head"),
    ),
    "path": _Schema(
        {"task": str, "layer": int, "seed": int, "direction": ("down", "up", "best")}
        | {"lambda": float, "lambda_max": float, "norms": list, **_SCORED},
        common=("task", "layer"),
        unique=("direction", "seed", "lambda"),
    ),
    "attribution": _Schema(
        {**_HEAD, "value": float}, common=("model", "task"), unique=("layer", "head")
    ),
    "ablation": _Schema(
        {
            "task": str,
            "layer": int,
            "variant": (*_LINES, *_BARS),
            "heads": list,
            **_SCORED,
            "loss": float,
        },
        common=("task", "layer"),
        unique=("variant", "heads"),
    ),
}
# What a fit that failed could not tell; it is left out of the picture, and the picture says so.
_MAY_BE_MISSING = {"exact_match", "loss"}

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
_DIVERGING = LinearSegmentedColormap.from_list(
    "blue_white_orange", ["#00395A", "#0072B2", "#FFFFFF", "#D55E00", "#6B2F00"]
)
_NAMED_HEADS = 12  # more lines than this cannot be told apart
_WIDTH = 3.3
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


def _styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a function in our style whatever the caller's is, which is as before afterwards."""

    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with style.context(_STYLE, after_reset=True):
            return draw(*args, **kwargs)

    return styled


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read rows from a file with one JSON object a line.

    Example:
        >>> rows = read_rows("figures/figure1.jsonl")  # doctest: +SKIP

    Args:
        path: A file in UTF-8; blank lines are skipped.

    Returns:
        The rows in the file's order, of whatever kinds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no rows, its last line is cut off, or a line is not a row.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a file of rows: it is not text in UTF-8.") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no rows; give a file with one JSON object a line.")
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == lines[-1][0] and rows and not text.endswith("\n"):
                raise ValueError(
                    f"{path}, line {number}: the last line is cut off ({line[:40]!r}); delete it, "
                    "or run what wrote the file again."
                ) from error
            raise ValueError(f"{path}, line {number} is not JSON: {line[:40]!r}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise ValueError(
                f'{path}, line {number} is not a row, an object with a "kind": {line[:40]!r}.'
            )
        rows.append(row)
    return rows


@_styled
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
    rows = _checked(rows, "sweep")
    tasks, layers, seeds = (_values(rows, field) for field in ("task", "layer", "seed"))
    scores = np.full((len(tasks), len(layers), len(seeds)), np.nan)
    for row in rows:
        place = (tasks.index(row["task"]), layers.index(row["layer"]), seeds.index(row["seed"]))
        scores[place] = 100 * _number(row, "exact_match")
    ax = _axes(ax, 2.1 + _legend_height([*(_wrap(task, 48) for task in tasks), "average"]))
    means = np.ma.masked_invalid(scores).mean(axis=2)
    if len(tasks) > 1:
        for i, task in enumerate(tasks):
            ax.plot(layers, means[i], **_line(i), label=_wrap(task, 48))
    average = np.ma.masked_invalid(scores.mean(axis=0))
    label = "average" if len(tasks) > 1 else _wrap(tasks[0], 48)
    ax.plot(layers, average.mean(axis=1), color="black", linewidth=2.2, label=label, zorder=3)
    ax.fill_between(
        layers, average.min(axis=1), average.max(axis=1), color="black", alpha=0.18, linewidth=0
    )
    ax.set(xlabel="layer", ylabel="exact match (%)")
    _percent(ax, np.ma.masked_invalid(scores))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    notes = [f"n = {_range(rows, 'n')} held-out examples, {_count(len(seeds), 'seed')}"]
    notes += ["band: lowest to highest seed"] * (len(seeds) > 1)
    if rows[0]["penalty"] != "none":
        notes.append(f"penalty: {rows[0]['penalty']}")
    if n_missing := int(np.isnan(scores).sum()):
        notes.append(f"{n_missing} of {scores.size} fits missing")
    if len(statuses := Counter(row["status"] for row in rows)) > 1:
        told = ", ".join(f"{n} {name}" for name, n in sorted(statuses.items()))
        notes.append(f"fits: {told}")
    ax.set_title(_wrap("; ".join(notes)), loc="left")
    _legend(ax)
    return _dress(ax)


@_styled
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
    rows = _checked(rows, "delta")
    penalties = sorted(_values(rows, "penalty"), key=lambda text: (text != "none", text))
    heads = _values(rows, "head")
    if axes is not None and len(axes) != len(penalties):
        raise ValueError(f"axes holds {len(axes)} axes, but rows hold penalties {penalties}.")
    panels = []
    for penalty in penalties:
        found = {row["head"]: row["values"] for row in rows if row["penalty"] == penalty}
        if len({len(values) for values in found.values()}) != 1 or sorted(found) != heads:
            raise ValueError(
                f"rows with penalty {penalty!r} are not one delta: heads {sorted(found)} of "
                f"{heads}, with {[len(values) for values in found.values()]} values."
            )
        panels.append(np.array([found[head] for head in heads], dtype=np.float64))
    if axes is None:
        figure = _figure(min(max(1.4 + 0.16 * len(heads), 2.1), 4.0))
        axes = tuple(figure.subplots(1, len(penalties), sharey=True, squeeze=False)[0])
        title = f"{rows[0]['model']}, {rows[0]['task']}, layer {rows[0]['layer']}"
        figure.suptitle(_wrap(title), x=0.02, ha="left")
    limit = max(float(np.abs(panel).max()) for panel in panels) or 1.0
    scale: dict[str, Any] = {"cmap": _DIVERGING, "vmin": -limit, "vmax": limit}
    for ax, penalty, panel in zip(axes, penalties, panels, strict=True):
        image = ax.imshow(panel, aspect="auto", interpolation="none", **scale)
        for place in np.flatnonzero(~panel.any(axis=1)):
            ax.add_patch(_hatched((-0.5, place - 0.5), panel.shape[1]))
        counts = sparsity(panel)
        name = "no penalty" if penalty == "none" else penalty
        ax.set_title(
            f"{_wrap(name, 54 // len(penalties))}\n"
            f"{counts.n_heads_nonzero} of {_count(counts.n_heads, 'head')} left\n"
            f"{100 * counts.share_zero:.1f} % of entries zero",
            loc="left",
        )
        ax.set_xlabel("dimension")
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        _label(ax.yaxis, heads)
        _dress(ax)
    axes[0].set_ylabel("head")
    zero = [ax for ax, panel in zip(axes, panels, strict=True) if not panel.any(axis=1).all()]
    label = "value of Delta" + ("; hatched: head exactly zero" if zero else "")
    bar = axes[0].figure.colorbar(image, ax=list(axes), orientation="horizontal", aspect=40)
    bar.set_label(label, size=7)
    bar.ax.tick_params(labelsize=7)
    return tuple(axes)


@_styled
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
    rows = sorted(_checked(rows, "path"), key=lambda row: -_ratio(row))
    n_heads = {len(row["norms"]) for row in rows}
    if len(n_heads) != 1 or n_heads == {0}:
        raise ValueError(f"rows hold norms of {sorted(n_heads)} heads; give those of one model.")
    ways = [way for way in ("best", "down", "up") if way in _values(rows, "direction")]
    seeds = _values(rows, "seed")
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
    ax = _axes(ax, 3.2 + _legend_height(list(names.values())))
    panel = _panel_above(ax)
    for (way, _seed), walk in walks.items():
        x = [_ratio(row) for row in walk]
        scores = np.ma.masked_invalid([100 * _number(row, "exact_match") for row in walk])
        place = ("best", "down", "up").index(way)
        panel.plot(
            x,
            scores,
            color=("black", _COLOURS[0], _COLOURS[5])[place],
            label=way,
            marker=_MARKERS[place],
            linestyle=_DASHES[place],
            linewidth=1.0,
        )
        for i, head in enumerate(order if way == ways[0] else []):
            looks = _line(i) if head in names else {"color": "#BBBBBB", "zorder": 1}
            ax.plot(x, [row["norms"][head] for row in walk], **looks, label=names.get(head))
    ax.set(xlabel="lambda / lambda_max (weaker to the right)", ylabel="norm of the head's Delta")
    panel.set(ylabel="exact\nmatch (%)", ylim=(-5, 105))
    _weaker_to_the_right(ax, [_ratio(row) for row in rows])
    notes = [rows[0]["task"], f"layer {rows[0]['layer']}", _count(len(seeds), "seed")]
    notes += [f"n = {_range(rows, 'n')} held-out examples", f"walk: {', '.join(ways)}"]
    panel.set_title(_wrap("; ".join(notes)), loc="left", pad=16 if len(ways) > 1 else 6)
    if len(ways) > 1:
        _legend(panel, above=True)
    title = "head: largest lambda / lambda_max at which it is in"
    title += " (any seed)" * (len(seeds) > 1)
    if len(order) > len(names):
        title += f"; grey: the {len(order) - len(names)} that enter last"
    _legend(ax, _wrap(title))
    _dress(panel)
    return _dress(ax)


@_styled
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
    rows = _checked(rows, "attribution")
    layers, heads = _values(rows, "layer"), _values(rows, "head")
    values = np.full((len(heads), len(layers)), np.nan)
    for row in rows:
        values[heads.index(row["head"]), layers.index(row["layer"])] = row["value"]
    ax = _axes(ax, min(1.5 + 0.11 * len(heads), 4.0))
    image = ax.imshow(values, aspect="auto", interpolation="none", cmap="cividis")
    for head, layer in np.argwhere(np.isnan(values)):
        ax.add_patch(_hatched((layer - 0.5, head - 0.5), 1))
    head, layer = np.unravel_index(np.nanargmax(values), values.shape)
    corner = (layer - 0.5, head - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=2.4, zorder=3))
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.0, zorder=4))
    largest = f"largest (framed): layer {layers[layer]}, head {heads[head]}"
    ax.set_title(_wrap(f"{rows[0]['model']}, {rows[0]['task']}; {largest}"), loc="left")
    ax.set(xlabel="layer", ylabel="head")
    _label(ax.xaxis, layers, 20)
    _label(ax.yaxis, heads)
    bar = ax.figure.colorbar(image, ax=ax, orientation="horizontal", aspect=40)
    bar.set_label("attribution" + "; hatched: no row" * bool(np.isnan(values).any()), size=7)
    bar.ax.tick_params(labelsize=7)
    return _dress(ax)


@_styled
def ablation_bars(rows: Sequence[Row], ax: Axes | None = None) -> Axes:
    """What each head of an intervention carries: exact match in bars, loss above.

    Heads stand in the order of the cumulative rows, strongest first. Lines across show the whole
    intervention and none. A bar that is missing in the rows is left out.

    Example:
        >>> ablation_bars(read_rows("figures/ablation.jsonl"))  # doctest: +SKIP

    Args:
        rows: Rows of kind "ablation" of one task and layer.
        ax: Where to draw (a panel is added above it), or None for a new figure.

    Returns:
        The axes of exact match; the panel of the loss is `ax.child_axes[0]`.

    Raises:
        ValueError: There are no rows, they break the schema, or a row names the wrong number of
            heads.
    """
    rows = _checked(rows, "ablation")
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
    ax = _axes(ax, 3.2 + 0.13 * len(variants), width=_WIDTH * (1 if len(order) <= 12 else 2))
    panel = _panel_above(ax)
    for target, field, unit in ((ax, "exact_match", 100.0), (panel, "loss", 1.0)):
        for row in rows:
            height = unit * _number(row, field)
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
    _label(ax.xaxis, order, 32)
    panel.set(ylabel="loss")
    notes = (
        f"{rows[0]['task']}; layer {rows[0]['layer']}; n = {_range(rows, 'n')} held-out examples"
    )
    panel.set_title(_wrap(notes), loc="left")
    _legend(ax)
    _dress(panel)
    return _dress(ax)


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
            raise ValueError(f"rows are of several kinds, {kinds}; say which with kind=...")
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


@_styled
def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes.

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
    # A figure laid out by us keeps its width; in another nothing outside the axes may be cut off.
    bounds = "tight" if figure.get_layout_engine() is None else None
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


def _checked(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows, all of one kind and as its schema says, or an error that names the first fault."""
    schema = _SCHEMAS[kind]
    if not rows:
        raise ValueError(f"rows holds none of kind {kind!r}; give at least one.")
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if row.get("kind") != kind:
            raise ValueError(f"rows[{number}] is of kind {row.get('kind')!r}; give only {kind!r}.")
        for field, allowed in schema.fields.items():
            if not (_fits(row.get(field), allowed) or _is_missing(row, field)):
                told = allowed.__name__ if isinstance(allowed, type) else f"one of {allowed}"
                raise ValueError(
                    f"rows[{number}] of kind {kind!r} has {field} = {row.get(field, 'nothing')!r}; "
                    f"it must be {told.replace('list', 'a list of numbers')}."
                )
        name = json.dumps({field: row[field] for field in schema.unique})
        if name in seen:
            raise ValueError(f"rows[{number}] of kind {kind!r} comes twice: {name}.")
        seen.add(name)
    for field in schema.common:
        if len(values := _values(rows, field)) > 1:
            raise ValueError(f"rows of kind {kind!r} mix several of {field}: {values}; choose one.")
    return list(rows)


def _fits(value: object, allowed: Any) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if allowed is list:
        return isinstance(value, list) and all(_fits(entry, float) for entry in value)
    if allowed is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if allowed is int else int | float):
        return False
    return math.isfinite(value)


def _is_missing(row: Row, field: str) -> bool:
    """Whether a row says that it has no such number: null, or a loss that went out of bounds."""
    value = row.get(field, "")
    return field in _MAY_BE_MISSING and (
        value is None or (isinstance(value, float) and not math.isfinite(value))
    )


def _number(row: Row, field: str) -> float:
    return math.nan if _is_missing(row, field) else float(row[field])


def _values(rows: Sequence[Row], field: str) -> list[Any]:
    return sorted({row[field] for row in rows})


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


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _wrap(text: str, width: int = 50) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def _figure(height: float, width: float = _WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Axes | None, height: float, width: float = _WIDTH) -> Axes:
    return _figure(height, width).subplots() if ax is None else ax


def _panel_above(ax: Axes) -> Axes:
    """A panel as wide as `ax` above it, of fixed height: else no layout would come to rest."""
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(0, 1, cast(Affine2DBase, ax.transAxes))
    across_and_up = blended_transform_factory(ax.transAxes, inches)
    panel = ax.inset_axes((0.0, 0.12, 1.0, 0.75), transform=across_and_up, sharex=ax)
    panel.tick_params(labelbottom=False)
    return panel


def _weaker_to_the_right(ax: Axes, ratios: Sequence[float]) -> None:
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


def _percent(ax: Axes, scores: Any) -> None:
    """An axis of percentages from 0 up to 100, or to the next ten above low scores."""
    top = min(100.0, max(20.0, 10 * math.ceil(float(np.ma.filled(np.ma.max(scores), 0)) / 10)))
    ax.set_ylim(-0.03 * top, 1.03 * top)


def _dress(ax: Axes) -> Axes:
    """Fix what matplotlib would read from the style in force when the figure is saved."""
    ax.tick_params(labelsize=7, width=0.6, length=2.5)
    return ax


def _line(i: int) -> dict[str, Any]:
    """The looks of line `i`: colours, markers and dashes turn at different lengths."""
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "linewidth": 0.9,
        "markersize": 2.8,
    }


def _hatched(corner: tuple[float, float], width: float) -> Rectangle:
    return Rectangle(
        corner, width, 1, facecolor="#F2F2F2", edgecolor="#8C8C8C", hatch="//////", linewidth=0.0
    )


def _label(axis: Any, labels: Sequence[int], most: int = 16) -> None:
    """Write labels at 0, 1, 2, ...: all of them, or every second, third, ... where they crowd."""
    step = -(-len(labels) // most) or 1
    axis.set_ticks(range(0, len(labels), step), labels=[str(label) for label in labels[::step]])


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 3 if longest <= 9 else 2 if longest <= 18 else 1


def _legend_height(labels: Sequence[str]) -> float:
    return 0.14 * math.ceil(sum(1 + text.count("\n") for text in labels) / _legend_columns(labels))


def _legend(ax: Axes, title: str | None = None, *, above: bool = False) -> None:
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
