"""Opinion tasks: splits by question, and the built-in poll."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_laai.opinions import OpinionQuestion
from tl_laai.polls import OpinionSplit, OpinionTask
from tl_laai.tasks import available_tasks, same_input_key

GROUPS = ("Democrat", "Independent", "Republican", "under 30", "30-49", "50-64", "65+")


@pytest.mark.parametrize("group", GROUPS)
def test_the_built_in_poll_has_twenty_questions_a_group(group: str) -> None:
    task = OpinionTask.load(group)
    assert len(task) == len(task.distinct) == 20
    assert task.source == "built-in"
    assert {question.group for question in task.questions} == {group}
    first = OpinionTask.load(GROUPS[0])
    assert [(q.question, q.options) for q in task.questions] == [
        (q.question, q.options) for q in first.questions
    ]
    assert (task.digest == first.digest) == (group == GROUPS[0])


def test_the_built_in_poll_names_its_source_and_is_no_input_output_task() -> None:
    import tl_laai

    folder = Path(tl_laai.__file__).parent / "data" / "opinions"
    licence = (folder / "LICENSE.md").read_text(encoding="utf-8")
    assert "FiveThirtyEight" in licence
    assert "creativecommons.org/licenses/by/4.0" in licence
    assert "opinions" not in available_tasks()


def test_no_question_stands_on_two_sides_of_a_split() -> None:
    task = OpinionTask.load("Republican")
    split = task.split(train=8, validation=4, seed=5)
    sides = [
        {same_input_key(q.question) for q in side}
        for side in (split.train, split.validation, split.test)
    ]
    assert [len(side) for side in sides] == [8, 4, 8]
    assert len(set.union(*sides)) == 20
    assert task.split(train=8, seed=5).train == split.train
    assert task.split(train=8, seed=6).train != split.train
    shown = {example.question for example in task.examples(split.train, n_orders=3)}
    assert not shown & {question.id for question in split.test}


def test_a_question_that_comes_twice_is_divided_once() -> None:
    question = OpinionTask.load("65+").questions[0]
    again = OpinionQuestion("x", f" {question.question.upper()}", ("a", "b"), (0.5, 0.5))
    assert OpinionTask("65+", (question, again)).distinct == (question,)
    with pytest.raises(ValueError, match="must not share questions"):
        OpinionSplit((question,), (), (again,))


def test_too_large_a_split_and_an_empty_task_are_refused() -> None:
    with pytest.raises(ValueError, match="'65\\+' has 20 distinct inputs, fewer than 21"):
        OpinionTask.load("65+").split(train=21)
    with pytest.raises(ValueError, match="group 'x' has no questions"):
        OpinionTask("x", ())
