"""Input-output tasks: examples, readers for where they live, and disjoint splits.

Two inputs count as the same when they agree after `str.strip`, Unicode composition (NFC) and
`str.casefold`. A split never puts the same input on two sides. Where one input has several
outputs, the first is kept and the others are left out of the split.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, cast

from tl_laai.splits import divide

if TYPE_CHECKING:
    import datasets

_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Example:
    """One input of a task with the output that is right for it.

    Example:
        >>> Example("Kenya", "Nairobi")
        Example(input='Kenya', output='Nairobi')

    Args:
        input: What the model is given, without template or surrounding white space.
        output: What it should answer, in one line: answers are read up to their first newline.
            Without a leading space: the template sets it.

    Raises:
        TypeError, ValueError: A field is not text, has nothing but white space, or holds half a
            character; `output` has several lines.
    """

    input: str
    output: str

    def __post_init__(self) -> None:
        for field in ("input", "output"):
            value: object = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"{field} must be text, got {value!r}; write it as a string")
            if not value.strip():
                raise ValueError(f"{field} must not be empty, got {value!r}; drop the example")
            check_whole(field, value)
        if "\n" in self.output.strip():  # never answered right, whatever the model writes
            raise ValueError(
                f"output must be one line, as answers end at a newline, got {self.output!r:.60}; "
                "give one line, or leave the rest out"
            )


def check_examples(name: str, examples: object) -> None:
    """Refuse what is no sequence of examples, such as a whole task.

    Raises:
        TypeError: It is a task, a split or no sequence, or holds texts or mappings.
    """
    if isinstance(examples, Task | Split):
        raise TypeError(
            f"{name} is a {type(examples).__name__}; give some of its examples, such as the train "
            "or test of Task.split(train=10)"
        )
    if not isinstance(examples, Sequence):
        raise TypeError(f"{name} is a {type(examples).__name__}; give a list or tuple of Example")
    for example in examples:
        if isinstance(example, str | Mapping):
            raise TypeError(
                f"{name} holds {example!r:.80}; give Example(input, output), or read them with "
                "Task.from_json or Task.from_dataset"
            )


def check_whole(name: str, text: str) -> None:
    """Refuse text that holds half a character (a lone surrogate): no tokenizer takes it.

    Raises:
        ValueError: It does; the message quotes where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(
            f"{name} holds half a character, {text[error.start]!r} in {around!r}; write it whole, "
            "or leave it out"
        ) from None


def same_input_key(text: str) -> str:
    """What two inputs share exactly when they count as the same input."""
    return unicodedata.normalize("NFC", text.strip()).casefold()


def check_disjoint(train: Iterable[Example], test: Iterable[Example]) -> None:
    """Refuse two sets of examples that share an input.

    Raises:
        ValueError: An input is on both sides; the message names up to five of them.
    """
    seen = {same_input_key(example.input) for example in train}
    shared = list(dict.fromkeys(e.input for e in test if same_input_key(e.input) in seen))
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise ValueError(
            f"train and test must not share inputs, both have {shared[:5]}{more}; "
            "remove them from one side, or use Task.split"
        )


