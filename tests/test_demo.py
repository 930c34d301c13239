"""The demo's own parts (the whole demo on a tiny model: tests/test_cli.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_laai import demo
from tl_laai.checkpoints import BUILT_IN
from tl_laai.tasks import available_tasks


def test_the_demo_needs_nothing_that_does_not_come_with_a_package() -> None:
    assert demo.DEMO_MODEL in BUILT_IN
    assert demo.DEMO_TASK in available_tasks()


@pytest.mark.parametrize("is_file", [True, False])
def test_the_demo_refuses_to_save_over_something_else_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
) -> None:
    monkeypatch.setattr(demo, "load", lambda _: pytest.fail("the model was loaded"))
    other = tmp_path / "notes.txt"
    other.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file" if is_file else "holds something else"):
        demo.demo(out=other if is_file else tmp_path)
    assert other.read_text(encoding="utf-8") == "mine"
