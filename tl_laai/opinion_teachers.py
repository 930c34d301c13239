"""Distillation of opinions: what a model answers after solved questions, to be learnt bare.

The few-shot prompt shows questions with a group's favourite answers; the shares that the model
then gives the options of a question stand in for the group's, and a fit to them brings the bare
prompt near to the few-shot one. Of the group, the favourites of the questions shown are all that it
learns from. It is `tl_laai.distillation` for options, where an answer is one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tl_laai.edits import Edit
from tl_laai.opinions import DEFAULT_OPINION_TEMPLATE, OpinionQuestion, OpinionTemplate
from tl_laai.surveys import evaluate_opinions
from tl_laai.tasks import same_input_key


def taught_questions(
    model: Any,
    questions: Sequence[OpinionQuestion],
    demonstrations: Sequence[OpinionQuestion],
    *,
    n_orders: int = 4,
    seed: int = 0,
    template: OpinionTemplate = DEFAULT_OPINION_TEMPLATE,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[OpinionQuestion, ...]:
    """The questions with the model's own few-shot answers as their shares.

    Example:
        >>> taught = taught_questions(model, split.train, split.train[:8])  # doctest: +SKIP
        >>> fit(model, task.examples(taught), layer=9, solver="adam")  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        questions: what the teacher is asked; its shares of them are not looked at.
        demonstrations: shown with the letter of their most frequent option; one that is asked too
            is asked after the others.
        n_orders: prompts a question, over which the teacher's shares are averaged.
        seed: of the orders.
        template: how questions become prompts.
        progress: told how many questions of how many are done.

    Returns:
        The questions in order; shares are among the letters, what is outside left out.

    Raises:
        ValueError: no questions, or one that has no other demonstration to be asked after.
        TooLongError: the demonstrations leave no room for a question.
    """
    if not questions:
        raise ValueError("questions is empty: give at least one to ask the teacher.")
    shown = {same_input_key(each.question) for each in demonstrations}
    by_itself = [i for i, each in enumerate(questions) if same_input_key(each.question) in shown]
    together = [i for i in range(len(questions)) if i not in set(by_itself)]
    taught: dict[int, OpinionQuestion] = {}
    for asked in ([together] if together else []) + [[i] for i in by_itself]:
        own = [questions[i] for i in asked]
        keys = {same_input_key(each.question) for each in own}
        others = [each for each in demonstrations if same_input_key(each.question) not in keys]
        if not others:
            raise ValueError(
                f"demonstrations hold {len(demonstrations)} questions, none but {own[0].question!r}"
                " itself: give at least one other for the teacher to read before it"
            )
        found = evaluate_opinions(
            model, own, {"it": Edit()}, n_orders=n_orders, seed=seed,
            demonstrations=others, template=template,
        )["it"]  # fmt: skip
        for i, row in zip(asked, found.rows, strict=True):
            taught[i] = replace(questions[i], distribution=row.predicted)
        if progress is not None:
            progress(len(taught), len(questions))
    return tuple(taught[i] for i in range(len(questions)))
