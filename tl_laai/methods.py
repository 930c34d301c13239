"""What a baseline method is: edits made from training examples, one for each of its settings.

`tl_laai.baselines` chooses among the settings by cross-validation, in the same way for all methods.
Here too is what several methods read: few-shot prompts, and right and wrong answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from tl_laai.activations import LastToken, last_token
from tl_laai.backends import backend_of
from tl_laai.controls import shuffled_answers
from tl_laai.edits import Edit
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TokenisedExample, tokenise
from tl_laai.tasks import Example

T = TypeVar("T")

# From labelled examples to what is learnt from them: for instance with more that a teacher answers.
Augment = Callable[[Sequence[Example]], Sequence[Example]]


def as_they_are(examples: Sequence[Example]) -> Sequence[Example]:
    """Nothing is added."""
    return examples


@dataclass(frozen=True)
class Setting:
    """What is chosen by cross-validation; None where a method has no such choice.

    Example:
        >>> str(Setting(layer=9, strength=2.0))
        'layer 9, strength 2'

    Attributes:
        layer: the edited layer.
        n_heads: how many heads are used or edited, over all layers.
        strength: the factor on the vector.
        learning_rate: of Adam.
    """

    layer: int | None = None
    n_heads: int | None = None
    strength: float | None = None
    learning_rate: float | None = None

    def __str__(self) -> str:
        values = ((f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {value:g}" for name, value in values if value is not None)


class Method(ABC):
    """A way to make edits from examples, and the settings to choose among."""

    @abstractmethod
    def grid(self, model: Any) -> tuple[Setting, ...]:
        """The settings that are tried on a model."""

    def candidates(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting] | None = None,
        *,
        template: PromptTemplate = DEFAULT_TEMPLATE,
    ) -> dict[Setting, Edit]:
        """The edit of each setting, made from these examples alone.

        Example:
            >>> TaskVector().candidates(model, split.train, [Setting(layer=9)])  # doctest: +SKIP

        Args:
            model: a `HookedTransformer` or `TransformerBridge`; left as found.
            examples: training examples.
            settings: which; None for the whole grid.
            template: how inputs become prompts.
        """
        settings = self.grid(model) if settings is None else settings
        return dict(zip(settings, self._edits(model, examples, settings, template), strict=True))

    @abstractmethod
    def _edits(
        self,
        model: Any,
        examples: Sequence[Example],
        settings: Sequence[Setting],
        template: PromptTemplate,
    ) -> list[Edit]:
        """The edits of the settings, in their order."""


def leave_one_out(
    model: Any,
    examples: Sequence[Example],
    shown: Sequence[Example],
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[TokenisedExample, ...]:
    """Each example asked after all of `shown` but the one at its own place.

    Raises:
        ValueError: fewer than two examples.
    """
    if len(examples) < 2:
        raise ValueError(
            f"examples holds {len(examples)}: few-shot prompts are made by asking one example "
            "after the others. Give at least two."
        )
    return tuple(
        tokenise(model, [e], template=template, demonstrations=[*shown[:i], *shown[i + 1 :]])[0]
        for i, e in enumerate(examples)
    )


def read_answers(
    model: Any,
    examples: Sequence[Example],
    seed: int,
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[LastToken, LastToken]:
    """What stands at the last token of right answers, and of wrong ones, behind their prompts.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: at least two with different answers.
        seed: which other example's answer is the wrong one.
        template: how inputs become prompts; what ends an answer is left out.
    """
    bare = replace(template, answer_end="")
    right, wrong = (
        [e.prompt + e.answer for e in tokenise(model, these, template=bare)]
        for these in (examples, shuffled_answers(examples, seed))
    )
    return read(model, right), read(model, wrong)


def read(model: Any, texts: Sequence[tuple[int, ...]]) -> LastToken:
    """What stands at the last token of texts."""
    return last_token(freeze(model, [TokenisedExample(tokens, (), "", "") for tokens in texts]))


def every_second(model: Any, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers given, or else every second one from 1."""
    return tuple(range(1, backend_of(model).n_layers, 2)) if layers is None else layers


def possible_heads(model: Any, counts: Sequence[int]) -> tuple[int, ...]:
    """The counts, none of them above the number of heads that the model has."""
    if out := [n for n in counts if n < 1]:
        raise ValueError(f"n_heads holds {out[0]}; give 1 or more.")
    backend = backend_of(model)
    return tuple(dict.fromkeys(min(n, backend.n_layers * backend.n_heads) for n in counts))


def given(value: T | None) -> T:
    """A value of a setting that a method cannot do without."""
    if value is None:
        raise ValueError("settings holds one of another method's; use those of grid(model).")
    return value
