"""The numbers that results are told in: scores, distances, sparsity counts, intervals, ranks.

Pure numpy on numbers that are already known: no model, no torch. Distributions lie on the last
axis; everything is computed in float64.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Real

# One number an example; scores of exact match may be booleans.
Values: TypeAlias = Sequence[float | int] | Real[np.ndarray, " n"] | Bool[np.ndarray, " n"]
Labels: TypeAlias = Sequence[int | str] | Int[np.ndarray, " n"]
Distribution: TypeAlias = Sequence[float | int] | Float[np.ndarray, "*batch n_options"]

# How far a distribution's sum may be from 1: room for a softmax in float32, not for a mistake.
_SUM_TOLERANCE = 1e-5
_RESAMPLED_AT_ONCE = 1 << 16  # values: half a megabyte


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


@dataclass(frozen=True)
class PairedDifference:
    """A difference of means and its bootstrap interval, with what is needed to repeat it.

    Args:
        difference: Mean of `a` minus mean of `b`.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Nominal coverage.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
        n_examples: Number of pairs.
        n_groups: Number of groups resampled first, in all strata; 1 a stratum when none were given.
    """

    difference: float
    low: float
    high: float
    level: float
    n_resamples: int
    seed: int
    n_examples: int
    n_groups: int


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


def bootstrap_interval(
    values: Values, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval for the mean of independent values (Efron 1979).

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)

    Args:
        values: One number an example, at least two.
        level: Nominal coverage, between 0 and 1.
        n_resamples: Number of resamples.
        seed: Seed of the resampling: the same seed, the same interval.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Fewer than two values, one not finite, or an option out of range.
    """
    numbers = _numbers("values", values)

    def resample(generator: np.random.Generator, n: int) -> np.ndarray:
        means: np.ndarray = generator.choice(numbers, size=(n, numbers.size)).mean(axis=1)
        return means

    return _interval(resample, numbers.size, level=level, n_resamples=n_resamples, seed=seed)


def paired_bootstrap(
    a: Values,
    b: Values,
    groups: Labels | None = None,
    *,
    strata: Labels | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Difference of the means of two paired scores, with a percentile bootstrap interval.

    With `groups` (such as the seeds of fits) whole groups are resampled first and examples inside
    each drawn group second, so that the interval also covers the choice of the group. An example
    that returns in several groups counts as a new one in each. With `strata` (such as tasks) each
    is resampled by itself, and all weigh alike: the interval is for these, not for others like
    them.

    Example:
        >>> paired_bootstrap([1, 1, 1], [0, 0, 0]).low
        1.0

    Args:
        a: Scores of one method, one an example, at least two.
        b: Scores of the other on the same examples in the same order.
        groups: The group of each pair, or None when there are none.
        strata: The stratum of each pair, or None when there are none.
        level: Nominal coverage, between 0 and 1.
        n_resamples: Number of resamples.
        seed: Seed of the resampling: the same seed, the same interval.

    Returns:
        Mean of `a` minus mean of `b` (in the mean over strata), and the interval.

    Raises:
        ValueError: Lengths differ, fewer than two pairs, one not finite, or an option out of range.
    """
    first, second = _numbers("a", a), _numbers("b", b)
    labels, parts = (
        np.zeros(first.size) if given is None else np.asarray(given) for given in (groups, strata)
    )
    for name, other in (("b", second), ("groups", labels), ("strata", parts)):
        if other.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(other.shape)}, but a has {first.size} scores; "
                "give one entry a pair, in the same order."
            )
    _, part_of = np.unique(parts, return_inverse=True)
    own = [part_of == part for part in range(part_of.max() + 1)]
    differences = first - second
    draws = [_groups_first(differences[these], labels[these]) for these in own]

    def resample(generator: np.random.Generator, n: int) -> np.ndarray:
        means: np.ndarray = np.mean([draw(generator, n) for draw in draws], axis=0)
        return means

    options = {"n_resamples": n_resamples, "seed": seed}
    low, high = _interval(resample, differences.size, level=level, **options)
    counts = {
        "n_examples": differences.size,
        "n_groups": sum(np.unique(labels[these]).size for these in own),
    }
    middle = float(np.mean([differences[these].mean() for these in own]))
    return PairedDifference(middle, low, high, level, **options, **counts)


def _groups_first(
    values: np.ndarray, labels: np.ndarray
) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Draws means of so many resamples: groups first, then values in each."""
    _, member_of, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    ordered = values[np.argsort(member_of, kind="stable")]
    starts = np.cumsum(sizes) - sizes

    def resample(generator: np.random.Generator, n: int) -> np.ndarray:
        drawn = generator.integers(len(sizes), size=(n, len(sizes)))
        totals = sizes[drawn].sum(axis=1)
        of = np.repeat(drawn.ravel(), sizes[drawn].ravel())
        # Quicker than integers below each size, and never rounded up to it.
        member = (generator.random(of.size) * sizes[of]).astype(np.intp)
        first = np.cumsum(totals) - totals
        means: np.ndarray = np.add.reduceat(ordered[starts[of] + member], first) / totals
        return means

    return resample


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
    first, second = _numbers("x", x), _numbers("y", y)
    if first.size != second.size:
        raise ValueError(f"y has {second.size} numbers, but x has {first.size}; give as many.")
    u, v = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    scale = np.sqrt((u @ u) * (v @ v))
    return float(np.clip(u @ v / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = np.cumsum(count) - (count - 1) / 2
    return mean_rank[place]


def _interval(
    resample: Callable[[np.random.Generator, int], np.ndarray],
    size: int,
    *,
    level: float,
    n_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentiles of the means of so many resamples, of about `size` values each."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; give a coverage between 0 and 1, such as 0.95.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples!r}; give at least 1, such as 2000.")
    generator = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_AT_ONCE // size)
    blocks = range(0, n_resamples, at_once)
    means = [resample(generator, min(at_once, n_resamples - i)) for i in blocks]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbers(name: str, values: Values) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    shape = list(numbers.shape)
    if numbers.ndim != 1 or numbers.size < 2:
        raise ValueError(f"{name} has shape {shape}; give at least two numbers on one axis.")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds NaN or infinity; give finite numbers, or leave those out.")
    return numbers


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
