"""Cross-validated choice on tiny models, against fits made fold by fold and full forwards."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

from tl_laai import rounds, selection
from tl_laai.batches import NonFiniteError
from tl_laai.candidates import Candidate
from tl_laai.crossvalidation import CrossValidation, TooManyHeadsError
from tl_laai.distillation import Distillation, ask_teacher, teach
from tl_laai.distributions import NothingTaughtError
from tl_laai.evaluation import AnswerRow, Evaluation
from tl_laai.fitting import fit
from tl_laai.opinions import OptionExample
from tl_laai.prompts import PromptTemplate
from tl_laai.selection import Selection, fit_auto
from tl_laai.splits import cross_validation_folds
from tl_laai.tasks import Example
from tl_laai.work import TEACHER_COST

WORDS = ("ab", "cde", "f", "gh", "ij", "klm", "n")
EXAMPLES = tuple(Example(word, word[0].upper() + "x" * (i % 2)) for i, word in enumerate(WORDS))
ALPHAS = (0.8, 0.5)
EVALUATIONS = 6
N_FOLDS = 3


@pytest.fixture
def backend() -> str:
    """One is enough: nothing here looks into a model, and fits are tested on both."""
    return "bridge"


@pytest.fixture
def model(windowed: Any) -> Any:
    return windowed


@functools.cache
def told_choice(
    backend: str, relax_steps: tuple[int, ...] = ()
) -> tuple[Selection, list[tuple[str, int, int]]]:
    """One choice among four layers, and what its progress told."""
    told: list[tuple[str, int, int]] = []
    chosen = fit_auto(
        oracle.shared_model(backend),
        EXAMPLES,
        alphas=ALPHAS,
        relax_steps=relax_steps,
        n_folds=N_FOLDS,
        seed=5,
        max_evaluations=EVALUATIONS,
        provenance={"task": "letters"},
        progress=lambda *state: told.append(state),
    )
    return chosen, told


def rows_of(chosen: Selection, name: str) -> list[Candidate]:
    return [row for row in chosen.table if row.round == name]


def test_prompts_of_one_opinion_question_are_held_out_together(model: Any) -> None:
    options = {"layers": [1], "alphas": [0.5], "n_folds": 4, "relax_steps": (2,)}
    texts = [(question, order) for question in "abcd" for order in ("x", "y")]
    prompts = [OptionExample(q + o, ("A", "B"), (0.3, 0.7), (), q) for q, o in texts]
    own = fit_auto(model, prompts, **options)
    assert own.table == fit_auto(model, prompts, groups=[q for q, _ in texts], **options).table
    assert own.table != fit_auto(model, prompts, groups=range(8), **options).table
    [row] = own.table
    assert row.fold_scores == tuple(-loss for loss in row.fold_losses)
    with pytest.raises(ValueError, match=r"examples holds 3: .*one without the other"):
        fit_auto(model, prompts[:6], **options)
    with pytest.raises(ValueError, match="groups has 2 labels, but there are 8 examples"):
        fit_auto(model, prompts, groups="ab", **options)


def test_opinion_fits_are_long_and_without_a_penalty_unless_told_otherwise(model: Any) -> None:
    prompts = [OptionExample(q, ("A", "B"), (0.3, 0.7), (), q) for q in "abcd"]
    own = fit_auto(model, prompts, n_folds=2)
    n_layers = model.cfg.n_layers
    tried = [(row.layer, row.alpha, row.relax_steps) for row in own.table]
    assert tried == [(layer, 0.0, 0) for layer in rounds.opinion_layers(n_layers)]
    by = {"solver": "proximal", "tolerance": 1e-6, "max_evaluations": 60}
    assert own.fit.intervention.provenance["solver"] == by
    slow = fit(model, prompts, layer=own.layer, tolerance=1e-6, max_evaluations=60)
    assert own.fit.solution.delta.equal(slow.solution.delta)
    asked = {"layers": [0], "relax_steps": [1], "alphas": [0.5], "n_folds": 2}
    [row] = fit_auto(model, prompts, **asked).table
    assert (row.layer, row.alpha, row.relax_steps) == (0, 0.5, 1)


STAGES = pytest.mark.parametrize("relax_steps", [(), (3, 5)], ids=["penalised", "relaxed"])


@STAGES
def test_every_layer_is_screened_and_the_best_few_meet_every_penalty(
    backend: str, relax_steps: tuple[int, ...]
) -> None:
    chosen, _ = told_choice(backend, relax_steps)
    screened = rows_of(chosen, "screening")
    at = (0.0, rounds.SCREENING_STEPS) if relax_steps else (rounds.SCREENING_ALPHA, 0)
    assert [(row.layer, row.alpha, row.relax_steps, row.n_folds) for row in screened] == [
        (layer, *at, 2) for layer in range(4)
    ]
    best = sorted(screened, key=lambda row: -row.validation_probability)[: rounds.FINALISTS]
    final = rows_of(chosen, "final")
    assert sorted((row.layer, -row.alpha, row.relax_steps) for row in final) == [
        (layer, -alpha, steps)
        for layer in sorted(row.layer for row in best)
        for alpha in ALPHAS
        for steps in relax_steps or (0,)
    ]
    assert chosen.table == (*screened, *final)


@STAGES
def test_the_choice_has_the_highest_held_out_probability_of_the_final_round(
    backend: str, relax_steps: tuple[int, ...]
) -> None:
    chosen, _ = told_choice(backend, relax_steps)
    final = rows_of(chosen, "final")
    assert chosen.candidate == max(final, key=lambda row: row.validation_probability)
    assert (chosen.layer, chosen.alpha) == (chosen.candidate.layer, chosen.candidate.alpha)
    assert len({row.validation_probability for row in final}) > 1


@STAGES
def test_the_choice_is_refitted_on_all_examples_for_as_long_as_it_was_tried(
    backend: str, model: Any, relax_steps: tuple[int, ...]
) -> None:
    chosen, _ = told_choice(backend, relax_steps)
    alone = fit(
        model,
        EXAMPLES,
        layer=chosen.layer,
        alpha=chosen.alpha,
        max_evaluations=EVALUATIONS,
        relax_steps=chosen.candidate.relax_steps,
    )
    assert chosen.fit.solution.objective == pytest.approx(alone.solution.objective, rel=1e-9)
    assert chosen.fit.layer == chosen.layer
    origin = chosen.fit.intervention.provenance
    assert origin["task"] == "letters"
    assert origin["n_train"] == len(EXAMPLES)
    assert origin["selection"]["table"] == [
        vars(row) | {"fold_losses": list(row.fold_losses), "fold_scores": list(row.fold_scores)}
        for row in chosen.table
    ]
    assert (origin["selection"]["folds"], origin["selection"]["seed"]) == (N_FOLDS, 5)


def foretold(told: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Work in all as it was told in the rounds, and in the refit, when the choice is known."""
    [whole], [last] = ({n for name, _, n in told if (name == "refit") == is_last}
                       for is_last in (False, True))  # fmt: skip
    return whole, last


