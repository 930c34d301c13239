"""Commands on a group's opinions: `laai opinions`, and `laai evaluate` of what it saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_laai import display
from tl_laai.opinion_recipes import PollData, record_poll, recorded_poll
from tl_laai.options import (
    AnyBackend,
    AnyModel,
    Json,
    check_out,
    layer_number,
    load,
    load_for,
)
from tl_laai.recipes import agreed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tl_laai.baselines import Tuned
    from tl_laai.interventions import Intervention
    from tl_laai.opinions import OpinionQuestion
    from tl_laai.surveys import OpinionEvaluation


def opinions(
    group: Annotated[str, typer.Option(help="Whose answers; a wrong one lists those there are.")],
    model: AnyModel,
    file: Annotated[
        Path | None, typer.Option(help="JSONL of question, options, group, distribution.")
    ] = None,
    layer: Annotated[
        str, typer.Option(help="A number from 0; auto: of three, by cross-validation.")
    ] = "auto",
    alpha: Annotated[
        float | None,
        typer.Option(min=0, help="Group penalty / lambda_max; none unless given."),
    ] = None,
    train: Annotated[int | None, typer.Option(min=1, help="Questions to fit on; 3 of 5.")] = None,
    orders: Annotated[int, typer.Option(min=1, help="Orders of the options a question.")] = 8,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Fitted questions few-shot shows.")
    ] = None,
    outside_weight: Annotated[
        float,
        typer.Option(min=0, help="Of naming no letter at all, in the loss; 0: letters alone."),
    ] = 1.0,
    objective: Annotated[
        Literal["answers", "distill"],
        typer.Option(help="answers: the group's shares; distill: the model's own after --shots."),
    ] = "answers",
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="Another intervention to stand beside it; may be repeated."),
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(min=1, help="Of loss and gradient; 60.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Fit by Adam, at a --layer given, without --alpha."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and the orders.")] = 0,
    backend: AnyBackend = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder to save the intervention in.")] = None,
    json: Json = False,
) -> None:
    """Fit a group's answers to opinion questions; compare on questions held out.

    Floors are saying each option equally often, and repeating the fitted
    questions' mean by position. Few-shot prompts show the fitted questions,
    each answered with the letter of its most frequent option.

    With --baseline other interventions stand beside it, each tuned on what
    few-shot prompts show: laai opinions --group Democrat --model gemma-3-270m
    --layer 9 --shots 8 --baseline task-vector. There are those of laai
    baselines, but for lora and ia3.

    With --objective distill the few-shot prompt's answers to the fitted
    questions are learnt; of the group it sees the favourites alone of those
    shown: laai opinions --group Republican --model gemma-3-270m --layer 9
    --shots 8 --objective distill
    """
    from tl_laai.polls import OpinionTask

    task = OpinionTask.load(group) if file is None else OpinionTask.from_jsonl(file, group=group)
    n_train = 3 * len(task.distinct) // 5 if train is None else train
    split = task.split(train=n_train, seed=seed)
    if len(split.test) < 2:
        remedy = "give fewer" if n_train > 1 else "give a --file with more questions"
        raise ValueError(f"--train {n_train} leaves {len(split.test)} to hold out; {remedy}")
    if shots is not None and shots > n_train:
        raise ValueError(f"--shots {shots}: few-shot prompts show fitted questions, {n_train} here")
    if objective == "distill" and min(n_train, n_train if shots is None else shots) < 2:
        raise ValueError(
            "--objective distill learns from few-shot prompts: show two questions or more (--shots)"
        )
    methods = _methods(baseline or [], n_train if shots is None else shots)
    fixed = (
        None
        if layer == "auto"
        else layer_number(layer, option="--layer", allowed="a number from 0, or auto")
    )
    if fixed is None and learning_rate is not None:
        raise ValueError("--learning-rate does not go with --layer auto: give it a number")
    if alpha is not None and learning_rate is not None:
        raise ValueError(
            "--learning-rate is adam's, and --alpha is solved by proximal gradient: leave one out"
        )
    if out is not None:
        check_out(out)
    if not math.isfinite(outside_weight):
        raise ValueError(f"--outside-weight is {outside_weight}; give a number from 0 on")
    loaded = load(model, backend)
    from tl_laai.batches import FitProblem
    from tl_laai.fitting import fit_many
    from tl_laai.opinions import DEFAULT_OPINION_TEMPLATE
    from tl_laai.rounds import OPINION_EVALUATIONS, OPINION_TOLERANCE
    from tl_laai.selection import fit_auto
    from tl_laai.surveys import compare_opinions, evaluate_opinions

    poll = PollData(task, split, orders, seed, shots, DEFAULT_OPINION_TEMPLATE)
    _check_few_shot(loaded, poll)
    known = record_poll(model, backend, poll, outside_weight=outside_weight, objective=objective)
    tuned = _tuned(loaded, poll, methods)
    learnt = split.train if objective == "answers" else _taught(loaded, poll)
    examples = task.examples(
        learnt,
        n_orders=orders,
        seed=seed,
        template=DEFAULT_OPINION_TEMPLATE,
        outside_weight=outside_weight,
    )
    if fixed is None:
        with display.row_bar("Cross-validating") as progress:
            fitted = fit_auto(
                loaded,
                examples,
                alphas=None if alpha is None else [alpha],
                n_folds=3,
                max_evaluations=max_evaluations,
                provenance=known,
                progress=lambda _, done, total: progress(done, total),
            ).fit
    else:
        title = f"Fitting layer {layer} on {len(examples)} prompts of {n_train} questions"
        by_adam: dict[str, Any] = {}
        if learning_rate is not None:
            by_adam = {"solver": "adam", "learning_rate": learning_rate}
        limit = OPINION_EVALUATIONS if max_evaluations is None else max_evaluations
        with display.solver_bar(title, limit) as bar:
            [fitted] = fit_many(
                loaded,
                [FitProblem(examples, fixed, None, alpha, provenance=known)],
                max_evaluations=limit,
                tolerance=OPINION_TOLERANCE,
                callback=bar,
                **by_adam,
            )
    if out is not None:
        fitted.intervention.save_pretrained(out)
    with display.step(f"Asking {len(split.test)} questions"):
        results = compare_opinions(
            loaded,
            split,
            fitted.intervention,
            n_orders=orders,
            seed=seed,
            shots=shots,
            template=DEFAULT_OPINION_TEMPLATE,
        )
    if tuned:
        results |= evaluate_opinions(
            loaded,
            split.test,
            {name: one.edit for name, one in tuned.items()},
            n_orders=orders,
            seed=seed,
            template=DEFAULT_OPINION_TEMPLATE,
        )
    distilled = objective == "distill"
    chosen = {name: str(one.setting) for name, one in tuned.items()}
    if json:
        kept = fitted.intervention.provenance
        shown = {name: kept[name] for name in ("solution", "penalty", "opinions", "split", "loss")}
        heads = display.head_norms(fitted.intervention)
        saved = {"out": None if out is None else str(out), "heads": heads}
        more = {"baselines": chosen} if chosen else {}
        _show(group, results, json, distilled, layer=fitted.layer, **saved, **shown, **more)
        return
    _show(group, results, json, distilled, layer=fitted.layer)
    for name, setting in chosen.items():
        display.say(f"{name}: {setting}")
    display.show_fit(fitted)
    if out is not None:
        display.say(f"Saved to {out}. Next: laai evaluate {out}")
    else:
        display.say("Not saved: --out FOLDER keeps the intervention.")


def evaluate_opinion_fit(
    intervention: Intervention,
    model: str | None,
    backend: str | None,
    *,
    few_shot: bool,
    json: bool,
) -> None:
    """Compare a saved fit on the questions that it was not fitted on, as `opinions` does."""
    from tl_laai.prompts import TooLongError
    from tl_laai.surveys import compare_opinions

    poll = recorded_poll(intervention.provenance)
    loaded = load_for(intervention, model, backend)
    with display.step(f"Asking {len(poll.split.test)} questions"):
        try:
            results = compare_opinions(
                loaded,
                poll.split,
                intervention,
                n_orders=poll.n_orders,
                seed=poll.seed,
                shots=poll.shots if few_shot else 0,
                template=poll.template,
            )
        except TooLongError as error:
            raise TooLongError(f"{error}, or leave few-shot out (--no-few-shot)") from error
    distilled = agreed(intervention.provenance, "loss", "objective") == "distill"
    _show(poll.task.group, results, json, distilled, layer=intervention.layers[0])


def _taught(model: Any, poll: PollData) -> tuple[OpinionQuestion, ...]:
    """The fitted questions with the shares that few-shot prompts of them give."""
    from tl_laai.opinion_teachers import taught_questions

    with display.row_bar("Asking the few-shot prompt") as progress:
        return taught_questions(
            model,
            poll.split.train,
            poll.split.train[: poll.shots],
            n_orders=poll.n_orders,
            seed=poll.seed,
            template=poll.template,
            progress=progress,
        )


def _methods(names: Sequence[str], n_shown: int) -> tuple[str, ...]:
    """Names of baselines, each once; refused where there is no such method."""
    if not names:
        return ()
    from tl_laai.baselines import METHODS

    for name in names:
        if name not in METHODS:
            raise ValueError(f"--baseline {name}: on opinions there are {', '.join(METHODS)}")
    if n_shown < 4:
        raise ValueError(
            f"--baseline {names[0]} is tuned on the {n_shown} questions that few-shot prompts "
            "show, and needs four: raise --shots or --train"
        )
    return tuple(dict.fromkeys(names))


def _tuned(model: Any, poll: PollData, names: Sequence[str]) -> dict[str, Tuned]:
    """Each baseline tuned on what few-shot prompts show; left out where that does not allow it."""
    tuned: dict[str, Tuned] = {}
    if not names:
        return tuned
    from tl_laai.baselines import METHODS
    from tl_laai.opinion_baselines import tune_on_opinions

    shown = poll.split.train[: poll.shots]
    for name in names:
        try:
            with display.row_bar(f"Tuning {name}") as progress:
                tuned[name] = tune_on_opinions(
                    model,
                    shown,
                    METHODS[name],
                    seed=poll.seed,
                    template=poll.template,
                    progress=progress,
                )
        except ValueError as error:
            display.message(f"{name} is left out: {error}", style="yellow")
    return tuned


def _check_few_shot(model: Any, poll: PollData) -> None:
    """Refuse, before the fit and not after it, to show more questions than the context holds."""
    from tl_laai.prompts import TooLongError, tokenise_options

    shown = () if poll.shots == 0 else poll.split.train[: poll.shots]
    asked = poll.task.examples(
        poll.split.test,
        n_orders=poll.n_orders,
        seed=poll.seed,
        template=poll.template,
        demonstrations=shown,
    )
    try:
        for example in asked:
            tokenise_options(model, example)
    except TooLongError as error:
        if not shown:
            raise
        raise TooLongError(f"{error} than {len(shown)} (--shots), or none (--shots 0)") from error


def _show(
    group: str,
    results: Mapping[str, OpinionEvaluation],
    json: bool,
    distilled: bool,
    **more: Any,
) -> None:
    """Compare with the group, and what was distilled with the few-shot prompt that taught it."""
    from tl_laai.surveys import mean_kl

    apart = {}
    if distilled and "few_shot" in results:
        few_shot = results["few_shot"]
        apart = {name: mean_kl(few_shot, results[name]) for name in ("zero_shot", "fitted")}
    if json:
        figures = {name: result.to_dict(rows=True) for name, result in results.items()}
        told = {"kl_from_few_shot": apart} if apart else {}
        display.show_json({"group": group, "results": figures, **told, **more})
        return
    display.show_opinions(group, results)
    if apart:
        display.say(
            "Learnt from the few-shot prompt's answers; KL from those, on the held-out questions: "
            f"zero-shot {apart['zero_shot']:.4f}, intervened {apart['fitted']:.4f}"
        )
