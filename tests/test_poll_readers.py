"""Readers of polls: what they read, and that they blame file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from tl_laai.polls import OpinionTask

ROW = {"question": "Tea?", "options": ["yes", "no"], "group": "all", "distribution": [0.25, 0.75]}


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------- JSONL


def test_json_lines_are_read_by_group(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "poll.jsonl",
        {**ROW, "id": "t", "n": 12, "attribute": "everyone"},
        {**ROW, "group": "some", "distribution": [1, 0]},
        "",
        {**ROW, "id": None, "question": "Sea?", "distribution": [0.33, 0.66]},
    )
    task = OpinionTask.from_jsonl(path, group="all")
    assert [q.id for q in task.questions] == ["t", "Q2"]  # no id, null and "" are all none
    assert task.questions[0].distribution == (0.25, 0.75)
    assert task.questions[1].distribution == pytest.approx((1 / 3, 2 / 3))
    assert OpinionTask.from_jsonl(path, group="some").questions[0].distribution == (1.0, 0.0)
    for group in (None, "other"):
        with pytest.raises(ValueError, match=r"one of \['all', 'some'\] of .*poll\.jsonl"):
            OpinionTask.from_jsonl(path, group=group)
    assert OpinionTask.from_jsonl(write_lines(tmp_path / "one.jsonl", ROW)).group == "all"


def test_rows_without_an_id_get_one_that_no_other_has(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "Q2"}, {**ROW, "question": "Sea?"}, {**ROW, "id": 0, "question": "Sun?"}]
    task = OpinionTask.from_jsonl(write_lines(tmp_path / "poll.jsonl", *rows))
    assert [q.id for q in task.questions] == ["Q2", "Q3", "0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": ', "truncated, or not JSON"),
        ([1], r"expected an object with \['distribution', 'group', 'options', 'question'\]"),
        ({"question": "Tea?"}, "expected an object"),
        ({**ROW, "group": None}, "expected an object"),
        ({**ROW, "distribution": [0.5, 0.6]}, "must sum to 1"),
        ({**ROW, "distribution": [0.5, "x"]}, "numbers of 0 or more, got 'x'"),
        ({**ROW, "distribution": [0.5, None]}, "numbers of 0 or more, got None"),
        ({**ROW, "distribution": [0.5, 10**400]}, "numbers of 0 or more, got 1000"),
        ({**ROW, "distribution": [1.0]}, "1 shares, but there are 2 options"),
        ({**ROW, "distribution": "0.5"}, "distribution must be a list"),
        ({**ROW, "options": "yes"}, "options must be a list"),
        ({**ROW, "options": ["yes", 2]}, "options must be text, got 2"),
        ({**ROW, "question": ""}, "question must not be empty"),
        ({**ROW, "question": "Other?", "id": "Q1"}, "id 'Q1' is also that of 'Tea\\?'"),
    ],
)
def test_a_bad_line_is_blamed_by_file_and_number(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "poll.jsonl", ROW, row)
    with pytest.raises(ValueError, match=rf"poll\.jsonl, line 2: .*{message}"):
        OpinionTask.from_jsonl(path, group="all")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "poll.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text at byte 0"):
        OpinionTask.from_jsonl(tmp_path / "poll.jsonl")


# --------------------------------------------------------------------------------- OpinionQA

INFO = (
    ("key", "option_mapping", "question", "references", "option_ordinal"),
    ("SAFE_W9", "", "Are you safe?", "['Yes', 'No', 'A bit', 'Refused']", "[1.0, 2.0, 1.5]"),
    ("NEVER_W9", "", "Were you asked?", "['Yes', 'No', 'Refused']", "[1.0, 2.0]"),
)
ANSWERS = (
    ("QKEY", "SAFE_W9", "NEVER_W9", "POLPARTY", "WEIGHT_W9", "WEIGHT_W8"),
    ("1", "Yes", "", "Democrat", "2.0", "9"),
    ("2", "No", "", "Republican", "0.5", "9"),
    ("3", "A bit", "", "Republican", "1.0", "9"),
    ("4", "Refused", "", "Republican", "7.0", "9"),
    ("5", "No", "", "Republican", "0.5", "9"),
)


def write_wave(
    folder: Path, info: Sequence[Sequence[str]] = INFO, answers: Sequence[Sequence[str]] = ANSWERS
) -> Path:
    folder = folder / "American_Trends_Panel_W9"
    folder.mkdir()
    for name, rows in (("info.csv", info), ("responses.csv", answers)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_spaces_around_an_answer_do_not_matter_and_one_that_is_no_option_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spaced = [*ANSWERS[:2], ("2", " No ", "nan", "Republican", "1", "9"), *ANSWERS[3:]]
    chosen = {"attribute": "POLPARTY", "group": "Republican"}
    [question] = OpinionTask.from_opinionqa(
        write_wave(tmp_path, answers=spaced), **chosen
    ).questions
    assert question.distribution == (0.0, 0.4, 0.6)
    assert not caplog.messages
    (tmp_path / "other").mkdir()
    wrong = [*ANSWERS[:2], ("2", "no", "", "Republican", "1", "9"), *ANSWERS[3:]]
    folder = write_wave(tmp_path / "other", answers=wrong)
    [question] = OpinionTask.from_opinionqa(folder, **chosen).questions
    assert question.distribution == pytest.approx((0.0, 2 / 3, 1 / 3))
    [message] = caplog.messages
    assert message.startswith("1 answers are left out")
    assert message.endswith("responses.csv, line 3: SAFE_W9 is 'no'")


def test_a_wave_of_opinionqa_is_weighted_in_the_order_of_its_scale(tmp_path: Path) -> None:
    folder = write_wave(tmp_path)
    task = OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Republican")
    [question] = task.questions  # nobody was asked the other
    assert question.id == "SAFE_W9"
    assert question.options == ("Yes", "A bit", "No")
    assert question.distribution == (0.0, 0.5, 0.5)
    other = OpinionTask.from_opinionqa(
        folder, attribute="POLPARTY", group="Republican", weight="WEIGHT_W8"
    )
    assert other.questions[0].distribution == pytest.approx((0, 1 / 3, 2 / 3))


def test_what_a_wave_lacks_is_named(tmp_path: Path) -> None:
    folder = write_wave(tmp_path)
    with pytest.raises(ValueError, match=r"one of \['Democrat', 'Republican'\] of POLPARTY"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Whig")
    with pytest.raises(ValueError, match=r"responses\.csv has no column 'AGE'"):
        OpinionTask.from_opinionqa(folder, attribute="AGE", group="65+")
    with pytest.raises(ValueError, match="must hold numbers of 0 or more, got None"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat", weight="W")
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"weight must be one of .*'WEIGHT_W9', 'WEIGHT_W8'"):
        OpinionTask.from_opinionqa(moved, attribute="POLPARTY", group="Democrat")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (3, "__import__('os').getcwd()", "references is no Python literal"),
        (3, "['Yes'", "references is no Python literal"),
        (3, "{'Yes': 1}", "references must be a list"),
        (3, "['Yes', 'No']", "3 places in option_ordinal"),
        (4, "['x', 'y', 'z']", "option_ordinal must hold numbers"),
    ],
)
def test_a_bad_row_of_info_is_blamed(tmp_path: Path, column: int, value: str, message: str) -> None:
    row = [value if i == column else cell for i, cell in enumerate(INFO[1])]
    folder = write_wave(tmp_path, info=(INFO[0], row))
    with pytest.raises(ValueError, match=rf"info\.csv, line 2: {message}"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat")


def test_a_wave_that_is_no_utf_8_is_blamed(tmp_path: Path) -> None:
    folder = write_wave(tmp_path)
    with (folder / "info.csv").open("ab") as file:
        file.write("café".encode("cp1252"))
    with pytest.raises(ValueError, match=r"info\.csv: not UTF-8 text behind line .* as UTF-8"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat")


def test_a_quote_that_is_not_closed_is_blamed(tmp_path: Path) -> None:
    """Read loosely, it would swallow the answers behind it."""
    folder = write_wave(tmp_path)
    text = (folder / "responses.csv").read_text(encoding="utf-8")
    (folder / "responses.csv").write_text(text.replace("2,No,", '2,"No,'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"responses\.csv: not CSV behind line \d.*not closed"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat")


def test_two_questions_of_one_key_are_blamed(tmp_path: Path) -> None:
    folder = write_wave(tmp_path, info=(*INFO, INFO[1]))
    with pytest.raises(ValueError, match=r"info\.csv, line \d: key 'SAFE_W9' is that of another"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat")


def test_a_bad_weight_is_blamed(tmp_path: Path) -> None:
    folder = write_wave(tmp_path, answers=(*ANSWERS, ("6", "No", "", "Democrat", "", "9")))
    with pytest.raises(ValueError, match=r"responses\.csv, line 7: WEIGHT_W9 must hold numbers"):
        OpinionTask.from_opinionqa(folder, attribute="POLPARTY", group="Democrat")


# ---------------------------------------------------------------------------- global opinions


def global_rows(**change: Any) -> datasets.Dataset:
    rows = [
        {
            "question": "Tea?",
            "selections": "defaultdict(<class 'list'>, "
            "{'Kenya': [0.4, 0.5, 0.2], 'Peru': [1, 0, 0]})",
            "options": "['yes', \"no, don't\", \"Don't know\"]",
            "source": "A",
        }
        | change,
        {
            "question": "Sea?",
            "selections": "{'Kenya': [0.0, 0.0, 1.0]}",
            "options": "['yes', 'no', 'Refused']",
            "source": "A",
        },
        {"question": None, "selections": "{'Kenya': [1.0]}", "options": "['x']", "source": "A"},
    ]
    return datasets.Dataset.from_list(rows)


def test_global_opinions_are_read_by_country() -> None:
    task = OpinionTask.from_global_opinions(global_rows(), group="Kenya")
    assert [q.id for q in task.questions] == ["row 0", "row 1"]
    assert task.questions[0].options == ("yes", "no, don't", "Don't know")
    assert task.questions[0].distribution == pytest.approx((4 / 11, 5 / 11, 2 / 11))
    without = OpinionTask.from_global_opinions(global_rows(), group="Kenya", drop_refusals=True)
    [question] = without.questions  # of the other question only refusals are left
    assert question.options == ("yes", "no, don't")
    assert question.distribution == pytest.approx((4 / 9, 5 / 9))


def test_countries_that_were_not_asked_may_be_none_or_nan() -> None:
    questions = [
        {"question": "A?", "selections": {"Kenya": [0.4, 0.6]}, "options": ["a", "b"]},
        {"question": "B?", "selections": {"Peru": [0.4, 0.6]}, "options": ["a", "b"]},
    ]
    table = datasets.Dataset.from_list(questions)
    assert table[1]["selections"] == {"Kenya": None, "Peru": [0.4, 0.6]}  # Arrow fills the gaps
    (asked,) = OpinionTask.from_global_opinions(table, group="Kenya").questions
    assert asked.question == "A?"
    rows = global_rows(selections="{'Kenya': [0.25, 0.5, 0.25], 'Peru': [nan, nan, nan]}")
    task = OpinionTask.from_global_opinions(rows, group="Kenya")
    assert task.questions[0].distribution == (0.25, 0.5, 0.25)
    with pytest.raises(ValueError, match="row 0: selections must hold numbers of 0 or more"):
        OpinionTask.from_global_opinions(rows, group="Peru")


@pytest.mark.parametrize(
    ("option", "is_refusal"),
    [
        ("Don\u2019t know", True),
        ("(Don't know/Refused)", True),
        ("DK", True),
        ("Not sure/refused", True),
        ("Refused to answer", True),
        ("No answer or not asked", True),
        ("Prefer not to answer", True),
        ("Declined a lot", False),
        ("Missing work", False),
        ("Refuse to obey", False),
        ("Don't know him", False),
        ("No", False),
    ],
)
def test_only_options_that_say_nothing_else_are_refusals(option: str, is_refusal: bool) -> None:
    rows = global_rows(options=str(["yes", option, "no"]))
    task = OpinionTask.from_global_opinions(rows, group="Kenya", drop_refusals=True)
    assert (option not in task.questions[0].options) == is_refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selections": "{'Kenya': [0.5, 0.5]}"}, "3 options, but selections"),
        ({"selections": "{'Kenya': [0.5, 0.5, 'x']}"}, "numbers of 0 or more, got 'x'"),
        ({"selections": "{'Kenya': print(1)}"}, "selections is no Python literal"),
        ({"selections": "[0.5]"}, "selections must be a dict"),
        ({"options": "__import__('os')"}, "options is no Python literal"),
    ],
)
def test_a_bad_row_of_global_opinions_is_blamed(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset, row 0: .*{message}"):
        OpinionTask.from_global_opinions(global_rows(**change), group="Kenya")


def test_datasets_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, got list"):
        OpinionTask.from_global_opinions([], group="Kenya")  # type: ignore[arg-type]  # on purpose
    rows = datasets.Dataset.from_list([{"question": "Tea?", "options": "['a']"}])
    with pytest.raises(ValueError, match=r"lacks \['selections'\]"):
        OpinionTask.from_global_opinions(rows, group="Kenya")
    with pytest.raises(ValueError, match=r"one of \['Kenya', 'Peru'\], got 'Chad'"):
        OpinionTask.from_global_opinions(global_rows(), group="Chad")
