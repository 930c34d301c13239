from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tl_laai.recipes import (
    draw,
    record,
    recorded_data,
    recorded_model,
    recorded_template,
)
from tl_laai.tasks import Example, Task, load_task

COUNTRIES = Task.load("country-capital")
SMALL = Task("small", tuple(Example(f"in {i}", f"out {i}") for i in range(12)))


def save(file: Path, examples: Iterable[Example]) -> str:
    file.write_text(json.dumps([asdict(example) for example in examples]), encoding="utf-8")
    return str(file)


def test_a_fit_is_evaluated_on_what_it_held_out() -> None:
    data = draw(COUNTRIES, train=10, test=20, seed=3)
    split = COUNTRIES.split(train=10, test=20, seed=3)
    assert (data.train, data.test) == (split.train, split.test)
    again = recorded_data(json.loads(json.dumps(record("gemma-3-270m", "auto", data))))
    assert again == data


def test_more_held_out_than_there_are_gives_all_there_are() -> None:
    assert len(draw(SMALL, train=10, test=100).test) == 2


def test_more_train_examples_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="12 distinct inputs, fewer than 13"):
        draw(SMALL, train=13)


@settings(deadline=None, max_examples=25)
@given(
    train=st.integers(1, 30),
    test=st.integers(1, 200),
    seed=st.integers(0, 50),
    other_seed=st.integers(0, 50),
)
def test_no_other_seed_ever_holds_out_what_was_fitted_on(
    train: int, test: int, seed: int, other_seed: int
) -> None:
    fitted_on = draw(COUNTRIES, train=train, seed=seed)
    other = recorded_data(record("m", "auto", fitted_on), seed=other_seed, test=test)
    assert not {e.input for e in other.test} & {e.input for e in (*fitted_on.train, *other.train)}
    assert other.origin_known
    assert len(other.test) <= test


def test_a_task_file_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"input": e.input, "output": e.output} for e in SMALL.examples]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    data = draw(load_task("mine.json"), train=4)
    provenance = record("checkpoint", "bridge", data)
    monkeypatch.chdir("/")
    assert recorded_data(provenance).test == data.test
    assert recorded_model(provenance) == (str(tmp_path / "checkpoint"), "bridge")


def test_a_folder_does_not_shadow_a_built_in_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gemma-3-270m").mkdir()
    monkeypatch.chdir(tmp_path)
    provenance = record("gemma-3-270m", "auto", draw(SMALL))
    assert recorded_model(provenance) == ("gemma-3-270m", "auto")


def test_what_is_given_goes_before_what_is_recorded() -> None:
    provenance = record("gemma-3-270m", "hooked", draw(COUNTRIES, test=7))
    assert recorded_model(provenance, model="gpt2", backend="bridge") == ("gpt2", "bridge")
    assert len(recorded_data(provenance, test=3).test) == 3
    other = recorded_data(provenance, task="antonym")
    assert other.task.name == "antonym"
    assert other.origin_known


