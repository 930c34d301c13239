"""The command that fits an intervention: `laai fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tl_laai import display
from tl_laai.fit_options import (
    DEFAULT_EVALUATIONS,
    DEFAULT_FOLDS,
    DEFAULT_LEARNING_RATE,
    DEFAULT_TEACHER_STEPS,
    DEFAULT_TOLERANCE,
    Objective,
    Penalty,
    Position,
    Preset,
    Solver,
    asked_distillation,
    asked_layer,
    asked_penalty,
    chosen_by_validation,
    preset_settings,
)
from tl_laai.options import (
    AnyBackend,
    AnyModel,
    Json,
    OneTask,
    Seed,
    Test,
    Train,
    check_out,
    load,
    newlines,
)
from tl_laai.recipes import DEFAULT_TEST, DEFAULT_TRAIN, draw, record
from tl_laai.tasks import load_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tl_laai.batches import Fit
    from tl_laai.candidates import Candidate
    from tl_laai.distillation import Distillation
    from tl_laai.prompts import PromptTemplate
    from tl_laai.tasks import Example


def fit(
    model: AnyModel,
    task: OneTask,
    out: Annotated[Path, typer.Option(help="Folder to save the intervention in.")],
    layer: Annotated[str, typer.Option(help="A number from 0; auto: cross-validated.")] = "auto",
    penalty: Annotated[
        Penalty, typer.Option(help="auto: cross-validated; or set --alpha, --group, --l1.")
    ] = "auto",
    train: Train = DEFAULT_TRAIN,
    test: Test = DEFAULT_TEST,
    seed: Seed = 0,
    group: Annotated[
        float | None, typer.Option(min=0, help="Penalty on whole heads (absolute).")
    ] = None,
    l1: Annotated[
        float | None, typer.Option(min=0, help="Penalty on single entries (absolute).")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Instead: the group penalty as a share of lambda_max, where all is zero.",
        ),
    ] = None,
    l1_ratio: Annotated[float, typer.Option(min=0, help="With --alpha: l1 / group.")] = 0.0,
    max_heads: Annotated[
        int | None,
        typer.Option(min=1, help="At most, of the layer that does best on all heads."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2, help=f"Of the cross-validation of labelled fits; {DEFAULT_FOLDS} unless given."
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(help="answers; distill: the model's own few-shot answers; auto: validated."),
    ] = "answers",
    inputs: Annotated[
        Path | None,
        typer.Option(help="To distill on, one a line; else the model makes them up."),
    ] = None,
    made_up: Annotated[
        int | None, typer.Option(min=1, help="How many inputs it makes up; 64 unless given.")
    ] = None,
    label_share: Annotated[
        float, typer.Option(min=0, help="Weight of the labels when distilling; auto: validated.")
    ] = 0.0,
    teachers: Annotated[
        int | None,
        typer.Option(
            min=1, help="When distilling: orders of the examples to average over; 1 unless given."
        ),
    ] = None,
    shown: Annotated[
        int | None,
        typer.Option(min=1, help="How many examples each but the first of these shows, or all."),
    ] = None,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="When distilling: steps of a first fit on the labels, behind the few-shot prompt "
            f"that teaches; {DEFAULT_TEACHER_STEPS} unless given, 0 for none.",
        ),
    ] = None,
    solver: Annotated[Solver, typer.Option(help="Only proximal makes exact zeros.")] = "proximal",
    max_evaluations: Annotated[
        int | None,
        typer.Option(min=1, help="At most; adam's steps: 150, and fewer where auto chooses."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of stationarity.")] = DEFAULT_TOLERANCE,
    learning_rate: Annotated[
        float, typer.Option(help="Of adam and --relax.")
    ] = DEFAULT_LEARNING_RATE,
    relax: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps of a second fit, without penalty, of the heads that the first one kept; "
            "auto layer or penalty: cross-validated.",
        ),
    ] = None,
    position: Annotated[
        Position, typer.Option(help="Only the prompt's last token, or every step's.")
    ] = "prompt_end",
    template: Annotated[
        str | None, typer.Option(help="Prompt with {input}; backslash-n is a newline.")
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(help="paper: both penalties; relaxed, distill: ours, see the README."),
    ] = None,
    backend: AnyBackend = "auto",
    json: Json = False,
) -> None:
    """Fit an intervention on a few examples of a task, and save it to a folder."""
    data = draw(load_task(task), train=train, test=test, seed=seed)

    from tl_laai.batches import FitProblem
    from tl_laai.distillation import prepare
    from tl_laai.fitting import fit_many, taught_problem
    from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
    from tl_laai.solvers import check_positive

    check_out(out)
    check_positive("--tolerance", tolerance)
    check_positive("--learning-rate", learning_rate)
    if preset is not None:
        if (objective, position, l1_ratio, relax) != ("answers", "prompt_end", 0.0, None):
            raise ValueError(
                f"--preset {preset} sets --objective, --position, --l1-ratio and --relax: leave "
                "them out"
            )
        objective, position, l1_ratio, relax = preset_settings(preset)
    weights, alphas = asked_penalty(penalty, group, l1, alpha)
    prompt = DEFAULT_TEMPLATE if template is None else PromptTemplate(newlines(template))
    fixed = None if layer == "auto" else asked_layer(layer)
    counts = {"made_up": made_up, "teachers": teachers, "shown": shown}
    distillation = asked_distillation(
        objective, inputs, label_share, seed, teacher_steps=teacher_steps, **counts
    )
    by_validation = chosen_by_validation(
        layer=fixed, weights=weights, alphas=alphas, objective=objective, label_share=label_share,
        solver=solver, preset=preset, l1_ratio=l1_ratio, max_heads=max_heads, folds=folds,
        tolerance=tolerance, learning_rate=learning_rate, relax=relax,
    )  # fmt: skip
    loaded = load(model, backend)
    known = record(model, backend, data)
    if by_validation:
        fitted = _fit_auto(
            loaded, data.train, fixed, alphas, known, l1_ratio=l1_ratio, max_heads=max_heads,
            position=position, template=prompt, objective=objective, distillation=distillation,
            relax=relax, max_evaluations=max_evaluations, learning_rate=learning_rate, folds=folds,
            seed=seed, quiet=json,
        )  # fmt: skip
    else:
        share = alphas[0] if alphas else None
        problem = FitProblem(
            data.train, cast("int", fixed), weights, share, l1_ratio, provenance=known
        )
        if objective == "distill":
            with display.step("Asking the few-shot teacher"):
                lesson = prepare(loaded, data.train, distillation, template=prompt)
            problem = taught_problem(problem, lesson)
        title = f"Fitting layer {layer} on {len(problem.examples)} examples"
        limit = max_evaluations or DEFAULT_EVALUATIONS
        with display.solver_bar(title, limit + (relax + 1 if relax else 0)) as bar:
            [fitted] = fit_many(
                loaded,
                [problem],
                position=position,
                template=prompt,
                solver=solver,
                tolerance=tolerance,
                max_evaluations=limit,
                learning_rate=learning_rate,
                relax_steps=relax or 0,
                callback=bar,
            )
    fitted.intervention.save_pretrained(out)
    if json:
        kept = fitted.intervention.provenance
        more = {name: kept[name] for name in ("layer", "solution", "penalty", "task", "split")}
        heads = display.head_norms(fitted.intervention)
        status = fitted.solution.status.name.lower()
        display.show_json({"status": status, "out": str(out), "heads": heads, **more})
    else:
        display.show_fit(fitted)
        display.say(f"Saved to {out}. Next: laai {'evaluate' if data.test else 'show'} {out}")


def _fit_auto(
    model: Any,
    examples: Sequence[Example],
    layer: int | None,
    alphas: Sequence[float] | None,
    provenance: dict[str, Any],
    *,
    l1_ratio: float,
    max_heads: int | None,
    position: Position,
    template: PromptTemplate,
    objective: Objective,
    distillation: Distillation | None,
    relax: int | None,
    max_evaluations: int | None,
    learning_rate: float,
    folds: int | None,
    seed: int,
    quiet: bool,
) -> Fit:
    """Choose by cross-validation, show the finalists, and return the refitted choice."""
    from tl_laai.selection import fit_auto

    steps = None if relax is None else (relax,) if relax else ()
    with display.row_bar("Cross-validating") as progress:
        chosen = fit_auto(
            model,
            examples,
            layers=None if layer is None else [layer],
            alphas=None if alphas is None else alphas or [0.0],
            l1_ratio=l1_ratio,
            max_heads=max_heads,
            objectives=("answers", "distill") if objective == "auto" else (objective,),
            distillation=distillation,
            relax_steps=steps,
            max_evaluations=max_evaluations,
            learning_rate=learning_rate,
            n_folds=DEFAULT_FOLDS if folds is None else folds,
            seed=seed,
            position=position,
            template=template,
            provenance=provenance,
            progress=lambda _, done, total: progress(done, total),
        )
    if not quiet:
        # Of the numbers of steps along one run, the best.
        best: dict[Any, Candidate] = {}
        for c in chosen.table:
            key = (c.round, c.layer, c.alpha, c.objective, c.label_share)
            if c.round != "screening" and (key not in best or c.score() > best[key].score()):
                best[key] = c
        cells = [
            (
                str(c.layer),
                f"{c.alpha:g}",
                str(c.relax_steps or "-"),
                c.objective + (f" + {c.label_share:g}" if c.label_share else ""),
                "by KL" if c.validation_probability is None else f"{c.validation_probability:.1%}",
                f"{c.validation_loss:.3f} ± {c.standard_error:.3f}",
                f"{c.n_heads:.1f}",
                "chosen" if c is chosen.candidate else "",
            )
            for c in best.values()
        ]
        columns = (
            "layer", "alpha", "relaxed", "objective", "held-out p", "loss", "heads", "",
        )  # fmt: skip
        display.show(display.text_table(columns, cells))
        if chosen.held_out is not None and chosen.teacher is not None:
            own, teacher = (
                sum(row.correct for row in e.rows) for e in (chosen.held_out, chosen.teacher)
            )
            display.say(
                f"Of {chosen.teacher.n} examples held out, fits on labels answer {own} right, the "
                f"teacher {teacher}: chosen is {chosen.objective} (labels if clearly more)."
            )
    return chosen.fit
