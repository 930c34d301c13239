"""Second-order models of a smooth loss from its gradients: limited-memory BFGS, term by term.

    model(z) = g . (z - x) + (z - x) . (B + ridge I) (z - x) / 2,    B = sum over terms of B_i

The loss of a fit is a sum over examples, and the gradient of each is known at no extra cost. Each
term bends in few directions of its own, so that a matrix a term (partitioned quasi-Newton;
Griewank & Toint, Numer. Math. 1982) knows the curvature after far fewer steps than one matrix of
the sum: measured on three hard fits of ten examples with a shortlist of the vocabulary, the same
objective in half to three quarters of the evaluations.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.penalties import SparseGroupLasso

# Chosen by the number of evaluations to 1e-3 on quadratics, random networks and a language model.
_MEMORY = 30  # curvature pairs
_FLAT = 0.05  # cosine of a step and the gradient's turn below which the turn is not learnt
_KEPT_CURVATURE = 0.2  # share of the curvature that is kept along such a step
_TINY = 1e-100  # curvature that is always kept
_POWER_STEPS, _MARGIN = 5, 1.1  # for the largest eigenvalue, and on top of what they find
# An inner step may be so many times as long as the bend that it meets allows; accelerated ones are
# stable up to 4/3.
_TOO_LONG = 1.1
_INNER_STEPS, _INNER_TOLERANCE = 200, 1e-2


class Curvature:
    """A sum of BFGS matrices, each `scale * I` but on the space that its pairs span.

    All terms share the steps; their gradients' turns are their own. A term's matrix is kept in the
    compact form of Byrd, Nocedal & Schnabel (Math. Programming 1994, theorem 2.3), in float64:

        B = scale I - U' M^-1 U,   U = [scale S; Y],   M = [[scale S S', L], [L', -D]]

    with the steps and turns as rows of S and Y, each pair scaled to a step of length 1, and S Y'
    parted into what is below its diagonal, L, and its diagonal, D. What is passed in is float64, on
    the device that was the default when this was made.

    Args:
        scale: Of the whole, before anything is learnt.
        n_terms: How many terms the loss is the sum of.
        size: Length of a step, `n_heads * d_head`.
    """

    def __init__(self, scale: float, n_terms: int, size: int) -> None:
        self.scale = self.largest = scale
        self._scales = torch.full((n_terms,), scale / n_terms, dtype=torch.float64)
        # Steps, then the turns of each term. The newest pair takes the place of the oldest; a place
        # not yet taken holds zeros, and counts in M as an orthonormal pair of its own.
        self._pairs = torch.zeros(1 + n_terms, _MEMORY, size, dtype=torch.float64)
        self._n_pairs = 0
        self._age = torch.full((_MEMORY,), -1)
        self._steps_steps = torch.eye(_MEMORY, dtype=torch.float64)
        self._steps_turns = self._steps_steps.repeat(n_terms, 1, 1)
        # M^-1 of each term; and of the whole, between all rows of `_pairs`.
        self._inverses = torch.zeros(n_terms, 2 * _MEMORY, 2 * _MEMORY, dtype=torch.float64)
        self._inner = self._gathered()
        self._leading: Tensor | None = None

    def times(self, step: Float[Tensor, "n_heads d_head"]) -> Float[Tensor, "n_heads d_head"]:
        """The product with the whole matrix."""
        flat, pairs = step.flatten(), self._pairs.flatten(0, 1)
        return (self.scale * flat - (self._inner @ (pairs @ flat)) @ pairs).view_as(step)

    def _bend_of_terms(self, flat: Float[Tensor, " size"]) -> Float[Tensor, " n_terms"]:
        """`step . B_i step` of each term."""
        steps, turns = (self._pairs @ flat).split([1, len(self._scales)])
        own = torch.cat([self._scales[:, None] * steps, turns], dim=1)
        solved = torch.einsum("tij,tj->ti", self._inverses, own)
        squared = torch.dot(flat, flat)
        most = self._scales * squared
        # Positive, as the updates keep it; rounding alone may not, nor cutting it without an end.
        least = torch.maximum(1e-12 * most, _TINY * squared)
        return torch.maximum(most - (own * solved).sum(dim=1), least)

    def learn(
        self,
        step: Float[Tensor, "n_heads d_head"],
        turns: Float[Tensor, "n_terms n_heads d_head"],
    ) -> None:
        """Take in by how much each term's gradient turns along `step`.

        Where a term bends downwards, or hardly at all, its turn would spoil a positive matrix.
        Then it is taken to bend by a fifth of what it was thought to along `step`, so that the next
        step there is longer. What a term bends by along the last step is its scale.
        """
        flat, turns = step.flatten(), turns.flatten(1)
        squared = torch.dot(flat, flat)
        along = turns @ flat
        too_flat = along <= _FLAT * squared.sqrt() * turns.norm(dim=1)
        if bool(too_flat.any()):
            kept = _KEPT_CURVATURE * self._bend_of_terms(flat)
            turns = torch.where(too_flat[:, None], flat * (kept / squared)[:, None], turns)
            along = torch.where(too_flat, kept, along)
        self._scales = along / squared
        self.scale = float(self._scales.sum())
        self._store(torch.cat([flat[None], turns]) / squared.sqrt())
        self._find_largest(turns.sum(dim=0))

    def _store(self, pair: Float[Tensor, "n_terms_and_1 size"]) -> None:
        """Replace the oldest pair, and invert M anew."""
        place = self._n_pairs % _MEMORY
        self._age[place] = self._n_pairs
        self._n_pairs += 1
        self._pairs[:, place] = pair
        with_steps = self._pairs[0] @ pair.T
        self._steps_steps[place] = self._steps_steps[:, place] = with_steps[:, 0]
        self._steps_turns[:, :, place] = with_steps[:, 1:].T
        self._steps_turns[:, place] = self._pairs[1:] @ pair[0]
        below = self._steps_turns * (self._age[:, None] > self._age)
        diagonal = torch.diag_embed(self._steps_turns.diagonal(dim1=1, dim2=2))
        above = torch.cat([self._scales[:, None, None] * self._steps_steps, below], dim=2)
        middle = torch.cat([above, torch.cat([below.mT, -diagonal], dim=2)], dim=1)
        self._inverses = torch.linalg.inv_ex(middle).inverse
        self._inner = self._gathered()

    def _gathered(self) -> Float[Tensor, "n_rows n_rows"]:
        """The matrix between the rows of `_pairs` whose form is `U' M^-1 U`, summed over terms."""
        scales, m = self._scales[:, None, None], _MEMORY
        of_steps, of_turns = self._inverses.split(m, dim=1)
        inner: Tensor = torch.block_diag(torch.zeros_like(self._steps_steps), *of_turns[:, :, m:])
        inner[:m, :m] = (scales.square() * of_steps[:, :, :m]).sum(dim=0)
        inner[:m, m:] = (scales * of_steps[:, :, m:]).movedim(0, 1).flatten(1)
        inner[m:, :m] = inner[:m, m:].T
        return inner

    def _find_largest(self, turn: Float[Tensor, " size"]) -> None:
        """The largest eigenvalue of the whole, or nearly: by power iteration, and a margin."""
        vector = turn / turn.norm()
        if self._leading is not None:
            same_side = torch.dot(vector, self._leading) >= 0
            vector = self._leading + torch.where(same_side, vector, -vector)
        found = 0.0
        for _ in range(_POWER_STEPS):
            image = self.times(vector[None])[0]
            found = float(image.norm() / vector.norm())
            vector = image / image.norm()
        self._leading = vector
        self.largest = max(self.scale, _MARGIN * found)


def model_minimiser(
    origin: Float[Tensor, "n_heads d_head"],
    gradient: Float[Tensor, "n_heads d_head"],
    curvature: Curvature,
    ridge: float,
    penalty: SparseGroupLasso,
) -> Float[Tensor, "n_heads d_head"]:
    """Minimise the quadratic model plus penalty by FISTA with restarts (O'Donoghue & Candes).

    Args:
        origin: Where the model is made.
        gradient: Of the loss there.
        curvature: The matrix B.
        ridge: Added to its eigenvalues.
        penalty: Of one problem.

    Returns:
        The minimiser, in float64, to a hundredth of the first inner step (of the last step size).
    """
    origin, gradient = origin.double(), gradient.double()
    size = 1 / (curvature.largest + ridge)
    current = lead = origin
    bent = lead_bent = torch.zeros_like(origin)  # (B + ridge I)(z - origin) at `current`, `lead`
    momentum, first = 1.0, 0.0
    for inner in range(_INNER_STEPS):
        found = penalty.prox(lead - size * (gradient + lead_bent), size)
        away, moved = found - origin, found - lead
        found_bent = curvature.times(away) + ridge * away
        squared = _dot(moved, moved)
        if size * _dot(moved, found_bent - lead_bent) > _TOO_LONG * squared:
            # `largest` is still below the eigenvalue. Steps half as long are half as far away.
            size, first = size / 2, first / 4
            continue
        first = first or squared
        if inner and squared <= _INNER_TOLERANCE**2 * first:
            return found
        if _dot(moved, found - current) < 0:
            momentum, lead, lead_bent = 1.0, found, found_bent
        else:
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = (momentum - 1) / following
            lead = found + ahead * (found - current)
            lead_bent = found_bent + ahead * (found_bent - bent)
            momentum = following
        current, bent = found, found_bent
    return current


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.flatten(), second.flatten()))
