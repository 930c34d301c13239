"""Bootstrap intervals: of a mean, and of paired differences over groups inside strata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

from tl_laai.metrics import Values, checked_numbers

Labels: TypeAlias = Sequence[int | str] | Int[np.ndarray, " n"]

_RESAMPLED_AT_ONCE = 1 << 16  # values: half a megabyte


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
    numbers = checked_numbers("values", values)

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
    first, second = checked_numbers("a", a), checked_numbers("b", b)
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
