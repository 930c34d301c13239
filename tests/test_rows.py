"""Rows on disk: read as written, refused where they are not rows, whole whatever kills a writer."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.rows import (
    append_rows,
    check_rows_file,
    checked,
    complete_rows,
    number,
    only_writer,
    read_rows,
    replace_rows,
    write_rows,
)

ROOT = Path(__file__).resolve().parent.parent
Rows = list[dict[str, Any]]


def some_rows(count: int = 6) -> Rows:
    return [
        {"kind": "sweep", "task": "überraschung\n", "layer": layer, "seed": 0, "penalty": "none"}
        | {"exact_match": layer / 7, "n": 50, "status": "converged"}
        for layer in range(count)
    ]


def written(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- reading -------------------------------------------------------------------------------------


def test_rows_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    rows = [*some_rows(), {"kind": "path", "norms": [0.1, 1e-300]}]
    (tmp_path / "rows.jsonl").write_text(written(rows).replace("\n", "\n\n", 1), encoding="utf-8")
    assert read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"holds no rows"),
        (b"\n \n", r"holds no rows"),
        (written(some_rows())[:-20].encode(), r"line 6: the last line is cut off .*delete it"),
        (b"layer,score\n1,2\n", r"line 1 is not JSON: 'layer,score'"),
        (b'{"kind": "sweep"}\n{"kind": \n{}\n', r"line 2 is not JSON"),
        (b'{"kind": "sweep"}\n{"kind": \n', r"line 2 is not JSON"),  # ended: not cut off
        (b"[1, 2]\n", r"line 1 is not a row, an object with a \"kind\""),
        (b'{"layer": 1}\n', r"line 1 is not a row"),
        (b"\x89PNG\r\n\x1a\n\xff", r"is not text in UTF-8"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_by_name_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, len(written(some_rows())) - 1))
def test_no_file_that_was_cut_anywhere_is_read_as_whole_rows_it_did_not_hold(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    rows = some_rows()
    text = written(rows)[:cut]
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    try:
        found = read_rows(path)
    except ValueError:
        assert not text.endswith("\n")
    else:
        assert found == rows[: len(found)]
        assert len(text.splitlines()) == len(found)


def test_a_score_that_is_missing_is_not_a_number_and_passes_the_schema() -> None:
    row = some_rows(1)[0] | {"exact_match": None}
    assert checked([row], "sweep") == [row]
    assert str(number(row, "exact_match")) == "nan"
    assert number(row, "n") == 50.0
    with pytest.raises(ValueError, match=r"rows\[0\] of kind 'sweep' has n = None; it must be int"):
        checked([row | {"n": None}], "sweep")


# --- appending and going on ----------------------------------------------------------------------


def test_rows_are_appended_behind_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    rows = some_rows()
    append_rows(path, rows[:2])
    append_rows(path, [])
    append_rows(path, rows[2:])
    assert read_rows(path) == complete_rows(path) == rows


def test_the_kind_stands_first_in_every_line(tmp_path: Path) -> None:
    append_rows(tmp_path / "rows.jsonl", [{"layer": 1, "kind": "sweep"}])
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"kind": "sweep", "layer": 1}\n'


def test_of_rows_that_hold_infinity_none_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(
            tmp_path / "rows.jsonl", [*some_rows(), {"kind": "sweep", "loss": float("inf")}]
        )
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_file_is_written_anew_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, some_rows(5))
    # A writer that was killed has left the beginning of another file behind.
    Path(f"{path}.new").write_text('{"kind": "sw')
    write_rows(path, some_rows(2))
    assert read_rows(path) == some_rows(2)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [*some_rows(), {"kind": "sweep", "loss": float("nan")}])
    assert read_rows(path) == some_rows(2)
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "content", [b"mine", b'{"format": 1}', b'{\n  "kind": "sweep"}', b"\x08\x01\x00", b"\n"]
)
def test_rows_replace_rows_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes holds something else than rows.*another file"):
        write_rows(path, some_rows())
    assert path.read_bytes() == content
    for torn in (b"", b'{"ki', b'{"ki\0\0'):
        path.write_bytes(torn)
        write_rows(path, some_rows())
        assert read_rows(path) == some_rows()
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "folder is a folder or a device; give a file"),
        ("file/rows.jsonl", r"file/rows\.jsonl cannot be written: .*Give a file in a folder"),
        ("file/deep/rows.jsonl", "cannot be written"),
    ],
)
def test_where_no_file_can_be_is_found_out_and_nothing_left_behind(
    tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for refusing in (check_rows_file, lambda path: write_rows(path, some_rows())):
        with pytest.raises(ValueError, match=message):
            refusing(tmp_path / out)
    check_rows_file(tmp_path / "new" / "deep" / "rows.jsonl")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_write_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_rows(tmp_path / "rows.jsonl", some_rows())
    assert list(tmp_path.iterdir()) == []


def test_there_are_no_rows_where_there_is_no_file_or_an_empty_one(tmp_path: Path) -> None:
    assert complete_rows(tmp_path / "rows.jsonl") == []
    (tmp_path / "rows.jsonl").touch()
    assert complete_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize("end", [b"", b"\0" * 9])
def test_a_writer_killed_at_any_byte_leaves_whole_rows_and_goes_on(
    tmp_path: Path, end: bytes
) -> None:
    rows = some_rows(3)
    path = tmp_path / "rows.jsonl"
    append_rows(path, rows)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut] + end)
        found = complete_rows(path)
        assert found == rows[: content[:cut].count(b"\n")]
        append_rows(path, rows[len(found) :])
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"a line\nand one without an end",
        b"one line, no end",
        b'{"a": 1}',
        b"\x89PNG\r\n\x1a\n\xff",
        written(some_rows()).encode() + b"an afterthought",
        b'{\n  "a": 1\n}',
    ],
)
def test_a_file_of_another_kind_is_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        complete_rows(path)
    assert path.read_bytes() == content


def test_rows_replace_those_that_they_agree_with(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{**some_rows(1)[0], "task": task, "seed": seed} for task in "ab" for seed in (0, 1)]
    assert replace_rows(path, rows, by=("task",)) == (0, 0)
    new = [{**rows[0], "seed": 7}]
    assert replace_rows(path, new, by=("task",)) == (2, 2)
    assert read_rows(path) == [*rows[2:], *new]
    assert replace_rows(path, new, by=("task", "seed")) == (2, 1)


# --- one writer ----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with only_writer(path):
        append_rows(path, some_rows(1))
        with (
            pytest.raises(ValueError, match="is being written by another process"),
            only_writer(path),
        ):
            pass
        with only_writer(tmp_path / "other.jsonl"):
            append_rows(path, some_rows(1))
    with only_writer(path):
        assert complete_rows(path) == some_rows(1) * 2
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_file_that_cannot_be_locked_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "rows.jsonl"
    with only_writer(path):
        append_rows(path, some_rows(1))
    assert complete_rows(path) == some_rows(1)
    assert "rows.jsonl cannot be locked here" in caplog.text


def test_a_writer_that_fails_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), only_writer(tmp_path / "rows.jsonl"):
        raise KeyboardInterrupt
    with only_writer(tmp_path / "rows.jsonl"):
        pass


FORKING_WRITER = """
import os, sys, time
from tl_laai.rows import only_writer
with only_writer(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    else:
        print(child, flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_worker_that_outlives_its_killed_parent_does_not_keep_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", FORKING_WRITER, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            with pytest.raises(ValueError, match="being written"), only_writer(path):
                pass
            parent.kill()
            parent.wait()
            os.kill(child, 0)  # it lives
            time.sleep(0.1)
            with only_writer(path):
                pass
        finally:
            parent.kill()
            os.kill(child, signal.SIGKILL)


def test_rows_of_other_kinds_are_not_replaced_and_a_file_that_grows_is_left_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"kind": "sweep"}, {"kind": "path"}])
    with path.open("ab") as handle:
        handle.write(b'{"kind": "sw')
    there = path.read_bytes()
    check_rows_file(path)
    with pytest.raises(ValueError, match=r"rows of other kinds: path, sweep\. Give"):
        check_rows_file(path, "ablation")
    with pytest.raises(ValueError, match=r"rows of other kinds: path\. "):
        check_rows_file(path, "sweep")
    assert path.read_bytes() == there
    path.write_bytes(b'{"kind": "sweep"}')  # whole, but for its line's end
    with pytest.raises(ValueError, match=r"rows of other kinds: sweep\. "):
        check_rows_file(path, "ablation")


@pytest.mark.parametrize("field", ["model", "settings"])
def test_rows_of_several_models_or_settings_are_no_picture(field: str) -> None:
    one, other, *_ = some_rows()
    assert checked([one | {field: {"a": 1}}, other], "sweep")
    with pytest.raises(ValueError, match=f"mix several of {field}: .* choose one"):
        checked([one | {field: {"a": 1}}, other | {field: {"a": 2}}], "sweep")