@STAGES
def test_progress_never_goes_back_and_ends_at_the_whole(
    backend: str, relax_steps: tuple[int, ...]
) -> None:
    _, told = told_choice(backend, relax_steps)
    done = [state[1] for state in told]
    whole, last = foretold(told)
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == last <= whole
    assert [name for name, _ in itertools.groupby(state[0] for state in told)] == [
        "screening",
        "final",
        "refit",
    ]
    # Four layers in two folds, and two penalties at three layers in three folds, then one fit:
    # an example is fitted on in all folds but its own.
    fewer = min(EVALUATIONS, rounds.SCREENING_EVALUATIONS)
    brief = rounds.SCREENING_STEPS + 1 if relax_steps else fewer
    screening = 4 * brief * len(EXAMPLES)
    one = EVALUATIONS + (max(relax_steps) + 1 if relax_steps else 0)
    final = 3 * 2 * one * 2 * len(EXAMPLES)
    assert whole == screening + final + one * len(EXAMPLES)
    chosen = told_choice(backend, relax_steps)[0].candidate
    refit = EVALUATIONS + (chosen.relax_steps + 1 if relax_steps else 0)
    assert last == screening + final + refit * len(EXAMPLES)
    at_last = {name: step for name, step, _ in told}
    assert at_last["screening"] <= screening < at_last["final"] <= screening + final


