"""The tuning protocol against a loop over folds, settings and examples with plain hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from methods_on_tiny import EXAMPLES

from tl_laai.baselines import METHODS, Trial, _score, compare_methods, tune
from tl_laai.edits import Edit
from tl_laai.evaluation import answer_scores, evaluate
from tl_laai.methods import Augment, Method, Setting, as_they_are
from tl_laai.prompts import tokenise
from tl_laai.splits import cross_validation_folds
from tl_laai.tasks import Example
from tl_laai.vectors import FunctionVector, MeanDifference, TaskVector

MORE = (*EXAMPLES, Example("ijk", "ts"), Example("l", "r"))
TEST = (Example("m", "xy"), Example("nop", "z"))


@pytest.fixture
def model(backend: str) -> Iterator[Any]:
    """On each backend the family with most to get wrong, left as found by every test."""
    yield from oracle.watched(oracle.shared_model(backend, "gemma"))


def slow_scores(model: Any, examples: Sequence[Example], edit: Edit) -> tuple[float, float]:
    """Mean cross-entropy of answers (mean over their tokens), and mean probability of the whole."""
    losses, probabilities = [], []
    for example in tokenise(model, examples):
        with torch.no_grad():
            steps = oracle.log_probabilities(
                model, example, edit.deltas, edit.position, edit.scale, edit.residual, edit.replace
            )
        losses.append(-float(steps.mean()))
        probabilities.append(float(steps.sum().exp()))
    return sum(losses) / len(losses), sum(probabilities) / len(probabilities)


def with_more(examples: Sequence[Example]) -> list[Example]:
    """The given ones, and two of their answers to other inputs."""
    return [*examples, *(Example(e.input + "k", e.output) for e in examples[:2])]


@pytest.mark.parametrize(
    ("method", "augment"),
    [
        (TaskVector((1, 3)), as_they_are),
        (MeanDifference((2,), (1.0, 3.0)), as_they_are),
        (TaskVector((1, 3)), with_more),
    ],
)
def test_the_table_is_each_settings_score_on_what_it_was_not_made_from(
    model: Any, method: Method, augment: Augment
) -> None:
    tuned = tune(model, MORE, method, n_folds=3, seed=1, augment=augment)
    assert [trial.setting for trial in tuned.table] == list(method.grid(model))
    for trial in tuned.table:
        scores = []
        for held_out in cross_validation_folds(MORE, 3, 1):
            known = [e for i, e in enumerate(MORE) if i not in held_out]
            (edit,) = method.candidates(model, augment(known), [trial.setting]).values()
            scores.append(slow_scores(model, [MORE[i] for i in held_out], edit))
        loss, probability = torch.tensor(scores, dtype=torch.float64).unbind(dim=1)
        assert trial.validation_probability == pytest.approx(probability.mean().item(), rel=1e-8)
        assert trial.validation_loss == pytest.approx(loss.mean().item(), rel=1e-8)
        assert trial.standard_error == pytest.approx(loss.std().item() / 3**0.5, rel=1e-6)
    best = max(tuned.table, key=lambda trial: trial.validation_probability)
    assert tuned.setting == best.setting
    (edit,) = method.candidates(model, augment(MORE), [best.setting]).values()
    for mine, own in ((tuned.edit.residual, edit.residual), (tuned.edit.replace, edit.replace)):
        assert mine.keys() == own.keys()
        assert all(torch.equal(mine[layer], own[layer]) for layer in own)


def test_losses_are_means_over_an_answers_tokens_and_probabilities_of_all(model: Any) -> None:
    delta = oracle.random_delta(model)
    edits = (Edit(), Edit({1: delta}))
    got = answer_scores(model, MORE, edits)
    assert got[0].shape == got[1].shape == (2, len(MORE))
    for i, edit in enumerate(edits):
        means = [float(part[i].mean()) for part in got]
        assert means == pytest.approx(slow_scores(model, MORE, edit), rel=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_tuned(model: Any, name: str) -> None:
    told: list[tuple[int, int]] = []
    tuned = tune(model, MORE, METHODS[name], progress=lambda *state: told.append(state))
    assert tuned.setting in METHODS[name].grid(model)
    assert tuned.edit.layers
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert all(math.isfinite(trial.validation_loss) for trial in tuned.table)


def test_methods_stand_beside_zero_shot_and_few_shot(model: Any) -> None:
    told: list[tuple[int, int]] = []
    methods = {"task-vector": TaskVector(layers=(2,))}
    got = compare_methods(
        model, EXAMPLES, TEST, methods=methods, progress=lambda *state: told.append(state)
    )
    assert [one.method for one in got] == ["zero-shot", "few-shot", "task-vector"]
    zero, few, vector = (one.evaluation.log_probability for one in got)
    assert zero == pytest.approx(evaluate(model, TEST).log_probability, rel=1e-9)
    shown = evaluate(model, TEST, demonstrations=EXAMPLES)
    assert few == pytest.approx(shown.log_probability, rel=1e-9)
    (edit,) = TaskVector().candidates(model, EXAMPLES, [Setting(layer=2)]).values()
    lengths = torch.tensor([len(e.answer) for e in tokenise(model, TEST)])
    whole = -(answer_scores(model, TEST, [edit])[0][0] * lengths).mean()
    assert vector == pytest.approx(whole.item(), rel=1e-9)
    assert [str(one.setting) for one in got] == ["", "", "layer 2"]
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_of_several_methods_one_that_examples_do_not_allow_is_left_out_with_a_warning(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    alike = [Example(text, "x") for text in "abc"] + [Example("d", "y")]
    methods = {"mean": METHODS["mean-difference"], "task": TaskVector(layers=(2,))}
    got = compare_methods(model, alike, TEST, methods=methods)
    assert [one.method for one in got] == ["zero-shot", "few-shot", "task"]
    assert "mean is left out of the comparison: MeanDifference, on all but fold" in caplog.text
    with pytest.raises(ValueError, match="MeanDifference, on all but fold"):
        compare_methods(model, alike, TEST, methods={"mean": METHODS["mean-difference"]})


def test_a_setting_whose_score_is_not_a_number_is_never_best() -> None:
    broken, sound = (Trial(Setting(layer=1), 3.0, 0.0, p) for p in (math.nan, 0.2))
    assert max(broken, sound, key=_score) == sound


def test_what_cannot_be_tuned_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"examples holds 3.*at least 4"):
        tune(model, MORE[:3], TaskVector())
    with pytest.raises(ValueError, match=r"n_folds is 1; use at least 2"):
        tune(model, MORE, TaskVector(), n_folds=1)
    with pytest.raises(ValueError, match=r"n_folds is 7, more than the 6"):
        tune(model, MORE, TaskVector(), n_folds=7)
    with pytest.raises(ValueError, match=r"n_folds is 2, more than the 1"):
        tune(model, MORE[:1] * 4, TaskVector())
    alike = [Example(text, "x") for text in "abc"] + [Example("d", "y")]
    with pytest.raises(ValueError, match=r"MeanDifference, on all but fold . of n_folds=2: "):
        tune(model, alike, METHODS["mean-difference"])
    with pytest.raises(ValueError, match="empty grid"):
        tune(model, MORE, TaskVector(layers=()))
    with pytest.raises(ValueError, match="n_heads holds 0; give 1 or more"):
        tune(model, MORE, FunctionVector(n_heads=(0,)))
    with pytest.raises(ValueError, match="n_folds is 5, more than the 4 inputs"):
        tune(model, [*MORE[:4], replace(MORE[0], output="other")], TaskVector(), n_folds=5)
    with pytest.raises(ValueError, match="methods holds 'few-shot', which is a row already"):
        compare_methods(model, MORE, MORE, methods={"few-shot": TaskVector()})
