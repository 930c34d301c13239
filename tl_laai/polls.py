"""Opinion tasks: what a group answers to many questions, and their splits by question.

Two questions count as the same when their texts agree as inputs of tasks do, whatever their
options. No question, in any order of its options, stands on two sides of a split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

from tl_laai.opinions import OpinionQuestion, option_examples
from tl_laai.poll_readers import read_global_opinions, read_jsonl, read_opinionqa
from tl_laai.splits import divide
from tl_laai.tasks import same_input_key

if TYPE_CHECKING:
    import datasets

_BUILT_IN = Path(__file__).with_name("data") / "opinions" / "nonvoters.jsonl"


@dataclass(frozen=True)
class OpinionSplit:
    """Three sets of questions; two that share a question are refused with a ValueError.

    Example:
        >>> split = OpinionTask.load("Republican").split(train=12)
        >>> len(split.train), len(split.validation), len(split.test)
        (12, 0, 8)
    """

    train: tuple[OpinionQuestion, ...]
    validation: tuple[OpinionQuestion, ...]
    test: tuple[OpinionQuestion, ...]

    def __post_init__(self) -> None:
        for one, other in itertools.combinations((self.train, self.validation, self.test), 2):
            check_no_shared_question(one, other)


@dataclass(frozen=True)
class OpinionTask:
    """Questions with the answers of one group, and where they came from.

    Example:
        >>> len(OpinionTask.load("Democrat"))
        20

    Args:
        group: Whose answers they are.
        questions: In the order of their source.
        source: "built-in", a path, or "datasets".

    Raises:
        ValueError: There is no question.
    """

    group: str
    questions: tuple[OpinionQuestion, ...]
    source: str = ""

    examples = staticmethod(option_examples)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError(f"group {self.group!r} has no questions; give at least one")

    def __len__(self) -> int:
        return len(self.questions)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the questions and their order."""
        rows = [[q.question, q.options, q.distribution] for q in self.questions]
        canonical = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]

    @cached_property
    def distinct(self) -> tuple[OpinionQuestion, ...]:
        """The first of every distinct question: what `split` divides."""
        first: dict[str, OpinionQuestion] = {}
        for question in self.questions:
            first.setdefault(same_input_key(question.question), question)
        return tuple(first.values())

    def split(
        self,
        *,
        train: SupportsIndex,
        validation: SupportsIndex = 0,
        test: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
    ) -> OpinionSplit:
        """Draw disjoint sets of questions, as `Task.split` draws examples.

        Example:
            >>> split = OpinionTask.load("under 30").split(train=10, test=5, seed=3)

        Args:
            train: How many to fit on.
            validation: How many to choose settings on.
            test: How many to hold out; None takes all that remain, possibly none.
            seed: Which order.

        Raises:
            TypeError, ValueError: A number is no count, or there are not so many questions.
        """
        sets = divide(
            self.distinct, train=train, validation=validation, test=test, seed=seed, name=self.group
        )
        return OpinionSplit(*sets)

    @classmethod
    def load(cls, group: str) -> OpinionTask:
        """Load a group of the built-in poll, for instance "Republican" or "under 30".

        Questions are in our own words; the shares are those of the FiveThirtyEight/Ipsos poll of
        voters and non-voters of September 2020, CC BY 4.0 (`data/opinions/LICENSE.md`).

        Raises:
            ValueError: There is no such group; the message lists those there are.
        """
        task = cls.from_jsonl(_BUILT_IN, group=group)
        return cls(task.group, task.questions, "built-in")

    @classmethod
    def from_jsonl(cls, path: str | Path, *, group: str | None = None) -> OpinionTask:
        """Read one group from a JSON Lines file.

        Each line is an object with "question", "options" (a list), "group" and "distribution" (a
        share an option; rounded ones are divided by their sum) and may have an "id". Other keys
        are ignored.

        Args:
            path: The file.
            group: Whose answers; may be left out where the file holds one group.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line is not like that (the message names file and line), or the file
                has no such group (it lists those there are).
        """
        group, questions = read_jsonl(Path(path), group)
        return cls(group, questions, str(path))

    @classmethod
    def from_opinionqa(
        cls, folder: str | Path, *, attribute: str, group: str, weight: str | None = None
    ) -> OpinionTask:
        """Read one group from a folder of OpinionQA's `human_resp`, one wave of the survey.

        `info.csv` has the questions: `key`, `question`, and as Python literals `references` (the
        options) and `option_ordinal` (where each stands on its scale; options without a number
        are refusals, and are left out as in the paper). `responses.csv` has a row a respondent:
        the text of the chosen option in the column of each key, attributes such as `POLPARTY`,
        and a weight. Options are put in the order of their scale. Questions that nobody in the
        group was asked are left out.

        Example:
            >>> OpinionTask.from_opinionqa(
            ...     "human_resp/American_Trends_Panel_W32", attribute="POLPARTY", group="Democrat"
            ... )  # doctest: +SKIP

        Args:
            folder: Holds `info.csv` and `responses.csv`.
            attribute: A column of attributes: CREGION, AGE, SEX, EDUCATION, CITIZEN, MARITAL,
                RELIG, RELIGATTEND, POLPARTY, INCOME, POLIDEOLOGY or RACE.
            group: A value of it.
            weight: The column of weights; None for the only one called `WEIGHT_...`, or that of
                the folder's wave.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A column or the group is missing, or a row is malformed (the message names
                file and line).
        """
        questions = read_opinionqa(Path(folder), attribute, group, weight)
        return cls(group, questions, str(folder))

    @classmethod
    def from_global_opinions(
        cls, dataset: datasets.Dataset, *, group: str, drop_refusals: bool = False
    ) -> OpinionTask:
        """Take one country from a dataset with the columns of `Anthropic/llm_global_opinions`.

        `selections` is text like `defaultdict(<class 'list'>, {'Kenya': [0.4, 0.6]})` and
        `options` a list as text; both are read as literals, never run. Shares are divided by
        their sum. Left out are questions that the country was not asked, rows without a question,
        and questions with fewer than two options left.

        Example:
            >>> name = "Anthropic/llm_global_opinions"
            >>> rows = load_dataset(name, split="train")  # doctest: +SKIP
            >>> task = OpinionTask.from_global_opinions(rows, group="Kenya")  # doctest: +SKIP

        Args:
            dataset: One loaded split.
            group: The country, as it stands in `selections`.
            drop_refusals: Leave out options that say no more than "Don't know", "Not sure",
                "Refused", "No answer" or the like.

        Raises:
            TypeError, ValueError: It is no such dataset, no row has the country, or a row is
                malformed (the message has its number; leave it out with `dataset.select`).
        """
        return cls(group, read_global_opinions(dataset, group, drop_refusals), "datasets")


def check_no_shared_question(
    train: Sequence[OpinionQuestion], test: Sequence[OpinionQuestion]
) -> None:
    """Refuse two sets that share a question.

    Raises:
        ValueError: A question is on both sides; the message names up to three of them.
    """
    seen = {same_input_key(question.question) for question in train}
    shared = [q.question for q in test if same_input_key(q.question) in seen]
    if shared:
        raise ValueError(
            f"train and test must not share questions, both have {shared[:3]}; remove them from "
            "one side, or use OpinionTask.split"
        )