def test_layers_are_screened_on_two_halves_whatever_the_number_of_folds(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    score = CrossValidation.score

    def spy(self: Any, name: str, grid: Any, folds: Any, *rest: Any) -> Any:
        seen[name] = [sorted(part) for part in folds]
        return score(self, name, grid, folds, *rest)

    monkeypatch.setattr(CrossValidation, "score", spy)
    fit_auto(model, EXAMPLES, alphas=[0.0], relax_steps=(1,), n_folds=3)
    everyone = list(range(len(EXAMPLES)))
    assert sorted(itertools.chain(*seen["screening"])) == everyone
    assert sorted(itertools.chain(*seen["final"])) == everyone
    assert (len(seen["screening"]), len(seen["final"])) == (2, 3)
    first, second = map(len, seen["screening"])
    assert abs(first - second) <= 1


def test_one_layer_is_not_screened(model: Any) -> None:
    told: list[str] = []
    chosen = fit_auto(
        model,
        EXAMPLES[:4],
        layers=[2],
        alphas=[0.9],
        relax_steps=(),
        max_evaluations=2,
        l1_ratio=0.1,
        position="every_step",
        progress=lambda name, *_: told.append(name),
    )
    [row] = chosen.table
    assert (row.round, row.layer, row.alpha, row.n_folds) == ("final", 2, 0.9, 4)
    assert set(told) == {"final", "refit"}
    assert chosen.fit.penalty.l1 == pytest.approx(0.1 * chosen.fit.penalty.group)
    assert chosen.fit.intervention.position == "every_step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": EXAMPLES[:3]}, "examples holds 3: choosing by cross-validation needs at le"),
        ({"alphas": ()}, "alphas is empty"),
        ({"alphas": (-0.5,)}, r"alpha is -0\.5"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (0, 4)}, "layers holds 4; this model has layers 0 to 3"),
        ({"n_folds": 1}, "n_folds is 1; use at least 2"),
        ({"relax_steps": (0, 3)}, "relax_steps holds 0; give 1 or more"),
        ({"drop_below": 1.5}, r"drop_below is 1\.5; give a share from 0 to 1"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    model: Any, options: dict[str, Any], message: str
) -> None:
    options = {"examples": EXAMPLES, **options}
    with pytest.raises(ValueError, match=message):
        fit_auto(model, options.pop("examples"), **options)


@pytest.mark.parametrize(("n", "most"), [(4, 1), (10, 1), (39, 1), (40, 2), (100, 3)])
def test_a_teacher_keeps_up_with_fits_that_answer_a_few_examples_more(n: int, most: int) -> None:
    def answered(n_right: int) -> Evaluation:
        return Evaluation(tuple(AnswerRow("", "", "", i < n_right, -1.0) for i in range(n)))

    assert selection.keeps_up(answered(1), answered(0))
    assert selection.keeps_up(answered(1), answered(1 + most))
    assert not selection.keeps_up(answered(0), answered(1 + most))


