"""What the teacher says while choosing: what is learnt of, what is held out, who reads what."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from test_selection import EXAMPLES

from tl_laai import lessons
from tl_laai.distillation import Distillation, teach
from tl_laai.distributions import NothingTaughtError
from tl_laai.lessons import Lessons
from tl_laai.prompts import DEFAULT_TEMPLATE
from tl_laai.splits import seeded_order

INPUTS = tuple("opqrstuvwx")


@pytest.fixture
def model() -> Any:
    return oracle.shared_model("bridge", "llama")


def lessons_on(model: Any, inputs: tuple[str, ...] = INPUTS, n_few: int = 3) -> Lessons:
    settings = Distillation(inputs=inputs, seed=4)
    return Lessons(model, EXAMPLES, settings, DEFAULT_TEMPLATE, n_few)


@pytest.mark.parametrize(
    ("n_inputs", "n_few", "learnt", "held_out"),
    [(10, 3, 3, 3), (10, 20, 8, 2), (3, 20, 2, 1), (5, 4, 4, 1), (2, 1, 1, 1)],
)
def test_a_few_answers_are_learnt_of_and_others_held_out(
    model: Any, n_inputs: int, n_few: int, learnt: int, held_out: int
) -> None:
    own = lessons_on(model, INPUTS[:n_inputs], n_few)
    kept, asked = own.held_out_split()
    assert (len(kept), len(asked)) == (learnt, held_out)
    names = [e.tokens.input for e in (*asked, *kept)]
    assert names == list(seeded_order(INPUTS[:n_inputs], 4))[: learnt + held_out]


def test_what_is_held_out_was_neither_learnt_nor_read(model: Any) -> None:
    own = lessons_on(model, ("m", "no", "M", EXAMPLES[0].input, "no", "pq"))
    kept, asked = own.held_out_split()
    assert sorted(e.tokens.input for e in (*kept, *asked)) == ["m", "no", "pq"]


def test_one_answered_input_is_too_few_to_choose_among_distilled_fits(model: Any) -> None:
    with pytest.raises(NothingTaughtError, match=r"inputs are \['m'\].*needs at least 2"):
        lessons_on(model, ("m",)).held_out_split()


def test_a_question_is_asked_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def told(model: Any, inputs: Any, examples: Any, settings: Any, **options: Any) -> Any:
        asked.append((tuple(inputs), len(examples)))
        return teach(model, inputs, examples, settings, **options)

    monkeypatch.setattr(lessons, "teach", told)
    own = lessons_on(model)
    for share in (0.0, 0.5):
        assert own.whole(share).provenance["label_share"] == share
    own.held_out_split()
    assert asked == [(INPUTS, len(EXAMPLES))]
    found = own.of_folds([EXAMPLES[:4], EXAMPLES[3:]], [0.0, 0.5])
    assert asked[1:] == [(INPUTS[:3], 4)] * 2
    assert set(found) == {(k, share) for k in (0, 1) for share in (0.0, 0.5)}
    assert found[1, 0.5].examples[-4:] == EXAMPLES[3:]


def test_a_fold_is_taught_no_input_whose_label_is_held_out(model: Any) -> None:
    inputs = (*(e.input for e in EXAMPLES), EXAMPLES[0].input.upper(), *INPUTS)
    found = lessons_on(model, inputs).of_folds([EXAMPLES[:4], EXAMPLES[3:]], [0.0])
    for lesson in found.values():
        assert lesson.inputs == INPUTS[:3]
