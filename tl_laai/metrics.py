"""The numbers that results are told in: scores, distances, sparsity counts, ranks.

Pure numpy on numbers that are already known: no model, no torch. Distributions lie on the last
axis; everything is computed in float64.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Real

# One number an example; scores of exact match may be booleans.
Values: TypeAlias = Sequence[float | int] | Real[np.ndarray, " n"] | Bool[np.ndarray, " n"]
Distribution: TypeAlias = Sequence[float | int] | Float[np.ndarray, "*batch n_options"]

# How far a distribution's sum may be from 1: room for a softmax in float32, not for a mistake.
_SUM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sparsity:
    """How much of a delta is exactly zero.

    Args:
        n_heads: Number of heads.
        n_heads_nonzero: Heads with at least one non-zero entry.
        n_entries: Number of entries.
        n_entries_nonzero: Entries that are not zero.
        share_zero: Share of entries that are exactly zero, between 0 and 1.
    """

    n_heads: int
    n_heads_nonzero: int
    n_entries: int
    n_entries_nonzero: int
    share_zero: float


def exact_match(prediction: str, target: str) -> bool:
    """Whether a decoded answer is the target, but for white space around it.

    Both are brought to Unicode's NFC form, so that an accent may be composed or not. Case counts.

    Example:
        >>> exact_match(" Paris ", "Paris"), exact_match("paris", "Paris")
        (True, False)

    Args:
        prediction: The decoded answer, already cut at its end.
        target: The right answer.

    Returns:
        True when they agree.

    Raises:
        TypeError: One of them is not text.
    """
    first, second = _answers(prediction, target)
    return first == second


def begins_with(prediction: str, target: str) -> bool:
    """Whether a decoded answer begins with the target as whole words, whatever follows.

    For methods that are not taught where an answer ends: exact match asks them for that too.

    Example:
        >>> begins_with("Paris is", "Paris"), begins_with("Parisian", "Paris")
        (True, False)

    Args:
        prediction: The decoded answer, which may go on.
        target: The right answer.

    Returns:
        True when it does; white space and the form of accents count as in `exact_match`.

    Raises:
        TypeError: One of them is not text.
    """
    first, second = _answers(prediction, target)
    after = first[len(second) : len(second) + 1]
    # Vowel signs of Hindi or Thai are marks on what they follow, and no letters.
    goes_on = after.isalnum() or (after and unicodedata.category(after).startswith("M"))
    return first.startswith(second) and not goes_on


def _answers(prediction: str, target: str) -> tuple[str, ...]:
    """Both texts as they are compared."""
    for name, text in (("prediction", prediction), ("target", target)):
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r}, but must be a decoded answer, a str.")
    return tuple(unicodedata.normalize("NFC", text).strip() for text in (prediction, target))


def kl_divergence(p: Distribution, q: Distribution) -> Float[np.ndarray, "*batch"]:
    """KL(p || q) in nats: what is lost when the group's `p` is told by the model's `q`.

    Example:
        >>> float(kl_divergence([0.5, 0.5], [1.0, 0.0]))
        inf

    Args:
        p: The group's distribution, `[..., n_options]`.
        q: The model's distribution, of the same shape.

    Returns:
        One divergence a distribution, `[...]`; infinite where `q` is zero and `p` is not.

    Raises:
        ValueError: `p` or `q` is not a distribution, or their shapes differ.
    """
    p, q = _pair(p, q)
    told = p > 0
    with np.errstate(divide="ignore"):  # log(0) is the infinity that is meant
        surprise = np.log(np.where(told, p, 1.0)) - np.log(np.where(told, q, 1.0))
    # Rounding may leave -1e-17 between equal distributions.
    return np.asarray(np.maximum(np.sum(p * surprise, axis=-1), 0.0))


def total_variation(p: Distribution, q: Distribution) -> Float[np.ndarray, "*batch"]:
    """Half the sum of absolute differences: the share of answers that would have to change.

    Example:
        >>> float(total_variation([0.5, 0.5], [1.0, 0.0]))
        0.5

    Args:
        p: A distribution, `[..., n_options]`.
        q: Another of the same shape.

    Returns:
        One distance a distribution, `[...]`, between 0 and 1.

    Raises:
        ValueError: `p` or `q` is not a distribution, or their shapes differ.
    """
    p, q = _pair(p, q)
    return np.asarray(np.abs(p - q).sum(axis=-1) / 2)


def wasserstein_ordered(p: Distribution, q: Distribution) -> Float[np.ndarray, "*batch"]:
    """Earth mover's distance over ordered options one step apart, as a share of the largest.

    Example:
        >>> float(wasserstein_ordered([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
        0.5

    Args:
        p: A distribution over options in their order, `[..., n_options]`.
        q: Another of the same shape.

    Returns:
        One distance a distribution, `[...]`: 0 when equal, 1 from one end to the other.

    Raises:
        ValueError: `p` or `q` is not a distribution, their shapes differ, or there is one option.
    """
    p, q = _pair(p, q)
    n_options = p.shape[-1]
    if n_options < 2:
        raise ValueError("p and q have 1 option; a distance between options needs at least 2.")
    crossing = np.cumsum(p - q, axis=-1)[..., :-1]
    return np.asarray(np.abs(crossing).sum(axis=-1) / (n_options - 1))


def sparsity(delta: Float[np.ndarray, "n_heads d_head"]) -> Sparsity:
    """Count the heads and entries of a delta that are not exactly zero.

    Example:
        >>> sparsity(np.array([[0.0, 2.0], [0.0, 0.0]])).n_heads_nonzero
        1

    Args:
        delta: Shape `[n_heads, d_head]`.

    Returns:
        The counts.

    Raises:
        ValueError: `delta` has other axes, is empty, or holds NaN or infinity.
    """
    values = np.asarray(delta, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"delta has shape {list(values.shape)}; give one [n_heads, d_head].")
    if not np.isfinite(values).all():
        raise ValueError("delta holds NaN or infinity; count the zeros of a finite delta.")
    nonzero = values != 0
    return Sparsity(
        n_heads=values.shape[0],
        n_heads_nonzero=int(nonzero.any(axis=1).sum()),
        n_entries=values.size,
        n_entries_nonzero=int(nonzero.sum()),
        share_zero=float(1 - nonzero.sum() / values.size),
    )


def checked_numbers(name: str, values: Values) -> np.ndarray:
    """At least two finite numbers on one axis, refused in the words of `name` if they are not."""
    numbers = np.asarray(values, dtype=np.float64)
    shape = list(numbers.shape)
    if numbers.ndim != 1 or numbers.size < 2:
        raise ValueError(f"{name} has shape {shape}; give at least two numbers on one axis.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity; give finite numbers, or leave those out.")
    return numbers


def spearman(x: Values, y: Values) -> float:
    """Spearman's rank correlation; ties share the mean of their ranks.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 40.0, 90.0])
        1.0

    Args:
        x: At least two numbers.
        y: As many, in the same order.

    Returns:
        A number between -1 and 1; NaN when all of `x` or all of `y` are equal, for then there is
        no order to compare.

    Raises:
        ValueError: Lengths differ, fewer than two numbers, or one not finite.
    """
    first, second = checked_numbers("x", x), checked_numbers("y", y)
    if first.size != second.size:
        raise ValueError(f"y has {second.size} numbers, but x has {first.size}; give as many.")
    u, v = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    scale = np.sqrt((u @ u) * (v @ v))
    return float(np.clip(u @ v / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = np.cumsum(count) - (count - 1) / 2
    return mean_rank[place]


def _pair(p: Distribution, q: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """`p` and `q` as float64 distributions of one shape that sum to 1 to the last digit."""
    first, second = _distribution("p", p), _distribution("q", q)
    if first.shape != second.shape:
        raise ValueError(
            f"q has shape {list(second.shape)}, but p has shape {list(first.shape)}; "
            "give distributions over the same options."
        )
    return first, second


def _distribution(name: str, values: Distribution) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim == 0 or numbers.size == 0:
        raise ValueError(f"{name} has shape {list(numbers.shape)}; give [..., n_options].")
    total = numbers.sum(axis=-1, keepdims=True)
    if not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(f"{name} holds a negative number, NaN or infinity; give probabilities.")
    off = np.abs(total - 1).max()
    if off > _SUM_TOLERANCE:
        raise ValueError(
            f"{name} is off a sum of 1 by {off:.3g} (at most {_SUM_TOLERANCE:g} is rounding); "
            "normalise it over its options, the last axis."
        )
    return np.asarray(numbers / total)