@pytest.mark.parametrize(("keeps_up", "teacher_steps"), [(False, 0), (True, 2)])
def test_distillation_is_taken_where_the_teacher_keeps_up_with_fits_on_labels(
    monkeypatch: pytest.MonkeyPatch, keeps_up: bool, teacher_steps: int
) -> None:
    model = oracle.shared_model("bridge", "llama")
    inputs = ("m", "no", "pq", "rs", "tu", "vw", "xy", "z")
    settings = Distillation(inputs=inputs, teacher_steps=teacher_steps)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(selection, "keeps_up", lambda *_: keeps_up)
    chosen = fit_auto(
        model, EXAMPLES, layers=[0, 1], alphas=[0.5], n_folds=3, objectives=("answers", "distill"),
        distillation=settings, relax_steps=(3, 4), max_evaluations=3,
        progress=lambda *state: told.append(state),
    )  # fmt: skip
    # A teacher that is fitted is asked fold by fold, one that is not after all others.
    folds = cross_validation_folds(EXAMPLES, 3, 0) if teacher_steps else None
    assert chosen.teacher == ask_teacher(model, EXAMPLES, folds=folds, settings=settings)
    assert chosen.held_out is not None
    done = [state[1] for state in told]
    assert done == sorted(done)
    whole, last = foretold(told)
    assert told[-1][1] == last <= whole
    names = {state[0] for state in told}
    kept = chosen.fit.intervention.provenance["selection"]
    assert kept["teacher"] == chosen.teacher.exact_match
    assert kept["held_out"] == chosen.held_out.exact_match
    taught = [row for row in chosen.table if row.objective == "distill"]
    if not keeps_up:
        assert chosen.objective == "answers"
        assert not taught
        assert {"final", "teacher", "refit"} == names
        return
    by_teacher, mixed = rows_of(chosen, "distilled"), rows_of(chosen, "mixed")
    assert [*by_teacher, *mixed] == taught
    # Two of eight inputs are held out.
    assert [(r.layer, r.label_share, r.relax_steps, r.n_folds) for r in by_teacher] == [
        (layer, rounds.DISTILLED_SHARES[-1], steps, 2) for steps in (3, 4) for layer in (0, 1)
    ]
    nearest = min(by_teacher, key=lambda row: row.validation_loss)
    assert [(r.layer, r.label_share, r.relax_steps, r.n_folds) for r in mixed] == [
        (nearest.layer, share, nearest.relax_steps, len(rounds.mixed_folds([[0], [1], [2]])))
        for share in rounds.DISTILLED_SHARES
    ]
    assert chosen.candidate is max(mixed, key=lambda row: row.validation_probability)
    assert {"final", "teacher", "distilled", "mixed", "refit"} == names
    # One teacher a fold is asked, one teaches all, and two of folds teach shares of labels. Two
    # layers, penalised and relaxed, learn of labels in three folds, and of six inputs too at once.
    n, one = len(EXAMPLES), 3 + 5
    costs = [
        (3 + 1 + 2) * 3 * TEACHER_COST,
        2 * one * 2 * n,
        2 * one * (n + 8),
        2 * one * sum(n - len(out) + 8 for out in cross_validation_folds(EXAMPLES, 3, 0)[:2]),
    ]
    assert whole == sum(costs) + one * (n + 8)


def test_distillation_alone_asks_no_teacher_first() -> None:
    model = oracle.shared_model("bridge", "llama")
    settings = Distillation(inputs=("m", "no", "pq"))
    alone = fit_auto(
        model, EXAMPLES, layers=[1], n_folds=2, objectives=["distill"], distillation=settings
    )
    assert alone.objective == "distill"
    assert alone.teacher is None
    assert alone.held_out is None
    recorded = alone.fit.intervention.provenance["objective"]
    assert recorded["inputs"] == ["m", "no", "pq"]
    assert recorded["label_share"] in rounds.DISTILLED_SHARES


def test_a_share_of_labels_that_is_given_is_kept() -> None:
    model = oracle.shared_model("bridge", "llama")
    settings = Distillation(inputs=("m", "no", "pq"), label_share=0.3)
    chosen = fit_auto(
        model, EXAMPLES, layers=[0, 1], objectives=["distill"], distillation=settings,
        relax_steps=(2,),
    )  # fmt: skip
    assert [(row.round, row.layer, row.label_share) for row in chosen.table] == [
        ("distilled", layer, 0.3) for layer in (0, 1)
    ]
    assert chosen.fit.intervention.provenance["objective"]["label_share"] == 0.3


