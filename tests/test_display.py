from __future__ import annotations

import io
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tl_laai import display


def rendered(table: Table, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # it is the StringIO


def test_every_head_has_a_line_and_the_longest_norm_the_longest_bar() -> None:
    lines = rendered(display.head_bars({9: [0.0, 4.0, 2.0], 11: [1e-6, 0.0, 0.0]}))
    assert len(lines) == 1 + 6
    assert lines[1].split() == ["9", "0", "0", "-"]
    assert lines[2].count("█") == 2 * lines[3].count("█") == 32
    assert lines[4].split()[:3] == ["11", "0", "1.0e-06"]
    assert len(lines[4].split()) == 4  # tiny, but to be seen
    assert max(map(len, lines)) <= 80


def test_the_strongest_heads_come_first_where_so_many_are_asked_for() -> None:
    norms = {9: [0.0, 4.0, 2.0], 11: [3.0, 5.0, 0.0]}
    lines = rendered(display.head_bars(norms, strongest=3))
    assert [line.split()[:3] for line in lines[1:]] == [
        ["11", "1", "5.000"],
        ["9", "1", "4.000"],
        ["11", "0", "3.000"],
    ]


def test_a_bar_says_how_many_rows_there_are_once_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(display, "err", terminal)
    written = terminal.file.getvalue  # type: ignore[attr-defined]  # it is the StringIO
    with display.row_bar("Sweeping"):
        pass
    assert "Sweeping" in written()
    assert "/" not in written()
    with display.row_bar("Sweeping") as progress:
        progress(2, 7)
    assert "2/7" in written()


def test_heads_that_are_all_zero_have_no_bars() -> None:
    assert "█" not in "".join(rendered(display.head_bars({0: [0.0, 0.0]})))


def test_a_record_is_shown_flat_with_quotation_marks_where_needed() -> None:
    table = display.record_table({"split": {"seed": 0}, "text": "Q: [bold]\nA:", "x": 0.12345678})
    assert [line.split(maxsplit=1) for line in rendered(table)] == [
        ["split.seed", "0"],
        ["text", '"Q: [bold]\\nA:"'],
        ["x", "0.123457"],
    ]


def test_a_record_of_a_sum_shows_its_parts_and_how_long_tables_are() -> None:
    half = {"operation": "multiply", "argument": 0.5, "parts": [{"seed": 1}]}
    record = {"operation": "add", "parts": [{"table": [{"layer": 3}, {"layer": 6}]}, half]}
    assert [line.split(maxsplit=1) for line in rendered(display.record_table(record))] == [
        ["operation", "add"],
        ["parts.0.table", "2 rows, which --json prints"],
        ["parts.1.operation", "multiply"],
        ["parts.1.argument", "0.5"],
        ["parts.1.parts.0.seed", "1"],
    ]


def test_cells_are_shown_as_they_are_and_not_read_as_markup() -> None:
    assert "[red]x[/red]" in rendered(display.text_table(("a",), [("[red]x[/red]",)]))[1]


@pytest.mark.parametrize("name", ["a[/b]", "[bold red]x[/]"])
def test_names_are_shown_as_they_are_and_not_read_as_markup(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in rendered(display.text_table((name,), []))[0]
    result: Any = SimpleNamespace(n=3, exact_match=0.5, log_probability=-1.0)
    display.show_results(name, {"zero_shot": result}, n_shown=1)
    assert f"{name}, 3 held-out examples" in capsys.readouterr().out
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(display, "err", terminal)
    for context in (display.step, display.solver_bar, display.row_bar):
        with context(name):
            pass
    assert terminal.file.getvalue().count(f"{name}: ") == 2  # type: ignore[attr-defined]  # it is the StringIO
    assert terminal.file.getvalue().count(name) >= 5  # type: ignore[attr-defined]  # it is the StringIO


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    display.error("first\n  second [bold]" + " word" * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("Error: first second [bold] word word")


def test_json_refuses_what_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    display.show_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        display.show_json({"a": float("nan")})


@pytest.mark.parametrize("context", [display.step, display.solver_bar])
def test_progress_goes_to_standard_error_and_errors_pass_through(
    context: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    with context("Counting"):  # type: ignore[attr-defined]  # a context manager
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Counting: ")
    with pytest.raises(KeyError), context("Counting"):  # type: ignore[attr-defined]  # a context manager
        raise KeyError
