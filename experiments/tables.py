"""What the tables share: rows that resume, and Markdown with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import FIGURES

from tl_laai.metrics import paired_bootstrap

Row = dict[str, Any]

# A smaller search than fit_auto's default, the same number of folds as the baselines get. Layers,
# penalty and steps are those that did well on four rule tasks with seed 100.
STEPS, N_FOLDS, ALPHA, CHOOSING_EVALUATIONS = (15, 30, 60), 2, 0.9, 15


def layers_of(model: Any) -> list[int]:
    """The layers after a sixth, a third and half of the model: 3, 6 and 9 of 18."""
    n_layers = model.cfg.n_layers
    return [n_layers // 6, n_layers // 3, n_layers // 2]


def search(seed: int) -> dict[str, Any]:
    """Settings of `fit_auto` that all tables share."""
    return {"relax_steps": STEPS, "n_folds": N_FOLDS, "seed": seed}


def resume(
    name: str, key: Sequence[str], jobs: Iterable[tuple[Row, Callable[[], list[Row]]]]
) -> None:
    """Run the jobs whose rows are not on disk yet; a job is `(what its rows share, compute)`.

    A job's rows are written together when they are known, so that what is there is complete.
    """
    from tl_laai.rows import append_rows, complete_rows, only_writer

    path = FIGURES / f"{name}.jsonl"
    with only_writer(path):
        done = {tuple(str(row.get(k)) for k in key) for row in complete_rows(path)}
        for shared, compute in jobs:
            mark = tuple(str(shared.get(k)) for k in key)
            if mark in done:
                continue
            start = time.monotonic()
            rows = compute()
            seconds = round(time.monotonic() - start, 1)
            append_rows(path, [{**shared, **row, "seconds": seconds} for row in rows])
            print(f"{name}: {' '.join(mark)}, {seconds:.0f} s", flush=True)


def answer_row(method: str, evaluation: Any, setting: str = "", **more: Any) -> Row:
    """One method on one task and seed: figures, and which examples were right."""
    return {
        "kind": "baseline",
        "method": method,
        "setting": setting,
        "exact_match": evaluation.exact_match,
        "n": evaluation.n,
        "log_probability": evaluation.log_probability,
        "correct": [int(row.correct) for row in evaluation.rows],
        **more,
    }


def described(chosen: Any) -> str:
    """A candidate of a validation table, in words."""
    steps = f", {chosen.relax_steps} steps" if chosen.relax_steps else ""
    return f"{chosen.objective}, layer {chosen.layer}, {chosen.alpha:g} lambda_max{steps}"


def by_method(rows: Sequence[Row], column: str) -> dict[str, dict[str, list[Row]]]:
    """method -> value of `column` -> rows, in the order in which they were written."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(str(row[column]), []).append(row)
    return found


def interval(scores: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean and 95 % interval of scores in groups (a fit each): groups resampled, then examples."""
    flat = [float(x) for own in scores for x in own]
    groups = [i for i, own in enumerate(scores) for _ in own]
    found = paired_bootstrap(flat, [0.0] * len(flat), groups)
    return found.difference, found.low, found.high


def percent(rows: Sequence[Row]) -> str:
    """Mean exact match with its interval over fits and examples."""
    mean, low, high = interval([row["correct"] for row in rows])
    return f"{100 * mean:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def average(numbers: Sequence[float]) -> str:
    return f"{np.mean(numbers):.1f}" if numbers else "-"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def difference(ours: Mapping[Any, Row], theirs: Mapping[Any, Row]) -> str:
    """Mean difference of exact match in points over the fits that both have, with interval."""
    shared = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[key]["correct"], theirs[key]["correct"]) for key in shared]
    a = [x for own, _ in pairs for x in own]
    b = [x for _, other in pairs for x in other]
    groups = [i for i, (own, _) in enumerate(pairs) for _ in own]
    found = paired_bootstrap(a, b, groups)
    return f"{100 * found.difference:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f})"


def source(task: Any) -> Row:
    return {"source": Path(task.source).name, "digest": task.digest}
