"""Opinion questions: options, the shares of a group's answers, and prompts with lettered options.

A question is asked several times, its options in another order each time, so that a fit cannot
learn positions and a score does not depend on one: the orders are the cyclic shifts of a random
order, in which each option stands at each position equally often. The shares move with the
options, and every prompt keeps the order by which a model's answer is mapped back.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# How far shares may be from a sum of 1: rounding, not a mistake. Metrics allow the same.
_SUM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class OptionExample:
    r"""A multiple-choice prompt, and the shares with which its options should be named.

    Example:
        >>> OptionExample("Tea or coffee?\nA. tea\nB. coffee\nAnswer:", (" A", " B"), (0.3, 0.7))
        OptionExample(prompt='Tea or...

    Args:
        prompt: The whole prompt; an option's name follows its last token.
        names: What names each option, leading space included; one token each.
        distribution: Share of each option, in the order of `names`; sums to 1.
        order: Which option of the question each name stands for, from 0; empty for the
            question's own order.
        question: The `id` of the question; prompts that ask the same one share it.
        outside_weight: How much a fit's loss counts that an option is named at all: 1 makes it
            the KL over the whole vocabulary, 0 the KL among the options alone.

    Raises:
        ValueError: Fewer than two options, shares that are no distribution over them, an order
            that is none, or a negative weight.
    """

    prompt: str
    names: tuple[str, ...]
    distribution: tuple[float, ...]
    order: tuple[int, ...] = ()
    question: str = ""
    outside_weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(self.names) != len(self.distribution):
            raise ValueError(
                f"names has {len(self.names)} entries and distribution {len(self.distribution)}; "
                "give one of each an option, and at least two options"
            )
        _check_shares(self.distribution, tolerance=1e-4)
        if self.order and sorted(self.order) != list(range(len(self.names))):
            raise ValueError(
                f"order is {self.order}; give each of 0 to {len(self.names) - 1} once, or nothing"
            )
        _check_weight(self.outside_weight)


@dataclass(frozen=True)
class OpinionQuestion:
    """A question with its options, and how a group answers it.

    Example:
        >>> OpinionQuestion("q1", "Tea or coffee?", ("tea", "coffee"), (0.3, 0.7), "adults").group
        'adults'

    Args:
        id: A short name, for rows of results.
        question: What is asked, without options.
        options: Two to 26 different answers, in their own order (from one end of a scale to the
            other, where they are a scale).
        distribution: The group's share of each option; sums to 1.
        group: Who was asked.

    Raises:
        TypeError: A text is none.
        ValueError: An empty text, too few, too many or equal options, or shares that are no
            distribution over them.
    """

    id: str
    question: str
    options: tuple[str, ...]
    distribution: tuple[float, ...]
    group: str = ""

    def __post_init__(self) -> None:
        for name, text in (("question", self.question), *(("options", o) for o in self.options)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be text, got {text!r}; write it as a string")
            if not text.strip():
                raise ValueError(f"{name} must not be empty, got {text!r}")
        n_options = len(self.options)
        if not 2 <= n_options <= len(string.ascii_uppercase) or len(set(self.options)) < n_options:
            raise ValueError(f"options are {self.options!r:.200}; give 2 to 26 different ones")
        if len(self.distribution) != n_options:
            raise ValueError(
                f"distribution has {len(self.distribution)} shares, but there are {n_options} "
                "options; give one an option"
            )
        _check_shares(self.distribution, tolerance=_SUM_TOLERANCE)

    @property
    def favourite(self) -> int:
        """Index of the group's most frequent option; the first of several."""
        return max(range(len(self.options)), key=self.distribution.__getitem__)


@dataclass(frozen=True)
class OpinionTemplate:
    r"""How a question and its options become a prompt that a letter answers.

    Example:
        >>> print(OpinionTemplate().ask("Tea or coffee?", ("tea", "coffee")))
        Question: Tea or coffee?
        A. tea
        B. coffee
        Answer:

    Args:
        text: The prompt, with `{question}` and `{options}`.
        option: One option, with `{letter}` and `{option}`; options stand on lines of their own.
        answer_prefix: What stands between prompt and letter.
        separator: What stands between demonstrations, and before the question.

    Raises:
        ValueError: A field lacks what is to be put in.
    """

    text: str = "Question: {question}\n{options}\nAnswer:"
    option: str = "{letter}. {option}"
    answer_prefix: str = " "
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        for field, holes in (("text", ("question", "options")), ("option", ("letter", "option"))):
            value = getattr(self, field)
            for hole in holes:
                if value.count(f"{{{hole}}}") != 1:
                    raise ValueError(f"{field} must contain {{{hole}}} once, got {value!r}")

    def ask(self, question: str, options: Sequence[str]) -> str:
        """The prompt of one question, its options in the given order."""
        lettered = [
            _fill(self.option, letter=letter, option=option)
            for letter, option in zip(string.ascii_uppercase, options, strict=False)
        ]
        return _fill(self.text, question=question, options="\n".join(lettered))

    def names(self, n_options: int) -> tuple[str, ...]:
        """What names each option after the prompt: its letter with the prefix."""
        return tuple(self.answer_prefix + letter for letter in string.ascii_uppercase[:n_options])

    def demonstrate(self, questions: Iterable[OpinionQuestion], *, seed: int = 0) -> str:
        """Questions answered with the letter of the group's most frequent option.

        Each stands in one random order of its options, the same for the same seed: in their own
        order the first letter would often be right. Empty without questions, else it ends with
        the separator, ready to stand before a prompt.
        """
        text = ""
        for question in questions:
            [order] = option_orders(question, 1, seed=seed)
            name = self.names(len(order))[order.index(question.favourite)]
            asked = self.ask(question.question, [question.options[i] for i in order])
            text += asked + name + self.separator
        return text


DEFAULT_OPINION_TEMPLATE = OpinionTemplate()


def option_orders(
    question: OpinionQuestion, n_orders: int, *, seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Orders in which to show the options of a question, balanced over positions.

    The cyclic shifts of a random order; after as many as there are options, those of another.
    Where `n_orders` is a multiple of the number of options, each option stands at each position
    equally often; else the numbers differ by at most one. They depend on the seed and the text
    of the question alone.

    Example:
        >>> option_orders(OpinionQuestion("q", "Tea?", ("yes", "no"), (0.5, 0.5)), 2)
        ((0, 1), (1, 0))

    Returns:
        For each order, the index of the option at each position.

    Raises:
        ValueError: `n_orders` is not at least 1.
    """
    if n_orders < 1:
        raise ValueError(f"n_orders is {n_orders}; ask each question at least once")
    # Python promises the same random() from a text in every version, but not the same shuffle().
    generator = random.Random(f"{seed} {question.question}")
    n_options = len(question.options)
    orders: list[tuple[int, ...]] = []
    while len(orders) < n_orders:
        first = sorted(range(n_options), key=lambda _: generator.random())
        orders += [(*first[i:], *first[:i]) for i in range(n_options)]
    return tuple(orders[:n_orders])


def option_examples(
    questions: Iterable[OpinionQuestion],
    *,
    n_orders: int = 8,
    seed: int = 0,
    template: OpinionTemplate = DEFAULT_OPINION_TEMPLATE,
    demonstrations: Iterable[OpinionQuestion] = (),
    outside_weight: float = 1.0,
) -> tuple[OptionExample, ...]:
    """Each question as `n_orders` prompts, options and shares permuted together.

    Example:
        >>> fit(model, option_examples(split.train), layer=9, alpha=0.5)  # doctest: +SKIP

    Args:
        questions: What is asked.
        n_orders: Prompts a question; every question counts the same.
        seed: Of the orders, the demonstrations' too.
        template: How questions become prompts.
        demonstrations: Answered before every prompt; see `OpinionTemplate.demonstrate`.
        outside_weight: Of a fit's loss; see `OptionExample`. The first prompt of a question
            bears it for all: whether a letter is named at all hardly depends on the order, and
            takes a pass over the vocabulary.

    Returns:
        The prompts, those of one question next to each other.
    """
    _check_weight(outside_weight)
    shown = template.demonstrate(demonstrations, seed=seed)
    return tuple(
        OptionExample(
            shown + template.ask(question.question, [question.options[i] for i in order]),
            template.names(len(order)),
            tuple(question.distribution[i] for i in order),
            order,
            question.id,
            0.0 if k else n_orders * outside_weight,
        )
        for question in questions
        for k, order in enumerate(option_orders(question, n_orders, seed=seed))
    )


def _check_weight(outside_weight: float) -> None:
    if not 0 <= outside_weight < math.inf:
        raise ValueError(f"outside_weight is {outside_weight}; give a number from 0 on")


def _check_shares(shares: Sequence[float], *, tolerance: float) -> None:
    fine = all(math.isfinite(share) and share >= 0 for share in shares)
    if not fine or abs(sum(shares) - 1) > tolerance:
        raise ValueError(f"distribution is {shares}; give shares of 0 or more that sum to 1")


def _fill(text: str, **values: str) -> str:
    """Put values in the holes of a template; braces in a value are left alone."""
    # From the last hole on, so that what is put in stands behind the holes that are left.
    for name in sorted(values, key=lambda name: text.index(f"{{{name}}}"), reverse=True):
        before, _, after = text.partition(f"{{{name}}}")
        text = before + values[name] + after
    return text
