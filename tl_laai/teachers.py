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
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TokenisedExample, tokenise
from tl_laai.relaxation import relax
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example, same_input_key

QUESTIONS = 20
"""How often a teacher is asked in a fit: ten examples twice, or twenty of more once."""


@own_modes()
def fit_teachers(
    model: Any,
    parts: Sequence[Sequence[Example]],
    *,
    steps: int,
    layer: int | None = None,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    seed: int = 0,
) -> list[Edit]:
    """What is added behind the demonstrations, for a teacher of each part of the examples.

    Example:
        >>> (edit,) = fit_teachers(model, [split.train], steps=5)  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        parts: the labelled examples that each teacher reads, and may learn from.
        steps: of Adam; 0 leaves the teachers as they are.
        layer: where; None for the one after a third of the model.
        template: how inputs become prompts.
        seed: of the order in which the other examples are shown.

    Returns:
        One edit a part, at the last prompt token.

    Raises:
        ValueError: a part has no two different inputs, so that none can be asked after another.
    """
    if not steps:
        return [Edit() for _ in parts]
    backend = backend_of(model)
    layer = backend.n_layers // 3 if layer is None else layer
    asked = [_questions(model, examples, template, seed) for examples in parts]
    numbers = iter(range(sum(map(len, asked))))
    engine = Engine(
        freeze(model, [question for own in asked for question in own]),
        layers=[layer] * len(parts),
        rows=[[next(numbers) for _ in own] for own in asked],
    )
    dtype = torch.promote_types(backend.dtype, torch.float32)
    support = torch.ones(len(parts), backend.n_heads, backend.d_head, dtype=torch.bool)
    found = relax(engine.value_and_grad, support, dtype=dtype, steps=steps)
    return [Edit({layer: solution.delta}) for solution in found.solutions]


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
            raise ValueError(
                f"examples hold the input {query.input!r} alone: a teacher is fitted on each "
                "example asked after others. Give more, or teacher_steps=0."
            )
        shown = seeded_order(others, seed + i)
        questions += tokenise(model, [query], template=template, demonstrations=shown)
    return questions