def test_a_task_file_that_has_changed_is_refused_unless_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    rows = [{"input": e.input, "output": e.output} for e in SMALL.examples]
    file.write_text(json.dumps(rows), encoding="utf-8")
    provenance = record("gpt2", "auto", draw(load_task(str(file)), train=4))
    file.write_text(json.dumps(rows[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine.json' has changed since the fit \(digest"):
        recorded_data(provenance)
    assert not recorded_data(provenance, task=str(file)).origin_known


def test_a_task_file_that_is_gone_is_named_as_that_of_the_fit(tmp_path: Path) -> None:
    file = save(tmp_path / "mine.json", SMALL.examples)
    provenance = record("gpt2", "auto", draw(load_task(file), train=4))
    Path(file).rename(tmp_path / "moved.json")
    with pytest.raises(FileNotFoundError, match=r"mine.json, is not there any more.*--task"):
        recorded_data(provenance)
    assert recorded_data(provenance, task=str(tmp_path / "moved.json")).origin_known


def test_an_opinion_fit_has_seen_no_example_of_any_task() -> None:
    provenance = {"opinions": {"group": "adults"}, "split": {"train": 4}}
    with pytest.raises(ValueError, match="fitted on opinions, which have no right answers"):
        recorded_data(provenance)
    assert recorded_data(provenance, task="antonym", test=5).origin_known


def test_what_was_fitted_on_is_not_held_out_of_a_file_of_another_name(tmp_path: Path) -> None:
    few = save(tmp_path / "few.json", SMALL.examples[:6])
    many = save(tmp_path / "many.json", SMALL.examples)
    data = draw(load_task(few), train=4)
    provenance = record("gpt2", "auto", data)
    other = recorded_data(provenance, task=many, seed=1)
    assert other.origin_known
    assert other.test
    assert not {e.input for e in other.test} & {e.input for e in data.train}
    Path(few).unlink()
    assert not recorded_data(provenance, task=many).origin_known


def test_a_task_that_came_from_no_file_has_to_be_given_again() -> None:
    made = Task("made", COUNTRIES.examples[:20], source="in a notebook")
    provenance = record("gpt2", "auto", draw(made))
    assert provenance["task"]["source"] is None
    with pytest.raises(ValueError, match=r"does not record its task,.* give --task"):
        recorded_data(provenance)


@pytest.mark.parametrize(
    "provenance", [{}, {"task": "a text"}, {"operation": "add", "parts": [{}, {}]}]
)
def test_a_provenance_that_says_nothing_asks_for_what_it_lacks(
    provenance: dict[str, object],
) -> None:
    with pytest.raises(ValueError, match=r"does not record its task,.* give --task"):
        recorded_data(provenance)
    with pytest.raises(ValueError, match=r"does not record its model's name,.* give --model"):
        recorded_model(provenance)
    assert recorded_template(provenance) == DEFAULT_TEMPLATE
    assert not recorded_data(provenance, task="antonym").origin_known


def part(task: str, seed: int = 0, text: str = "{input} ->", model: str = "gpt2") -> dict[str, Any]:
    """The provenance of a fit on five examples of a built-in task."""
    data = draw(Task.load(task), train=5, test=20, seed=seed)
    return record(model, "hooked", data) | {"template": asdict(PromptTemplate(text))}


def added(*parts: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a sum, each part of which was also scaled."""
    scaled = [{"operation": "multiply", "argument": 2, "parts": [part]} for part in parts]
    return {"operation": "add", "parts": scaled}


def test_algebra_forgets_nothing_on_which_all_parts_agree() -> None:
    fit = part("antonym", seed=3)
    for made in (added(fit), added(fit, fit)):
        assert recorded_data(made) == recorded_data(fit)
        assert recorded_model(made) == ("gpt2", "hooked")
        assert recorded_template(made) == PromptTemplate("{input} ->")


def test_nothing_that_any_part_of_a_sum_has_seen_is_held_out() -> None:
    fits = [part("antonym", seed=seed) for seed in range(4)]
    seen = {e.input for fit in fits for e in recorded_data(fit).train}
    together = recorded_data(added(*fits), test=1000)
    assert together.origin_known
    assert len(together.test) == len(together.task.distinct) - len(seen)
    assert not seen & {e.input for e in together.test}
    assert not recorded_data(added(fits[0], {}), task="antonym").origin_known


def test_parts_that_disagree_are_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    made = added(part("antonym"), part("synonym", text="{input} =", model="other"))
    with pytest.raises(ValueError, match=r"its parts do not agree on it; give --task"):
        recorded_data(made)
    with pytest.raises(ValueError, match=r"its parts do not agree on it; give --model"):
        recorded_model(made)
    assert recorded_data(made, task="capitalize").origin_known
    assert recorded_template(made) == DEFAULT_TEMPLATE
    [warning] = caplog.messages
    assert "different prompt templates ('{input} ->', '{input} =')" in warning


def test_a_task_with_nothing_left_to_hold_out_is_refused() -> None:
    few = Task("few", COUNTRIES.examples[:10], source="built-in")
    provenance = record("gpt2", "auto", draw(COUNTRIES, train=len(COUNTRIES.distinct)))
    with pytest.raises(ValueError, match="none is left to hold out"):
        recorded_data(provenance)
    assert draw(few, train=10).test == ()


def test_a_template_is_recorded_whole_and_empty_parts_are_kept() -> None:
    template = PromptTemplate("{input} =", answer_prefix="", separator=";", answer_end="!")
    assert recorded_template({"template": asdict(template)}) == template
    assert recorded_template({"template": {"text": "{input}?"}}) == PromptTemplate("{input}?")
    with pytest.raises(ValueError, match=r"text must contain \{input\}"):
        recorded_template({"template": {"text": "nothing"}})