N, WITH_INPUTS = len(EXAMPLES), len(EXAMPLES) + 3
TEACHER = TEACHER_COST * (Distillation().teacher_steps + 1)


@pytest.mark.parametrize(
    ("objective", "share", "costs"),
    [
        # Two layers on all heads; then nine penalties of four evaluations; then one, two steps.
        # Each of two folds is fitted on half of the examples.
        ("answers", 0.0, {"final": 2 * 3 * N, "heads": 9 * 4 * N + (4 + 3) * N}),
        (
            "distill",
            0.3,
            {
                "teacher": TEACHER,
                "distilled": 2 * 3 * WITH_INPUTS,
                "heads": 9 * 4 * WITH_INPUTS + (4 + 3) * WITH_INPUTS,
            },
        ),
        (
            "distill",
            0.0,
            {
                "teacher": 3 * TEACHER,
                "distilled": 2 * 3 * WITH_INPUTS,
                "mixed": 2 * 3 * (N + 2 * 3),
                "heads": 9 * 4 * WITH_INPUTS + (4 + 3) * WITH_INPUTS,
            },
        ),
    ],
)
def test_no_more_heads_are_left_than_allowed(
    model: Any, objective: Any, share: float, costs: dict[str, int]
) -> None:
    told: list[tuple[str, int, int]] = []
    options: Any = {
        "layers": [1, 3], "n_folds": 2, "relax_steps": (2,), "max_evaluations": 4,
        "objectives": [objective],
    }  # fmt: skip
    if objective == "distill":
        options["distillation"] = Distillation(inputs=("m", "no", "pq"), label_share=share)
    chosen = fit_auto(
        model, EXAMPLES, **options, max_heads=2, progress=lambda *state: told.append(state)
    )
    assert 1 <= len(chosen.fit.intervention.heads()) <= 2
    assert chosen.fit.intervention.provenance["selection"]["max_heads"] == 2
    free = fit_auto(model, EXAMPLES, **options, alphas=[0.0])
    assert str(chosen.table[:-1]) == str(free.table)  # NaN differs from itself
    assert chosen.table[-1].alpha in rounds.SPARSE_ALPHAS
    assert chosen.table[-1] == chosen.candidate
    for of_choice in ("layer", "objective", "label_share"):
        assert getattr(chosen.candidate, of_choice) == getattr(free.candidate, of_choice)
    assert {name for name, _, _ in told} == {*costs, "refit"}
    refit = (4 + 3) * (N if objective == "answers" else WITH_INPUTS)
    whole, last = foretold(told)
    assert whole == sum(costs.values()) + refit
    assert told[-1][1] == last <= whole
    before_refit = next(done for name, done, _ in told if name == "refit") - sum(costs.values())
    assert 0 < before_refit <= WITH_INPUTS  # its first evaluation
    assert all(before[1] <= after[1] for before, after in pairwise(told))


@pytest.mark.parametrize("relax_steps", [(2,), ()])
def test_no_work_is_told_twice_where_heads_are_counted(
    model: Any, relax_steps: tuple[int, ...]
) -> None:
    told: list[tuple[str, int, int]] = []
    chosen = fit_auto(
        model, EXAMPLES, layers=[1, 3], n_folds=2, relax_steps=relax_steps, max_evaluations=4,
        max_heads=2, alphas=[0.0, 0.9, 0.3], progress=lambda *state: told.append(state),
    )  # fmt: skip
    assert 1 <= len(chosen.fit.intervention.heads()) <= 2
    assert chosen.held_out is not None
    whole, last = foretold(told)
    assert max(done for name, done, _ in told if name != "refit") < last <= whole


