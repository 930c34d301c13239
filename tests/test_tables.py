"""What the experiments' tables say of rows: means, intervals, choices; and that they resume."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tl_laai.rows import read_rows, write_rows

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a file of `experiments/`."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


def row(task: str, seed: int, correct: list[int], **more: Any) -> dict[str, Any]:
    return {"method": "it", "task": task, "seed": seed, "correct": correct, **more}


def by_fit(*rows: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(one["task"], one["seed"]): one for one in rows}


def test_tasks_weigh_alike_and_are_held_fixed(room: Any) -> None:
    tables = room("tables")
    rows = [row("easy", seed, [1] * 20) for seed in range(5)]
    rows += [row("hard", seed, [0] * 80) for seed in range(2)]
    assert tables.interval(rows) == (50.0, 50.0, 50.0)  # although tasks differ by all there is
    mixed = [row("a", 0, [1, 0] * 50), row("b", 0, [1, 0] * 50)]
    middle, low, high = tables.interval(mixed)
    alone = tables.interval(mixed[:1])
    assert middle == alone[0] == 50.0
    # Two independent tasks: their mean varies less by the root of two.
    assert (high - low) / (alone[2] - alone[1]) == pytest.approx(2**-0.5, abs=0.08)


def test_the_second_interval_is_students_over_tasks(room: Any) -> None:
    differences = [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    rows = [row(f"task {i}", 0, own) for i, own in enumerate(differences)]
    means = [100 * statistics.fmean(own) for own in differences]
    half = 3.182 * statistics.stdev(means) / 2  # t at 97.5 %, three degrees of freedom
    found = room("tables")._ends_over_tasks(differences, rows)
    assert found == pytest.approx((50 - half, 50 + half))
    again = [row("task 0", seed, own) for seed, own in enumerate(differences)]
    assert room("tables")._ends_over_tasks(differences, again) is None


def test_differences_are_of_fits_that_both_have(room: Any) -> None:
    tables = room("tables")
    ours = by_fit(row("a", 0, [1, 1, 1]), row("a", 1, [0, 0, 0]), row("b", 0, [1, 1, 1]))
    theirs = by_fit(row("a", 0, [0, 0, 0]), row("b", 0, [1, 1, 1]), row("b", 1, [0, 0, 0]))
    assert tables.difference(ours, theirs) == "+50 (+50 to +50; -585 to +685)"
    assert tables.difference(by_fit(row("a", 0, [1])), by_fit(row("b", 0, [1]))) == "-"
    of_one = by_fit(row("a", 0, [1, 1]), row("a", 1, [1, 1]), row("b", 0, [1, 1]))
    other = by_fit(row("a", 0, [0, 0]), row("a", 1, [1, 1]), row("b", 0, [0, 0]))
    # Seed 1 ran for one of the two tasks alone.
    assert tables.mean_difference(of_one, other, ["a", "b"]) == "+100 (+100 to +100; +100 to +100)"
    assert tables.mean_difference(of_one, other, ["a", "b", "c"]) == "-"


def test_labels_are_the_choice_where_they_answer_two_more_of_ten(room: Any) -> None:
    shown, taught = room("rules_shown"), room("tables").TAUGHT
    rows = []
    for task, labels in (("one more", 0.6), ("two more", 0.7)):
        rows.append(row(task, 0, [1], validation=[labels, 0.5], setting="labels"))
        rows.append(
            row(task, 0, [0], validation=[0.5, 0.5], setting="teacher") | {"method": taught}
        )
    rows.append(row("no teacher", 0, [1], validation=[1.0, 1.0], setting="labels"))
    best = {one["task"]: one["setting"] for one in shown._best_by_validation(rows)}
    assert best == {"one more": "teacher", "two more": "labels"}


def test_what_has_rows_is_not_computed_again(
    room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = room("tables")
    monkeypatch.setattr(tables, "FIGURES", tmp_path)
    ran: list[int] = []

    def job(seed: int) -> tuple[dict[str, Any], Any]:
        def compute() -> list[dict[str, Any]]:
            if seed == 2 and not ran.count(2):
                ran.append(seed)
                raise KeyboardInterrupt
            ran.append(seed)
            score = {"exact_match": 0.5, "n": 2, "log_probability": -1.0, "correct": [1, 0]}
            return [{"kind": "baseline", "method": m, "setting": "", **score} for m in ("a", "b")]

        return {"model": "m", "task": "t", "seed": seed}, compute

    with pytest.raises(KeyboardInterrupt):
        tables.resume("it", ("task", "seed"), [job(seed) for seed in (0, 1, 2)])
    tables.resume("it", ("task", "seed"), [job(seed) for seed in (0, 1, 2)])
    assert ran == [0, 1, 2, 2]
    rows = read_rows(tmp_path / "it.jsonl")
    assert [(one["seed"], one["method"]) for one in rows] == [
        (seed, method) for seed in (0, 1, 2) for method in ("a", "b")
    ]


def test_a_setting_is_that_of_the_same_model_and_dtype(
    room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = room("shared_fits")
    monkeypatch.setattr(shared, "FIGURES", tmp_path)
    score = {"exact_match": 0.5, "n": 2, "log_probability": -1.0}
    rows = [
        row("t", 0, [1, 0], kind="baseline", model=model, setting=setting, **score, **more)
        for model, setting, more in (
            ("m", "answers, layer 3, 0.5 lambda_max, 30 steps", {}),
            ("m", "answers, layer 9", {"dtype": "bfloat16"}),
            ("n", "answers, layer 5", {}),
        )
    ]
    write_rows(tmp_path / "it.jsonl", rows)
    of = {"model": "m"}
    assert shared.layer_of("it", "it", "t", 0, **of) == 3
    assert shared.layer_of("it", "it", "t", 0, **of, dtype="bfloat16") == 9
    assert shared.layer_of("it", "it", "t", 0, model="n") == 5
    with pytest.raises(ValueError, match="run the group that writes it first"):
        shared.layer_of("it", "it", "t", 1, **of)
    assert shared._numbers(shared.RELAXED, rows[0]["setting"]) == [3, 0.5, 30]
    with pytest.raises(ValueError, match="no setting that can be made again: 'answers, layer 9'"):
        shared._numbers(shared.RELAXED, rows[1]["setting"])


@pytest.mark.parametrize("table", ["table_regularisation", "table_sizes"])
def test_controls_have_rows_of_their_own(
    room: Any, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = {"n_heads": 4, "zeros": 0.0, "model": "m", "dtype": "float32"}
    rows = [row("t", 0, [1, 0], **fitted)]
    rows += [
        row("t", 0, [0, 0], model="m", dtype="float32") | {"method": name}
        for name in room("tables").CONTROLS
    ]
    room(table).show(rows)
    shown = capsys.readouterr().out
    for name in room("tables").CONTROLS:
        assert f"| {name} | 0 (0 to 0)" in shown
