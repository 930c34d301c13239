"""Folders of tensors and their description: written whole or not at all, refused when damaged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import oracle
import pytest
import torch

from tl_laai import artifacts
from tl_laai.artifacts import CONFIG_FILE, TENSORS_FILE, find_artifact, save_artifact
from tl_laai.fingerprints import fingerprint
from tl_laai.interventions import Intervention


def test_saving_again_replaces_the_intervention_and_nothing_else(tmp_path: Path) -> None:
    first, second = Intervention({1: torch.ones(4, 8)}), Intervention({2: torch.ones(4, 8)})
    first.save_pretrained(tmp_path / "x")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    second.save_pretrained(tmp_path / "x")
    assert Intervention.from_pretrained(tmp_path / "x") == second
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"
    assert len(os.listdir(tmp_path / "x")) == 3
    assert os.listdir(tmp_path) == ["x"]


def failing(*args: Any, **options: Any) -> Any:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(artifacts, "save"), (Path, "write_bytes"), (Path, "write_text"), (os, "replace")],
)
def test_a_failed_save_leaves_the_old_files_and_nothing_new(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Intervention({1: torch.ones(4, 8)})
    old.save_pretrained(tmp_path / "x")
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OSError, match="disk full"):
        (2 * old).save_pretrained(tmp_path / "x")
    monkeypatch.undo()
    assert Intervention.from_pretrained(tmp_path / "x") == old
    assert os.listdir(tmp_path) == ["x"]
    assert len(os.listdir(tmp_path / "x")) == 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [(artifacts, "save"), (Path, "write_bytes"), (Path, "write_text"), (os, "rename")],
)
def test_a_failed_first_save_leaves_no_folder(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OSError, match="disk full"):
        Intervention({1: torch.ones(4, 8)}).save_pretrained(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_disk_of_its_own_can_be_saved_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "mount"
    disk.mkdir()

    def move(source: Path, target: Path) -> None:
        if source.is_relative_to(disk) != target.is_relative_to(disk):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", move)
    for saved in (Intervention({1: torch.ones(4, 8)}), Intervention({2: torch.ones(4, 8)})):
        saved.save_pretrained(disk)
        assert Intervention.from_pretrained(disk) == saved
        assert sorted(os.listdir(disk)) == sorted([TENSORS_FILE, CONFIG_FILE])


def test_what_a_killed_save_left_behind_is_no_file_of_anyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "shutil", None)  # nothing is cleaned up
    with pytest.raises(AttributeError):
        artifacts.check_folder(tmp_path)
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 1
    artifacts.check_folder(tmp_path)


def test_whether_a_folder_can_be_made_is_found_out_and_nothing_left_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), ("file/x", "cannot be written"), ("", "else than")):
        with pytest.raises(ValueError, match=words):
            artifacts.check_folder(tmp_path / name)
    artifacts.check_folder(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_two_different_saves_are_told_apart(tmp_path: Path) -> None:
    first = Intervention({1: torch.ones(4, 8)})
    first.save_pretrained(tmp_path / "a")
    (2 * first).save_pretrained(tmp_path / "b")
    os.replace(tmp_path / "a" / TENSORS_FILE, tmp_path / "b" / TENSORS_FILE)
    with pytest.raises(ValueError, match=r"b/intervention\.safetensors is truncated, altered or"):
        Intervention.from_pretrained(tmp_path / "b")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        (TENSORS_FILE, Path.unlink, r"intervention\.safetensors does not exist"),
        (CONFIG_FILE, Path.unlink, r"intervention_config\.json does not exist"),
        (TENSORS_FILE, cut, r"intervention\.safetensors is truncated, altered"),
        (TENSORS_FILE, lambda path: path.write_bytes(b""), "is truncated, altered"),
        (CONFIG_FILE, cut, r"intervention_config\.json is not JSON, perhaps truncated"),
        (CONFIG_FILE, lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        (CONFIG_FILE, lambda path: path.write_text("[1]"), "is not of an intervention"),
        (CONFIG_FILE, lambda path: path.write_text("{}"), "is not of an intervention"),
        (CONFIG_FILE, edit(format_version=99), "format_version 99, this version .* reads 1"),
        (CONFIG_FILE, edit(position="first"), r"x holds no valid intervention: .*position='first'"),
        (CONFIG_FILE, edit(fingerprint={"name": "m"}), "x holds no valid intervention"),
        (CONFIG_FILE, edit(provenance=3), "x holds no valid intervention"),
    ],
)
def test_truncated_and_foreign_files_are_refused_with_their_path(
    file: str, spoil: Any, words: str, tmp_path: Path
) -> None:
    Intervention({1: torch.ones(4, 8)}).save_pretrained(tmp_path / "x")
    spoil(tmp_path / "x" / file)
    with pytest.raises(ValueError, match=words):
        Intervention.from_pretrained(tmp_path / "x")


def test_foreign_tensors_are_refused_even_with_a_right_checksum(tmp_path: Path) -> None:
    config = {"position": "prompt_end", "fingerprint": None, "provenance": {}}
    artifacts.save_artifact(tmp_path / "x", {"model.weight": torch.ones(4, 8)}, config)
    with pytest.raises(ValueError, match=r"x holds no valid .*called 'model\.weight'"):
        Intervention.from_pretrained(tmp_path / "x")


def test_provenance_may_hold_half_a_character(tmp_path: Path) -> None:
    """As names of files do that are no UTF-8: a fit is not lost for one."""
    task = os.fsdecode(b"caf\xe9.json")
    Intervention({1: torch.ones(4, 8)}, provenance={"task": task, "é": 1}).save_pretrained(tmp_path)
    assert Intervention.from_pretrained(tmp_path).provenance["task"] == task
    text = (tmp_path / artifacts.CONFIG_FILE).read_text(encoding="utf-8")
    assert '"caf\\udce9.json"' in text
    assert '"é"' in text


def test_paths_that_cannot_hold_an_intervention_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        Intervention({1: torch.ones(4, 8)}).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"latest is a link to .*gone, which is not there"):
        artifacts.check_folder(tmp_path / "latest")
    with pytest.raises(ValueError, match=r"latest is a link to .*gone, which is not there"):
        Intervention({1: torch.ones(4, 8)}).save_pretrained(tmp_path / "latest")
    (tmp_path / "gone").mkdir()
    Intervention({1: torch.ones(4, 8)}).save_pretrained(tmp_path / "latest")
    assert Intervention.from_pretrained(tmp_path / "gone").layers == (1,)
    for name in (str(tmp_path / "file"), str(tmp_path / "none"), "none", "none/", "./none", "../n"):
        with pytest.raises(ValueError, match="is neither a folder nor a Hub name"):
            Intervention.from_pretrained(name)


# ---------------------------------------------------------------------------------------------- hub


def test_loading_from_the_hub_fetches_the_two_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, calls = Intervention({1: torch.ones(4, 8)}), []
    saved.save_pretrained(tmp_path)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Intervention.from_pretrained("me/capital", revision="v1") == saved
    options = {"revision": "v1", "allow_patterns": [TENSORS_FILE, CONFIG_FILE]}
    assert calls == [("me/capital", options)]


def test_a_hub_name_that_cannot_be_fetched_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(ValueError, match=r"'me/capital' is not a folder .*'main': disk full"):
        Intervention.from_pretrained("me/capital")


def test_pushing_uploads_the_files_and_a_card_in_one_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pushed = Intervention(
        oracle.random_deltas(),
        fingerprint=fingerprint(oracle.shared_model("bridge", "gpt2")),
        provenance={"task": "capital"},
    )
    calls: list[Any] = []

    class FakeApi:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            calls.append(("create", repo_id, private, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            files = {path.name for path in Path(folder_path).iterdir()}
            card = (Path(folder_path) / "README.md").read_text(encoding="utf-8")
            calls.append(("upload", repo_id, files, commit_message))
            calls.append((Intervention.from_pretrained(folder_path), card))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    address = pushed.push_to_hub("me/capital", private=True, token="t", commit_message="first")
    assert address == "https://huggingface.co/me/capital"
    assert calls[:2] == [("token", "t"), ("create", "me/capital", True, True)]
    assert calls[2] == ("upload", "me/capital", {TENSORS_FILE, CONFIG_FILE, "README.md"}, "first")
    uploaded, card = calls[3]
    assert uploaded == pushed
    assert card.startswith("---\nlibrary_name: tl_laai\n")
    for words in ("`tiny-gpt2`", "prompt_end", '"task": "capital"', "me/capital", "| 1 | 0 | "):
        assert words in card


def test_a_tilde_is_the_home_folder_and_no_path_at_all_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = save_artifact("~/saved", {"a": torch.ones(1)}, {})
    assert folder == find_artifact("~/saved") == tmp_path / "home" / "saved"
    with pytest.raises(ValueError, match="folder is empty"):
        save_artifact("", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="'' is neither a folder nor a Hub name"):
        find_artifact("")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
