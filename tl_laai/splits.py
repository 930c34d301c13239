"""Orders, splits and folds of anything, which a seed alone decides; numbers asked for, checked."""

from __future__ import annotations

import operator
import random
from collections.abc import Hashable, Iterable, Sequence
from typing import SupportsFloat, SupportsIndex, TypeVar

Item = TypeVar("Item")


def integer(argument: str, value: SupportsIndex) -> int:
    """`value` as Python's own integer, which JSON can hold: NumPy's are none.

    Example:
        >>> integer("layer", np.int64(9))  # doctest: +SKIP
        9

    Raises:
        TypeError: a bool, or no integer.
    """
    if not isinstance(value, bool):  # True would be layer 1
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{argument} is {value!r}; give an integer, such as 3.")


def number(argument: str, value: SupportsFloat) -> float:
    """`value` as Python's own number, likewise.

    Raises:
        TypeError: a bool, text, or no number.
    """
    if not isinstance(value, bool | str):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{argument} is {value!r}; give a number, such as 0.5.")


def count(argument: str, value: SupportsIndex) -> int:
    """`value` as `integer` gives it, and 0 or more.

    Raises:
        TypeError, ValueError: it is not.
    """
    number = integer(argument, value)
    if number < 0:
        raise ValueError(f"{argument} must be 0 or more, got {number}")
    return number


def seeded_order(examples: Iterable[Item], seed: int) -> tuple[Item, ...]:
    """The examples in an order that the seed alone decides."""
    # Python promises the same random() from a seed in every version, but not the same shuffle().
    generator = random.Random(seed)
    return tuple(sorted(examples, key=lambda _: generator.random()))


def cross_validation_folds(labels: Sequence[Hashable], n_folds: int, seed: int) -> list[list[int]]:
    """Held-out indices of each fold: disjoint, as even as they can be, decided by the seed alone.

    Args:
        labels: One a thing that may be held out (the examples themselves will do); those with
            equal labels are held out together.
        n_folds: At most the number of different labels, or folds are empty.
        seed: Which folds.

    Raises:
        ValueError: fewer than two folds.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds is {n_folds}; use at least 2.")
    distinct = list(dict.fromkeys(labels))
    # Python promises the same random() from a seed in every version, but not the same shuffle().
    generator = random.Random(seed)
    order = sorted(range(len(distinct)), key=lambda _: generator.random())
    fold_of = {distinct[label]: i % n_folds for i, label in enumerate(order)}
    return [[i for i, label in enumerate(labels) if fold_of[label] == k] for k in range(n_folds)]


def divide(
    items: Sequence[Item],
    *,
    train: SupportsIndex,
    validation: SupportsIndex = 0,
    test: SupportsIndex | None = None,
    seed: SupportsIndex = 0,
    name: str = "",
) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]:
    """Train, validation and test items of one seeded order, as `Task.split` describes."""
    train, validation = count("train", train), count("validation", validation)
    seed = count("seed", seed)  # random.Random(-1) would repeat random.Random(1)
    test = None if test is None else count("test", test)
    total = train + validation + (test or 0)
    if total > len(items):
        raise ValueError(
            f"task {name!r} has {len(items)} distinct inputs, fewer than {total} "
            f"asked for (train={train}, validation={validation}, test={test}); ask for "
            "fewer" + ("" if test is None else ", or pass test=None for all that remain")
        )
    order = seeded_order(items, seed)
    back = order[::-1]
    held_out = len(order) - train - validation if test is None else test
    return order[:train], back[held_out : held_out + validation], back[:held_out]
