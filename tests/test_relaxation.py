"""Relaxed fits: torch's own Adam on the free entries, penalised supports, exact zeros elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tl_laai.batches import FitBatch, FitProblem
from tl_laai.fitting import fit, fit_many
from tl_laai.penalties import SparseGroupLasso
from tl_laai.relaxation import relax
from tl_laai.solvers import Progress, Status, proximal_gradient
from tl_laai.tasks import Example

EXAMPLES = tuple(Example(word, word.upper()) for word in ("ab", "cde", "f", "gh"))
LIMIT = 30


def quartic(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
    """A loss with another minimum in every entry, and in every problem."""
    size = deltas[0].numel()
    goal = torch.arange(1, size + 1, dtype=deltas.dtype).view(deltas.shape[1:]) / size
    away = deltas - goal * (1 + problems.to(deltas))[:, None, None]
    return (away**4 + away**2).sum(dim=(1, 2)), 4 * away**3 + 2 * away


def test_the_free_entries_walk_as_torchs_adam_does_and_the_others_never_move() -> None:
    support = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    found = relax(
        quartic, support, dtype=torch.float64, steps=20, at=(1, 7, 20), learning_rate=0.03
    )
    leaf = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.03)
    for step in range(1, 21):
        loss = quartic(leaf * support, torch.arange(2))[0].sum()
        (leaf.grad,) = torch.autograd.grad(loss, leaf)
        optimiser.step()
        if step in (1, 7, 20):
            torch.testing.assert_close(found.iterates[step], leaf.detach() * support)
    assert set(found.iterates) == {1, 7, 20}
    last = torch.stack([solution.delta for solution in found.solutions])
    assert torch.equal(last, found.iterates[20])
    assert torch.equal(last != 0, support)


def test_a_problem_that_is_not_followed_ends_there_and_the_others_go_on() -> None:
    support = torch.ones(3, 2, 2, dtype=torch.bool)
    options: dict[str, Any] = {"dtype": torch.float64, "steps": 6, "at": (2, 4, 6)}
    alone = relax(quartic, support, **options)
    asked, evaluated = [], []

    def follow(steps: int, deltas: Tensor) -> Tensor:
        asked.append((steps, deltas))
        return torch.tensor([True, steps != 2, True])

    def counted(deltas: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        evaluated.append(problems.tolist())
        return quartic(deltas, problems)

    found = relax(counted, support, follow=follow, **options)
    assert [steps for steps, _ in asked] == [2, 4]
    assert torch.equal(asked[0][1], alone.iterates[2])
    assert evaluated == [[0, 1, 2]] * 3 + [[0, 2]] * 4
    for steps in (4, 6):
        assert torch.equal(found.iterates[steps][[0, 2]], alone.iterates[steps][[0, 2]])
        assert bool(found.iterates[steps][1].isnan().all())
    assert torch.equal(found.solutions[1].delta, alone.iterates[2][1])
    assert {solution.status for solution in found.solutions} == {Status.EARLY_STOPPED}
    assert [solution.n_evaluations for solution in found.solutions] == [7, 3, 7]


def test_an_empty_support_stays_at_zero() -> None:
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    [solution] = relax(quartic, nothing, dtype=torch.float32, steps=3).solutions
    assert not solution.delta.any()


def test_steps_that_are_never_made_are_refused() -> None:
    support = torch.ones(1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"at holds \[0, 4\]; give numbers of steps from 1 to"):
        relax(quartic, support, dtype=torch.float32, steps=3, at=(0, 2, 4))


def test_each_penalty_chooses_what_is_fitted_again(model: Any) -> None:
    problems = [
        FitProblem(EXAMPLES, 1, alpha=0.6),
        FitProblem(EXAMPLES, 2),
        FitProblem(EXAMPLES[:2], 0, alpha=0.4, l1_ratio=0.1),
    ]
    told: list[Progress] = []
    found = fit_many(model, problems, relax_steps=5, max_evaluations=LIMIT, callback=told.append)
    for problem, own in zip(problems, found, strict=True):
        batch = FitBatch(model, [problem])
        penalised = proximal_gradient(
            batch.engine.value_and_terms, batch.zero, batch.penalty, max_evaluations=LIMIT
        )[0]
        chosen = problem.alpha is not None
        support = penalised.delta != 0 if chosen else torch.ones_like(penalised.delta).bool()
        assert support.any()
        assert torch.equal(own.solution.delta != 0, support)
        # By hand: torch's Adam on the whole loss, with the rest of Delta held at zero.
        leaf = torch.zeros_like(batch.zero, requires_grad=True)
        optimiser = torch.optim.Adam([leaf], lr=0.1)
        for _ in range(5):
            _, gradient = batch.engine.value_and_grad((leaf * support).detach(), batch.everyone)
            leaf.grad = gradient * support
            optimiser.step()
        torch.testing.assert_close(own.solution.delta, leaf.detach()[0] * support)
        assert own.solution.n_evaluations == 6 + (penalised.n_evaluations if chosen else 0)
        assert own.solution.objective == own.solution.loss
        numbers = [record.evaluation for record in own.solution.history]
        assert numbers == list(range(1, own.solution.n_evaluations + 1))
        kept = own.intervention.provenance
        assert kept["solver"]["relax_steps"] == 5
        assert (kept["penalty"]["group"] > 0) == chosen
    assert told


def test_relaxing_needs_a_solver_that_leaves_something_out(model: Any) -> None:
    with pytest.raises(ValueError, match=r"relax_steps is 3 with solver='adam'"):
        fit(model, EXAMPLES, layer=1, solver="adam", relax_steps=3)


def test_above_lambda_max_nothing_is_chosen_and_nothing_is_fitted(model: Any) -> None:
    penalty = SparseGroupLasso(l1=0.0, group=1e6)
    found = fit(model, EXAMPLES, layer=1, penalty=penalty, relax_steps=2)
    assert not found.solution.delta.any()


def test_a_start_that_would_not_be_used_is_refused(model: Any) -> None:
    start = FitBatch(model, [FitProblem(EXAMPLES, 1)]).zero[0]
    problem = FitProblem(EXAMPLES, 1, start=start)
    with pytest.raises(ValueError, match="start is given: a relaxed fit starts from zero"):
        fit_many(model, [problem], relax_steps=2)
