"""Steering vectors of the residual stream: what other methods add or write, without training.

Residuals are those before a block, so an edit at layer `l` acts on what block `l - 1` has written.
Where a paper edits every position of a prompt, here the last prompt token and, with `every_step`,
all later ones are edited: what stands before them is kept, and computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.activations import last_token
from tl_laai.backends import backend_of
from tl_laai.controls import shuffled_answers
from tl_laai.decoding import answer_log_probabilities
from tl_laai.edits import Edit
from tl_laai.methods import (
    Method,
    Setting,
    every_second,
    given,
    leave_one_out,
    possible_heads,
    read,
    read_answers,
)
from tl_laai.packing import FrozenPrompts
from tl_laai.prefix import freeze
from tl_laai.prompts import PromptTemplate, tokenise, tokenise_prompts
from tl_laai.tasks import Example


@dataclass(frozen=True)
class FunctionVector(Method):
    """The summed output of the heads that carry a task in context, added at one layer.

    A head's mean output at the last token of few-shot prompts is patched into few-shot prompts
    with shuffled labels; its average indirect effect is the rise in the probability of the right
    answer's first token. The heads with the largest effects, through W_O (and the norm behind it
    where there is one), are summed. Each example is asked with the others as demonstrations, and
    labels are shuffled among all of them.

    Todd et al., "Function Vectors in Large Language Models", ICLR 2024, sections 2.2 and 2.3.
    They take 10 heads of GPT-J and add the sum itself, at strength 1.

    Args:
        layers: where it may be added; None for every second layer.
        n_heads: how many heads are summed.
        strengths: factors on the sum.
        seed: of the shuffled labels.
    """

    layers: tuple[int, ...] | None = None
    n_heads: tuple[int, ...] = (4, 16, 64)
    strengths: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    seed: int = 0

    def grid(self, model: Any) -> tuple[Setting, ...]:
        return tuple(
            Setting(layer=layer, n_heads=n, strength=strength)
            for layer in every_second(model, self.layers)
            for n in possible_heads(model, self.n_heads)
            for strength in self.strengths
        )

    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        shown = leave_one_out(model, examples, examples, template=template)
        z = last_token(freeze(model, shown)).z
        wrong = leave_one_out(
            model, examples, shuffled_answers(examples, self.seed), template=template
        )
        # What all answers begin with, such as a space that is a token, tells none from another.
        columns = zip(*(e.answer for e in wrong), strict=False)
        shared = len([*itertools.takewhile(lambda tokens: len({*tokens}) == 1, columns)])
        first = [replace(e, answer=e.answer[: shared + 1]) for e in wrong]
        effects = average_indirect_effects(freeze(model, first), z.mean(dim=1))
        vectors = {
            n: _heads_sum(model, z, effects, n) for n in {given(s.n_heads) for s in settings}
        }
        return [
            Edit(residual={given(s.layer): given(s.strength) * vectors[given(s.n_heads)]})
            for s in settings
        ]


def average_indirect_effects(
    prompts: FrozenPrompts, mean_z: Float[Tensor, "n_layers n_heads d_head"]
) -> Float[Tensor, "n_layers n_heads"]:
    """How much more probable the answers become with one head's output replaced by its mean.

    Example:
        >>> average_indirect_effects(corrupted, clean.z.mean(dim=1))  # doctest: +SKIP

    Args:
        prompts: prompts with shuffled labels, with the right answers (up to their first tokens
            that differ).
        mean_z: each head's mean output at the last token of right prompts.

    Returns:
        Differences in probability, mean over prompts. The heads of a layer run as one batch,
        from that layer up.
    """
    n_layers, n_heads, _ = mean_z.shape
    prompts.enter_at(range(n_layers))
    heads = torch.eye(n_heads, dtype=mean_z.dtype, device=mean_z.device)
    effects = []
    for layer in range(n_layers):
        patched = [
            Edit({layer: own[:, None] * mean_z[layer]}, scale={layer: 1 - own}) for own in heads
        ]
        # Without an edit as a zero delta, so that both come from the same layer and batch.
        plain = Edit({layer: torch.zeros_like(mean_z[layer])})
        probabilities = answer_log_probabilities(prompts, [plain, *patched]).exp()
        effects.append((probabilities[1:] - probabilities[0]).mean(dim=-1))
    return torch.stack(effects)


def _heads_sum(
    model: Any,
    z: Float[Tensor, "n_layers n_prompts n_heads d_head"],
    effects: Float[Tensor, "n_layers n_heads"],
    n: int,
) -> Float[Tensor, " d_model"]:
    """What the `n` heads with the largest effects write, mean over prompts."""
    backend = backend_of(model)
    top = effects.flatten().argsort(descending=True)[:n]
    chosen = torch.zeros(effects.numel()).index_fill(0, top, 1.0).view_as(effects)
    total = torch.zeros(backend.d_model, dtype=z.dtype, device=z.device)
    for layer in chosen.any(dim=1).nonzero().flatten().tolist():
        whole = z[layer].to(backend.dtype)
        part = whole * chosen[layer].to(whole)[:, None]
        total += backend.written(layer, part, whole).to(z.dtype).mean(dim=0)
    return total


@dataclass(frozen=True)
class TaskVector(Method):
    """The residual that demonstrations leave behind, written over the zero-shot one at a layer.

    It is read at the last token of few-shot prompts that ask a dummy query, and replaces the
    residual at the last token of a zero-shot prompt. Every example is a dummy query once, after
    the others as demonstrations, and the mean is taken; the paper reads one prompt.

    Hendel, Geva & Globerson, "In-Context Learning Creates Task Vectors", Findings of EMNLP 2023.

    Args:
        layers: where it may be written; None for all but the embedding.
    """

    layers: tuple[int, ...] | None = None

    def grid(self, model: Any) -> tuple[Setting, ...]:
        layers = range(1, backend_of(model).n_layers) if self.layers is None else self.layers
        return tuple(Setting(layer=layer) for layer in layers)

    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        shown = leave_one_out(model, examples, examples, template=template)
        mean = last_token(freeze(model, shown)).residuals.mean(dim=1)
        return [Edit(replace={given(s.layer): mean[given(s.layer)]}) for s in settings]


@dataclass(frozen=True)
class InContextVector(Method):
    """The main direction from inputs to outputs, added at every layer and step.

    Inputs and outputs are read as texts of their own; the differences of their last tokens'
    residuals, all layers in one long vector, have a first principal direction (uncentred, turned
    towards their mean). Each layer's part is scaled to `strength` times the mean norm of the
    residual that a zero-shot prompt has there.

    Liu et al., "In-context Vectors", ICML 2024, section 3. They shift every position and put the
    shifted state back to its old length; here the last prompt token and those after it are shifted
    and the length is left, since an edit adds a constant. The embedding and the output of the
    last block are not shifted.

    Args:
        strengths: of each layer's shift, relative to the residual.
    """

    strengths: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05)

    def grid(self, model: Any) -> tuple[Setting, ...]:
        return tuple(Setting(strength=strength) for strength in self.strengths)

    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        before = read(model, tokenise_prompts(model, [e.input for e in examples])).residuals
        after = read(model, tokenise_prompts(model, [e.output for e in examples])).residuals
        asked = last_token(freeze(model, tokenise(model, examples, template=template))).residuals
        change = (after - before)[1:].double()
        if not change.any():
            raise ValueError(
                "the examples' outputs are their inputs, so no direction leads from one to the "
                "other: leave the in-context vector out, or give other examples."
            )
        flat = change.transpose(0, 1).flatten(1)
        direction = torch.linalg.svd(flat, full_matrices=False).Vh[0]
        direction = direction * torch.sign(flat.mean(dim=0) @ direction)
        by_layer = direction.view(len(change), -1)
        by_layer = by_layer / by_layer.norm(dim=-1, keepdim=True)
        size = asked[1:].double().norm(dim=-1).mean(dim=-1)
        shift = by_layer * size[:, None]
        return [
            Edit(
                residual={i + 1: given(s.strength) * shift[i] for i in range(len(shift))},
                position="every_step",
            )
            for s in settings
        ]


@dataclass(frozen=True)
class MeanDifference(Method):
    """The mean residual of right answers less that of wrong ones, added at one layer and step on.

    Residuals are read at the last token of the answer, behind its prompt. A wrong answer is
    another example's, so both sides hold the same answers and only how they fit differs.

    Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024.

    Args:
        layers: where it may be added; None for every second layer.
        strengths: factors on the difference.
        seed: which wrong answers.
    """

    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    seed: int = 0

    def grid(self, model: Any) -> tuple[Setting, ...]:
        return tuple(
            Setting(layer=layer, strength=strength)
            for layer in every_second(model, self.layers)
            for strength in self.strengths
        )

    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        right, wrong = read_answers(model, examples, self.seed, template=template)
        difference = right.residuals.mean(dim=1) - wrong.residuals.mean(dim=1)
        return [
            Edit(
                residual={given(s.layer): given(s.strength) * difference[given(s.layer)]},
                position="every_step",
            )
            for s in settings
        ]
