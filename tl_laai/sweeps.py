"""Layer sweeps: a fit and its held-out score for each task, layer and seed; rows on disk.

The unit of work is one (task, seed): all its layers are fitted as one batch on shared prompts,
and all its interventions are evaluated from one prefill. Its rows are appended as soon as they
are known. A sweep that was stopped, in whatever way, goes on where it was: units with rows
missing are computed again as a whole, so that each row is that of an undisturbed sweep to the
last digit, and only the missing rows are written.

Units run here, or on any `concurrent.futures.Executor`; workers load the model by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

from tl_laai.backends import backend_of
from tl_laai.batches import Solver
from tl_laai.executors import Submits, spread
from tl_laai.fingerprints import fingerprint
from tl_laai.hooking import Position
from tl_laai.models import load_model
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.rows import append_rows, check_rows_file, checked, complete_rows, only_writer
from tl_laai.splits import integer
from tl_laai.sweep_units import SweepUnit, check_unit, run_by_name, run_unit
from tl_laai.tasks import Task, load_task

UNREGULARISED_STEPS = 30
"""Adam steps of an unpenalised fit: without a penalty, only stopping early regularises."""


def sweep_layers(
    model: Any,
    tasks: str | Path | Task | Iterable[str | Path | Task],
    *,
    out: str | os.PathLike[str],
    layers: Iterable[SupportsIndex] | None = None,
    seeds: Iterable[SupportsIndex] = (0, 1, 2, 3, 4),
    n_train: SupportsIndex = 10,
    n_test: SupportsIndex = 100,
    penalty: SparseGroupLasso | None = None,
    alpha: SupportsFloat | None = None,
    solver: Solver | None = None,
    max_evaluations: SupportsIndex | None = None,
    learning_rate: SupportsFloat = 0.1,
    tolerance: SupportsFloat = 1e-3,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    executor: Submits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Fit and evaluate every (task, layer, seed); resumes what `out` already holds.

    Example:
        >>> rows = sweep_layers("gemma-3-270m", ["antonym"], out="rows.jsonl")  # doctest: +SKIP

    Args:
        model: a model, or the name or path of one; with `executor` a name, which workers load.
        tasks: tasks, or names or paths of them; one alone will do.
        out: file of rows, one JSON object a line.
        layers: None for all.
        seeds: of the splits.
        n_train: examples to fit on.
        n_test: held-out examples; all there are where there are fewer.
        penalty: absolute weights; None for none.
        alpha: instead of `penalty`: the group weight as a share of `lambda_max`.
        solver: None for `proximal` with a penalty and `adam` without.
        max_evaluations: None for 150, and 30 steps of Adam without a penalty.
        learning_rate: of `adam`.
        tolerance: of stationarity.
        position: where Delta is added.
        template: how inputs become prompts.
        executor: any `concurrent.futures.Executor` to spread over, Dask's `client.get_executor()`,
            or submitit's; None to run here. Give a process pool the context "spawn": PyTorch does
            not survive a fork.
        progress: called with `(rows done, rows in all)`.

    Returns:
        All rows of the sweep, in the order (task, seed, layer).

    Raises:
        ValueError: bad arguments, `out` written by another sweep with other settings, or by
            another process right now.
        RuntimeError: a worker of `executor` died; `out` keeps the rows of the others.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if executor is not None and name is None:
        raise ValueError(
            "model is a loaded model, and executor is given: workers load models by name. Give "
            "the name or path that load_model takes."
        )
    if isinstance(tasks, str | os.PathLike | Task):
        tasks = [tasks]
    tasks = list(tasks)
    # Rows are JSON, which has no numbers of NumPy's.
    given = None if layers is None else sorted({integer("layers", layer) for layer in layers})
    n_train, n_test = integer("n_train", n_train), integer("n_test", n_test)
    numbers = list(dict.fromkeys(integer("seeds", seed) for seed in seeds))
    if len(tasks) == 0 or not numbers or given == []:
        raise ValueError("tasks, seeds and layers must each hold at least one entry.")
    if penalty is not None and alpha is not None:
        raise ValueError("penalty and alpha are both given: use one of them.")
    splits = _checked_tasks(tasks, n_train, n_test)
    check_rows_file(out)
    loaded = model
    if name is not None and (executor is None or given is None):
        loaded = load_model(name)
    chosen = range(backend_of(loaded).n_layers) if given is None else given
    free = penalty is None and alpha is None
    solver = solver or ("adam" if free else "proximal")
    weights = penalty or SparseGroupLasso(0.0, 0.0)
    if max_evaluations is None:
        max_evaluations = UNREGULARISED_STEPS if free and solver == "adam" else 150
    # A path such as "." has a name only once it is resolved.
    known_as = (
        fingerprint(loaded).name if name is None else Path(name).name or Path(name).resolve().name
    )
    units = [
        SweepUnit(
            model=known_as,
            task=task,
            layers=tuple(chosen),
            seed=seed,
            n_train=n_train,
            n_test=size,
            l1=float(weights.l1),
            group=float(weights.group),
            alpha=None if alpha is None else float(alpha),
            solver=solver,
            max_evaluations=integer("max_evaluations", max_evaluations),
            learning_rate=float(learning_rate),
            tolerance=float(tolerance),
            position=position,
            template=template,
        )
        for task, size in splits
        for seed in numbers
    ]
    wanted = [(u.task.name, layer, u.seed) for u in units for layer in chosen]
    with only_writer(out):
        there = [row for row in complete_rows(out) if row["kind"] == "sweep"]
        mark = fingerprint(loaded) if executor is None else None
        known = {} if mark is None else {"weights_hash": mark.weights_hash, "dtype": mark.dtype}
        _check_same_sweep(out, there, units, known)
        found = {_key(row): row for row in there}

        def keep(rows: Sequence[dict[str, Any]]) -> None:
            for row in [*found.values()][:1]:
                _check_same_sweep(out, rows, units, row["provenance"])
            new = [row for row in rows if _key(row) not in found]
            append_rows(out, new)
            found.update({_key(row): row for row in new})
            tell()

        def tell() -> None:
            if progress is not None:
                progress(sum(key in found for key in wanted), len(wanted))

        tell()
        todo = [u for u in units if any((u.task.name, x, u.seed) not in found for x in chosen)]
        if executor is None:
            for unit in todo:  # before the first is fitted
                check_unit(loaded, unit)
            for unit in todo:
                keep(run_unit(loaded, unit))
        elif name is not None:
            spread(
                executor,
                [(run_by_name, name, unit) for unit in todo],
                keep,
                remedy=f"{os.fspath(out)} keeps the rows that are done; the same command, with a "
                "new executor, goes on from there.",
            )
    return [found[key] for key in wanted]


def _checked_tasks(
    tasks: Sequence[str | Path | Task], n_train: int, n_test: int
) -> list[tuple[Task, int]]:
    """Each task once, with the number of its held-out examples."""
    found: dict[str, Task] = {}
    for task in (t if isinstance(t, Task) else load_task(t) for t in tasks):
        if found.setdefault(task.name, task).digest != task.digest:
            raise ValueError(
                f"tasks holds two different ones named {task.name!r}, which rows could not tell "
                "apart: rename one."
            )
        if n_test < 1 or len(task.distinct) <= n_train:
            raise ValueError(
                f"n_train is {n_train} and n_test {n_test}: task {task.name!r} has "
                f"{len(task.distinct)} distinct inputs, and at least one must be held out."
            )
    return [(task, min(n_test, len(task.distinct) - n_train)) for task in found.values()]


def _check_same_sweep(
    out: str | os.PathLike[str],
    rows: Sequence[Mapping[str, Any]],
    units: Sequence[SweepUnit],
    model: Mapping[str, Any],
) -> None:
    """Refuse rows that do not belong beside those of the units.

    Args:
        out: where they are.
        rows: what is there, or is to come there.
        units: of the sweep.
        model: its `weights_hash` and `dtype`, where they are known.
    """
    settings = units[0].settings()
    by_task = {unit.task.name: unit for unit in units}
    try:
        rows = rows and checked(rows, "sweep")
    except ValueError as error:
        raise ValueError(f"out={os.fspath(out)!r} is not of one sweep: {error}") from error
    for row in rows:
        there, origin = (_mapping(row.get(name)) for name in ("settings", "provenance"))
        other = [name for name, value in settings.items() if there.get(name) != value]
        if not other:
            unit = by_task.get(row["task"])
            if "weights_hash" not in origin:
                other.append("provenance")
            elif model.get("weights_hash") not in (None, origin["weights_hash"]):
                other.append("weights of the model")
            elif "dtype" in origin and model.get("dtype") not in (None, origin["dtype"]):
                other.append("dtype of the model")
            if unit is not None and _mapping(origin.get("task")).get("digest") != unit.task.digest:
                other.append("examples")
            if unit is not None and row["n"] != unit.n_test:
                other.append("n_test")
        if other:
            raise ValueError(
                f"out={os.fspath(out)!r} holds rows of a sweep with other {', '.join(other)} "
                f"(task {row['task']!r}, layer {row['layer']}, seed {row['seed']}); give another "
                "file, or move that one away."
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    """What another program may have left out, or written otherwise, as an empty one."""
    return value if isinstance(value, Mapping) else {}


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["task"], row["layer"], row["seed"]
