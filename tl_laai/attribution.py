"""Which heads and layers matter: gradients at zero, and head ablations.

Gradient attribution of head h at layer l is the smallest group weight at which the fit of that
layer leaves the head at zero, given Delta = 0: `||grad_h||_2` for a pure group penalty. One
forward and one backward give it for every head of every layer. It is a first-order prediction:
it says how fast the loss falls when the head starts to move, not how far it can fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.activations import gradient_at_zero, last_token
from tl_laai.edits import Edit
from tl_laai.evaluation import Evaluation, evaluate_edits
from tl_laai.interventions import Intervention
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, tokenise
from tl_laai.tasks import Example, check_examples


@dataclass(frozen=True)
class Attribution:
    """Gradient attribution of every head.

    Attributes:
        values: smallest group weight that keeps each head at zero, `[n_layers, n_heads]`.
        loss: the loss at Delta = 0, in nats.
        n_examples: how many examples it was measured on.
    """

    values: Float[Tensor, "n_layers n_heads"]
    loss: float
    n_examples: int

    @property
    def by_layer(self) -> Float[Tensor, " n_layers"]:
        """Each layer's `lambda_max`: its largest head."""
        return self.values.amax(dim=-1)


def attribute(
    model: Any,
    examples: Sequence[Example],
    *,
    l1_ratio: float = 0.0,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Attribution:
    """Gradient attribution of every head of every layer at the last prompt token.

    Example:
        >>> attribute(model, split.train).by_layer.argmax()  # doctest: +SKIP
        tensor(7)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: about ten input-output pairs.
        l1_ratio: the l1 weight as a multiple of the group weight.
        template: how inputs become prompts.
    """
    check_examples("examples", examples)
    prompts = freeze(model, tokenise(model, examples, template=template))
    loss, gradient = gradient_at_zero(prompts)
    penalty = SparseGroupLasso.from_ratio(1.0, l1_ratio)
    return Attribution(penalty.head_thresholds(gradient.double().cpu()), loss, len(examples))


@dataclass(frozen=True)
class Ablation:
    """One variant of an intervention, evaluated.

    Attributes:
        variant: `all`, `none`, `without`, `only`, `cumulative` (the strongest heads so far), or
            `zero` / `mean` (the model's own head output replaced, the intervention left out).
        heads: the heads that the variant is about.
        evaluation: its rows.
    """

    variant: str
    heads: tuple[int, ...]
    evaluation: Evaluation


def ablate_heads(
    model: Any,
    intervention: Intervention,
    examples: Sequence[Example],
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    max_new_tokens: int | None = None,
) -> tuple[Ablation, ...]:
    """Evaluate an intervention without each head, with each alone, and strongest first.

    Beside it, the model's own head outputs at the last prompt token are replaced by zero and by
    their mean over the examples, for comparison. All variants run as one batch.

    Example:
        >>> for row in ablate_heads(model, capital, split.test):  # doctest: +SKIP
        ...     print(row.variant, row.heads, row.evaluation.exact_match)

    Args:
        model: the model that the intervention was fitted on; left as found.
        intervention: an intervention at one layer.
        examples: held-out examples.
        template: how inputs become prompts.
        max_new_tokens: longest answer to decode; None for the longest target and a margin.
    """
    if len(intervention.layers) != 1:
        raise ValueError(
            f"intervention edits layers {list(intervention.layers)}; heads are ablated at one "
            "layer. Ablate each summand on its own."
        )
    intervention.check_model(model, strict=True)
    layer = intervention.layers[0]
    strongest = [h.head for h in intervention.heads()]
    every = range(intervention.shape[0])

    def keeping(heads: Sequence[int]) -> Edit:
        kept = intervention.only_heads([(layer, head) for head in heads])
        return Edit(dict(kept.deltas), intervention.position)

    variants: list[tuple[str, tuple[int, ...], Edit]] = [
        ("none", (), Edit()),
        ("all", tuple(strongest), keeping(strongest)),
    ]
    for head in strongest:
        variants.append(("without", (head,), keeping([h for h in strongest if h != head])))
        variants.append(("only", (head,), keeping([head])))
    variants += [
        ("cumulative", tuple(strongest[:n]), keeping(strongest[:n]))
        for n in range(1, len(strongest) + 1)
    ]
    prompts = freeze(model, tokenise(model, examples, template=template))
    mean = last_token(prompts).z[layer].mean(dim=0)
    for head in every:
        keep = torch.ones(intervention.shape[0])
        keep[head] = 0
        replaced = torch.zeros_like(mean)
        replaced[head] = mean[head]
        variants.append(("zero", (head,), Edit(scale={layer: keep})))
        variants.append(("mean", (head,), Edit({layer: replaced}, scale={layer: keep})))
    names = {str(i): edit for i, (_, _, edit) in enumerate(variants)}
    evaluations = evaluate_edits(
        model, examples, names, template=template, max_new_tokens=max_new_tokens
    )
    return tuple(
        Ablation(name, heads, evaluations[str(i)]) for i, (name, heads, _) in enumerate(variants)
    )
