"""Layer sweeps: a fit and its held-out score for each task, layer and seed; rows on disk.

The unit of work is one (task, seed): all its layers are fitted as one batch on shared prompts,
and all its interventions are evaluated from one prefill. Its rows are appended as soon as they
are known. A sweep that was stopped, in whatever way, goes on where it was: units with rows
missing are computed again as a whole, so that each row is that of an undisturbed sweep to the
last digit, and only the missing rows are written.

Units run here, or on any `concurrent.futures.Executor`; workers load the model by its name.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

from tl_laai.backends import backend_of
from tl_laai.batches import FitProblem, Solver
from tl_laai.evaluation import as_edit, evaluate_edits
from tl_laai.executors import Submits, spread
from tl_laai.fingerprints import fingerprint
from tl_laai.fitting import fit_many
from tl_laai.hooking import Position
from tl_laai.models import load_model
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.rows import append_rows, check_rows_file, checked, complete_rows, only_writer
from tl_laai.splits import integer
from tl_laai.tasks import Task, load_task

UNREGULARISED_STEPS = 30
"""Adam steps of an unpenalised fit: without a penalty, only stopping early regularises."""


@dataclass(frozen=True)
class SweepUnit:
    """All layers of one task and seed; picklable, and all that a worker needs.

    Attributes:
        model: its name, as rows give it.
        task: the task itself.
        layers: every layer of the sweep, computed together.
        seed: of the split.
        n_train, n_test: sizes of the split; fewer test examples where there are fewer.
        l1, group: absolute penalty weights; both 0 with `alpha` None for none.
        alpha: instead: the group weight as a share of `lambda_max`.
        solver, max_evaluations, learning_rate, tolerance: as in `fit`.
        position, template: as in `fit`.
    """

    model: str
    task: Task
    layers: tuple[int, ...]
    seed: int
    n_train: int
    n_test: int
    l1: float
    group: float
    alpha: float | None
    solver: Solver
    max_evaluations: int
    learning_rate: float
    tolerance: float
    position: Position
    template: PromptTemplate

    @property
    def penalty(self) -> str:
        """The penalty as rows name it."""
        if self.alpha is not None:
            return f"{self.alpha:g} lambda_max"
        parts = [f"{name} {w:g}" for name, w in (("l1", self.l1), ("group", self.group)) if w]
        return ", ".join(parts) or "none"


def sweep_layers(
    model: Any,
    tasks: Sequence[str | Path | Task],
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
        tasks: tasks, or names or paths of them.
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
    units = [
        SweepUnit(
            model=fingerprint(loaded).name if name is None else Path(name).name,
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
        weights_hash = fingerprint(loaded).weights_hash if executor is None else None
        _check_same_sweep(out, there, units, weights_hash)
        found = {_key(row): row for row in there}

        def keep(rows: Sequence[dict[str, Any]]) -> None:
            for row in [*found.values()][:1]:
                _check_same_sweep(out, rows, units, row["provenance"]["weights_hash"])
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
            for unit in todo:
                keep(run_unit(loaded, unit))
        elif name is not None:
            spread(
                executor,
                [(_run_by_name, name, unit) for unit in todo],
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
    weights_hash: str | None,
) -> None:
    """Refuse rows that do not belong beside those of the units."""
    settings = _settings(units[0])
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
            elif weights_hash not in (None, origin["weights_hash"]):
                other.append("weights of the model")
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


def run_unit(model: Any, unit: SweepUnit) -> list[dict[str, Any]]:
    """The rows of one unit, one a layer."""
    split = unit.task.split(train=unit.n_train, test=unit.n_test, seed=unit.seed)
    penalty = SparseGroupLasso(unit.l1, unit.group) if unit.alpha is None else None
    fits = fit_many(
        model,
        [FitProblem(split.train, layer, penalty, unit.alpha) for layer in unit.layers],
        position=unit.position,
        template=unit.template,
        solver=unit.solver,
        tolerance=unit.tolerance,
        max_evaluations=unit.max_evaluations,
        learning_rate=unit.learning_rate,
    )
    edits = {str(fit.layer): as_edit(model, fit.intervention) for fit in fits}
    results = evaluate_edits(model, split.test, edits, template=unit.template)
    mark = fingerprint(model)
    rows = []
    for fit in fits:
        result = results[str(fit.layer)]
        rows.append(
            {
                "kind": "sweep",
                "model": unit.model,
                "task": unit.task.name,
                "layer": fit.layer,
                "seed": unit.seed,
                "penalty": unit.penalty,
                "exact_match": result.exact_match,
                "n": result.n,
                "log_probability": _finite(result.log_probability),
                "loss": _finite(fit.solution.loss),
                "objective": _finite(fit.solution.objective),
                "status": fit.solution.status.value,
                "stationarity": _finite(fit.solution.stationarity),
                "n_evaluations": fit.solution.n_evaluations,
                "lambda_max": fit.lambda_max,
                "n_heads": fit.intervention.n_heads_used,
                "norm": fit.intervention.norm(),
                "settings": _settings(unit),
                "provenance": {
                    "task": {
                        "source": Path(unit.task.source).name,
                        "version": unit.task.version,
                        "digest": unit.task.digest,
                    },
                    "versions": dict(fit.intervention.provenance["versions"]),
                    "backend": mark.backend,
                    "weights_hash": mark.weights_hash,
                },
            }
        )
    return rows


def _finite(value: float) -> float | None:
    """The number, or None for NaN and infinity, which JSON has not."""
    return value if math.isfinite(value) else None


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> Any:
    """A worker's model, loaded once a process."""
    return load_model(name)


# A worker may have several threads (Dask's do), and a model serves one unit at a time.
_ONE_AT_A_TIME = threading.Lock()


def _run_by_name(name: str, unit: SweepUnit) -> list[dict[str, Any]]:
    with _ONE_AT_A_TIME:
        return run_unit(_loaded(name), unit)


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["task"], row["layer"], row["seed"]


def _settings(unit: SweepUnit) -> dict[str, Any]:
    """What all rows of one sweep share, as JSON has it."""
    own = ("task", "layers", "seed", "n_test")
    shared = {f.name: getattr(unit, f.name) for f in fields(unit) if f.name not in own}
    return shared | {"template": asdict(unit.template)}
