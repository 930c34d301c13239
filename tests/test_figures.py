"""Figures from small made-up rows: what they say, what they refuse, and the same bytes twice.

Rows here are invented; they show that a picture tells what its rows hold, and nothing else.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tl_laai.figures import (
    ablation_bars,
    attribution_map,
    delta_heatmaps,
    draw,
    layer_sweep,
    regularisation_path,
    save,
)

Rows = list[dict[str, Any]]


def sweep_rows(tasks: tuple[str, ...] = ("antonym", "synonym"), seeds: int = 3) -> Rows:
    return [
        {"kind": "sweep", "task": task, "layer": layer, "seed": seed, "penalty": "none"}
        | {"exact_match": (i + 1) * layer / 10 + seed / 100, "n": 50, "status": "converged"}
        for i, task in enumerate(tasks)
        for layer in range(4)
        for seed in range(seeds)
    ]


def delta_rows(n_heads: int = 3, d_head: int = 8) -> Rows:
    """Without a penalty every entry lives; with one, only the second half of head 1."""
    dense = np.linspace(-2, 1, n_heads * d_head).reshape(n_heads, d_head) + 0.01
    sparse = np.zeros_like(dense)
    sparse[1, d_head // 2 :] = 0.5
    return [
        {"kind": "delta", "model": "tiny", "task": "antonym", "layer": 2, "head": head}
        | {"penalty": penalty, "values": values.tolist(), "norm": float(np.linalg.norm(values))}
        for penalty, delta in (("group=0.3", sparse), ("none", dense))
        for head, values in enumerate(delta)
    ]


def path_rows(*directions: str, seeds: int = 1, zero: bool = False) -> Rows:
    """Head 2 enters first, then head 0; head 1 never does."""
    ratios = [1.0, 0.5, 0.25, 0.1] + [0.0] * zero
    return [
        {"kind": "path", "task": "antonym", "layer": 2, "seed": seed, "direction": direction}
        | {"lambda": 4 * ratio, "lambda_max": 4.0, "exact_match": 0.8 * (1 - ratio), "n": 50}
        | {"norms": [max(0.0, 0.4 - ratio), 0.0, max(0.0, 0.9 - ratio)], "status": "converged"}
        | {"objective": 1.0, "loss": 1.0}
        for direction in directions or ("down",)
        for seed in range(seeds)
        for ratio in ratios
    ]


def attribution_rows(n_layers: int = 5, n_heads: int = 2) -> Rows:
    return [
        {"kind": "attribution", "model": "tiny", "task": "antonym", "layer": layer, "head": head}
        | {"value": 9.0 if (layer, head) == (3, 1) else float(layer + head)}
        for layer in range(n_layers)
        for head in range(n_heads)
    ]


def ablation_rows(order: tuple[int, ...] = (2, 0, 1)) -> Rows:
    def row(variant: str, heads: list[int], score: float) -> dict[str, Any]:
        named = {"kind": "ablation", "task": "antonym", "layer": 2, "variant": variant}
        return named | {"heads": heads, "exact_match": score, "n": 50, "loss": 2 - score}

    rows = [row("all", sorted(order), 0.75), row("none", [], 0.125)]
    for i, head in enumerate(order):
        rows += [row("without", [head], 0.25 + i / 8), row("only", [head], 0.5 - i / 8)]
        rows += [row("cumulative", list(order[: i + 1]), 0.5 + i / 8)]
        rows += [row("zero", [head], 0.625), row("mean", [head], 0.7)]
    return rows


MADE: dict[str, Callable[[], Rows]] = {
    "sweep": sweep_rows,
    "delta": delta_rows,
    "path": path_rows,
    "attribution": attribution_rows,
    "ablation": ablation_rows,
}
kinds = pytest.mark.parametrize("kind", MADE)


def texts(figure: Figure) -> str:
    """Every text that the figure shows, after it was drawn, with its line breaks taken out."""
    figure.draw_without_rendering()
    found = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    return " | ".join(" ".join(text.split()) for text in found if text)


def written(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def hatched_rows(ax: Axes) -> list[float]:
    return sorted(patch.get_y() + 0.5 for patch in ax.patches if patch.get_hatch())


# --- what every figure keeps ---------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", ["price $1 to $2", "a$b_$", r"a \$ sign"])
def test_names_with_dollars_are_shown_as_they_are(kind: str, name: str) -> None:
    figure = draw([row | {"task": f"{name} {row['task']}"} for row in MADE[kind]()])
    figure.draw_without_rendering()
    shown = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    assert not any(is_maths for _, is_maths in shown)
    assert any(name in " ".join(text.split()) for text, _ in shown)


@pytest.mark.parametrize(
    ("kind", "suffix"), [*((kind, ".svg") for kind in MADE), ("delta", ".pdf"), ("sweep", ".png")]
)
def test_the_same_rows_give_the_same_bytes_twice(kind: str, suffix: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        save(draw(MADE[kind]()), tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


@kinds
def test_one_figure_saved_twice_is_one_picture(kind: str, tmp_path: Path) -> None:
    figure = draw(MADE[kind]())
    for name in ("first.png", "second.png"):
        save(figure, tmp_path / name)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_two_processes_draw_the_same_pixels_whatever_the_order_of_hashes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(written(sweep_rows()), encoding="utf-8")
    script = (
        "import sys; from tl_laai.figures import *; "
        "[save(draw(read_rows(sys.argv[1])), sys.argv[2] + s) for s in ('.png', '.svg')]; "
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, "rows.jsonl", f"picture{seed}"]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert np.array_equal(imread(tmp_path / "picture1.png"), imread(tmp_path / "picture2.png"))
    first, second = (tmp_path / f"picture{seed}.svg" for seed in "12")
    assert first.read_bytes() == second.read_bytes()


@kinds
def test_a_picture_depends_on_its_rows(kind: str, tmp_path: Path) -> None:
    rows = MADE[kind]()
    save(draw(rows), tmp_path / "before.png")
    field = {"delta": "values", "attribution": "value"}.get(kind, "exact_match")
    rows[-1][field] = [3.0] * 8 if field == "values" else 0.9
    save(draw(rows), tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


@kinds
def test_the_order_of_rows_does_not_matter(kind: str, tmp_path: Path) -> None:
    save(draw(MADE[kind]()), tmp_path / "there.png")
    save(draw(MADE[kind]()[::-1]), tmp_path / "back.png")
    assert np.array_equal(imread(tmp_path / "there.png"), imread(tmp_path / "back.png"))


@kinds
def test_a_new_figure_fits_a_column_and_no_text_is_too_small_or_cut_off(kind: str) -> None:
    figure = draw(MADE[kind]())
    assert figure.get_figwidth() == 3.3
    figure.draw_without_rendering()
    canvas = figure.bbox
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(shown) > 5
    for text in shown:
        assert text.get_fontsize() >= 7, text
        box = text.get_window_extent()
        if text.get_text() in _ticks_beyond_the_view(figure):
            continue
        assert box.x0 >= canvas.x0 - 1, text
        assert box.x1 <= canvas.x1 + 1, text
        assert box.y0 >= canvas.y0 - 1, text
        assert box.y1 <= canvas.y1 + 1, text


def _ticks_beyond_the_view(figure: Figure) -> set[str]:
    """Labels of ticks that matplotlib keeps in memory, but does not draw."""
    axes = [*figure.axes, *(child for ax in figure.axes for child in ax.child_axes)]
    hidden: set[str] = set()
    for axis in [axis for ax in axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {t.label1.get_text() for t in ticks if not low <= t.get_loc() <= high}
    return hidden


@pytest.mark.parametrize("rows", [sweep_rows(), path_rows("down", "up"), ablation_rows()])
def test_legends_cover_no_axes(rows: Rows) -> None:
    figure = draw(rows)
    figure.draw_without_rendering()
    [ax] = figure.axes
    panels = [ax, *ax.child_axes]
    legends = [panel.get_legend() for panel in panels if panel.get_legend()]
    assert legends
    for legend in legends:
        for panel in panels:
            assert not legend.get_window_extent().overlaps(panel.get_window_extent())


@kinds
def test_the_callers_style_and_figures_are_left_as_they_were(kind: str, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        save(draw(MADE[kind]()), tmp_path / "loud.png")
        assert dict(matplotlib.rcParams) == before
    save(draw(MADE[kind]()), tmp_path / "plain.png")
    assert (tmp_path / "loud.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (layer_sweep, "sweep"),
        (regularisation_path, "path"),
        (attribution_map, "attribution"),
        (ablation_bars, "ablation"),
    ],
)
def test_a_notebook_can_give_its_own_axes(function: Any, kind: str) -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert function(MADE[kind](), right) is right
    assert right.has_data()
    assert not left.has_data()
    assert right.xaxis.label.get_size() == 7
    assert isinstance(function(MADE[kind]()), Axes)


# --- Figure 1: the layer sweep -------------------------------------------------------------------


def test_a_sweep_draws_the_mean_of_seeds_and_the_average_of_tasks() -> None:
    ax = layer_sweep(sweep_rows())
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["antonym", "synonym", "average"]
    # The seeds 0, 1, 2 add 0, 1 and 2 points; the tasks rise by 10 and 20 points a layer.
    assert np.asarray(lines["synonym"].get_ydata()) == pytest.approx([1, 21, 41, 61])
    assert np.asarray(lines["average"].get_ydata()) == pytest.approx([1, 16, 31, 46])
    assert lines["average"].get_linewidth() > 2 * lines["antonym"].get_linewidth()
    [band] = ax.collections
    corners = band.get_paths()[0].vertices
    at_layer_2 = corners[corners[:, 0] == 2][:, 1]
    assert (at_layer_2.min(), at_layer_2.max()) == pytest.approx((30, 32))


def test_a_sweep_tells_its_examples_seeds_spread_and_penalty() -> None:
    told = texts(draw(sweep_rows()))
    assert "n = 50 held-out examples, 3 seeds; band: lowest to highest seed" in told
    assert "penalty" not in told
    penalised = [row | {"penalty": "group=0.3"} for row in sweep_rows(seeds=1)]
    penalised[0]["n"] = 40
    told = texts(draw(penalised))
    assert "n = 40 to 50 held-out examples, 1 seed; penalty: group=0.3" in told


def test_fits_that_failed_are_gaps_and_are_counted() -> None:
    rows = sweep_rows(seeds=1)
    rows[1] |= {"exact_match": None, "status": "diverged"}
    del rows[-1]
    ax = layer_sweep(rows)
    lines = {line.get_label(): np.ma.getmaskarray(line.get_ydata(orig=True)) for line in ax.lines}
    assert lines["antonym"].tolist() == [False, True, False, False]
    assert lines["average"].tolist() == [False, True, False, True]
    title = " ".join(ax.get_title(loc="left").split())
    assert title.endswith("2 of 8 fits missing; fits: 6 converged, 1 diverged")


def test_many_tasks_differ_in_more_than_colour() -> None:
    rows = [row | {"exact_match": 0.5} for row in sweep_rows(tuple("abcdefgh"), seeds=1)]
    ax = layer_sweep(rows)
    looks = [(line.get_marker(), line.get_linestyle()) for line in ax.lines[:-1]]
    assert len(set(looks)) == 8


def test_one_task_is_its_own_thick_line() -> None:
    [line] = layer_sweep(sweep_rows(("antonym",))).lines
    assert line.get_label() == "antonym"


def test_a_lone_layer_is_a_point_at_its_number() -> None:
    rows = [row for row in sweep_rows(("antonym",)) if row["layer"] == 1]
    axes = layer_sweep(rows)
    assert axes.lines[0].get_marker() == "o"
    assert axes.get_xticks().tolist() == [1]


# --- Figure 2: the values of Delta ---------------------------------------------------------------


def test_deltas_stand_side_by_side_on_one_symmetric_scale() -> None:
    without, penalised = delta_heatmaps(delta_rows())
    limits = {image.get_clim() for ax in (without, penalised) for image in ax.images}
    assert limits == {(-1.99, 1.99)}
    assert without.get_title(loc="left").startswith("no penalty")
    assert penalised.get_title(loc="left").startswith("group=0.3")
    assert np.asarray(penalised.images[0].get_array())[1].tolist() == [0.0] * 4 + [0.5] * 4


def test_heads_that_are_exactly_zero_are_hatched_and_counted() -> None:
    without, penalised = delta_heatmaps(delta_rows())
    assert hatched_rows(without) == []
    assert hatched_rows(penalised) == [0, 2]
    told = texts(draw(delta_rows()))
    assert "3 of 3 heads left 0.0 % of entries zero" in told
    assert "1 of 3 heads left 83.3 % of entries zero" in told  # 20 of 24
    assert "hatched: head exactly zero" in told
    assert "tiny, antonym, layer 2" in told


def test_a_tiny_entry_keeps_its_head_from_being_marked_as_zero() -> None:
    rows = delta_rows()
    rows[0]["values"][0] = 1e-300
    assert hatched_rows(delta_heatmaps(rows)[1]) == [2]


def test_a_delta_of_zeros_alone_is_drawn_as_such() -> None:
    rows = [row | {"values": [0.0] * 8} for row in delta_rows() if row["penalty"] != "none"]
    [ax] = delta_heatmaps(rows)
    assert hatched_rows(ax) == [0, 1, 2]
    assert ax.images[0].get_clim() == (-1.0, 1.0)


@pytest.mark.parametrize("field", ["head", "values"])
def test_a_delta_that_lacks_a_head_or_an_entry_is_refused(field: str) -> None:
    rows = delta_rows()
    if field == "head":
        del rows[1]
    else:
        rows[1]["values"] = rows[1]["values"][:-1]
    with pytest.raises(ValueError, match=r"rows with penalty 'group=0\.3' are not one delta"):
        delta_heatmaps(rows)


def test_each_penalty_needs_axes_of_its_own() -> None:
    with pytest.raises(ValueError, match="axes holds 1 axes, but rows hold penalties"):
        delta_heatmaps(delta_rows(), [Figure().subplots()])


# --- the path ------------------------------------------------------------------------------------


def test_heads_are_told_in_the_order_in_which_they_enter() -> None:
    ax = regularisation_path(path_rows())
    assert [line.get_label() for line in ax.lines] == [
        "head 2: 0.5",
        "head 0: 0.25",
        "head 1: never",
    ]
    assert ax.xaxis_inverted()
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xdata() == pytest.approx([1.0, 0.5, 0.25, 0.1])
    [panel] = ax.child_axes
    assert np.asarray(panel.lines[0].get_ydata()) == pytest.approx([0.0, 40.0, 60.0, 72.0])
    assert panel.get_xlim() == ax.get_xlim()


def test_every_walk_has_its_scores_and_the_best_one_its_norms() -> None:
    rows = path_rows("up", "best", "down")
    for row in rows:
        if row["direction"] == "best":
            row["norms"] = [7.0, 8.0, 9.0]
    ax = regularisation_path(rows)
    assert [line.get_label() for line in ax.child_axes[0].lines] == ["best", "down", "up"]
    assert sorted({float(y) for line in ax.lines for y in line.get_ydata()}) == [7, 8, 9]


def test_seeds_are_drawn_one_by_one_and_named_once() -> None:
    ax = regularisation_path(path_rows(seeds=3))
    assert len(ax.lines) == 9
    assert len(ax.get_legend().get_texts()) == 3
    assert "2 seeds" not in texts(draw(path_rows(seeds=3)))
    assert "3 seeds" in texts(draw(path_rows(seeds=3)))


def test_a_point_without_penalty_has_a_place_on_the_axis() -> None:
    ax = regularisation_path(path_rows(zero=True))
    left, right = ax.get_xlim()
    assert left > 1 > 0 > right
    assert 0.0 in ax.get_xticks()
    assert "| 0 |" in texts(draw(path_rows(zero=True)))


def test_beyond_twelve_heads_the_late_ones_are_grey_and_counted() -> None:
    rows = path_rows()
    for row in rows:
        row["norms"] = [max(0.0, 0.9 - head / 20 - row["lambda"] / 4) for head in range(15)]
    ax = regularisation_path(rows)
    assert sum(line.get_color() == "#BBBBBB" for line in ax.lines) == 3
    assert "grey: the 3 that enter last" in texts(draw(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda_max": 0.0}, r"lambda_max is 0\.0 .*give lambda >= 0 and lambda_max > 0"),
        ({"norms": [1.0]}, r"rows hold norms of \[1, 3\] heads"),
        ({"direction": "sideways"}, r"direction = 'sideways'; it must be one of \('down', 'up'"),
    ],
)
def test_a_path_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    rows = path_rows()
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        regularisation_path(rows)


# --- the attribution map -------------------------------------------------------------------------


def test_the_largest_attribution_is_framed_and_named() -> None:
    ax = attribution_map(attribution_rows())
    assert np.asarray(ax.images[0].get_array())[1].tolist() == [1.0, 2.0, 3.0, 9.0, 5.0]
    frames = {patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle)}
    assert frames == {(2.5, 0.5)}
    assert "tiny, antonym; largest (framed): layer 3, head 1" in texts(draw(attribution_rows()))


def test_heads_without_a_row_are_hatched_not_zero() -> None:
    rows = attribution_rows()
    ax = attribution_map(rows[1:])
    assert [patch.get_xy() for patch in ax.patches if patch.get_hatch()] == [(-0.5, -0.5)]
    assert "hatched: no row" in texts(draw(rows[1:]))
    assert "hatched" not in texts(draw(rows))


# --- the ablation bars ---------------------------------------------------------------------------


def test_bars_stand_by_head_in_the_order_of_strength() -> None:
    ax = ablation_bars(ablation_rows())
    [panel] = ax.child_axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "0", "1"]
    assert len(ax.patches) == len(panel.patches) == 15
    first = sorted(ax.patches, key=lambda bar: bar.get_x())[:5]
    assert [bar.get_height() for bar in first] == pytest.approx([25, 50, 50, 62.5, 70])
    assert len({bar.get_hatch() for bar in first}) == 5
    assert sorted(line.get_ydata()[0] for line in ax.lines) == [12.5, 75]
    assert sorted(line.get_ydata()[0] for line in panel.lines) == [1.25, 1.875]


def test_a_variant_that_was_not_run_has_no_place_in_the_legend() -> None:
    told = texts(draw([row for row in ablation_rows() if row["variant"] in ("all", "only")]))
    assert "this head alone" in told
    assert "without this head" not in told
    assert "no intervention" not in told


def test_a_score_that_is_missing_has_no_bar() -> None:
    rows = ablation_rows()
    rows[2]["exact_match"] = None
    rows[3]["loss"] = math.inf
    ax = ablation_bars(rows)
    assert (len(ax.patches), len(ax.child_axes[0].patches)) == (14, 14)


def test_an_ablation_of_no_head_or_of_several_is_refused() -> None:
    for heads, variant in (([], "cumulative"), ([0, 1], "without")):
        rows = [*ablation_rows(), ablation_rows()[2] | {"variant": variant, "heads": heads}]
        with pytest.raises(ValueError, match=rf"in a row of variant '{variant}'; give"):
            ablation_bars(rows)


# --- choosing, refusing, saving ------------------------------------------------------------------


def test_the_kind_of_mixed_rows_must_be_chosen() -> None:
    rows = [*sweep_rows(), *path_rows()]
    with pytest.raises(ValueError, match=r"several kinds, \['path', 'sweep'\]; say which"):
        draw(rows)
    assert "held-out examples, 3 seeds" in texts(draw(rows, "sweep"))
    with pytest.raises(ValueError, match="none of kind 'delta'"):
        draw(rows, "delta")
    with pytest.raises(ValueError, match=r"rows\[24\] is of kind 'path'; give only 'sweep'"):
        layer_sweep(rows)


@pytest.mark.parametrize("rows", [[{"kind": "opinion"}], [{"kind": "evaluation", "n": 3}]])
def test_rows_that_no_figure_draws_are_refused_with_the_known_kinds(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"which no figure draws; known: \['ablation', 'attrib"):
        draw(rows)


@kinds
def test_no_rows_make_no_picture(kind: str) -> None:
    with pytest.raises(ValueError, match=f"none of kind '{kind}'; give at least one"):
        draw([], kind)


@kinds
def test_a_row_that_comes_twice_is_refused(kind: str) -> None:
    rows = MADE[kind]()
    with pytest.raises(ValueError, match=rf"rows\[{len(rows)}\] of kind '{kind}' comes twice"):
        draw([*rows, rows[0]])


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("sweep", "penalty", "group=0.3"),
        ("delta", "model", "another"),
        ("path", "task", "synonym"),
        ("attribution", "task", "synonym"),
        ("ablation", "layer", 5),
    ],
)
def test_what_a_figure_does_not_name_is_never_mixed(kind: str, field: str, value: object) -> None:
    rows = MADE[kind]()
    with pytest.raises(ValueError, match=f"mix several of {field}: .*choose one"):
        draw([*rows, rows[0] | {field: value}])


@pytest.mark.parametrize(
    ("kind", "field", "value", "told"),
    [
        ("sweep", "exact_match", 83.0, "a share between 0 and 1"),
        ("sweep", "layer", 1.5, "int"),
        ("sweep", "seed", True, "int"),
        ("sweep", "task", None, "str"),
        ("delta", "values", [1.0, math.nan] * 4, "a list of numbers"),
        ("delta", "values", "0.1", "a list of numbers"),
        ("attribution", "value", math.inf, "float"),
        ("ablation", "variant", "half", "one of"),
    ],
)
def test_a_field_that_breaks_its_schema_is_named(
    kind: str, field: str, value: object, told: str
) -> None:
    rows = MADE[kind]()
    rows[1][field] = value
    with pytest.raises(ValueError, match=rf"rows\[1\] of kind '{kind}' has {field} = .*{told}"):
        draw(rows)
    del rows[1][field]
    with pytest.raises(ValueError, match=f"has {field} = 'nothing'"):
        draw(rows)


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.jpg'; end it in one of \.png, \.svg, \.pdf"):
        save(draw(sweep_rows()), tmp_path / "x.jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "picture.png"
    save(draw(sweep_rows()), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def no_space(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(draw(path_rows()), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_figure_without_layout_loses_no_legend(tmp_path: Path) -> None:
    figure = Figure(figsize=(3.0, 2.0))
    layer_sweep(sweep_rows(), figure.subplots())
    save(figure, tmp_path / "loose.png")
    height = imread(tmp_path / "loose.png").shape[0]
    assert height > 2.0 * 200 + 20  # it grew to hold what hangs out
