"""What the teacher says while distilled fits are chosen among: each question asked once.

The whole teacher reads all labelled examples; a fold's teacher reads that fold's training part
alone, and is fitted on no more, so that the fold's held-out labels can judge what it teaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tl_laai.distillation import Distillation, Lesson, teach, weighed
from tl_laai.distributions import NothingTaughtError
from tl_laai.made_up_inputs import make_up_inputs
from tl_laai.prompts import PromptTemplate, TaughtExample
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example, same_input_key


@dataclass
class Lessons:
    """Lessons of several shares of labels, on all inputs or on a few.

    Attributes:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: labelled; the whole teacher reads all of them.
        settings: of all lessons, but for their share of labels.
        template: how inputs become prompts.
        n_few: how many inputs are a few.
    """

    model: Any
    examples: Sequence[Example]
    settings: Distillation
    template: PromptTemplate
    n_few: int

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The user's inputs, or those that the model makes up from all examples."""
        if self.settings.inputs is not None:
            return self.settings.inputs
        return make_up_inputs(
            self.model,
            self.examples,
            self.settings.n_inputs,
            template=self.template,
            seed=self.settings.seed,
        )

    @cached_property
    def _known(self) -> set[str]:
        return {same_input_key(example.input) for example in self.examples}

    @cached_property
    def answered(self) -> tuple[TaughtExample, ...]:
        """What the whole teacher says to all inputs."""
        return self._teach(self.examples, self.inputs)

    def whole(self, share: float, taught: Sequence[TaughtExample] = ()) -> Lesson:
        """All examples, and all that the whole teacher says, or some of it.

        Args:
            share: of labels.
            taught: some of `answered`; empty for all.
        """
        return self._weighed(taught or self.answered, self.examples, self.inputs, share)

    def held_out_split(self) -> tuple[tuple[TaughtExample, ...], tuple[TaughtExample, ...]]:
        """A few of the whole teacher's answers to learn from, and others to be held out.

        No input is in both, or is one of `examples`, which the teacher reads answered.

        Returns:
            At most `n_few` each, in an order that the seed decides; about a quarter is held out
            where there are no more than a few.

        Raises:
            NothingTaughtError: it answered fewer than two inputs.
        """
        distinct = {same_input_key(e.tokens.input): e for e in reversed(self.answered)}
        new = [e for key, e in reversed(distinct.items()) if key not in self._known]
        some = seeded_order(new, self.settings.seed)[: 2 * self.n_few]
        if len(some) < 2:
            raise NothingTaughtError(
                f"inputs are {list(self.inputs)[:5]}, of which the teacher answered {len(some)} "
                "that are no examples: choosing among distilled fits needs at least 2, one to hold "
                "out. Give more inputs, or choose layer and steps yourself"
            )
        n_held_out = max(1, len(some) // 4, len(some) - self.n_few)
        return some[n_held_out:], some[:n_held_out]

    def of_folds(
        self, known: Sequence[Sequence[Example]], shares: Iterable[float]
    ) -> dict[tuple[int, float], Lesson]:
        """Each fold's lesson on a few inputs at each share of labels, by `(fold, share)`.

        No input is one of `examples`.

        Args:
            known: each fold's training part.
            shares: of labels.
        """
        # A fold's held-out labels would judge what it was told of their inputs.
        few = [text for text in self.inputs if same_input_key(text) not in self._known]
        wanted, few = set(shares), few[: self.n_few]
        lessons = {}
        for k, part in enumerate(known):
            taught = self._teach(part, few)
            for share in wanted:
                lessons[k, share] = self._weighed(taught, part, few, share)
        return lessons

    def _teach(
        self, examples: Sequence[Example], inputs: Sequence[str]
    ) -> tuple[TaughtExample, ...]:
        return teach(self.model, inputs, examples, self.settings, template=self.template)

    def _weighed(
        self,
        taught: Sequence[TaughtExample],
        examples: Sequence[Example],
        inputs: Sequence[str],
        share: float,
    ) -> Lesson:
        settings = replace(self.settings, label_share=share)
        return weighed(taught, examples, settings, inputs, made_up=self.settings.inputs is None)
