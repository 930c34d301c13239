"""Scores on folds, against fits made one by one and full forwards; the work told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from test_selection import EXAMPLES
from test_surveys import QUESTIONS, TEMPLATE

from tl_laai.batches import FitProblem
from tl_laai.candidates import Candidate, Trial
from tl_laai.crossvalidation import CrossValidation
from tl_laai.distillation import Distillation, teach, weighed
from tl_laai.evaluation import AnswerRow, Evaluation, as_edit, evaluate
from tl_laai.fitting import fit, fit_many, taught_problem
from tl_laai.opinions import option_examples
from tl_laai.problems import engine_for
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, tokenise
from tl_laai.splits import cross_validation_folds, seeded_order
from tl_laai.surveys import evaluate_opinions, question_losses

FOLDS = cross_validation_folds(EXAMPLES, 3, 5)
EVALUATIONS, LEARNING_RATE = 6, 0.1
TAUGHT = Distillation(inputs=("m", "no", "pq", "rs"), teacher_steps=0)


@pytest.fixture
def backend() -> str:
    """One is enough: nothing here looks into a model, and fits are tested on both."""
    return "bridge"


@pytest.fixture
def model(windowed: Any) -> Any:
    return windowed


def search_on(model: Any, told: list[tuple[str, int, int]] | None = None) -> CrossValidation:
    return CrossValidation(
        model, EXAMPLES, FOLDS, 0.0, EVALUATIONS, 1e-3, LEARNING_RATE, "prompt_end",
        DEFAULT_TEMPLATE, 1.0, None if told is None else lambda *state: told.append(state), TAUGHT,
        n_inputs=3, drop_below=0.0,
    )  # fmt: skip


def held_out_scores(
    model: Any, deltas: Any, held_out: list[int], template: PromptTemplate = DEFAULT_TEMPLATE
) -> tuple[float, float]:
    """Loss and probability of the held-out answers by full forwards."""
    asked = tokenise(model, [EXAMPLES[i] for i in held_out], template=template)
    with torch.no_grad():
        losses = [oracle.loss(model, [example], deltas).item() for example in asked]
    wholes = [loss * len(e.answer) for loss, e in zip(losses, asked, strict=True)]
    return sum(losses) / len(losses), sum(math.exp(-whole) for whole in wholes) / len(wholes)


def check(row: Candidate, losses: list[float], probabilities: list[float]) -> None:
    assert row.fold_losses == pytest.approx(losses, rel=1e-6)
    assert row.fold_scores == pytest.approx(probabilities, rel=1e-6)
    assert row.validation_loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert row.validation_probability == pytest.approx(row.score(), rel=1e-9)
    spread = torch.tensor(row.fold_losses, dtype=torch.float64).std(correction=1).item()
    assert row.standard_error == pytest.approx(spread / math.sqrt(len(losses)), rel=1e-4)
    assert row.n_folds == len(losses)


@pytest.mark.parametrize("relax_steps", [(), (3, 5)], ids=["penalised", "relaxed"])
def test_scores_are_those_of_fits_made_fold_by_fold(
    model: Any, relax_steps: tuple[int, ...]
) -> None:
    grid = [Trial(1, 0.8), Trial(3, 0.5)]
    rows = search_on(model).score("final", grid, FOLDS[:2], relax_steps)
    assert [(row.relax_steps, row.layer, row.alpha) for row in rows] == [
        (steps, trial.layer, trial.alpha) for steps in relax_steps or (0,) for trial in grid
    ]
    for row in rows:
        slow = []
        for held_out in FOLDS[:2]:
            own = fit(
                model,
                [e for i, e in enumerate(EXAMPLES) if i not in held_out],
                layer=row.layer,
                alpha=row.alpha,
                max_evaluations=EVALUATIONS,
                relax_steps=row.relax_steps,
            )
            slow.append(held_out_scores(model, own.intervention.deltas, held_out))
        check(row, *map(list, zip(*slow, strict=True)))


def test_penalised_fits_stop_at_the_tolerance_that_is_asked_for(model: Any) -> None:
    [strict], [loose] = (
        replace(search_on(model), tolerance=tolerance).score("final", [Trial(1, 0.8)], FOLDS, ())
        for tolerance in (1e-3, 0.5)
    )
    assert strict.fold_losses != loose.fold_losses
    slow = []
    for held_out in FOLDS:
        known = [e for i, e in enumerate(EXAMPLES) if i not in held_out]
        options = {"alpha": 0.8, "tolerance": 0.5, "max_evaluations": EVALUATIONS}
        own = fit(model, known, layer=1, **options)
        slow.append(held_out_scores(model, own.intervention.deltas, held_out))
    check(loose, *map(list, zip(*slow, strict=True)))


def test_fits_that_fall_behind_are_left_and_change_nothing_of_the_others(model: Any) -> None:
    grid = [Trial(layer, alpha) for layer in (0, 1, 3) for alpha in (0.8, 0.0)]
    steps = (2, 4, 6)
    every = search_on(model).score("final", grid, FOLDS, steps)
    lengths = set()
    for share in (0.5, 0.9, 0.97, 1.0):
        followed, expected = grid, []
        for k in steps:
            rows = [row for row in every if row.relax_steps == k]
            rows = [row for row in rows if Trial(row.layer, row.alpha) in followed]
            expected += rows
            odds = {Trial(row.layer, row.alpha): row.score() / (1 - row.score()) for row in rows}
            followed = [trial for trial in odds if odds[trial] >= share * max(odds.values())]
        rows = replace(search_on(model), drop_below=share).score("final", grid, FOLDS, steps)
        for row, own in zip(rows, expected, strict=True):
            assert (row.layer, row.alpha) == (own.layer, own.alpha)
            assert row.relax_steps == own.relax_steps
            assert row.fold_losses == pytest.approx(own.fold_losses, rel=1e-12)
        lengths.add(len(rows))
    assert len(lengths) > 1  # shares differ in what they leave


def test_opinions_are_scored_by_the_averaged_answers_to_each_question(model: Any) -> None:
    prompts = option_examples(QUESTIONS, n_orders=3, template=TEMPLATE)
    folds = [range(3), range(3, 9)]
    search = replace(search_on(model), examples=prompts, folds=folds)
    rows = search.score("final", [Trial(1, 0.0), Trial(3, 0.5)], folds, (5,))
    for row in rows:
        slow = []
        for held_out in folds:
            known = [e for i, e in enumerate(prompts) if i not in held_out]
            own = fit(model, known, layer=row.layer, alpha=row.alpha, relax_steps=5,
                      max_evaluations=EVALUATIONS)  # fmt: skip
            edits = {"own": as_edit(model, own.intervention)}
            asked = [q for q in QUESTIONS if q.id in {prompts[i].question for i in held_out}]
            [found] = evaluate_opinions(model, asked, edits, n_orders=3, template=TEMPLATE).values()
            unnamed = question_losses(model, [prompts[i] for i in held_out], [*edits.values()])
            silent = [replace(prompts[i], outside_weight=0.0) for i in held_out]
            among = question_losses(model, silent, [*edits.values()])
            assert among.mean().item() == pytest.approx(found.mean("kl"), rel=1e-9)
            slow.append(unnamed.mean().item())
        assert row.fold_losses == pytest.approx(slow, rel=1e-6)
        assert row.fold_scores == tuple(-loss for loss in row.fold_losses)
        assert row.validation_probability is None


def test_answers_are_those_of_each_folds_own_fit_to_what_it_was_not_fitted_on(model: Any) -> None:
    search = search_on(model)
    [row] = search.score("final", [Trial(3, 0.5)], FOLDS, (5,))
    found = search.answers(row)
    slow: list[AnswerRow] = []
    for held_out in FOLDS:
        part = [e for i, e in enumerate(EXAMPLES) if i not in held_out]
        own = fit(model, part, layer=3, alpha=0.5, max_evaluations=EVALUATIONS, relax_steps=5)
        asked = [EXAMPLES[i] for i in held_out]
        slow += evaluate(model, asked, intervention=own.intervention).rows
    assert [(r.input, r.prediction, r.correct) for r in found.rows] == [
        (r.input, r.prediction, r.correct) for r in slow
    ]
    assert found.log_probability == pytest.approx(Evaluation(tuple(slow)).log_probability, rel=1e-6)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_folds_teacher_reads_that_folds_training_part_alone(model: Any, steps: int) -> None:
    grid = [Trial(1, 0.0, "distill", 0.2)]
    search = search_on(model)
    search.distillation = replace(TAUGHT, teacher_steps=steps)
    [row] = search.score("distilled", grid, FOLDS[:2], (3,))
    assert (row.objective, row.label_share) == ("distill", 0.2)
    inputs = ("m", "no", "pq")
    endless = PromptTemplate(answer_end="")
    slow = []
    for held_out in FOLDS[:2]:
        part = [e for i, e in enumerate(EXAMPLES) if i not in held_out]
        taught = teach(model, inputs, part, search.distillation)
        lesson = weighed(taught, part, Distillation(label_share=0.2), inputs, made_up=False)
        problem = taught_problem(FitProblem(part, 1, alpha=0.0), lesson)
        (own,) = fit_many(model, [problem], relax_steps=3)
        slow.append(held_out_scores(model, own.intervention.deltas, held_out, endless))
    check(row, *map(list, zip(*slow, strict=True)))


def test_distilled_fits_are_scored_by_what_the_teacher_says_to_held_out_inputs(model: Any) -> None:
    search = search_on(model)
    grid = [Trial(1, 0.0, "distill", 0.2), Trial(3, 0.0, "distill", 0.2)]
    rows = search.score_by_teacher("distilled", grid, (2, 3))
    answered = teach(model, TAUGHT.inputs or (), EXAMPLES, TAUGHT)
    held_out, *kept = seeded_order(answered, TAUGHT.seed)  # three are learnt of, one is not
    lesson = weighed(kept, EXAMPLES, Distillation(label_share=0.2), (), made_up=False)
    assert [(row.layer, row.relax_steps) for row in rows] == [(1, 2), (3, 2), (1, 3), (3, 3)]
    for row in rows:
        problem = taught_problem(FitProblem(EXAMPLES, row.layer, alpha=0.0), lesson)
        (own,) = fit_many(model, [problem], relax_steps=row.relax_steps)
        engine = engine_for(model, [[held_out]], layers=[row.layer])
        [kl] = engine.losses(own.solution.delta[None], torch.arange(1)).tolist()
        assert row.fold_losses == pytest.approx((kl,), rel=1e-6)
        assert row.score() == -row.validation_loss == -row.fold_losses[0]
        assert (row.validation_probability, row.n_folds) == (None, 1)
        assert math.isnan(row.standard_error)


@pytest.mark.parametrize("max_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("layer", [1, 3])
def test_the_setting_is_kept_that_leaves_the_most_heads_allowed(
    model: Any, layer: int, max_heads: int
) -> None:
    alphas = (0.95, 0.9, 0.5, 0.3, 0.1, 0.0)
    left = []
    for alpha in alphas:
        own = fit(model, EXAMPLES, layer=layer, alpha=alpha, max_evaluations=EVALUATIONS)
        left.append(len(own.intervention.heads()))
    allowed = [n if n <= max_heads else 0 for n in left]
    grid = [Trial(layer, alpha) for alpha in alphas]
    if not max(allowed):
        with pytest.raises(TooManyHeadsError, match=f"max_heads is {max_heads}"):
            search_on(model).within("heads", grid, max_heads)
        return
    kept = search_on(model).within("heads", grid, max_heads)
    assert kept == Trial(layer, alphas[allowed.index(max(allowed))])


@pytest.mark.parametrize("drop_below", [0.0, 1.0])
def test_the_work_told_is_the_work_foretold(model: Any, drop_below: float) -> None:
    told: list[tuple[str, int, int]] = []
    search = replace(search_on(model, told), drop_below=drop_below)
    grid = [Trial(1, 0.8), Trial(3, 0.0)]
    parts = search.work.parts(FOLDS[:2], taught=False)
    foretold = search.work.of_fits(grid, parts, (3, 5))
    search.work.whole = 2 * foretold
    search.score("final", grid, FOLDS[:2], (3, 5))
    assert {name for name, _, _ in told} == {"final"}
    done = [state[1] for state in told]
    assert done == sorted(done)
    to_come = foretold - (2 * sum(parts) if drop_below else 0)  # the worse makes 3 of 5 steps
    assert 0.5 * to_come < done[-1] <= to_come
    search.work.tell("next", 0)
    assert told[-1] == ("next", to_come, to_come + foretold)


def test_fits_that_diverge_have_no_score(model: Any) -> None:
    search = search_on(model)
    search.learning_rate = 1e300
    rows = search.score("final", [Trial(1, 0.0)], FOLDS[:2], (2, 3))
    assert [row.relax_steps for row in rows] == [2, 3]
    assert all(row.score() == -math.inf for row in rows)
