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
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl_laai.backends import backend_of
from tl_laai.evaluation import as_edit, evaluate_edits
from tl_laai.fingerprints import fingerprint
from tl_laai.fitting import FitProblem, Solver, fit_many
from tl_laai.hooking import Position
from tl_laai.models import load_model
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.rows import append_rows, complete_rows, only_writer
from tl_laai.tasks import Task, load_task

UNREGULARISED_STEPS = 30
"""Adam steps of an unpenalised fit: without a penalty, only stopping early regularises."""


@dataclass(frozen=True)
class SweepUnit:
    """All layers of one task and seed; picklable, and all that a worker needs.

    Attributes:
        task: the task itself.
        layers: every layer of the sweep, computed together.
        seed: of the split.
        n_train, n_test: sizes of the split; fewer test examples where there are fewer.
        l1, group: absolute penalty weights; both 0 with `alpha` None for none.
        alpha: instead: the group weight as a share of `lambda_max`.
        solver, max_evaluations, learning_rate, tolerance: as in `fit`.
        position, template: as in `fit`.
    """

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
    tasks: Sequence[str | Task],
    *,
    out: str | Path,
    layers: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    n_train: int = 10,
    n_test: int = 100,
    penalty: SparseGroupLasso | None = None,
    alpha: float | None = None,
    solver: Solver | None = None,
    max_evaluations: int | None = None,
    learning_rate: float = 0.1,
    tolerance: float = 1e-3,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Fit and evaluate every (task, layer, seed); resumes what `out` already holds.

    Example:
        >>> rows = sweep_layers("gemma-3-270m", ["antonym"], out="rows.jsonl")  # doctest: +SKIP

    Args:
        model: a model, or the name of one; with `executor` a name, which workers load.
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
        executor: any `concurrent.futures.Executor` to spread over; None to run here.
        progress: called with `(rows done, rows in all)`.

    Returns:
        All rows of the sweep, in the order (task, seed, layer).

    Raises:
        ValueError: bad arguments, `out` written by another sweep with other settings, or by
            another process right now.
    """
    if executor is not None and not isinstance(model, str):
        raise ValueError(
            "model is a loaded model, and executor is given: workers load models by name. Give "
            "the name or path that load_model takes."
        )
    loaded = load_model(model) if isinstance(model, str) and executor is None else model
    if not tasks or not seeds:
        raise ValueError("tasks and seeds must each hold at least one entry.")
    if layers is None and executor is not None:
        loaded = load_model(model)
    chosen = range(backend_of(loaded).n_layers) if layers is None else sorted(set(layers))
    free = penalty is None and alpha is None
    weights = penalty or SparseGroupLasso(0.0, 0.0)
    own_solver: Solver = solver or ("adam" if free else "proximal")
    limit = max_evaluations or (UNREGULARISED_STEPS if free else 150)
    units = []
    for task in (load_task(t) if isinstance(t, str) else t for t in tasks):
        size = min(n_test, len(task.distinct) - n_train)
        if size < 1:
            raise ValueError(
                f"n_train is {n_train}: task {task.name!r} has {len(task.distinct)} distinct "
                "inputs, and at least one must be left to evaluate on."
            )
        for seed in seeds:
            units.append(
                SweepUnit(
                    task, tuple(chosen), seed, n_train, size, float(weights.l1),
                    float(weights.group), alpha, own_solver, limit, learning_rate, tolerance,
                    position, template,
                )
            )  # fmt: skip
    with only_writer(out):
        found = {_key(row): row for row in complete_rows(out) if row["kind"] == "sweep"}
        settings = {_settings(unit) for unit in units}
        for row in found.values():
            if row["settings"] not in settings:
                raise ValueError(
                    f"out={str(out)!r} holds rows of a sweep with other settings "
                    f"({row['settings']}); give another file, or move that one away."
                )
        total = len(units) * len(chosen)

        def keep(rows: Sequence[dict[str, Any]]) -> None:
            new = [row for row in rows if _key(row) not in found]
            append_rows(out, new)
            found.update({_key(row): row for row in new})
            if progress is not None:
                progress(len(wanted & found.keys()), total)

        wanted = {(u.task.name, layer, u.seed) for u in units for layer in chosen}
        todo = [u for u in units if any((u.task.name, x, u.seed) not in found for x in chosen)]
        if progress is not None:
            progress(len(wanted & found.keys()), total)
        if executor is None:
            for unit in todo:
                keep(run_unit(loaded, unit))
        else:
            futures = [executor.submit(_run_by_name, model, unit) for unit in todo]
            for future in as_completed(futures):
                keep(future.result())
    return [found[u.task.name, layer, u.seed] for u in units for layer in chosen]


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
        heads = [h.norm for h in sorted(fit.intervention.heads(), key=lambda h: h.head)]
        rows.append(
            {
                "kind": "sweep",
                "model": mark.name,
                "task": unit.task.name,
                "layer": fit.layer,
                "seed": unit.seed,
                "penalty": unit.penalty,
                "exact_match": result.exact_match,
                "n": result.n,
                "log_probability": result.log_probability,
                "loss": fit.solution.loss,
                "objective": fit.solution.objective,
                "status": fit.solution.status.value,
                "stationarity": fit.solution.stationarity,
                "n_evaluations": fit.solution.n_evaluations,
                "lambda_max": fit.lambda_max,
                "n_heads": len(heads),
                "norm": fit.intervention.norm(),
                "settings": _settings(unit),
                "provenance": {
                    "task": {
                        "source": unit.task.source,
                        "version": unit.task.version,
                        "digest": unit.task.digest,
                    },
                    "template": asdict(unit.template),
                    "versions": dict(fit.intervention.provenance["versions"]),
                    "backend": mark.backend,
                    "weights_hash": mark.weights_hash,
                },
            }
        )
    return rows


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> Any:
    """A worker's model, loaded once a process."""
    return load_model(name)


def _run_by_name(name: str, unit: SweepUnit) -> list[dict[str, Any]]:
    return run_unit(_loaded(name), unit)


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["task"], row["layer"], row["seed"]


def _settings(unit: SweepUnit) -> str:
    """What all rows of one sweep share, in words."""
    return (
        f"{unit.n_train} examples, {unit.solver}, {unit.max_evaluations} evaluations, "
        f"learning rate {unit.learning_rate:g}, tolerance {unit.tolerance:g}, penalty "
        f"{unit.penalty}, {unit.position}"
    )
