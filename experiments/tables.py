"""What the tables share: rows that resume, and Markdown with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import FIGURES

from tl_laai.bootstrap import paired_bootstrap

Row = dict[str, Any]

MODEL = "gemma-3-270m"  # of the tables that compare methods on one model

# What a table's script prints below this line does not stand in the README.
MORE = "\n---\n"

# Student's t at 97.5 %, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

TAUGHT = "distilled, fitted teacher"  # as `fit_auto` distils by default
CONTROLS = ("shuffled answers", "random direction", "permuted heads")


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


def by_method(rows: Sequence[Row], column: str) -> dict[str, dict[str, list[Row]]]:
    """method -> value of `column` -> rows, in the order in which they were written."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(str(row[column]), []).append(row)
    return found


def interval(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Mean exact match over tasks and the ends of its 95 % interval, in percent.

    Of each task fits are drawn, then their examples (bootstrap); it is for these tasks.

    Args:
        rows: a fit each.
    """
    return _interval([[float(x) for x in row["correct"]] for row in rows], rows)


def _interval(scores: Sequence[Sequence[float]], rows: Sequence[Row]) -> tuple[float, float, float]:
    flat = [x for own in scores for x in own]
    fits, of_tasks = (
        [label for label, own in zip(labels, scores, strict=True) for _ in own]
        for labels in (range(len(rows)), [row["task"] for row in rows])
    )
    it = paired_bootstrap(flat, [0.0] * len(flat), fits, strata=of_tasks)
    return 100 * it.difference, 100 * it.low, 100 * it.high


def _ends_over_tasks(
    scores: Sequence[Sequence[float]], rows: Sequence[Row]
) -> tuple[float, float] | None:
    """The ends of the interval of a mean over tasks of which these are a sample: Student's t."""
    of_tasks: dict[str, list[float]] = {}
    for row, own in zip(rows, scores, strict=True):
        of_tasks.setdefault(row["task"], []).append(100 * float(np.mean(own)))
    means = np.array([np.mean(own) for own in of_tasks.values()])
    n = len(means)
    if n < 2:
        return None
    half = _T[n - 2] * float(means.std(ddof=1)) / n**0.5
    return float(means.mean()) - half, float(means.mean()) + half


def percent(rows: Sequence[Row]) -> str:
    """The interval as text."""
    return "{:.0f} ({:.0f} to {:.0f})".format(*interval(rows))


def average(numbers: Sequence[float]) -> str:
    return f"{np.mean(numbers):.1f}" if numbers else "-"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def difference(ours: Mapping[Any, Row], theirs: Mapping[Any, Row]) -> str:
    """Mean difference of exact match in points over the fits that both have, as `percent`.

    Over several tasks the ends of the interval over tasks stand behind those for these tasks.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return "-"
    rows = [ours[key] for key in shared]
    pairs = [
        [float(a - b) for a, b in zip(ours[k]["correct"], theirs[k]["correct"], strict=True)]
        for k in shared
    ]
    ends = _ends_over_tasks(pairs, rows)
    more = "" if ends is None else "; {:+.0f} to {:+.0f}".format(*ends)
    return "{:+.0f} ({:+.0f} to {:+.0f}{})".format(*_interval(pairs, rows), more)


def mean_difference(
    ours: Mapping[tuple[str, int], Row],
    theirs: Mapping[tuple[str, int], Row],
    names: Sequence[str],
) -> str:
    """The same of the mean over tasks, from the seeds for which both have all of them."""
    shared: dict[str, list[Row]] = {}
    for key in sorted(ours.keys() & theirs.keys()):
        shared.setdefault(key[0], []).append(ours[key])
    whole = {(row["task"], row["seed"]): row for row in of_all_tasks(shared, names)}
    return difference(whole, theirs)


def of_all_tasks(own: Mapping[str, Sequence[Row]], names: Sequence[str]) -> list[Row]:
    """The rows of those seeds that have one for every task, so that all tasks weigh the same."""
    seeds = [{row["seed"] for row in own.get(name, [])} for name in names]
    whole = set.intersection(*seeds)
    return [row for name in names for row in own.get(name, []) if row["seed"] in whole]


def differences(
    found: Mapping[str, Mapping[str, Sequence[Row]]],
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> str:
    """Pairs of methods, in points on each task, over the seeds that both ran for."""
    lines = []
    for ours, theirs in pairs:
        a, b = (
            {name: {row["seed"]: row for row in own.get(name, ())} for name in names}
            for own in (found.get(ours, {}), found.get(theirs, {}))
        )
        cells = [difference(a[name], b[name]) for name in names]
        lines.append([f"{ours} - {theirs}", *cells])
    return markdown(["difference in points", *names], lines)


def seeds_of(rows: Sequence[Row]) -> str:
    """Which seeds have run, and what the intervals are over."""
    by_task: dict[str, set[int]] = {}
    for row in rows:
        by_task.setdefault(row["task"], set()).add(row["seed"])
    seeds = {task: sorted(own) for task, own in by_task.items()}
    same = len({tuple(own) for own in seeds.values()}) == 1
    which = (
        f"Seeds {next(iter(seeds.values()))}"
        if same
        else "Seeds: " + ", ".join(f"{task} {own}" for task, own in seeds.items())
    )
    whole = f"\n{which}; in brackets 95 % bootstrap intervals over fits, then their examples."
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["model"], row["method"]), []).append(row)
    apart: dict[tuple[str, str], list[str]] = {}
    for (model, method), own in kinds.items():
        if _seeds_of_all_tasks(own) != _seeds_of_all_tasks(rows):
            same_seeds = (model, str(sorted(_seeds_of_all_tasks(own))))
            apart.setdefault(same_seeds, []).append(method)
    for (model, own_seeds), methods in apart.items():
        whole += f" Of {model}, {'; '.join(methods)}: seeds {own_seeds} alone."
    return whole


def _seeds_of_all_tasks(rows: Sequence[Row]) -> set[int]:
    by_task: dict[str, set[int]] = {}
    for row in rows:
        by_task.setdefault(row["task"], set()).add(row["seed"])
    return set.intersection(*by_task.values())


def unit(task: Any, seed: int, group: str, device: str) -> Row:
    """What the rows of one group of methods share, on one task and seed; where, if not on a CPU."""
    from measuring import hardware

    shared = {"model": MODEL, "task": task.name, "seed": seed, "group": group, **source(task)}
    return shared if device == "cpu" else shared | {"hardware": hardware(device)}


def computed_elsewhere(rows: Sequence[Row]) -> str:
    """How many rows were not computed on a CPU, and of which tasks."""
    lines = []
    for place in sorted({row["hardware"] for row in rows if "hardware" in row}):
        own = [row for row in rows if row.get("hardware") == place]
        names = ", ".join(dict.fromkeys(row["task"] for row in own))
        lines.append(f"\nComputed on one {place}: {len(own)} of {len(rows)} rows, of {names}.")
    return "".join(lines)


def source(task: Any) -> Row:
    return {"source": Path(task.source).name, "digest": task.digest}
