"""One unit of a sweep, the layers of one task and seed: fitted as a batch, evaluated, made rows."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tl_laai.batches import FitProblem, Solver
from tl_laai.evaluation import as_edit, evaluate_edits
from tl_laai.fingerprints import fingerprint
from tl_laai.fitting import fit_many
from tl_laai.hooking import Position
from tl_laai.models import load_model
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import PromptTemplate, tokenise
from tl_laai.tasks import Split, Task


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

    def settings(self) -> dict[str, Any]:
        """What all rows of one sweep share, as JSON has it."""
        own = ("task", "layers", "seed", "n_test")
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return shared | {"template": asdict(self.template)}


def check_unit(model: Any, unit: SweepUnit) -> Split:
    """The split of a unit, of which every prompt and answer fits into the model's context.

    Raises:
        ValueError: one does not, or has no tokens; the message names task and seed.
    """
    split = unit.task.split(train=unit.n_train, test=unit.n_test, seed=unit.seed)
    try:
        tokenise(model, [*split.train, *split.test], template=unit.template)
    except ValueError as error:
        raise type(error)(f"task {unit.task.name!r}, seed {unit.seed}: {error}") from error
    return split


def run_unit(model: Any, unit: SweepUnit) -> list[dict[str, Any]]:
    """The rows of one unit, one a layer."""
    split = check_unit(model, unit)
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
                "settings": unit.settings(),
                "provenance": {
                    "task": {
                        "source": Path(unit.task.source).name,
                        "version": unit.task.version,
                        "digest": unit.task.digest,
                    },
                    "versions": dict(fit.intervention.provenance["versions"]),
                    "backend": mark.backend,
                    "dtype": mark.dtype,
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


def run_by_name(name: str, unit: SweepUnit) -> list[dict[str, Any]]:
    """The rows of one unit, by a worker, which loads the model of that name."""
    with _ONE_AT_A_TIME:
        return run_unit(_loaded(name), unit)
