"""Heat maps of small made-up rows: every value at its place, and what is not there is not drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tl_laai.canvas import save
from tl_laai.heatmaps import attribution_map, delta_heatmaps

Rows = list[dict[str, Any]]


def delta_rows(values: np.ndarray, penalty: str = "none") -> Rows:
    return [
        {"kind": "delta", "model": "tiny", "task": "antonym", "layer": 2, "head": head}
        | {"penalty": penalty, "values": row.tolist(), "norm": float(np.linalg.norm(row))}
        for head, row in enumerate(values)
    ]


def attribution_rows(values: np.ndarray) -> Rows:
    return [
        {"kind": "attribution", "model": "tiny", "task": "antonym", "layer": layer, "head": head}
        | {"value": float(values[layer, head])}
        for layer in range(values.shape[0])
        for head in range(values.shape[1])
    ]


def some_values(n_rows: int, n_columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_rows, n_columns)).round(3)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.randoms())
def test_values_stand_at_their_head_and_dimension_whatever_the_rows_order(
    n_heads: int, d_head: int, seed: int, random: Any
) -> None:
    values = some_values(n_heads, d_head, seed)
    rows = delta_rows(values)
    random.shuffle(rows)
    [ax] = delta_heatmaps(rows)
    [image] = ax.images
    assert np.asarray(image.get_array()).tolist() == values.tolist()
    low, high = image.get_clim()
    assert -low == high == (np.abs(values).max() or 1.0)


def test_a_weak_delta_beside_a_strong_one_is_pale() -> None:
    strong, weak = some_values(4, 8, 0), some_values(4, 8, 1) / 100
    without, penalised = delta_heatmaps([*delta_rows(weak, "group 0.3"), *delta_rows(strong)])
    assert without.get_title(loc="left").startswith("no penalty")
    assert penalised.get_title(loc="left").startswith("group 0.3")
    assert without.images[0].get_clim() == penalised.images[0].get_clim()


@pytest.mark.parametrize("n_panels", [1, 2, 3])
def test_titles_of_panels_side_by_side_do_not_meet(n_panels: int) -> None:
    penalties = ("none", "0.6 lambda_max", "0.9 lambda_max, relaxed")[:n_panels]
    rows = [row for name in penalties for row in delta_rows(some_values(9, 64, 0), name)]
    axes = delta_heatmaps(rows)
    figure = axes[0].figure
    figure.canvas.draw()
    boxes = [ax._left_title.get_window_extent() for ax in axes]  # type: ignore[attr-defined]  # no public name
    edges = [box.x0 for box in boxes[1:]] + [figure.bbox.x1]
    assert all(box.x1 < edge for box, edge in zip(boxes, edges, strict=True))


def test_more_panels_than_fit_beside_one_another_stand_in_rows(tmp_path: Path) -> None:
    penalties = ("none", "0.3 lambda_max", "0.6 lambda_max", "0.9 lambda_max", "1 lambda_max")
    rows = [row for name in penalties for row in delta_rows(some_values(4, 64, 0), name)]
    axes = delta_heatmaps(rows)
    figure = axes[0].figure
    save(figure, tmp_path / "x.png")  # which brings the layout to rest
    boxes = [ax.get_window_extent() for ax in axes]
    assert len({round(box.y0) for box in boxes}) == 2
    assert min(box.height for box in boxes) > 0.4 * figure.dpi  # inches
    titles = [ax._left_title.get_window_extent() for ax in axes]  # type: ignore[attr-defined]  # no public name
    assert all(title.y0 > box.y1 for title, box in zip(titles, boxes, strict=True))
    assert max(title.y1 for title in titles[3:]) < min(box.y0 for box in boxes[:3])


def test_heads_are_hatched_exactly_where_all_entries_are_zero() -> None:
    values = some_values(5, 8, 0)
    values[[1, 4]] = 0.0
    values[2, :7] = 0.0
    [ax] = delta_heatmaps(delta_rows(values))
    assert sorted(p.get_y() + 0.5 for p in ax.patches if p.get_hatch()) == [1, 4]
    assert "3 of 5 heads left" in ax.get_title(loc="left")
    assert f"{100 * 23 / 40:.1f} % of entries zero" in ax.get_title(loc="left")


def test_deltas_are_drawn_where_the_caller_says() -> None:
    axes = Figure().subplots(1, 2)
    rows = [*delta_rows(some_values(2, 3, 0)), *delta_rows(some_values(2, 3, 1), "l1 1")]
    assert delta_heatmaps(rows, list(axes)) == tuple(axes)
    with pytest.raises(ValueError, match="axes holds 1 axes, but rows hold penalties"):
        delta_heatmaps(rows, [axes[0]])


def test_a_delta_without_one_of_its_heads_is_refused() -> None:
    rows = [*delta_rows(some_values(3, 2, 0)), *delta_rows(some_values(3, 2, 1), "l1 1")[:2]]
    with pytest.raises(ValueError, match=r"rows with penalty 'l1 1' are not one delta"):
        delta_heatmaps(rows)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99), st.randoms())
def test_attributions_stand_at_their_layer_and_head_and_the_largest_is_framed(
    n_layers: int, n_heads: int, seed: int, random: Any
) -> None:
    values = np.abs(some_values(n_layers, n_heads, seed))
    values.flat[seed % values.size] = 9.0
    rows = attribution_rows(values)
    random.shuffle(rows)
    ax = attribution_map(rows)
    [image] = ax.images
    assert np.asarray(image.get_array()).T.tolist() == values.tolist()
    layer, head = divmod(seed % values.size, n_heads)
    assert {p.get_xy() for p in ax.patches} == {(layer - 0.5, head - 0.5)}
    title = " ".join(ax.get_title(loc="left").split())
    assert title.endswith(f"largest (framed): layer {layer}, head {head}")


def test_a_head_without_a_row_is_hatched_and_layers_keep_their_numbers() -> None:
    rows = [row for row in attribution_rows(np.ones((5, 2))) if row["layer"] in (1, 4)]
    rows = [row for row in rows if (row["layer"], row["head"]) != (4, 0)]
    ax = attribution_map(rows)
    assert [patch.get_xy() for patch in ax.patches if patch.get_hatch()] == [(0.5, -0.5)]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "4"]


def test_attributions_of_two_tasks_are_not_mixed() -> None:
    rows = attribution_rows(np.ones((2, 2)))
    with pytest.raises(ValueError, match="mix several of task"):
        attribution_map([*rows, rows[0] | {"task": "synonym"}])
