"""Teachers: their answers and distributions are those of plain forwards after demonstrations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from tl_laai import distillation
from tl_laai.decoding import longest_answer
from tl_laai.distillation import Distillation, ask_teacher, prepare, teach
from tl_laai.distributions import NothingTaughtError
from tl_laai.edits import Edit
from tl_laai.fitting import fit
from tl_laai.problems import engine_for
from tl_laai.prompts import (
    PromptTemplate,
    TaughtExample,
    TooLongError,
    decoded_answer,
    tokenise,
)
from tl_laai.splits import seeded_order
from tl_laai.tasks import Example
from tl_laai.teachers import fit_teacher

TEMPLATE = PromptTemplate(text="{input}>", answer_prefix="", separator=";", answer_end=".")
SHOWN = (Example("ab", "x"), Example("c", "yz"), Example("de", "w"))
INPUTS = ("f", "gh", "ijk")


@pytest.fixture(scope="module", params=("llama", "gemma", "gemma2"))
def model(request: pytest.FixtureRequest) -> Any:
    return oracle.run_once(tiny_model("bridge", request.param))


def asked(
    model: Any,
    text: str,
    answer: tuple[int, ...],
    shown: tuple[Example, ...],
    edit: Edit | None = None,
) -> Any:
    """Logits at each answer token after demonstrations, by a plain forward with a plain hook."""
    prompt = model.to_tokens(TEMPLATE.render(text, shown), truncate=False)[0].tolist()
    deltas = edit.deltas if edit else {}
    logits = oracle.logits_under_edits(model, [*prompt, *answer[:-1]], len(prompt), deltas)
    return logits[len(prompt) - 1 :]


def taught_after(steps: int, **options: Any) -> Distillation:
    return Distillation(seed=5, teacher_steps=steps, teacher_layer=0, **options)


def edit_after(model: Any, steps: int) -> Edit:
    return fit_teacher(model, SHOWN, steps=steps, layer=0, template=TEMPLATE, seed=5)


@pytest.mark.parametrize("steps", [0, 9])
@pytest.mark.parametrize(("n_teachers", "n_shown"), [(1, None), (3, None), (3, 2)])
def test_a_taught_loss_is_the_kl_to_the_plain_few_shot_forwards(
    model: Any, n_teachers: int, n_shown: int | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_ASKED_AT_ONCE", 2)
    settings = taught_after(steps, n_teachers=n_teachers, n_shown=n_shown)
    taught, edit = (
        teach(model, INPUTS, SHOWN, settings, template=TEMPLATE),
        edit_after(model, steps),
    )
    orders = [SHOWN, *(seeded_order(SHOWN, 5 + i)[:n_shown] for i in range(n_teachers - 1))]
    assert [e.tokens.input for e in taught] == list(INPUTS)
    delta = oracle.random_delta(model)
    terms = []
    for example in taught:
        answer = example.tokens.answer
        averages = [
            asked(model, example.tokens.input, answer, order, edit).softmax(dim=-1)
            for order in orders
        ]
        average = torch.stack(averages).mean(dim=0)
        prompt = example.tokens.prompt
        student = oracle.logits_under_edits(
            model, [*prompt, *answer[:-1]], len(prompt), {1: delta}
        )[len(prompt) - 1 :]
        kl = F.kl_div(student.log_softmax(dim=-1), average, reduction="none").sum(dim=-1)
        terms.append(kl.mean())
    engine = engine_for(model, [taught], layers=[1], template=TEMPLATE)
    loss = engine.losses(delta[None], torch.tensor([0]))
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)


@pytest.mark.parametrize("folds", [None, [[3], [0, 2], [4], [1]]])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_teacher_is_asked_each_example_after_the_others(
    model: Any, folds: Any, steps: int
) -> None:
    shown = (*SHOWN, Example("k", "v"), Example("AB", "u"))
    settings = Distillation(teacher_steps=steps, teacher_layer=0, seed=2)
    words = dataclasses.replace(TEMPLATE, answer_end="")
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    stops = (model.tokenizer.eos_token_id, newline)
    found = ask_teacher(model, shown, template=TEMPLATE, folds=folds, settings=settings)
    assert [(row.input, row.target) for row in found.rows] == [(e.input, e.output) for e in shown]
    for i, (example, row) in enumerate(zip(shown, found.rows, strict=True)):
        (hidden,) = (fold for fold in folds or [[i]] if i in fold)
        inputs = {shown[j].input.lower() for j in hidden}  # of one input, none is shown
        others = tuple(e for e in shown if e.input.lower() not in inputs)
        longest = longest_answer(tokenise(model, [shown[j] for j in hidden], template=words))
        edit = fit_teacher(model, others, steps=steps, layer=0, template=TEMPLATE, seed=2)
        (tokens,) = tokenise(model, [example], template=words, demonstrations=others)
        logits = asked(model, example.input, tokens.answer, others, edit).log_softmax(dim=-1)
        each = logits[torch.arange(len(tokens.answer)), list(tokens.answer)]
        assert row.log_probability == pytest.approx(each.sum().item(), rel=1e-6)
        prompt = list(tokens.prompt)
        greedy = oracle.greedy_continuation(model, prompt, longest, stops.__contains__, edit.deltas)
        ends = words.ends(demonstrated=True)
        assert row.prediction == decoded_answer(model.tokenizer.decode(list(greedy)), ends)
    wholes = [math.exp(row.log_probability) for row in found.rows]
    assert found.probability == pytest.approx(sum(wholes) / 5)


@pytest.mark.parametrize("steps", [0, 9])
def test_the_teachers_answer_is_its_greedy_one_with_the_end_of_an_answer(
    model: Any, steps: int
) -> None:
    edit = edit_after(model, steps)
    longest = max(len(e.answer) for e in tokenise(model, SHOWN, template=TEMPLATE)) + 4
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    ends = (model.tokenizer.eos_token_id, newline)
    end = tuple(model.tokenizer(".", add_special_tokens=False)["input_ids"])
    for example in teach(model, INPUTS, SHOWN, taught_after(steps), template=TEMPLATE):
        prompt = model.to_tokens(TEMPLATE.render(example.tokens.input, SHOWN))[0].tolist()
        greedy = oracle.greedy_continuation(model, prompt, longest, ends.__contains__, edit.deltas)
        answer = example.tokens.answer
        assert answer == (greedy if len(greedy) == longest else (*greedy, *end))


def test_the_student_is_asked_the_bare_prompt(model: Any) -> None:
    (first, *_) = teach(model, INPUTS, SHOWN, template=TEMPLATE)
    assert list(first.tokens.prompt) == model.to_tokens("f>")[0].tolist()


def test_inputs_without_an_answer_are_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = distillation.decode
    monkeypatch.setattr(
        distillation, "decode", lambda *a, **k: [[(), *answers[1:]] for answers in real(*a, **k)]
    )
    taught = teach(model, INPUTS, SHOWN, template=TEMPLATE)
    assert [e.tokens.input for e in taught] == list(INPUTS[1:])


def test_a_teacher_without_any_answer_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "decode", lambda *_, **__: [[(), (), ()]])
    with pytest.raises(NothingTaughtError, match=r"inputs \['f', 'gh', 'ijk'\] have no answer"):
        prepare(model, SHOWN, Distillation(inputs=INPUTS), template=TEMPLATE)


def test_shares_of_labels_and_teacher_are_their_weights(model: Any) -> None:
    settings = Distillation(inputs=INPUTS, label_share=0.25)
    lesson = prepare(model, SHOWN, settings, template=TEMPLATE)
    taught = [w for e, w in zip(lesson.examples, lesson.weights, strict=True) if e not in SHOWN]
    assert taught == pytest.approx([0.25] * 3)
    assert sum(lesson.weights) == pytest.approx(1)
    assert lesson.examples[3:] == SHOWN
    alone = prepare(model, SHOWN, Distillation(inputs=INPUTS), template=TEMPLATE)
    assert all(isinstance(e, TaughtExample) for e in alone.examples)


def test_distilling_brings_the_bare_prompt_to_the_teacher(model: Any) -> None:
    result = fit(
        model, SHOWN, layer=0, template=TEMPLATE, objective="distill",
        distillation=Distillation(inputs=INPUTS), solver="adam", max_evaluations=40,
    )  # fmt: skip
    history = result.solution.history
    assert result.solution.loss < 0.9 * history[0].objective
    recorded = result.intervention.provenance["objective"]
    assert recorded["objective"] == "distill"
    assert recorded["inputs"] == list(INPUTS)
    assert recorded["teacher_layer"] == model.cfg.n_layers // 3
    assert result.intervention.provenance["n_train"] == 3


def test_settings_out_of_range_are_refused(model: Any) -> None:
    for wrong in (
        {"label_share": 1.0},
        {"n_teachers": 0},
        {"n_shown": 2},
        {"n_shown": 0, "n_teachers": 2},
        {"inputs": ()},
        {"n_inputs": -1},
        {"teacher_steps": -1},
        {"teacher_layer": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(Distillation(), **wrong)
    with pytest.raises(ValueError, match="objective='distill'"):
        fit(model, SHOWN, layer=0, distillation=Distillation())
    with pytest.raises(ValueError, match="objective is 'teach'"):
        fit(model, SHOWN, layer=0, objective="teach")  # type: ignore[arg-type]  # on purpose


def test_one_text_for_inputs_is_refused() -> None:
    with pytest.raises(TypeError, match=r"inputs is 'Kenya'; give several, or \('Kenya',\)"):
        Distillation(inputs="Kenya")  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(TypeError, match=r"inputs holds Example\(.*; give texts, without labels"):
        Distillation(inputs=(SHOWN[0],))  # type: ignore[arg-type]  # likewise
    with pytest.raises(TypeError, match="inputs holds ' '; give texts"):
        Distillation(inputs=("Kenya", " "))


def test_inputs_without_room_for_an_answer_are_left_out(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = Distillation(teacher_steps=0)
    long = "z" * model.cfg.n_ctx
    taught = teach(model, (INPUTS[0], long, INPUTS[1]), SHOWN, own, template=TEMPLATE)
    assert [e.tokens.input for e in taught] == list(INPUTS[:2])
    assert "1 of 3 inputs leave no room for an answer" in caplog.text
    assert f"first '{'z' * 60}" in caplog.text
    with pytest.raises(TooLongError, match=r"1 of 1 inputs leave no room .* give shorter ones"):
        teach(model, (long,), SHOWN, own, template=TEMPLATE)


def test_a_long_label_leaves_the_others_room_to_be_taught(model: Any) -> None:
    """The longest label and a margin do not fit behind the demonstrations; the label does."""

    def behind(n_letters: int) -> tuple[tuple[Example, ...], int, int]:
        shown = (*SHOWN, Example("long", "B" * n_letters))
        few_shot = model.to_tokens(TEMPLATE.render(INPUTS[0], shown))[0]
        longest = longest_answer(tokenise(model, shown, template=TEMPLATE))
        return shown, model.cfg.n_ctx - len(few_shot), longest

    found = map(behind, range(1, model.cfg.n_ctx))
    shown, room, longest = next(it for it in found if it[1] < it[2])
    assert longest - 4 <= room
    (taught,) = teach(model, INPUTS[:1], shown, taught_after(0), template=TEMPLATE)
    assert 0 < len(taught.tokens.answer) <= room
