"""Commands on a group's opinions: `laai opinions`, and `laai evaluate` of what it saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_laai import display
from tl_laai.options import (
    AnyBackend,
    AnyModel,
    Json,
    check_out,
    layer_number,
    load,
    load_for,
)
from tl_laai.recipes import agreed, model_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tl_laai.interventions import Intervention
    from tl_laai.opinions import OpinionTemplate
    from tl_laai.polls import OpinionSplit
    from tl_laai.surveys import OpinionEvaluation

OPINION_STEPS, OPINION_LEARNING_RATE = 45, 0.03


@dataclass(frozen=True)
class PollData:
    """The questions of an opinion fit, and how they are asked.

    Attributes:
        group: whose answers.
        split: what was fitted on, and what is held out.
        n_orders: prompts a question.
        seed: of split and orders.
        shots: questions that few-shot prompts show; None for all that were fitted on.
        template: how questions become prompts.
    """

    group: str
    split: OpinionSplit
    n_orders: int
    seed: int
    shots: int | None
    template: OpinionTemplate


def recorded_poll(provenance: Mapping[str, Any]) -> PollData:
    """The questions that an opinion fit was made on, and those held out from it.

    Raises:
        FileNotFoundError, ValueError: the poll is not where it was, or has changed since the fit;
            parts of the intervention were fitted on different questions.
    """
    from tl_laai.opinions import OpinionTemplate
    from tl_laai.polls import OpinionTask

    asked, split = (agreed(provenance, name) for name in ("opinions", "split"))
    if asked is None or split is None:
        raise ValueError(
            "the parts of the intervention were not all fitted on the same questions of one group, "
            "so none are known to be held out; evaluate the parts, or give --task"
        )
    group, source, digest = (asked[name] for name in ("group", "source", "digest"))
    if source == "built-in":
        task = OpinionTask.load(group)
    else:
        task = OpinionTask.from_jsonl(str(source), group=group)
    if task.digest != digest:
        raise ValueError(
            f"the questions of {group!r} in {source} have changed since the fit (digest {digest}, "
            f"now {task.digest}), so its split cannot be made again; restore them"
        )
    n_train, n_orders, seed, shots = (split[name] for name in ("train", "orders", "seed", "shots"))
    template = OpinionTemplate(**asked["template"])
    questions = task.split(train=n_train, seed=seed)
    return PollData(task.group, questions, n_orders, seed, shots, template)


def opinions(
    group: Annotated[str, typer.Option(help="Whose answers; a wrong one lists those there are.")],
    model: AnyModel,
    file: Annotated[
        Path | None, typer.Option(help="JSONL of question, options, group, distribution.")
    ] = None,
    layer: Annotated[str, typer.Option(help="A number from 0; auto: cross-validated.")] = "auto",
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0, help="Group penalty / lambda_max; else auto chooses, a number has none."
        ),
    ] = None,
    train: Annotated[int | None, typer.Option(min=1, help="Questions to fit on; 3 of 5.")] = None,
    orders: Annotated[int, typer.Option(min=1, help="Orders of the options a question.")] = 4,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Fitted questions few-shot shows.")
    ] = None,
    max_evaluations: Annotated[
        int | None, typer.Option(min=1, help="With a number as --layer: at most; adam's 45 steps.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of adam, without --alpha: 0.03.")
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
    """
    from tl_laai.polls import OpinionTask

    task = OpinionTask.load(group) if file is None else OpinionTask.from_jsonl(file, group=group)
    n_train = 3 * len(task.distinct) // 5 if train is None else train
    split = task.split(train=n_train, seed=seed)
    if len(split.test) < 2:
        raise ValueError(f"--train {n_train} leaves {len(split.test)} to hold out; give fewer")
    fixed = (
        None
        if layer == "auto"
        else layer_number(layer, option="--layer", allowed="a number from 0, or auto")
    )
    if fixed is None and (max_evaluations is not None or learning_rate is not None):
        raise ValueError(
            "--max-evaluations and --learning-rate do not go with --layer auto: give it a number"
        )
    if alpha is not None and learning_rate is not None:
        raise ValueError(
            "--learning-rate is adam's, and --alpha is solved by proximal gradient: leave one out"
        )
    if out is not None:
        check_out(out)
    limit = OPINION_STEPS if max_evaluations is None else max_evaluations
    rate = OPINION_LEARNING_RATE if learning_rate is None else learning_rate
    loaded = load(model, backend)
    from tl_laai.batches import FitProblem
    from tl_laai.fitting import fit_many
    from tl_laai.opinions import DEFAULT_OPINION_TEMPLATE
    from tl_laai.selection import fit_auto
    from tl_laai.surveys import compare_opinions

    examples = task.examples(
        split.train, n_orders=orders, seed=seed, template=DEFAULT_OPINION_TEMPLATE
    )
    known = {
        "model": model_name(model),
        "backend": backend,
        "opinions": {
            "group": task.group,
            "source": task.source if file is None else str(file.resolve()),
            "digest": task.digest,
            "template": asdict(DEFAULT_OPINION_TEMPLATE),
        },
        "split": {"train": n_train, "orders": orders, "seed": seed, "shots": shots},
    }
    if fixed is None:
        with display.row_bar("Cross-validating") as progress:
            fitted = fit_auto(
                loaded,
                examples,
                alphas=None if alpha is None else [alpha],
                n_folds=3,
                learning_rate=OPINION_LEARNING_RATE,
                provenance=known,
                progress=lambda _, done, total: progress(done, total),
            ).fit
    else:
        title = f"Fitting layer {layer} on {len(examples)} prompts of {n_train} questions"
        with display.solver_bar(title, limit) as bar:
            [fitted] = fit_many(
                loaded,
                [FitProblem(examples, fixed, None, alpha, provenance=known)],
                solver="adam" if alpha is None else "proximal",
                learning_rate=rate,
                max_evaluations=limit,
                callback=bar,
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
    _show(group, results, json, layer=fitted.layer)
    if json:
        return
    display.show_fit(fitted)
    if out is not None:
        display.say(f"Saved to {out}. Next: laai evaluate {out}")


def evaluate_opinion_fit(
    intervention: Intervention,
    model: str | None,
    backend: str | None,
    *,
    few_shot: bool,
    json: bool,
) -> None:
    """Compare a saved fit on the questions that it was not fitted on, as `opinions` does."""
    from tl_laai.surveys import compare_opinions

    poll = recorded_poll(intervention.provenance)
    loaded = load_for(intervention, model, backend)
    with display.step(f"Asking {len(poll.split.test)} questions"):
        results = compare_opinions(
            loaded,
            poll.split,
            intervention,
            n_orders=poll.n_orders,
            seed=poll.seed,
            shots=poll.shots if few_shot else 0,
            template=poll.template,
        )
    _show(poll.group, results, json, layer=intervention.layers[0])


def _show(group: str, results: Mapping[str, OpinionEvaluation], json: bool, *, layer: int) -> None:
    if json:
        figures = {name: result.to_dict(rows=True) for name, result in results.items()}
        display.show_json({"layer": layer, "group": group, "results": figures})
    else:
        display.show_opinions(group, results)
