"""Work of a choice, counted by hand."""

from __future__ import annotations

from tl_laai.candidates import Trial
from tl_laai.distillation import Distillation
from tl_laai.splits import cross_validation_folds
from tl_laai.work import INPUTS_COST, TEACHER_COST, Work

N_EXAMPLES, EVALUATIONS, FEW = 10, 6, 3
FOLDS = cross_validation_folds(range(N_EXAMPLES), 4, 0)
GIVEN = Distillation(inputs=("m", "no", "pq", "rs"), teacher_steps=0)


def work(distillation: Distillation = GIVEN) -> Work:
    return Work(N_EXAMPLES, EVALUATIONS, distillation, FEW)


def test_a_fit_has_the_examples_that_are_not_held_out_and_what_is_taught() -> None:
    parts = [N_EXAMPLES - len(out) for out in FOLDS]
    assert work().parts(FOLDS, taught=False) == parts
    assert work().parts(FOLDS, taught=True) == [n + FEW for n in parts]
    assert work().largest(taught=False) == N_EXAMPLES
    assert work().largest(taught=True) == N_EXAMPLES + len(GIVEN.inputs or ())


def test_of_relaxed_fits_only_those_with_a_penalty_are_solved_first() -> None:
    grid, parts = [Trial(1, 0.8), Trial(3, 0.0)], [7, 8]
    assert work().of_fits(grid, parts, ()) == 15 * 2 * EVALUATIONS
    assert work().of_fits(grid, parts, (3, 5)) == 15 * (EVALUATIONS + 2 * 6)
    assert work().of_fits(grid, parts, (), 4) == 15 * 2 * 4


def test_teachers_and_made_up_inputs_are_work_too() -> None:
    assert (work().of_teacher, work().of_inputs) == (0, 0)
    made_up = work(Distillation(n_inputs=7, teacher_steps=2))
    assert (made_up.of_teacher, made_up.of_inputs) == (3 * TEACHER_COST, 7 * INPUTS_COST)
    assert made_up.largest(taught=True) == N_EXAMPLES + 7
    assert made_up.parts([()], taught=True) == [N_EXAMPLES + FEW]  # no more while choosing


def test_work_done_is_told_and_never_more_than_there_is() -> None:
    told: list[tuple[str, int, int]] = []
    own = Work(N_EXAMPLES, EVALUATIONS, GIVEN, FEW, lambda *state: told.append(state), whole=5)
    own.tell("final", 3)
    own.tell("refit", 4)
    assert told == [("final", 3, 5), ("refit", 5, 5)]
