"""The look that all figures share: the caller's style is left alone, files are the same twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tl_laai import canvas


@canvas.styled
def lines(names: list[str], height: float = 2.0, *, legend: str = "") -> Figure:
    figure = canvas.new_figure(height)
    ax = figure.subplots()
    for i, name in enumerate(names):
        ax.plot([0, 1], [i, i + 1], label=name, **canvas.line_looks(i))
    ax.set(xlabel="layer", ylabel="score")
    if legend:
        canvas.legend_outside(ax, above=legend == "above")
    return figure


def luminance(colour: str) -> float:
    """Relative luminance of a colour, as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_styled_function_has_our_style_and_the_callers_is_back_afterwards() -> None:
    @canvas.styled
    def seen(fail: bool) -> float:
        if fail:
            raise KeyError("failed")
        return float(matplotlib.rcParams["font.size"])

    with matplotlib.rc_context({"font.size": 33}):
        assert seen(False) == 7.0
        with pytest.raises(KeyError):
            seen(True)
        assert matplotlib.rcParams["font.size"] == 33


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_the_same_figure_makes_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        canvas.save(lines(["one", "two"]), tmp_path / "new" / f"{name}{suffix}")
    first, second = ((tmp_path / "new" / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_a_picture_is_a_column_wide_at_two_hundred_dots_an_inch(tmp_path: Path) -> None:
    canvas.save(lines(["one"], height=1.5), tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[:2] == (300, round(200 * canvas.WIDTH))


def test_an_ending_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end it in one of \.png, \.svg, \.pdf"):
        canvas.save(lines(["one"]), tmp_path / "figure.jpg")
    assert not list(tmp_path.iterdir())


def test_lines_differ_in_colour_marker_and_dashes_for_as_long_as_can_be() -> None:
    looks = [canvas.line_looks(i) for i in range(50)]
    told = [(look["color"], look["marker"], look["linestyle"]) for look in looks]
    assert len(set(told)) == len(told)
    for one, other in itertools.pairwise(looks):
        assert one["color"] != other["color"]
        assert one["marker"] != other["marker"]


def test_every_ink_stands_out_from_white_paper() -> None:
    for colour in canvas.COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) > 2.0, colour


def test_both_signs_of_the_diverging_map_are_as_dark_and_zero_is_white() -> None:
    low, middle, high = (canvas.DIVERGING(value) for value in (0.0, 0.5, 1.0))
    assert min(middle[:3]) > 0.99
    assert abs(sum(low[:3]) - sum(high[:3])) < 0.3


@pytest.mark.parametrize(
    ("ratios", "scale"), [([1.0, 0.5, 0.05], "log"), ([1.0, 0.5, 0.0], "symlog"), ([1.0], "log")]
)
def test_the_penalty_weakens_to_the_right_and_zero_has_a_place(
    ratios: list[float], scale: str
) -> None:
    ax = canvas.new_figure(2.0).subplots()
    canvas.weaker_to_the_right(ax, ratios)
    left, right = ax.get_xlim()
    assert left > max(ratios)
    assert right < min(ratios)
    assert ax.get_xscale() == scale
    assert set(ax.get_xticks()) & set(ratios)


@pytest.mark.parametrize(
    ("scores", "top"), [([3.0], 20.0), ([41.0, 5.0], 50.0), ([99.0], 100.0), ([100.0], 100.0)]
)
def test_a_percent_axis_starts_at_zero_and_ends_at_the_next_ten(
    scores: list[float], top: float
) -> None:
    ax = canvas.new_figure(2.0).subplots()
    canvas.percent_axis(ax, scores)
    low, high = ax.get_ylim()
    assert low < 0 < max(scores) < high
    assert high == pytest.approx(1.03 * top)


@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_crowded_labels_are_thinned_evenly(count: int) -> None:
    ax = canvas.new_figure(2.0).subplots()
    canvas.label_axis(ax.xaxis, [10 * i for i in range(count)])
    ticks = list(ax.get_xticks())
    assert len(ticks) <= 16
    assert [text.get_text() for text in ax.get_xticklabels()] == [str(10 * int(t)) for t in ticks]
    assert ticks[0] == 0
    assert len({b - a for a, b in itertools.pairwise(ticks)}) <= 1


@pytest.mark.parametrize("legend", ["above", "below"])
@pytest.mark.parametrize("names", [["a"], [f"a task {i}" for i in range(7)], ["x" * 40, "y"]])
def test_a_legend_stands_outside_the_axes_and_inside_the_figure(
    names: list[str], legend: str
) -> None:
    figure = lines(names, 2.0 + canvas.legend_height(names), legend=legend)
    [ax] = figure.axes
    figure.draw_without_rendering()
    drawn = ax.get_legend()
    assert drawn is not None
    box = drawn.get_window_extent()
    assert not box.overlaps(ax.get_window_extent())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert [text.get_text() for text in drawn.get_texts()] == names


def test_a_name_drawn_by_many_lines_stands_in_the_legend_once() -> None:
    figure = lines(["head 1", "head 1", "head 2"], legend="below")
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["head 1", "head 2"]


def test_a_panel_above_shares_its_axis_and_covers_nothing() -> None:
    figure = lines(["one"], height=3.0)
    [ax] = figure.axes
    panel = canvas.panel_above(ax)
    figure.draw_without_rendering()
    low, high = panel.get_window_extent(), ax.get_window_extent()
    assert low.y0 > high.y1
    assert (low.x0, low.x1) == pytest.approx((high.x0, high.x1), abs=1)
    ax.set_xlim(3, 7)
    assert panel.get_xlim() == (3, 7)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: canvas.count(1, "head"), "1 head"),
        (lambda: canvas.count(0, "seed"), "0 seeds"),
        (lambda: canvas.wrap("_mine"), " _mine"),  # legends leave out what begins with "_"
        (lambda: canvas.wrap("gemma-3-270m country-capital", 15), "gemma-3-270m\ncountry-capital"),
    ],
)
def test_words(make: Callable[[], str], text: str) -> None:
    assert make() == text
