"""Reads opinion questions from where polls live: files, folders, datasets.

    read_jsonl            one object a line: question, options, group, distribution
    read_opinionqa        a wave of OpinionQA (Santurkar et al. 2023, arXiv:2303.17548)
    read_global_opinions  Anthropic/llm_global_opinions (Durmus et al. 2023, arXiv:2306.16388)

What is read, and what is refused, is told at `OpinionTask.from_...` (`polls.py`).
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tl_laai.opinions import OpinionQuestion

if TYPE_CHECKING:
    import datasets

# Rounded percentages add up to 0.99 or 1.01; they are divided by their sum.
_ROUNDING = 0.015
# Whole options, in brackets or not, and several in one: "(Don't know/Refused)".
_REFUSAL = re.compile(
    r"\W*((don['\u2019]?t know|do not know|dk|not sure|unsure|can['\u2019]?t (say|choose)|refused?"
    r"|refused? to answer|declined? to answer|prefer not to (answer|say)|no answer|no response"
    r"|missing|not asked)(\W+or)?\W*)+",
    re.I,
)

_LOG = logging.getLogger("tl_laai")

# Cells of those who were not asked.
_NO_ANSWER = {"", "nan", "NaN"}

_Made = TypeVar("_Made")
_COLUMNS = {"question", "options", "group", "distribution"}


def read_jsonl(path: Path, group: str | None) -> tuple[str, tuple[OpinionQuestion, ...]]:
    """One group of a JSON Lines file, and which it was."""
    questions: dict[str, list[OpinionQuestion]] = {}
    for where, row in _json_lines(path):
        if not isinstance(row, Mapping) or not row.keys() >= _COLUMNS or row["group"] is None:
            raise ValueError(
                f"{where}: expected an object with {sorted(_COLUMNS)}, got {row!r:.80}"
            )
        before = [other.id for other in questions.get(str(row["group"]), ())]
        name = row.get("id")
        if name is None or name == "":
            name = next(q for n in itertools.count(1 + len(before)) if (q := f"Q{n}") not in before)
        made = _question(
            where, name, row["question"], row["options"],
            row["distribution"], str(row["group"]),
        )  # fmt: skip
        known = questions.setdefault(made.group, [])
        for other in known:
            if made.id == other.id and made.question != other.question:
                raise ValueError(f"{where}: id {made.id!r} is also that of {other.question!r:.80}")
        known.append(made)
    if group is None and len(questions) == 1:
        [group] = questions
    if group not in questions:
        raise ValueError(f"group must be one of {list(questions)} of {path}, got {group!r}")
    return group, tuple(questions[group])


def read_opinionqa(
    folder: Path, attribute: str, group: str, weight: str | None
) -> tuple[OpinionQuestion, ...]:
    """One group of a wave of OpinionQA."""
    info = list(_csv_rows(folder / "info.csv", ("key", "question", "references")))
    scales: dict[str, list[str]] = {}
    for where, row in info:
        if row["key"] in scales:
            raise ValueError(f"{where}: key {row['key']!r} is that of another question too")
        scales[row["key"]] = _scale(where, row)
    answers = {row["key"]: {*_references(where, row), *_NO_ANSWER} for where, row in info}
    counts: dict[str, dict[str, float]] = {key: defaultdict(float) for key in scales}
    seen: dict[str, None] = {}
    unknown: list[str] = []
    for where, row in _csv_rows(folder / "responses.csv", (attribute,)):
        seen[row[attribute]] = None
        if row[attribute] == group:
            column = weight or _weight_column(where, list(row), folder.name)
            heavy = _number(where, row.get(column), column)
            for key in counts.keys() & row.keys():
                answer = row[key].strip()
                if answer not in answers[key]:
                    unknown.append(f"{where}: {key} is {row[key]!r}")
                counts[key][answer] += heavy
    if group not in seen:
        known = sorted(value for value in seen if value)
        raise ValueError(f"group must be one of {known} of {attribute}, got {group!r}")
    if unknown:
        _LOG.warning(
            "%d answers are left out, which info.csv does not know; first %s",
            len(unknown),
            unknown[0],
        )
    questions = []
    for where, row in info:
        key = row["key"]
        shares = [counts[key][option] for option in scales[key]]
        if sum(shares) > 0:
            questions.append(
                _question(where, key, row["question"], scales[key], shares, group, exact=False)
            )
    return tuple(questions)


def read_global_opinions(
    dataset: datasets.Dataset, group: str, drop_refusals: bool
) -> tuple[OpinionQuestion, ...]:
    """One country of a dataset with the columns of `Anthropic/llm_global_opinions`."""
    import datasets  # heavy, and nothing else here needs it

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}; choose one "
            'split, for instance load_dataset(..., split="train")'
        )
    missing = {"question", "selections", "options"} - set(dataset.column_names)
    if missing:
        raise ValueError(f"dataset lacks {sorted(missing)}; it has {dataset.column_names}")
    questions: list[OpinionQuestion] = []
    seen: set[Any] = set()
    for number, row in enumerate(dataset):
        where = f"dataset, row {number}"
        by_country = _literal(where, "selections", row["selections"], dict, start="{", end="}")
        # A column of dictionaries has all countries in each row, with None for those not asked.
        seen |= {country for country, shares in by_country.items() if shares is not None}
        if by_country.get(group) is None or not row["question"]:
            continue
        options = [str(o) for o in _literal(where, "options", row["options"], list)]
        shares = by_country[group]
        if not isinstance(shares, Sequence) or len(shares) != len(options):
            raise ValueError(f"{where}: {len(options)} options, but selections {shares!r:.80}")
        kept = [i for i, o in enumerate(options) if not (drop_refusals and _REFUSAL.fullmatch(o))]
        shares = [_number(where, shares[i], "selections") for i in kept]
        if len(kept) > 1 and sum(shares) > 0:
            options = [options[i] for i in kept]
            text = row["question"]
            made = _question(where, f"row {number}", text, options, shares, group, exact=False)
            questions.append(made)
    if group not in seen:
        raise ValueError(f"group must be one of {sorted(seen, key=str)}, got {group!r}")
    return tuple(questions)


def _question(
    where: str,
    name: object,
    question: object,
    options: object,
    shares: object,
    group: str,
    *,
    exact: bool = True,
) -> OpinionQuestion:
    """A question of a row; `where` opens every error, `exact` shares sum to 1 but for rounding."""
    for argument, value in (("options", options), ("distribution", shares)):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {argument} must be a list, got {value!r:.80}")
    numbers = [_number(where, share, "distribution") for share in shares]  # type: ignore[attr-defined]  # a list, see above
    total = sum(numbers)
    if total <= 0 or (exact and abs(total - 1) > _ROUNDING):
        raise ValueError(f"{where}: distribution must sum to 1, got {numbers} (sum {total:.4g})")
    try:
        distribution = tuple(share / total for share in numbers)
        texts = tuple(o.strip() if isinstance(o, str) else o for o in options)  # type: ignore[attr-defined]  # a list, see above
        asked = question.strip() if isinstance(question, str) else question
        return OpinionQuestion(str(name), asked, texts, distribution, group)  # type: ignore[arg-type]  # checked by the class
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _number(where: str, value: object, name: str) -> float:
    """A finite number of 0 or more."""
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever is no number is refused
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise ValueError(f"{where}: {name} must hold numbers of 0 or more, got {value!r:.80}")
    return number


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: truncated, or not JSON ({error})") from error


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as dictionaries, each with file and line; every one of `columns` must be there."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Not strict, it takes all behind a quote that is never closed for one cell.
        reader = csv.DictReader(file, restval="", strict=True)
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                known = list(reader.fieldnames or ())
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {known!r:.500}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise ValueError(f"{where}: more cells than the header has columns")
                yield where, row
        except csv.Error as error:
            raise ValueError(
                f"{path}: not CSV behind line {reader.line_num} ({error}): look for a quote that "
                "is not closed"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 text behind line {reader.line_num}: save it as UTF-8"
            ) from error


def _references(where: str, row: Mapping[str, str]) -> list[str]:
    """All answers to a question, refusals behind the options."""
    return [
        str(answer).strip() for answer in _literal(where, "references", row["references"], list)
    ]


def _scale(where: str, row: Mapping[str, str]) -> list[str]:
    """The options of a question in the order of their scale, refusals left out."""
    options = _references(where, row)
    places = _literal(where, "option_ordinal", row.get("option_ordinal", ""), list)
    if len(places) > len(options):
        raise ValueError(f"{where}: {len(places)} places in option_ordinal for {options!r:.80}")
    numbers = [_number(where, place, "option_ordinal") for place in places]
    return [options[i] for i in sorted(range(len(places)), key=numbers.__getitem__)]


def _weight_column(where: str, columns: Sequence[str], folder: str) -> str:
    found = [name for name in columns if name.startswith("WEIGHT_")]
    wave = f"WEIGHT_{folder.rpartition('_')[2]}"
    if len(found) != 1 and wave not in found:
        raise ValueError(f"{where}: weight must be one of the columns {found or columns!r:.500}")
    return wave if wave in found else found[0]


class _NotANumber(ast.NodeTransformer):
    """Makes the name `nan`, which NumPy and pandas write, a number; it is no Python literal."""

    def visit_Name(self, node: ast.Name) -> ast.expr:  # the name that ast calls
        """Another name stays, and is refused."""
        return ast.Constant(math.nan) if node.id == "nan" else node


def _literal(
    where: str, name: str, text: object, kind: type[_Made], *, start: str = "", end: str = ""
) -> _Made:
    """A Python literal in text, read without running it; inside `start` and `end` if given."""
    value: Any = text
    if isinstance(text, str):
        inside = text
        if start and start in text and end in text:
            inside = text[text.index(start) : text.rindex(end) + 1]
        try:
            value = ast.literal_eval(_NotANumber().visit(ast.parse(inside.strip(), mode="eval")))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{where}: {name} is no Python literal: {text!r:.80}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {value!r:.80}")
    return value