@dataclass(frozen=True)
class Split:
    """Three sets of examples; two that share an input are refused with a ValueError.

    Example:
        >>> split = Task.load("country-capital").split(train=10, test=100)
        >>> len(split.train), len(split.validation), len(split.test)
        (10, 0, 100)
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        for one, other in itertools.combinations((self.train, self.validation, self.test), 2):
            check_disjoint(one, other)


@dataclass(frozen=True)
class Task:
    """Examples of one input-output rule, with where they came from.

    Example:
        >>> len(Task("double", (Example("2", "4"), Example("3", "6"))))
        2

    Args:
        name: A short name for tables and file names.
        examples: All examples, in the order of their source.
        version: The version of the data.
        description: One sentence that says what the rule is.
        source: "built-in", the path of the file, or "datasets".

    Raises:
        ValueError: There is no example, or the name is empty.
    """

    name: str
    examples: tuple[Example, ...]
    version: str = ""
    description: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must not be empty, got {self.name!r}; give the task a name")
        if not self.examples:
            raise ValueError(f"task {self.name!r} has no examples; give it at least one")

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the examples and their order, nothing else."""
        pairs = [[example.input, example.output] for example in self.examples]
        canonical = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]

    @cached_property
    def distinct(self) -> tuple[Example, ...]:
        """The first example of every distinct input: what `split` divides."""
        first: dict[str, Example] = {}
        for example in self.examples:
            first.setdefault(same_input_key(example.input), example)
        return tuple(first.values())

    def split(
        self,
        *,
        train: SupportsIndex,
        validation: SupportsIndex = 0,
        test: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
    ) -> Split:
        """Draw disjoint train, validation and test sets, the same for the same seed.

        The distinct inputs are put in one seeded order. Train is taken from its front, test
        and then validation from its back. So a larger `train` extends a smaller one, and
        where `test` is a number, changing `train` changes neither test nor validation.

        Example:
            >>> split = Task.load("antonym").split(train=10, validation=20, test=100, seed=3)

        Args:
            train: How many examples to train on.
            validation: How many to choose settings on.
            test: How many to hold out; None takes all that remain, possibly none.
            seed: Which order; a non-negative integer. The global random state is not used.

        Raises:
            TypeError, ValueError: A number is not an integer, is negative, or there are fewer
                distinct inputs than asked for.
        """
        sets = divide(
            self.distinct, train=train, validation=validation, test=test, seed=seed, name=self.name
        )
        return Split(*sets)

    @classmethod
    def load(cls, name: str) -> Task:
        """Load a task that comes with the package, for instance "country-capital".

        Raises:
            ValueError: There is no built-in task of that name.
        """
        if name not in available_tasks():
            raise ValueError(f"name must be one of {list(available_tasks())}, got {name!r}")
        text = (_DATA / f"{name}.json").read_text(encoding="utf-8")
        return _parse(text, name=name, source="built-in", where=f"built-in task {name!r}")

    @classmethod
    def from_json(cls, path: str | Path) -> Task:
        """Read a task from a JSON or JSON Lines file.

        The file holds a list of `{"input": ..., "output": ...}`, or an object with that list
        under "examples" and optionally "name", "version" and "description", or one such pair
        a line. White space around texts is dropped, since the prompt template sets its own;
        other keys are ignored. Without "name", the file's name without suffix is taken.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not such a file; the message starts with its path.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 text at byte {error.start}; a task file is JSON or JSON Lines"
            ) from error
        return _parse(text, name=path.stem, source=str(path), where=str(path))

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        *,
        input: str = "input",
        output: str = "output",
        name: str | None = None,
    ) -> Task:
        """Take a task from two text columns of a Hugging Face dataset.

        Example:
            >>> rows = load_dataset("me/capitals", split="train")  # doctest: +SKIP
            >>> task = Task.from_dataset(rows, input="country", output="capital")  # doctest: +SKIP

        Args:
            dataset: One loaded split, not a dictionary of splits.
            input: The column of inputs.
            output: The column of outputs.
            name: The task's name; by default the dataset's own, or "dataset".

        Raises:
            TypeError, ValueError: It is no such dataset, or a column or a row's text is missing.
        """
        import datasets  # heavy, and nothing else here needs it

        if not isinstance(dataset, datasets.Dataset):
            raise TypeError(
                f"dataset must be a datasets.Dataset, got {type(dataset).__name__}; choose one "
                'split, for instance load_dataset(..., split="train")'
            )
        for argument, column in (("input", input), ("output", output)):
            if column not in dataset.column_names:
                raise ValueError(
                    f"{argument} must be one of the columns {dataset.column_names}, got {column!r}"
                )
        name = name or dataset.info.dataset_name or "dataset"
        examples = tuple(
            _example({"input": given, "output": right}, where=f"dataset {name!r}, row {row}")
            for row, (given, right) in enumerate(zip(dataset[input], dataset[output], strict=True))
        )
        return cls(name, examples, source="datasets")


def available_tasks() -> tuple[str, ...]:
    """The names of the built-in tasks, sorted."""
    return tuple(sorted(file.stem for file in _DATA.glob("*.json")))


def load_task(name_or_path: str | Path) -> Task:
    """Load a built-in task by its name, or else read the file at that path.

    A built-in name wins over a file of the same name; write `./antonym` for the file.

    Raises:
        ValueError: It is neither, or the file is not a task file.
    """
    # A Path is always a file: Path("./antonym") has already lost its "./".
    if isinstance(name_or_path, str) and name_or_path in available_tasks():
        return Task.load(name_or_path)
    if Path(name_or_path).is_file():
        return Task.from_json(name_or_path)
    raise ValueError(f"task must be a file or one of {available_tasks()}, got {name_or_path!r}")


def _parse(text: str, *, name: str, source: str, where: str) -> Task:
    """Make a task of a file's text; `where` opens every error message."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    about: Mapping[str, object] = {}
    # The first line alone tells JSON Lines, so that a broken later line is blamed by number.
    if lines and _is_row(lines[0][1]):
        rows: object = [_json(line, f"{where}, line {number}") for number, line in lines]
    else:
        rows = _json(text, where)
        if isinstance(rows, dict):
            about, rows = rows, rows.get("examples")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{where}: expected a non-empty list of {{"input", "output"}} objects')
    return Task(
        name=str(about.get("name") or name),
        examples=tuple(
            _example(row, where=f"{where}: example {n}") for n, row in enumerate(rows, 1)
        ),
        version=str(about.get("version") or ""),
        description=str(about.get("description") or ""),
        source=source,
    )


def _is_row(line: str) -> bool:
    """Whether a line is a whole JSON object that is not a whole task."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "examples" not in value


def _json(text: str, where: str) -> object:
    try:
        return cast("object", json.loads(text))
    except ValueError as error:
        raise ValueError(f"{where}: truncated, or not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not a task file, nested too deeply") from error


def _example(row: object, *, where: str) -> Example:
    if not isinstance(row, Mapping) or not {"input", "output"} <= row.keys():
        raise ValueError(f'{where}: expected an object with "input" and "output", got {row!r:.80}')
    texts = (row["input"], row["output"])
    try:
        return Example(*(text.strip() if isinstance(text, str) else text for text in texts))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
