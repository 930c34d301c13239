"""Sparse additive activation interventions for TransformerLens models.

The names below are loaded from their rooms on first use, so that ``import tl_laai`` (and the parts
that need no model, such as ``laai --help``) stays fast and does not import torch.

Example:
    >>> from tl_laai import SparseGroupLasso, Task, fit, load_model  # doctest: +SKIP
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# MKL, which multiplies torch's matrices on Intel CPUs, rounds a row's product by how many rows
# there are, unless told before its first product not to. In fits that are stopped before they
# converge that rounding grows to a thousandth of the objective; without it, fits in a batch equal
# each alone bit for bit, where the model's own modules round a row alike too. (Tested: float32, one
# and two threads. torch's gelu and silu do not where a thread's share of the numbers is no multiple
# of 32, as with three threads.)
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_ROOM_OF = {
    "Example": "tasks",
    "FitProblem": "batches",
    "Intervention": "interventions",
    "OpinionTask": "polls",
    "PromptTemplate": "prompts",
    "SparseGroupLasso": "penalties",
    "Task": "tasks",
    "ablate_heads": "attribution",
    "attribute": "attribution",
    "evaluate": "evaluation",
    "evaluate_opinions": "surveys",
    "fingerprint": "models",
    "fit": "fitting",
    "fit_auto": "selection",
    "fit_many": "fitting",
    "fit_path": "paths",
    "load_model": "models",
    "sweep_layers": "sweeps",
}

__all__ = [
    "Example",
    "FitProblem",
    "Intervention",
    "OpinionTask",
    "PromptTemplate",
    "SparseGroupLasso",
    "Task",
    "ablate_heads",
    "attribute",
    "evaluate",
    "evaluate_opinions",
    "fingerprint",
    "fit",
    "fit_auto",
    "fit_many",
    "fit_path",
    "load_model",
    "sweep_layers",
]

if TYPE_CHECKING:
    from tl_laai.attribution import ablate_heads, attribute
    from tl_laai.batches import FitProblem
    from tl_laai.evaluation import evaluate
    from tl_laai.fitting import fit, fit_many
    from tl_laai.interventions import Intervention
    from tl_laai.models import fingerprint, load_model
    from tl_laai.paths import fit_path
    from tl_laai.penalties import SparseGroupLasso
    from tl_laai.polls import OpinionTask
    from tl_laai.prompts import PromptTemplate
    from tl_laai.selection import fit_auto
    from tl_laai.surveys import evaluate_opinions
    from tl_laai.sweeps import sweep_layers
    from tl_laai.tasks import Example, Task
else:
    # Hidden from type checkers, which would otherwise accept any misspelt name.
    def __getattr__(name: str) -> object:
        """Import a public name from its room the first time it is asked for."""
        if name not in _ROOM_OF:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
            )
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names as well, though not all are loaded yet."""
        return sorted({*globals(), *__all__})
