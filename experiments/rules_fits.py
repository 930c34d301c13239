"""Our rows of the table of rules: fits on labels, distilled ones, controls, and prompting."""

from __future__ import annotations

from functools import partial
from typing import Any

from shared_fits import (
    ALPHA,
    CHOOSING_EVALUATIONS,
    HALF_ALPHAS,
    N_FOLDS,
    TEACHER_STEPS,
    described,
    distilling,
    layer_of,
    layers_of,
    search,
    zeros,
)
from tables import TAUGHT, Row, answer_row

NAME = "table_rules"
WEAKER_ALPHAS = (0.9, 0.5, 0.25, 0.1, 0.05)


def fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Prompting, fits with and without penalty, and controls of the relaxed fit."""
    from tl_laai import FitProblem, evaluate, fit_auto, fit_many
    from tl_laai.candidates import Candidate
    from tl_laai.controls import permuted_heads, random_direction, shuffled_answers
    from tl_laai.edits import Edit
    from tl_laai.evaluation import as_edit, evaluate_edits
    from tl_laai.selection import PRESETS
    from tl_laai.side_effects import next_token_kl

    choose = partial(fit_auto, model, data.train, **search(seed))
    labelled = choose(layers=layers_of(model), alphas=(ALPHA, 0.0))
    relaxed, free = (
        max((c for c in labelled.table if c.alpha == alpha), key=Candidate.score)
        for alpha in (ALPHA, 0.0)
    )
    paper = fit_auto(
        model,
        data.train,
        layers=[relaxed.layer],
        alphas=(0.9, 0.5),
        n_folds=N_FOLDS,
        seed=seed,
        **PRESETS["paper"],
    )

    def refit(c: Candidate, examples: Any = data.train) -> Any:
        problem = FitProblem(examples, c.layer, None, c.alpha)
        options = {"relax_steps": c.relax_steps, "max_evaluations": CHOOSING_EVALUATIONS}
        return fit_many(model, [problem], **options)[0]

    found = {
        "penalised": (paper.fit, paper.candidate),
        "relaxed": (labelled.fit if labelled.candidate is relaxed else refit(relaxed), relaxed),
        "unregularised": (labelled.fit if labelled.candidate is free else refit(free), free),
        "shuffled answers": (refit(relaxed, shuffled_answers(data.train, seed)), relaxed),
    }
    edits = {"zero-shot": Edit()}
    edits |= {name: as_edit(model, f.intervention) for name, (f, _) in found.items()}
    edits["random direction"] = random_direction(edits["relaxed"], seed)
    edits["permuted heads"] = permuted_heads(edits["relaxed"], seed)
    answered = evaluate_edits(model, data.test, edits)
    answered["few-shot"] = evaluate(model, data.test, demonstrations=data.train)
    moved = next_token_kl(model, edits)
    rows = []
    for name, score in answered.items():
        fitted, chosen = found.get(name, (None, None))
        more = {} if fitted is None else of_fit(fitted)
        if name in moved:
            more["kl_unrelated"] = float(moved[name].mean())
        if chosen is labelled.candidate and name != "shuffled answers":
            more["validation"] = _validation(labelled.held_out)
        rows.append(answer_row(name, score, "" if chosen is None else described(chosen), **more))
    return rows


def weaker(model: Any, data: Any, seed: int) -> list[Row]:
    """The paper's objective with more penalties to choose from, at the layer of `relaxed`."""
    from tl_laai import fit_auto
    from tl_laai.selection import PRESETS

    chosen = fit_auto(
        model,
        data.train,
        layers=[layer_of(NAME, "relaxed", data.task.name, seed)],
        alphas=WEAKER_ALPHAS,
        n_folds=N_FOLDS,
        seed=seed,
        **PRESETS["paper"],
    )
    return [_fitted_row("penalised, weaker", model, data, chosen)]


