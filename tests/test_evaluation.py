"""Evaluation: each row against answers made one by one, and the refusals that keep it honest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from tiny import N_CTX, tiny_model

from tl_laai import evaluation
from tl_laai.decoding import longest_answer
from tl_laai.edits import Edit
from tl_laai.evaluation import (
    AnswerRow,
    Evaluation,
    answer_scores,
    as_edit,
    evaluate,
    evaluate_edits,
)
from tl_laai.fingerprints import fingerprint
from tl_laai.interventions import Intervention
from tl_laai.metrics import exact_match
from tl_laai.prefix import freeze
from tl_laai.prompts import PromptTemplate, TooLongError, decoded_answer, tokenise
from tl_laai.tasks import Example, Task

EXAMPLES = tuple(
    Example(*pair) for pair in (("abc", "x"), ("d", "yz"), ("efghi", "uvw"), ("jk", "st"))
)
SHOWN = (Example("lm", "n"), Example("op", "qr"))


@pytest.fixture
def model(backend: str) -> Iterator[Any]:
    yield from oracle.watched(oracle.shared_model(backend, "llama"))


def slow_rows(
    model: Any,
    examples: Sequence[Example],
    edit: Edit,
    demonstrations: Sequence[Example] = (),
    max_new_tokens: int | None = None,
    template: PromptTemplate | None = None,
) -> list[AnswerRow]:
    """Each example alone, each token by a full forward."""
    rows = []
    options = {} if template is None else {"template": template}
    if demonstrations:  # whose answers end with an empty line
        options = {"template": PromptTemplate(answer_end="\n\n")}
    batch = tokenise(model, examples, demonstrations=demonstrations, **options)
    for example, tokenised in zip(examples, batch, strict=True):
        written = oracle.greedy_continuation(
            model,
            tokenised.prompt,
            longest_answer(batch) if max_new_tokens is None else max_new_tokens,
            lambda token: token in (0, 1, 2) or "\n" in model.tokenizer.decode([token]),
            edit.deltas,
            edit.position,
            edit.scale,
        )
        prediction = decoded_answer(model.tokenizer.decode(list(written)))
        with torch.no_grad():
            steps = oracle.log_probabilities(
                model, tokenised, edit.deltas, edit.position, edit.scale
            )
        correct = exact_match(prediction, example.output)
        rows.append(
            AnswerRow(example.input, example.output, prediction, correct, float(steps.sum()))
        )
    return rows


def assert_same_rows(got: Sequence[AnswerRow], expected: Sequence[AnswerRow]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.input, one.target) == (other.input, other.target)
        assert one.prediction == other.prediction
        assert one.correct == other.correct
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-9)


def intervention_for(model: Any, position: Any = "prompt_end", seed: int = 1) -> Intervention:
    delta = oracle.random_delta(model, seed=seed)
    return Intervention({1: delta, 0: -delta}, position, fingerprint(model))


# ------------------------------------------------------------------------------ the slow twin


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
def test_rows_under_an_intervention_are_those_of_one_by_one(model: Any, position: Any) -> None:
    intervention = intervention_for(model, position)
    got = evaluate(model, EXAMPLES, intervention=intervention)
    edit = Edit(dict(intervention.deltas), position)
    assert_same_rows(got.rows, slow_rows(model, EXAMPLES, edit))
    plain = evaluate(model, EXAMPLES)
    assert_same_rows(plain.rows, slow_rows(model, EXAMPLES, Edit()))
    assert [r.prediction for r in got.rows] != [r.prediction for r in plain.rows]


def test_prompts_of_unlike_lengths_are_answered_apart_with_the_same_rows(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[list[int]] = []

    def noted(model: Any, examples: Any, **options: Any) -> Any:
        frozen.append([len(e.prompt) for e in examples])
        return freeze(model, examples, **options)

    monkeypatch.setattr(evaluation, "freeze", noted)
    monkeypatch.setattr(evaluation, "_PADDED_TOKENS", 60)
    examples = [Example("ab" * (30 if i == 1 else 1 + i % 3), "xy"[: 1 + i % 2]) for i in range(7)]
    edit = as_edit(model, intervention_for(model))
    rows = evaluate_edits(model, examples, {"it": edit})["it"].rows
    assert len(frozen) == 2
    assert max(frozen[0]) < min(frozen[1])
    assert_same_rows(rows, slow_rows(model, examples, edit))
    losses, _ = answer_scores(model, examples, [edit])
    lengths = [len(e.answer) for e in tokenise(model, examples)]
    expected = [-row.log_probability / n for row, n in zip(rows, lengths, strict=True)]
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_few_shot_rows_are_those_of_one_by_one(model: Any) -> None:
    got = evaluate(model, EXAMPLES, demonstrations=SHOWN)
    assert_same_rows(got.rows, slow_rows(model, EXAMPLES, Edit(), SHOWN))
    assert [r.prediction for r in got.rows] != [
        r.prediction for r in evaluate(model, EXAMPLES).rows
    ]


def test_answers_that_just_fit_the_context_are_decoded_as_far_as_it_reaches(model: Any) -> None:
    [plain] = tokenise(model, [Example("x", "yz")])
    room = model.cfg.n_ctx - len(plain.prompt) - len(plain.answer)
    last = Example("x" * (1 + room), "yz")
    [row] = evaluate(model, [last]).rows
    assert row.target == "yz"
    with pytest.raises(TooLongError, match=r"max_new_tokens is 9: .* Ask for fewer"):
        evaluate(model, [last], max_new_tokens=9)
    with pytest.raises(ValueError, match="max_new_tokens is 0; give 1 or more"):
        evaluate(model, [last], max_new_tokens=0)


def test_demonstrations_and_an_intervention_go_together(model: Any) -> None:
    intervention = intervention_for(model, "every_step")
    got = evaluate(model, EXAMPLES, demonstrations=SHOWN, intervention=intervention)
    edit = Edit(dict(intervention.deltas), "every_step")
    assert_same_rows(got.rows, slow_rows(model, EXAMPLES, edit, SHOWN))


def test_many_edits_from_one_prefill_equal_each_alone(model: Any) -> None:
    delta = oracle.random_delta(model, seed=4)
    edits = {
        "none": Edit(),
        "one": Edit({2: delta}),
        "ablated": Edit(scale={1: torch.tensor([1.0, 0.0, 1.0, 0.0])}),
        "same": Edit({2: delta}),
    }
    got = evaluate_edits(model, EXAMPLES, edits)
    assert list(got) == list(edits)
    for name, edit in edits.items():
        assert_same_rows(got[name].rows, slow_rows(model, EXAMPLES, edit))
    assert got["one"] == got["same"]


def test_template_and_length_are_those_asked_for(model: Any) -> None:
    template = PromptTemplate(text="{input}=", answer_prefix="")
    got = evaluate(model, EXAMPLES, template=template, max_new_tokens=2)
    expected = slow_rows(model, EXAMPLES, Edit(), max_new_tokens=2, template=template)
    assert_same_rows(got.rows, expected)
    assert all(len(row.prediction) <= 2 for row in got.rows)


def test_a_right_answer_is_counted(model: Any) -> None:
    said = [row.prediction for row in evaluate(model, EXAMPLES, max_new_tokens=3).rows]
    sayable = [text for text in said if text]
    assert sayable
    answers = [Example(e.input, text or "?") for e, text in zip(EXAMPLES, said, strict=True)]
    got = evaluate(model, answers, max_new_tokens=3)
    assert [row.correct for row in got.rows] == [bool(text) for text in said]
    assert got.exact_match == len(sayable) / len(EXAMPLES)


# ------------------------------------------------------------------------------------ figures


def test_figures_are_means_over_rows() -> None:
    rows = tuple(
        AnswerRow("a", "b", prediction, prediction == "b", score)
        for prediction, score in (("b", -1.0), ("c", -2.0), ("b", -6.0), ("b, or c", -1.0))
    )
    result = Evaluation(rows)
    assert result.n == 4
    assert result.exact_match == 0.5
    assert result.log_probability == -2.5
    figures = {"exact_match": 0.5, "begins_right": 0.75, "n": 4, "log_probability": -2.5}
    assert result.to_dict() == figures
    with_rows = result.to_dict(rows=True)
    assert with_rows["rows"][1] == {
        "input": "a",
        "target": "b",
        "prediction": "c",
        "correct": False,
        "log_probability": -2.0,
    }
    assert json.loads(json.dumps(with_rows)) == with_rows


# ------------------------------------------------------------------------------------ refusals


def test_no_examples_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="examples is empty: give at least one"):
        evaluate(model, [])


def test_a_demonstration_that_is_also_asked_is_refused(model: Any) -> None:
    shown = (*SHOWN, Example(" ABC", "x"))  # the same input but for case and white space
    with pytest.raises(ValueError, match=r"must not share inputs.*abc"):
        evaluate(model, EXAMPLES, demonstrations=shown)


def test_another_models_intervention_is_refused_unless_not_strict(backend: str) -> None:
    model, other = oracle.shared_model(backend), oracle.shared_model(backend, seed=1)
    foreign = intervention_for(other)
    with pytest.raises(ValueError, match=r"not the one that this intervention was fitted on"):
        evaluate(model, EXAMPLES, intervention=foreign)
    with pytest.raises(ValueError, match="strict=False"):
        as_edit(model, foreign)
    got = evaluate(model, EXAMPLES, intervention=foreign, strict=False)
    assert_same_rows(got.rows, slow_rows(model, EXAMPLES, Edit(dict(foreign.deltas))))


@pytest.mark.parametrize("strict", [True, False])
def test_an_intervention_of_another_shape_is_always_refused(model: Any, strict: bool) -> None:
    wide = Intervention({0: torch.zeros(4, 9)})
    high = Intervention({7: torch.zeros(4, 8)})
    for intervention in (wide, high):
        with pytest.raises(ValueError, match="cannot be applied to this model"):
            evaluate(model, EXAMPLES, intervention=intervention, strict=strict)


def test_a_fit_for_an_intervention_is_refused_with_what_to_give(model: Any) -> None:
    fit: Any = SimpleNamespace(intervention=Intervention({0: torch.ones(1, 1)}))
    message = r"is a SimpleNamespace; expected an Intervention\. Give its \.intervention\."
    with pytest.raises(TypeError, match=message):
        evaluate(model, EXAMPLES, intervention=fit)


def test_prompts_longer_than_the_context_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"context of {N_CTX}"):
        evaluate(model, [Example("a" * N_CTX, "b")])
    with pytest.raises(ValueError, match=f"context of {N_CTX}.*fewer demonstrations"):
        evaluate(model, EXAMPLES, demonstrations=[Example(f"{i:02}", "b") for i in range(20)])


def test_the_model_is_left_as_found_also_when_something_raises(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = oracle.state_of(model)
    evaluate(model, EXAMPLES, intervention=intervention_for(model), demonstrations=SHOWN)
    assert oracle.state_of(model) == before

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(evaluation, "answer_log_probabilities", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate(model, EXAMPLES)
    assert oracle.state_of(model) == before


# ---------------------------------------------------------------------------------- real Gemma


def test_gemma_answers_more_capitals_when_shown_ten(gemma: Any) -> None:
    split = Task.load("country-capital").split(train=10, test=8, seed=0)
    zero_shot = evaluate(gemma, split.test)
    few_shot = evaluate(gemma, split.test, demonstrations=split.train)
    assert zero_shot.exact_match <= 0.25
    assert few_shot.exact_match >= 0.5
    assert few_shot.log_probability > zero_shot.log_probability + 1


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_change_no_evaluation(backend: str, mode: Any) -> None:
    model = tiny_model(backend, "llama", dtype=torch.float32)
    intervention = Intervention({1: torch.ones(4, 8)}, "every_step", fingerprint(model))
    edits = {"none": Edit(), "some": as_edit(model, intervention)}
    with mode():
        found = evaluate_edits(model, EXAMPLES, edits)
    assert found == evaluate_edits(model, EXAMPLES, edits)
