"""The command that compares baselines, on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

from tl_laai.baselines import METHODS
from tl_laai.cli import app
from tl_laai.rows import checked, read_rows

PAIRS = [{"input": a, "output": a.upper()} for a in "abcdefghij"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a task."""
    room = tmp_path_factory.mktemp("room")
    tiny.tiny_hf("llama", torch.float32).save_pretrained(room / "model")
    tiny.tiny_tokenizer().save_pretrained(room / "model")
    (room / "upper.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    return room


def laai(room: Path, *more: object) -> Result:
    words = ["baselines", "--model", room / "model", "--task", room / "upper.json"]
    words += ["--train", 5, "--test", 3, "--seed", 1, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_methods_are_shown_beside_prompting_and_kept_as_rows(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    result = laai(
        room, "--method", "task-vector", "--method", "mean-difference", "--out", out, "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert read_rows(out) == rows
    assert checked(rows, "baseline") == rows
    assert [row["method"] for row in rows] == [
        "zero-shot", "few-shot", "task-vector", "mean-difference",
    ]  # fmt: skip
    assert [row["setting"] for row in rows[:2]] == ["", ""]
    assert rows[2]["setting"].startswith("layer ")
    assert {(row["n"], row["train"], row["seed"], row["task"]) for row in rows} == {
        (3, 5, 1, "upper")
    }


def test_a_file_keeps_its_rows_of_other_seeds_and_methods(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for more in ((), ("--seed", 2), ("--seed", 2, "--method", "mean-difference")):
        result = laai(room, "--method", "task-vector", "--out", out, *more)
        assert result.exit_code == 0, result.output
    rows = checked(read_rows(out), "baseline")
    assert [(row["seed"], row["method"]) for row in rows] == [
        (seed, method)
        for seed, own in ((1, ("task-vector",)), (2, ("task-vector", "mean-difference")))
        for method in ("zero-shot", "few-shot", *own)
    ]


def test_rows_that_could_not_be_compared_do_not_share_a_file(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert laai(room, "--method", "task-vector", "--out", out).exit_code == 0
    kept = out.read_bytes()
    other = tmp_path / "upper.json"  # of the same name
    other.write_text(json.dumps([*PAIRS[1:], PAIRS[0] | {"output": "x"}]))
    for more, told in (
        (("--folds", 3), "rows of upper with folds 2, and these have 3"),
        (("--train", 6), "rows of upper with train 5, and these have 6"),
        (("--test", 2), "rows of upper with n 3, and these have 2"),
        (("--task", other), "rows of upper with digest "),
    ):
        result = laai(room, "--method", "mean-difference", "--out", out, *more)
        assert result.exit_code == 2
        assert told in " ".join(result.stderr.split())
        assert out.read_bytes() == kept


def test_the_table_names_the_chosen_setting(room: Path) -> None:
    result = laai(room, "--method", "task-vector")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert [line[0] for line in lines[:4]] == ["method", "zero-shot", "few-shot", "task-vector"]
    assert lines[3][1] == "layer"
    assert "upper: tuned on 5 examples, 3 held out." in result.stdout


def test_fine_tuning_stands_in_the_table_where_it_is_asked_for(room: Path) -> None:
    pytest.importorskip("peft")
    result = laai(room, "--method", "ia3", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["method"] for row in rows] == ["zero-shot", "few-shot", "ia3"]
    assert rows[2]["setting"].startswith("learning rate ")
    assert rows[2]["n"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "prompting"), "Error: --method prompting: there are function-vector, task-"),
        (("--train", 10), "Error: --train 10 leaves no example of upper to hold out"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    room: Path, words: tuple[object, ...], message: str
) -> None:
    result = laai(room, *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_help_names_every_method_and_one_example() -> None:
    text = CliRunner().invoke(app, ["baselines", "--help"]).stdout
    assert all(name in " ".join(text.split()) for name in METHODS)
    assert text.count("Example:") == 1
