"""Few-shot teachers that have been taught: a Delta behind the demonstrations, fitted on labels.

A distilled fit comes near to its teacher and no nearer to the task than that, so a better teacher
is a better fit. Each labelled example is asked after the others, in drawn orders, and Delta of one
layer is fitted at the last token of those few-shot prompts, by Adam from zero without a penalty,
for a few steps: enough to learn what the demonstrations do not say (that an opposite is wanted,
how a plural is written), too few to learn the answers by heart. The prompt of the student stays
bare, and so does what it costs.

Ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tl_laai.backends import backend_of, own_modes
from tl_laai.distributions import NothingTaughtError
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TokenisedExample, tokenise
from tl_laai.relaxation import relax
from tl_laai.solvers import Status
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example, same_input_key

QUESTIONS = 20
"""How many prompts a teacher is fitted on: ten examples twice, or twenty of more once."""


@own_modes()
def fit_teacher(
    model: Any,
    examples: Sequence[Example],
    *,
    steps: int,
    layer: int | None = None,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    seed: int = 0,
) -> Edit:
    """What is added behind the demonstrations of a teacher that reads the examples.

    Example:
        >>> edit = fit_teacher(model, split.train, steps=5)  # doctest: +SKIP
        >>> evaluate_edits(  # doctest: +SKIP
        ...     model, split.test, {"fitted": edit}, demonstrations=split.train
        ... )

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: labelled; each is asked after the others.
        steps: of Adam; 0 leaves the teacher as it is.
        layer: where; None for the one after a third of the model.
        template: how inputs become prompts.
        seed: of the orders in which the others are shown.

    Returns:
        Delta of one layer, at the last prompt token.

    Raises:
        NothingTaughtError: no two different inputs, so that none can be asked after another, or a
            loss that is not finite.
        ValueError: no such layer.
    """
    if not steps:
        return Edit()
    if not examples:
        raise NothingTaughtError(
            "examples is empty: a teacher is fitted on examples asked after others. Give some, "
            "hold out fewer together, or no steps of that fit (teacher_steps=0)."
        )
    layer = teacher_layer(model, layer)
    prompts = freeze(model, _questions(model, examples, template, seed))
    engine = Engine(prompts, layers=[layer], rows=[range(QUESTIONS)])
    backend = prompts.backend
    dtype = torch.promote_types(backend.dtype, torch.float32)
    support = torch.ones(1, backend.n_heads, backend.d_head, dtype=torch.bool)
    (found,) = relax(engine.value_and_grad, support, dtype=dtype, steps=steps).solutions
    if found.status is Status.NON_FINITE:
        raise NothingTaughtError(
            f"teacher_steps is {steps}, and the teacher's loss on its labels is not finite. Use a "
            "wider dtype (float32), or teacher_steps=0."
        )
    return Edit({layer: found.delta})


def teacher_layer(model: Any, layer: int | None) -> int:
    """The layer of a teacher's fit: the one asked for, or the one after a third of the model."""
    n_layers = backend_of(model).n_layers
    if layer is None:
        return n_layers // 3
    if layer not in range(n_layers):
        raise ValueError(
            f"teacher_layer is {layer}; this model has layers 0 to {n_layers - 1}, or give None."
        )
    return layer


def _questions(
    model: Any, examples: Sequence[Example], template: PromptTemplate, seed: int
) -> list[TokenisedExample]:
    """Examples asked after the others, over and again in new orders until there are enough."""
    template = template.behind_demonstrations()
    queries = seeded_order(examples, seed)
    questions: list[TokenisedExample] = []
    for i in range(QUESTIONS):
        query = queries[i % len(queries)]
        own = same_input_key(query.input)
        others = [e for e in examples if same_input_key(e.input) != own]
        if not others:
            raise NothingTaughtError(
                f"examples hold the input {query.input!r} alone: a teacher is fitted on each "
                "example asked after others. Give more examples, or no steps of that fit "
                "(teacher_steps=0, --teacher-steps 0)."
            )
        shown = seeded_order(others, seed + i)
        questions += tokenise(model, [query], template=template, demonstrations=shown)
    return questions
