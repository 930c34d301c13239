"""What opinion fits keep of their questions, made again from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_laai.opinion_recipes import PollData, record_poll, recorded_poll
from tl_laai.opinions import OpinionTemplate
from tl_laai.polls import OpinionTask


def test_a_recorded_poll_is_made_again_whatever_the_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "built-in").mkdir()  # is not the built-in poll
    task = OpinionTask.load("Republican")
    split = task.split(train=8, seed=3)
    poll = PollData(task, split, 2, 3, None, OpinionTemplate(answer_prefix="  "))
    kept = record_poll("gpt2", "auto", poll, outside_weight=0.5)
    assert kept["loss"] == {"outside_weight": 0.5, "objective": "answers"}
    assert recorded_poll(kept) == poll
    parts = [kept, kept | {"loss": {"outside_weight": 1.0}}]  # the same questions all the same
    assert recorded_poll({"operation": "add", "parts": parts}) == poll
    other = kept | {"opinions": kept["opinions"] | {"digest": "0"}}
    with pytest.raises(ValueError, match="have changed since the fit"):
        recorded_poll(other)
    damaged = kept | {"opinions": {"group": "Republican"}}
    with pytest.raises(ValueError, match="does not say source, digest, template of the questions"):
        recorded_poll(damaged)
    with pytest.raises(ValueError, match="not all fitted on the same questions"):
        recorded_poll({"operation": "add", "parts": [kept, other]})