def preset(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """`fit_auto` as it is called: its own layers, penalties, steps and folds."""
    from tl_laai import fit_auto
    from tl_laai.selection import PRESETS

    chosen = fit_auto(model, data.train, seed=seed, **PRESETS[name])
    return [_fitted_row(f"preset {name}", model, data, chosen)]


def half(model: Any, data: Any, seed: int) -> list[Row]:
    """Relaxed fits on at most half of the heads of the layer that does best on all."""
    return [_half("relaxed, half", model, data, **search(seed))]


def distilled_half(model: Any, data: Any, seed: int) -> list[Row]:
    """The same of distilled fits."""
    return [_half("distilled, half", model, data, **distilling(seed))]


def _half(method: str, model: Any, data: Any, **settings: Any) -> Row:
    from tl_laai import fit_auto

    chosen = fit_auto(
        model,
        data.train,
        layers=layers_of(model),
        alphas=HALF_ALPHAS,
        max_heads=model.cfg.n_heads // 2,
        max_evaluations=CHOOSING_EVALUATIONS,
        **settings,
    )
    return _fitted_row(method, model, data, chosen)


def distilled(model: Any, data: Any, seed: int) -> list[Row]:
    """Distillation, its layer by what the teacher says to held-out inputs; how good a teacher."""
    from tl_laai import fit_auto
    from tl_laai.distillation import ask_teacher

    options = distilling(seed)
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    validation = _validation(ask_teacher(model, data.train, settings=options["distillation"]))
    return [_fitted_row("distilled", model, data, chosen, validation=validation)]


def fitted_teacher(model: Any, data: Any, seed: int) -> list[Row]:
    """The same from a teacher that is fitted on the ten itself; what that teacher answers."""
    from tl_laai import fit_auto
    from tl_laai.distillation import ask_teacher
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.splits import cross_validation_folds
    from tl_laai.teachers import fit_teacher

    options = distilling(seed, TEACHER_STEPS)
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    folds = cross_validation_folds(data.train, N_FOLDS, seed)
    held_out = ask_teacher(model, data.train, folds=folds, settings=options["distillation"])
    edit = fit_teacher(model, data.train, steps=TEACHER_STEPS, seed=seed)
    itself = evaluate_edits(model, data.test, {"it": edit}, demonstrations=data.train)["it"]
    return [
        _fitted_row(TAUGHT, model, data, chosen, validation=_validation(held_out)),
        answer_row("few-shot, fitted", itself),
    ]


def distilled_every_step(model: Any, data: Any, seed: int) -> list[Row]:
    """The same with Delta added at every token that answers, not at the first alone."""
    from tl_laai import fit_auto

    options = distilling(seed) | {"position": "every_step"}
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    return [_fitted_row("distilled, every step", model, data, chosen)]


def taught_layer(model: Any, data: Any, seed: int) -> list[Row]:
    """Labels alone at the layer that the teacher's answers chose."""
    from tl_laai import fit_auto

    layer = layer_of(NAME, TAUGHT, data.task.name, seed)
    chosen = fit_auto(model, data.train, layers=[layer], alphas=(0.0,), **search(seed))
    return [_fitted_row("unregularised, taught layer", model, data, chosen)]


def _fitted_row(method: str, model: Any, data: Any, chosen: Any, **more: Any) -> Row:
    from tl_laai.evaluation import as_edit, evaluate_edits
    from tl_laai.side_effects import next_token_kl

    edits = {method: as_edit(model, chosen.fit.intervention)}
    more |= of_fit(chosen.fit)
    more["kl_unrelated"] = float(next_token_kl(model, edits)[method].mean())
    if chosen.objective == "distill":
        more["n_test_made_up"] = _made_up(chosen.fit.intervention.provenance, data.test)
    score = evaluate_edits(model, data.test, edits)[method]
    return answer_row(method, score, described(chosen.candidate), **more)


def _validation(held_out: Any) -> list[float]:
    """How examples of the ten were answered that were held out: share right, probability."""
    return [held_out.exact_match, held_out.probability]


def _made_up(provenance: Any, test: Any) -> int:
    """How many held-out inputs the model made up itself, and was taught on without their labels."""
    from tl_laai.tasks import same_input_key

    known = {same_input_key(text) for text in provenance["objective"]["inputs"]}
    return sum(same_input_key(e.input) in known for e in test)


def of_fit(fitted: Any) -> Row:
    """What a row says of a fit: status, heads, layer and norm."""
    return {
        "status": fitted.solution.status.value,
        "n_heads": zeros(fitted)["n_heads"],
        "layer": fitted.layer,
        "norm": float(fitted.solution.delta.norm()),
    }
