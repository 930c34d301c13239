"""Baselines on opinions: the right answer that they learn is a question's favourite option."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

from tl_laai.baselines import Tuned, tune
from tl_laai.methods import Method
from tl_laai.opinions import (
    DEFAULT_OPINION_TEMPLATE,
    OpinionQuestion,
    OpinionTemplate,
    option_examples,
)
from tl_laai.prompts import PromptTemplate
from tl_laai.tasks import Example


def tune_on_opinions(
    model: Any,
    questions: Sequence[OpinionQuestion],
    method: Method,
    *,
    n_folds: int = 2,
    seed: int = 0,
    template: OpinionTemplate = DEFAULT_OPINION_TEMPLATE,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Tune a baseline on opinion questions, each asked once and answered as the group mostly does.

    Example:
        >>> tuned = tune_on_opinions(model, split.train, METHODS["task-vector"])  # doctest: +SKIP
        >>> evaluate_opinions(model, split.test, {"it": tuned.edit})  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        questions: at least four; of the group, their most frequent options alone are seen.
        method: as for `baselines.tune`, which chooses its setting.
        n_folds: as there.
        seed: of the folds, and of the one order in which each question's options stand.
        template: how questions become prompts.
        progress: as for `baselines.tune`.

    Returns:
        The edit, its setting and the whole validation table.

    Raises:
        ValueError: as `baselines.tune`; a method that learns from what answers differ in, and a
            fold of which all have the same letter.
    """
    asked = option_examples(questions, n_orders=1, seed=seed, template=template)
    right = [
        Example(prompt.prompt, string.ascii_uppercase[prompt.order.index(question.favourite)])
        for prompt, question in zip(asked, questions, strict=True)
    ]
    # A letter is the whole answer: nothing is to be learnt behind it.
    bare = PromptTemplate("{input}", template.answer_prefix, template.separator, answer_end="")
    return tune(model, right, method, n_folds=n_folds, seed=seed, template=bare, progress=progress)
