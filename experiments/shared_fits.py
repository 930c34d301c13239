"""Fits and fine-tuning that several tables share, their settings, and how they are made again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from common import FIGURES
from tables import MODEL, TAUGHT, Row, answer_row

from tl_laai.rows import read_rows

# A smaller search than fit_auto's default, the same number of folds as the baselines get. Layers,
# penalty and steps are those that did well on rule tasks with seed 100.
STEPS, N_FOLDS, ALPHA, CHOOSING_EVALUATIONS = (15, 30, 60), 2, 0.9, 15
HALF_ALPHAS = (0.9, 0.7, 0.6, 0.5)
TAUGHT_STEPS, LABEL_SHARE, TEACHER_STEPS = 45, 0.5, 5

# How `described` tells of a relaxed fit.
RELAXED = r"layer (\d+), ([\d.]+) lambda_max, (\d+) steps"


def layers_of(model: Any) -> list[int]:
    """The layers after a sixth, a third and half of the model: 3, 6 and 9 of 18."""
    n_layers = model.cfg.n_layers
    return [n_layers // 6, n_layers // 3, n_layers // 2]


def search(seed: int) -> dict[str, Any]:
    """Settings of `fit_auto` that all tables share."""
    return {"relax_steps": STEPS, "n_folds": N_FOLDS, "seed": seed, "drop_below": 0.0}


def distilling(seed: int, teacher_steps: int = 0) -> dict[str, Any]:
    """The same of distilled fits: their layer alone is chosen, by what the teacher says."""
    from tl_laai.distillation import Distillation

    settings = Distillation(label_share=LABEL_SHARE, seed=seed, teacher_steps=teacher_steps)
    return search(seed) | {
        "relax_steps": [TAUGHT_STEPS],
        "objectives": ["distill"],
        "distillation": settings,
    }


def described(chosen: Any) -> str:
    """A candidate of a validation table, in words."""
    steps = f", {chosen.relax_steps} steps" if chosen.relax_steps else ""
    share = f" and {chosen.label_share:g} labels" if chosen.label_share else ""
    return f"{chosen.objective}{share}, layer {chosen.layer}, {chosen.alpha:g} lambda_max{steps}"


def fitted_teacher(model: Any, data: Any, seed: int, **settings: Any) -> list[Row]:
    """A fit on what the few-shot prompt answers with a Delta of its own; layer chosen by that."""
    return [distilled_row(TAUGHT, model, data, seed, TEACHER_STEPS, **settings)]


def distilled_row(
    method: str, model: Any, data: Any, seed: int, teacher_steps: int, **settings: Any
) -> Row:
    """A distilled fit on `data.train`, asked `data.test`; `settings` of `fit_auto` go before."""
    from tl_laai import evaluate, fit_auto

    choice = {"layers": layers_of(model), **distilling(seed, teacher_steps), **settings}
    chosen = fit_auto(model, data.train, **choice)
    score = evaluate(model, data.test, intervention=chosen.fit.intervention)
    return answer_row(method, score, described(chosen.candidate), **zeros(chosen.fit))


def zeros(fitted: Any) -> Row:
    """How many heads a Delta has, and the share of its entries that are zero."""
    delta = fitted.solution.delta
    n_heads = int((delta.norm(dim=-1) > 0).sum())
    return {"n_heads": n_heads, "zeros": float((delta == 0).double().mean())}


def finetuning(
    model: Any,
    data: Any,
    seed: int,
    *,
    methods: Sequence[str] = ("lora", "ia3"),
    suffix: str = "",
    **more: Any,
) -> list[Row]:
    """LoRA and IA3, learning rate and steps by the same cross-validation.

    Args:
        model, data, seed: as for all groups.
        methods: which of the two.
        suffix: of the methods' names.
        more: as for `tune_fine_tuning`.
    """
    from tl_laai.adapters import hugging_face_model
    from tl_laai.finetuning_selection import tune_fine_tuning

    plain = hugging_face_model(MODEL, like=model)
    rows = []
    for method in methods:
        settings = {"method": method, "seed": seed, "hf_model": plain, **more}
        tuned = tune_fine_tuning(model, data.train, **settings)
        setting = f"learning rate {tuned.learning_rate:g}, {tuned.steps} steps"
        rows.append(answer_row(method + suffix, tuned.fine_tuned.evaluate(data.test), setting))
    return rows


def setting_of(
    name: str, method: str, task: str, seed: int, model: str = MODEL, dtype: str = "float32"
) -> str:
    """What a method chose, in words, from its row in a table."""
    unit = {"method": method, "task": task, "seed": seed, "model": model, "dtype": dtype}
    rows = [
        row
        for row in read_rows(FIGURES / f"{name}.jsonl")
        if all({"dtype": "float32", **row}[key] == value for key, value in unit.items())
    ]
    if not rows:
        raise ValueError(f"{name}.jsonl has no row of {unit}: run the group that writes it first")
    return str(rows[-1]["setting"])


def layer_of(name: str, method: str, task: str, seed: int, **of: str) -> int:
    """The layer that it chose."""
    return layer_in(setting_of(name, method, task, seed, **of))


def layer_in(setting: str) -> int:
    """The layer that a setting's words tell."""
    return int(_numbers(r"layer (\d+)", setting)[0])


def labelled_again(model: Any, examples: Any, setting: str) -> Any:
    """A relaxed fit on labels, with what was chosen for it before."""
    from tl_laai import fit

    layer, alpha, steps = _numbers(RELAXED, setting)
    options = {"relax_steps": int(steps), "max_evaluations": CHOOSING_EVALUATIONS}
    return fit(model, examples, layer=int(layer), alpha=alpha, **options)


def _numbers(pattern: str, setting: str) -> list[float]:
    found = re.search(pattern, setting)
    if found is None:
        raise ValueError(f"no setting that can be made again: {setting!r}")
    return [float(number) for number in found.groups()]


def distilled_controls(model: Any, data: Any, layer: int, seed: int) -> dict[str, Any]:
    """The distilled fit at the layer that it chose, as an edit, and its controls.

    These are the same norms in random directions, its heads permuted, and a fit that learns from
    the training examples with shuffled answers, by a teacher that reads those.
    """
    from tl_laai import fit
    from tl_laai.controls import permuted_heads, random_direction, shuffled_answers
    from tl_laai.distillation import Distillation
    from tl_laai.evaluation import as_edit

    def distilled(examples: Any) -> Any:
        teaching = Distillation(label_share=LABEL_SHARE, seed=seed, teacher_steps=TEACHER_STEPS)
        options = {"distillation": teaching, "relax_steps": TAUGHT_STEPS, "alpha": 0.0}
        fitted = fit(model, examples, layer=layer, objective="distill", **options)
        return as_edit(model, fitted.intervention)

    itself = distilled(data.train)
    return {
        TAUGHT: itself,
        "shuffled answers": distilled(shuffled_answers(data.train, seed)),
        "random direction": random_direction(itself, seed),
        "permuted heads": permuted_heads(itself, seed),
    }


def control_rows(name: str, task: str, model: Any, data: Any, seed: int, **of: str) -> list[Row]:
    """Controls of the distilled fit whose row stands in a table; `of` a model and dtype."""
    from tl_laai.evaluation import evaluate_edits

    layer = layer_of(name, TAUGHT, task, seed, **of)
    edits = distilled_controls(model, data, layer, seed)
    del edits[TAUGHT]
    scores = evaluate_edits(model, data.test, edits)
    return [answer_row(control, score, f"layer {layer}") for control, score in scores.items()]
