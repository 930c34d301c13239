"""Offsets for chosen heads of many layers: inference-time intervention, and learnt ones.

Both choose K heads over the whole model and add a vector to each at the last prompt token and at
every later one. The first reads its vectors off right and wrong answers; the second learns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.activations import gradient_at_zero, losses_under
from tl_laai.backends import own_modes
from tl_laai.edits import Edit
from tl_laai.hooking import Position
from tl_laai.methods import Method, Setting, given, possible_heads, read_answers
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prefix import freeze
from tl_laai.prompts import PromptTemplate, tokenise
from tl_laai.solvers import adam
from tl_laai.splits import cross_validation_folds
from tl_laai.tasks import Example

PROBE_FOLDS = 5
PROBE_RIDGE = 0.1
_NEWTON_STEPS = 15


@dataclass(frozen=True)
class InferenceTimeIntervention(Method):
    """Shifts the heads that tell right answers from wrong ones towards the right ones.

    A linear probe on each head's output at the last token of an answer; the K heads with the best
    cross-validated accuracy (ties by held-out loss) are shifted along the difference of means, by
    `strength` standard deviations of the outputs along it. A wrong answer is another example's.

    Li et al., "Inference-Time Intervention", NeurIPS 2023 (48 of 1,024 heads, strength 15).

    Args:
        n_heads: how many heads are shifted.
        strengths: of the shift, in standard deviations.
        seed: of the wrong answers and the probes' folds.
    """

    n_heads: tuple[int, ...] = (4, 8, 16)
    strengths: tuple[float, ...] = (1.0, 3.0, 8.0, 15.0)
    seed: int = 0

    def grid(self, model: Any) -> tuple[Setting, ...]:
        return tuple(
            Setting(n_heads=n, strength=strength)
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
        states = read_answers(model, examples, self.seed, template=template)
        right, wrong = (s.z.transpose(1, 2).flatten(0, 1).double() for s in states)
        accuracy, loss = probe(right, wrong, seed=self.seed)
        by_loss = loss.argsort(stable=True)
        order = by_loss[accuracy[by_loss].argsort(descending=True, stable=True)]
        mean = right.mean(dim=1) - wrong.mean(dim=1)
        direction = mean / mean.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        along = torch.einsum("hnd,hd->hn", torch.cat([right, wrong], dim=1), direction)
        shift = along.std(dim=-1, correction=0)[:, None] * direction
        shape = states[0].z.shape[0], *states[0].z.shape[2:]
        return [
            _head_edit(_chosen(order, s) * given(s.strength) * shift, shape, "every_step")
            for s in settings
        ]


def probe(
    right: Float[Tensor, "n_heads n d_head"],
    wrong: Float[Tensor, "n_heads n d_head"],
    *,
    seed: int = 0,
) -> tuple[Float[Tensor, " n_heads"], Float[Tensor, " n_heads"]]:
    """How well a linear probe on each head tells right from wrong, on held-out pairs.

    Logistic regression with a ridge penalty; the right and the wrong answer of one example are
    held out together. All heads are solved as one batch of Newton steps in the span of the data.

    Example:
        >>> accuracy, loss = probe(right, wrong)  # doctest: +SKIP

    Args:
        right: a head's outputs, one an example.
        wrong: the same for the wrong answers.
        seed: of the folds.

    Returns:
        Each head's accuracy and cross-entropy (nats) over all held-out pairs.
    """
    n = right.shape[1]
    correct, loss = (right.new_zeros(right.shape[0]) for _ in range(2))
    for held_out in cross_validation_folds(range(n), min(PROBE_FOLDS, n), seed):
        kept = [i for i in range(n) if i not in held_out]
        known = torch.cat([right[:, kept], wrong[:, kept]], dim=1)
        asked = torch.cat([right[:, held_out], wrong[:, held_out]], dim=1)
        label = known.new_tensor([1.0] * len(kept) + [0.0] * len(kept))
        sign = known.new_tensor([1.0] * len(held_out) + [-1.0] * len(held_out))
        margin = sign * probe_logits(known, label, asked)
        correct += (margin > 0).sum(dim=-1)
        loss -= torch.nn.functional.logsigmoid(margin).sum(dim=-1)
    return correct / (2 * n), loss / (2 * n)


def probe_logits(
    known: Float[Tensor, "n_heads n d_head"],
    label: Float[Tensor, " n"],
    asked: Float[Tensor, "n_heads m d_head"],
) -> Float[Tensor, "n_heads m"]:
    """Logits of ridge logistic regressions, one a head, fitted on `known` and asked of `asked`.

    Each minimises `sum log(1 + exp(-+ w.x)) + ridge / 2 ||w||^2` over features centred, scaled to
    a mean square norm of 1, and with a 1 behind them. With `w = X^T a`, a Newton step solves a
    system of the size of the data and not of the head.
    """
    centre = known.mean(dim=1, keepdim=True)
    size = (known - centre).square().sum(dim=-1).mean(dim=-1).sqrt()[:, None, None]
    size = torch.where(size > 0, size, 1.0)
    x, y = ((part - centre) / size for part in (known, asked))
    gram, cross = x @ x.mT + 1, y @ x.mT + 1
    ridge = PROBE_RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    a = x.new_zeros(x.shape[:2])
    for _ in range(_NEWTON_STEPS):
        f = (gram @ a[..., None])[..., 0]
        p = f.sigmoid()
        weight = p * (1 - p)
        a = torch.linalg.solve(weight[..., None] * gram + ridge, weight * f + label - p)
    return (cross @ a[..., None])[..., 0]


@dataclass(frozen=True)
class LearntHeads(Method):
    """Learnt offsets for K heads over all layers: few, joint, by Adam on the answers' loss.

    Heads are chosen by the norm of the loss's gradient with respect to an offset at the last prompt
    token, at zero (`tl_laai.attribution`); then the offsets of the chosen ones are learnt together.

    After Yin, Ye & Durrett, "LoFiT: Localized Fine-tuning on LLM Representations", NeurIPS 2024,
    who choose heads by the norm of learnt scales and shift every position.

    Args:
        n_heads: how many heads.
        learning_rates: of Adam.
        steps: of Adam.
        position: which tokens are shifted.
    """

    n_heads: tuple[int, ...] = (4, 12, 36)
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    steps: int = 20
    position: Position = "every_step"

    def grid(self, model: Any) -> tuple[Setting, ...]:
        return tuple(
            Setting(n_heads=n, learning_rate=rate)
            for n in possible_heads(model, self.n_heads)
            for rate in self.learning_rates
        )

    @own_modes()
    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        prompts = freeze(model, tokenise(model, examples, template=template))
        _, at_zero = gradient_at_zero(prompts)
        order = at_zero.flatten(0, 1).norm(dim=-1).argsort(descending=True, stable=True)
        chosen = torch.stack([_chosen(order, s) for s in settings]).to(at_zero)
        layers = chosen.view(-1, *at_zero.shape[:2]).any(2).any(0).nonzero().flatten().tolist()
        # Adam's step does not depend on the gradient's size: with offsets in units of each
        # setting's own rate, and gradients in those of the offsets, all run as a batch at rate 1.
        unit = chosen * chosen.new_tensor([given(s.learning_rate) for s in settings])[:, None, None]

        def value_and_grad(steps: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
            leaf = (steps * unit[problems]).detach().requires_grad_()
            offsets = leaf.unflatten(1, at_zero.shape[:2])
            deltas = {layer: offsets[:, layer] for layer in layers}
            losses = losses_under(prompts, deltas, position=self.position)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            return losses.detach(), gradient * chosen[problems]

        start = at_zero.new_zeros(len(settings), *at_zero.flatten(0, 1).shape)
        none = SparseGroupLasso(0.0, 0.0)
        found = adam(value_and_grad, start, none, learning_rate=1.0, steps=self.steps)
        return [
            _head_edit(solution.delta * own, at_zero.shape, self.position)
            for solution, own in zip(found, unit, strict=True)
        ]


def _chosen(order: Tensor, setting: Setting) -> Tensor:
    """1 for the first `n_heads` of an order of all heads, else 0, `[n_layers * n_heads, 1]`."""
    first = order[: int(given(setting.n_heads))]
    mask = torch.zeros(len(order), 1, dtype=torch.float64, device=order.device)
    return mask.index_fill(0, first, 1.0)


def _head_edit(vectors: Tensor, shape: Sequence[int], position: Position) -> Edit:
    """An edit of `[n_layers * n_heads, d_head]` vectors, in the layers where any is not zero."""
    by_layer = vectors.detach().view(*shape)
    kept = by_layer.flatten(1).any(dim=1).nonzero().flatten().tolist()
    return Edit({layer: by_layer[layer] for layer in kept}, position)
