"""What a model computes at the last prompt token, and the loss under Deltas in many layers.

Both run on frozen prompts, so only the last prompt token and the answer tokens are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.backends import own_modes
from tl_laai.hooking import Position
from tl_laai.packing import FrozenPrompts, Packing, last_residual, run
from tl_laai.vocabulary import cross_entropy


@dataclass(frozen=True)
class LastToken:
    """What stands at the last token of each prompt, in every layer.

    Attributes:
        residuals: the residual before each block, `[n_layers, n_prompts, d_model]`.
        z: the heads' outputs before W_O, `[n_layers, n_prompts, n_heads, d_head]`.
    """

    residuals: Float[Tensor, "n_layers n_prompts d_model"]
    z: Float[Tensor, "n_layers n_prompts n_heads d_head"]


@own_modes()
def last_token(prompts: FrozenPrompts) -> LastToken:
    """Residuals and heads' outputs at the last prompt token, without an edit.

    Example:
        >>> last_token(freeze(model, tokenise(model, examples))).z.mean(dim=1)  # doctest: +SKIP

    Args:
        prompts: frozen prompts; their answers are not read.

    Returns:
        Tensors on the model's device, in float32 (float64 for a float64 model).
    """
    backend = prompts.backend
    packing = Packing(prompts, torch.arange(len(prompts.examples)), prompt_only=True)
    heads: list[Tensor] = []

    def watch(_: int, z: Tensor) -> Tensor:
        heads.append(z[packing.last])
        return z

    with torch.no_grad():
        embedded = backend.embed(prompts.tokens[packing.token], packing.positions)
        steps = run(packing, {0: embedded}, watch)
        residuals = [x[packing.last] for layer, x in steps if layer < backend.n_layers]
    wide = _wide(prompts)
    return LastToken(torch.stack(residuals).to(wide), torch.stack(heads).to(wide))


@own_modes()
def losses_under(
    prompts: FrozenPrompts,
    deltas: Mapping[int, Float[Tensor, "n_problems n_heads d_head"]],
    *,
    position: Position = "prompt_end",
) -> Float[Tensor, " n_problems"]:
    """Mean answer cross-entropy with a Delta in each of several layers, differentiable in them.

    `tl_laai.engine` has one layer a problem, and chunks for any number of them; here every
    problem edits all the layers given, and all rows run at once.

    Example:
        >>> delta = torch.zeros(1, n_heads, d_head, requires_grad=True)  # doctest: +SKIP
        >>> losses_under(prompts, {3: delta, 9: delta}).sum().backward()  # doctest: +SKIP

    Args:
        prompts: frozen prompts with their answers.
        deltas: layer -> what each problem adds to that layer's heads' outputs.
        position: the last prompt token, or every step's.

    Returns:
        `[n_problems]`, in nats: the mean over an answer's tokens, then over the examples.
    """
    backend, head = prompts.backend, prompts.backend.unembedding()
    entry, n_examples = min(deltas), len(prompts.examples)
    n_problems = len(deltas[entry])
    prompts.enter_at([entry])
    packing = Packing(prompts, torch.arange(n_examples).repeat(n_problems))
    problem = torch.div(packing.row, n_examples, rounding_mode="floor")
    targets = prompts.targets[packing.token]
    edited = prompts.is_prompt_end[packing.token]
    if position == "every_step":
        edited = edited | (targets >= 0)
    where = torch.nonzero(edited).squeeze(-1)

    def edit(layer: int, z: Tensor) -> Tensor:
        if layer not in deltas:
            return z
        return z.index_add(0, where, deltas[layer][problem[where]].to(z.dtype))

    x = last_residual(run(packing, {entry: prompts.residuals[entry][packing.token]}, edit))
    counted = targets >= 0
    losses = cross_entropy(
        backend.final_norm(x[counted]),
        head.weight,
        targets[counted],
        bias=head.bias,
        softcap=head.softcap,
    )
    row = packing.row[counted]
    weight = 1 / (torch.bincount(row)[row] * n_examples).to(losses.dtype)
    return losses.new_zeros(n_problems).index_add(0, problem[counted], losses * weight)


@own_modes()
def gradient_at_zero(
    prompts: FrozenPrompts,
) -> tuple[float, Float[Tensor, "n_layers n_heads d_head"]]:
    """Loss without an edit, and its gradient with respect to a Delta at each layer."""
    backend = prompts.backend
    deltas = torch.zeros(
        (backend.n_layers, 1, backend.n_heads, backend.d_head),
        dtype=_wide(prompts),
        device=backend.device,
        requires_grad=True,
    )
    loss = losses_under(prompts, dict(enumerate(deltas))).sum()
    (gradient,) = torch.autograd.grad(loss, deltas)
    return float(loss.detach()), gradient[:, 0]


def _wide(prompts: FrozenPrompts) -> torch.dtype:
    return torch.float64 if prompts.backend.dtype == torch.float64 else torch.float32