def test_as_many_heads_as_there_are_is_no_limit(model: Any) -> None:
    options: Any = {"layers": [1], "n_folds": 2, "relax_steps": (2,), "max_evaluations": 4}
    free = fit_auto(model, EXAMPLES, **options)
    allowed = fit_auto(model, EXAMPLES, **options, max_heads=4)
    assert allowed.table == free.table
    assert allowed.candidate == free.candidate


def test_few_heads_without_a_finite_score_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CrossValidation.score

    def diverging(self: Any, name: str, *rest: Any) -> Any:
        rows = plain(self, name, *rest)
        lost = (math.nan,) * 2
        return [replace(row, fold_scores=lost) for row in rows] if name == "heads" else rows

    monkeypatch.setattr(CrossValidation, "score", diverging)
    with pytest.raises(NonFiniteError, match="no candidate has a finite score"):
        fit_auto(
            model, EXAMPLES, layers=[1], n_folds=2, relax_steps=(2,), max_evaluations=4, max_heads=2
        )


def test_a_number_of_heads_that_no_penalty_leaves_is_refused(model: Any) -> None:
    options: Any = {"layers": [1], "max_heads": 2, "relax_steps": (2,), "max_evaluations": 4}
    message = r"max_heads is 2, but of layer 1 .*: 4 at 0\. Give larger ones, or allow more"
    with pytest.raises(TooManyHeadsError, match=message):
        fit_auto(model, EXAMPLES, **options, alphas=[0.0])
    with pytest.raises(TooManyHeadsError, match=r"heads: 0 at 1\.5\. Give smaller ones"):
        fit_auto(model, EXAMPLES, **options, alphas=[1.5])
    with pytest.raises(ValueError, match="max_heads is 0; give 1 to 4"):
        fit_auto(model, EXAMPLES, **options | {"max_heads": 0})


