"""The engine: loss and gradient of many Deltas at once, on a frozen prefix.

A problem is a layer, a set of examples and a Delta. All problems are evaluated as rows of one
packed batch (`packing.py`), each row entering at its own layer, cut into chunks that bound
memory. Gradients are taken with respect to the Deltas alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_laai.attention import room_for_keys
from tl_laai.backends import own_modes
from tl_laai.hooking import Position
from tl_laai.memory import bytes_of_gib, bytes_per_token
from tl_laai.objectives import AnswerCrossEntropy, Objective
from tl_laai.packing import FrozenPrompts, Packing, last_residual, run
from tl_laai.recording import Recorded, pool_of

MAX_TERMS = 16
"""Most terms in which the gradient of one problem is told; a solver keeps a matrix for each."""


class Engine:
    """Loss and gradient of many problems, each a layer, a set of examples and a Delta.

    Args:
        prompts: the frozen prompts of all problems.
        layers: the edited layer of each problem, `[n_problems]`.
        rows: the examples of each problem, as indices into `prompts.examples`.
        position: where Delta is added: the last prompt token, or at every decoding step.
        objective: what suffix tokens should predict; None for the examples' answers.
        weights: of each problem's rows; None for all alike. They are divided by their sum.
        max_memory: GiB that one chunk of rows may take above the model.

    Example:
        >>> engine = Engine(prompts, layers=[9], rows=[range(10)])  # doctest: +SKIP
        >>> loss, gradient = engine.value_and_grad(delta[None], torch.tensor([0]))  # doctest: +SKIP
    """

    @own_modes()
    def __init__(
        self,
        prompts: FrozenPrompts,
        *,
        layers: Sequence[int],
        rows: Sequence[Sequence[int]],
        position: Position = "prompt_end",
        objective: Objective | None = None,
        weights: Sequence[Sequence[float]] | None = None,
        max_memory: float = 1.0,
    ) -> None:
        backend = prompts.backend
        _check_problems(prompts, layers, rows, position, weights)
        self.prompts, self.position = prompts, position
        self.objective = objective or AnswerCrossEntropy(prompts.targets)
        self.n_counted = _counted_tokens(prompts, self.objective)
        _check_counted(prompts, rows, self.n_counted)
        self.layers = tuple(layers)
        shared = weights or [[1.0] * len(own) for own in rows]
        once = [_each_once(own, weight) for own, weight in zip(rows, shared, strict=True)]
        self.rows = tuple(torch.tensor(list(own), device=backend.device) for own in once)
        wide = torch.float64 if backend.dtype == torch.float64 else torch.float32
        shares = [torch.tensor(list(own.values()), dtype=wide) for own in once]
        self.row_weights = tuple((share / share.sum()).to(backend.device) for share in shares)
        self.n_terms = tuple(min(MAX_TERMS, len(own)) for own in self.rows)
        self.unembedding = backend.unembedding()
        prompts.enter_at(self.layers)
        self._plans: dict[tuple[int, ...], list[_Plan]] = {}
        self.pool = pool_of(backend.model)
        n_keys = room_for_keys(int(prompts.prefix_lengths.max())) + 1
        per_token = bytes_per_token(backend, n_keys, min(self.layers))
        self.max_tokens = max(1, bytes_of_gib(max_memory) // per_token)

    def _chunks(self, problems: Sequence[int]) -> list[list[tuple[int, range]]]:
        """Cut the rows of the problems, sorted by layer, into chunks of bounded size.

        A chunk lists `(place in problems, which of its rows)`.
        """
        order = sorted(range(len(problems)), key=lambda a: self.layers[problems[a]])
        chunks: list[list[tuple[int, range]]] = [[]]
        room = self.max_tokens
        for a in order:
            begin = 0
            for first, tokens in self._pieces(problems[a]):
                if tokens > room and (chunks[-1] or first > begin):
                    if first > begin:
                        chunks[-1].append((a, range(begin, first)))
                    chunks.append([])
                    begin, room = first, self.max_tokens
                room -= tokens
            chunks[-1].append((a, range(begin, len(self.rows[problems[a]]))))
        return [chunk for chunk in chunks if chunk]

    def _pieces(self, problem: int) -> list[tuple[int, int]]:
        """Where the rows of a problem may be cut: `(first row, tokens up to the next)`.

        Between terms, so that each is added up in one go, whatever shares its chunk; inside a
        term only if it is too large for a chunk of its own.
        """
        offsets, rows = self.prompts.offsets, self.rows[problem]
        lengths = (offsets[rows + 1] - offsets[rows]).tolist()
        n_rows, n_terms = len(rows), self.n_terms[problem]
        starts = [-(-k * n_rows // n_terms) for k in range(n_terms + 1)]
        pieces = []
        for first, end in pairwise(starts):
            tokens = sum(lengths[first:end])
            if tokens <= self.max_tokens:
                pieces.append((first, tokens))
            else:
                pieces += [(i, lengths[i]) for i in range(first, end)]
        return pieces

    def plans(self, problems: Sequence[int]) -> list[_Plan]:
        """The packed batches that evaluate the listed problems (the last few are kept)."""
        key = tuple(problems)
        if key not in self._plans:
            if len(self._plans) > 3:
                self._plans.clear()
            self._plans[key] = [_Plan(self, key, chunk) for chunk in self._chunks(key)]
        return self._plans[key]

    @own_modes()
    def losses(
        self,
        deltas: Float[Tensor, "n_active n_heads d_head"],
        problems: Int[Tensor, " n_active"],
    ) -> Float[Tensor, " n_active"]:
        """Loss of each listed problem under its Delta, in nats."""
        listed = problems.tolist()
        there = deltas.to(self.prompts.backend.device)
        with torch.no_grad():
            parts = [plan.loss(there, plan.problem) for plan in self.plans(listed)]
        return self._of_problems(torch.stack(parts).sum(0), listed).to(deltas.device)

    def value_and_grad(
        self,
        deltas: Float[Tensor, "n_active n_heads d_head"],
        problems: Int[Tensor, " n_active"],
    ) -> tuple[Float[Tensor, " n_active"], Float[Tensor, "n_active n_heads d_head"]]:
        """Loss and gradient of each listed problem at its Delta.

        Args:
            deltas: one Delta a listed problem, on any device.
            problems: indices of the problems.

        Returns:
            Losses `[n_active]` in nats (mean over a row's counted tokens, then over rows), and
            gradients of the shape of `deltas`, both on its device.
        """
        there = deltas.to(self.prompts.backend.device)
        losses, terms = self.value_and_terms(there, problems)
        gradients = torch.stack([own.sum(dim=0) for own in terms])
        return losses.to(deltas.device), gradients.to(deltas.device)

    @own_modes()
    def value_and_terms(
        self,
        deltas: Float[Tensor, "n_active n_heads d_head"],
        problems: Int[Tensor, " n_active"],
    ) -> tuple[Float[Tensor, " n_active"], list[Float[Tensor, "n_terms n_heads d_head"]]]:
        """As `value_and_grad`, with each gradient in the terms that it is the sum of.

        A term is the share of one row of the problem in its loss (of several where there are more
        than `MAX_TERMS`); telling them apart costs nothing.
        """
        listed = problems.tolist()
        n_terms = [self.n_terms[p] for p in listed]
        there = deltas.detach().to(self.prompts.backend.device)
        copies = there.repeat_interleave(torch.tensor(n_terms, device=there.device), dim=0)
        total, gradient = copies.new_zeros(len(copies)), torch.zeros_like(copies)
        for plan in self.plans(listed):
            own_total, own_gradient = plan.value_and_grad(copies)
            total += own_total
            gradient += own_gradient
        losses = self._of_problems(total, listed).to(deltas.device)
        return losses, list(gradient.to(deltas.device).split(n_terms))

    def _of_problems(self, terms: Tensor, listed: Sequence[int]) -> Tensor:
        """Losses of the listed problems, from those of their terms one after the other."""
        return torch.stack([own.sum() for own in terms.split([self.n_terms[p] for p in listed])])


def _check_problems(
    prompts: FrozenPrompts,
    layers: Sequence[int],
    rows: Sequence[Sequence[int]],
    position: Position,
    weights: Sequence[Sequence[float]] | None,
) -> None:
    n_layers = prompts.backend.n_layers
    if position not in ("prompt_end", "every_step"):
        raise ValueError(f"position is {position!r}; use 'prompt_end' or 'every_step'.")
    if len(layers) != len(rows):
        raise ValueError(
            f"layers has {len(layers)} entries and rows {len(rows)}: give one of each a problem."
        )
    for layer in layers:
        if layer not in range(n_layers):
            raise ValueError(f"layer is {layer}; this model has layers 0 to {n_layers - 1}.")
    for i, own in enumerate(rows):
        if not own:
            raise ValueError(f"rows[{i}] is empty: a problem needs at least one example.")
    if weights is not None:
        if [len(own) for own in weights] != [len(own) for own in rows]:
            raise ValueError("weights must hold one number a row of each problem, like rows.")
        for i, shares in enumerate(weights):
            if not (all(math.isfinite(w) and w >= 0 for w in shares) and sum(shares) > 0):
                raise ValueError(
                    f"weights[{i}] is {list(shares)[:5]}; give finite numbers of 0 or more, not "
                    "all 0."
                )


def _each_once(rows: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """The rows of a problem and their weights, a row that comes several times with their sum.

    A question of two options comes twice among its four orders, and a line of the packing is as
    wide as the most frequent prompt.
    """
    once: dict[int, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        once[row] = once.get(row, 0.0) + weight
    return once


def _counted_tokens(prompts: FrozenPrompts, objective: Objective) -> Int[Tensor, " n_examples"]:
    """How many of each example's suffix tokens carry a loss."""
    sums = torch.cat([prompts.offsets.new_zeros(1), objective.counted().long().cumsum(0)])
    return sums[prompts.offsets[1:]] - sums[prompts.offsets[:-1]]


def _check_counted(
    prompts: FrozenPrompts, rows: Sequence[Sequence[int]], n_counted: Tensor
) -> None:
    used = dict.fromkeys(row for own in rows for row in own)
    silent = [prompts.examples[row].input for row in used if not n_counted[row]]
    if silent:
        raise ValueError(f"examples {silent[:5]} have no answer to fit: leave them out.")


class _Plan:
    """One packed batch of rows, with everything that does not depend on the Deltas."""

    def __init__(
        self, engine: Engine, problems: Sequence[int], chunk: Sequence[tuple[int, range]]
    ) -> None:
        prompts = engine.prompts
        self.engine: Engine = weakref.proxy(engine)  # which owns the plan, and is freed with it
        device = prompts.tokens.device
        parts = [(problems[a], slice(part.start, part.stop)) for a, part in chunk]
        rows = torch.cat([engine.rows[p][part] for p, part in parts])
        row_weight = torch.cat([engine.row_weights[p][part] for p, part in parts])
        self.row_problem = torch.cat(
            [torch.full((len(part),), a, device=device) for a, part in chunk]
        )
        n_terms = [engine.n_terms[p] for p in problems]
        self.n_terms = sum(n_terms)
        first_term = [sum(n_terms[:a]) for a in range(len(n_terms))]
        row_term = [
            first_term[a] + i * n_terms[a] // len(engine.rows[problems[a]])
            for a, part in chunk
            for i in part
        ]
        layer_of = torch.tensor([engine.layers[p] for p in problems], device=device)
        row_layers = layer_of[self.row_problem]
        self.entry_layers, stages = torch.unique(row_layers, return_inverse=True)
        self.packing = Packing(prompts, rows, stages, len(self.entry_layers))
        packing = self.packing
        self.problem = self.row_problem[packing.row]
        self.term = torch.tensor(row_term, device=device)[packing.row]
        edited = prompts.is_prompt_end[packing.token]
        if engine.position == "every_step":
            edited = edited | (prompts.targets[packing.token] >= 0)
        token_layer = row_layers[packing.row]
        self.edits = {
            int(layer): torch.nonzero(edited & (token_layer == layer)).squeeze(-1)
            for layer in self.entry_layers
        }
        bounds = [0, *packing.n_tokens]
        self.entries = {
            int(layer): prompts.residuals[int(layer)][packing.token[bounds[i] : bounds[i + 1]]]
            for i, layer in enumerate(self.entry_layers)
        }
        self.counted = torch.nonzero(engine.objective.counted()[packing.token]).squeeze(-1)
        row = packing.row[self.counted]
        self.weight = row_weight[row] / engine.n_counted[rows][row]
        itself = weakref.proxy(self)
        self._replayed: Recorded | None = None
        if engine.pool is not None:
            self._replayed = Recorded(
                lambda x: itself._value_and_grad(x), engine.pool, prompts.backend.tensors
            )

    def per_token(self, deltas: Tensor, of: Tensor) -> Tensor:
        """Loss of every counted token, `[n_counted]`; token i is edited with `deltas[of[i]]`."""
        engine = self.engine

        def edit(layer: int, z: Tensor) -> Tensor:
            where = self.edits.get(layer)
            if where is None:
                return z
            # Of these two one has a gradient that threads add up in any order: the second on a
            # CPU, the first on a GPU.
            on_cpu = deltas.device.type == "cpu"
            own = deltas.index_select(0, of[where]) if on_cpu else deltas[of[where]]
            return z.index_add(0, where, own.to(z.dtype))

        x = last_residual(run(self.packing, self.entries, edit))
        if len(self.counted) < len(x):
            x = x[self.counted]
        return engine.objective.losses(
            engine.prompts.backend.final_norm(x),
            self.packing.token[self.counted],
            engine.unembedding,
        )

    def value_and_grad(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every term under a Delta of its own, `[n_terms]`, and its gradient there."""
        if self._replayed is None:
            return self._value_and_grad(copies)
        loss, gradient = self._replayed(copies)
        if bool(loss.isfinite().all()):
            return loss, gradient
        # Sums out of the floating-point range are taken anew, which no recording can decide.
        self._replayed = None
        return self._value_and_grad(copies)

    def _value_and_grad(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        leaf = copies.detach().requires_grad_()
        loss = self.loss(leaf, self.term)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient

    def loss(self, deltas: Tensor, of: Tensor) -> Tensor:
        """Loss of every term of the active problems, the part of it in this chunk, `[n_terms]`."""
        weighted = (self.per_token(deltas, of) * self.weight).to(deltas.dtype)
        return deltas.new_zeros(self.n_terms).index_add(0, self.term[self.counted], weighted)