def test_labels_are_the_choice_where_the_teacher_has_no_room(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = [Example(letter * 25, "xy") for letter in "abcdef"]  # fine alone, not one after another
    chosen = fit_auto(
        model, long, layers=[1], n_folds=2, relax_steps=(2,), max_evaluations=4,
        objectives=["answers", "distill"],
        distillation=Distillation(inputs=("m", "no", "pq"), label_share=0.3),
    )  # fmt: skip
    assert chosen.objective == "answers"
    assert "distillation is left out of the choice" in caplog.text


@pytest.mark.parametrize("inputs", ["xxxxxx", "xxxyyy"])
def test_labels_are_the_choice_where_a_folds_teacher_has_no_examples(
    model: Any, caplog: pytest.LogCaptureFixture, inputs: str
) -> None:
    """Held out one without the other as asked, the examples of an input are not shown either."""
    few = [Example(text, "Y" * (1 + i % 2)) for i, text in enumerate(inputs)]
    chosen = fit_auto(
        model, few, groups=range(6), layers=[1], n_folds=2, relax_steps=(2,), max_evaluations=4,
        objectives=["answers", "distill"], distillation=Distillation(inputs=("m", "no", "pq")),
    )  # fmt: skip
    assert chosen.objective == "answers"
    assert "distillation is left out of the choice: examples" in caplog.text


def test_examples_of_one_input_are_held_out_together(model: Any) -> None:
    options: Any = {
        "layers": [1], "alphas": [0.5], "n_folds": 4, "relax_steps": (2,), "max_evaluations": 3,
    }  # fmt: skip
    twice = [*EXAMPLES[:4], *EXAMPLES[:4]]
    own = fit_auto(model, twice, **options)
    assert own.table == fit_auto(model, twice, groups=[e.input for e in twice], **options).table
    assert own.table != fit_auto(model, twice, groups=range(8), **options).table


@pytest.mark.parametrize("error", [NothingTaughtError("inputs"), None])
def test_labels_are_the_choice_where_distilling_fails(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
) -> None:
    def failing(self: Any, name: str, *_: Any) -> Any:
        if error is not None:
            raise error
        row = Candidate(1, 0.0, name, math.nan, 0.0, None, 4.0, (math.nan,), (math.nan,), "distill")
        return [row]

    monkeypatch.setattr(CrossValidation, "score_by_teacher", failing)
    monkeypatch.setattr(selection, "keeps_up", lambda *_: True)
    chosen = fit_auto(
        model, EXAMPLES, layers=[1], n_folds=2, relax_steps=(2,), max_evaluations=4,
        objectives=["answers", "distill"],
        distillation=Distillation(inputs=("m", "no", "pq"), label_share=0.3),
    )  # fmt: skip
    assert chosen.objective == "answers"
    assert ("distillation is left out" in caplog.text) == (error is not None)


def test_the_share_of_labels_stays_where_the_folds_teachers_say_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def silent(*_: Any) -> Any:
        raise NothingTaughtError("inputs have no answer")

    monkeypatch.setattr(CrossValidation, "score", silent)
    chosen = fit_auto(
        model, EXAMPLES, layers=[1], relax_steps=(2,), objectives=["distill"],
        distillation=Distillation(inputs=("m", "no", "pq")),
    )  # fmt: skip
    assert (chosen.candidate.round, chosen.candidate.label_share) == ("distilled", 0.5)
    assert "label_share stays 0.5: inputs have no answer" in caplog.text


def test_a_choice_among_fits_that_all_diverge_is_refused(model: Any) -> None:
    options: Any = {"layers": [1], "alphas": [0.0], "relax_steps": (2,), "n_folds": 2}
    with pytest.raises(NonFiniteError, match=r"learning_rate is 1e\+300: no candidate has"):
        fit_auto(model, EXAMPLES, learning_rate=1e300, **options)


def test_objectives_that_cannot_be_are_refused() -> None:
    model = oracle.shared_model("bridge", "llama")
    with pytest.raises(ValueError, match="objectives is"):
        fit_auto(model, EXAMPLES, objectives=["teach"])  # type: ignore[list-item]  # on purpose
    question = [OptionExample(f"{i}?", ("A", "B"), (0.5, 0.5), question=str(i)) for i in range(4)]
    with pytest.raises(ValueError, match=r"objectives is \['answers'\]: add 'distill'"):
        fit_auto(model, EXAMPLES, distillation=Distillation())
    with pytest.raises(TypeError, match="the teacher reads them"):
        fit_auto(model, question, objectives=["distill"])
    with pytest.raises(TypeError, match="examples holds Example and OptionExample: "):
        fit_auto(model, [*EXAMPLES, *question])
    taught = teach(model, ("a", "b", "c", "d"), EXAMPLES)
    with pytest.raises(TypeError, match=r"examples holds TaughtExample: .* at a layer of your own"):
        fit_auto(model, taught)
    twice = PromptTemplate("{input}={input}:")
    with pytest.raises(ValueError, match=r"template has \{input\} 2 times"):
        fit_auto(model, EXAMPLES, objectives=["answers", "distill"], template=twice)


def test_numbers_of_numpy_choose_as_pythons_do(model: Any) -> None:
    steps = {"relax_steps": np.array([1, 2]), "n_folds": np.int64(2), "seed": np.int64(3)}
    found = fit_auto(
        model, EXAMPLES, layers=np.arange(2), alphas=np.array([0.5], dtype=np.float32),
        max_heads=np.int64(4), max_evaluations=np.int64(2), **steps,
    )  # fmt: skip
    plain = fit_auto(
        model, EXAMPLES, layers=[0, 1], alphas=[0.5], max_heads=4, max_evaluations=2,
        relax_steps=[1, 2], n_folds=2, seed=3,
    )  # fmt: skip
    assert found.table == plain.table
    assert found.fit.intervention == plain.fit.intervention


def test_provenance_that_cannot_be_kept_is_refused_before_anything_is_tried(model: Any) -> None:
    def progress(*_: Any) -> None:
        raise AssertionError("the choice has started")

    with pytest.raises(TypeError, match=r"provenance=.* is not JSON"):
        fit_auto(model, EXAMPLES, provenance={"path": Path()}, progress=progress)
