"""Regularisation paths on tiny models: each point is a fit, and the better of two directions."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch

from tl_laai.batches import FitProblem
from tl_laai.fitting import fit
from tl_laai.paths import Path, fit_path, fit_paths
from tl_laai.prompts import tokenise
from tl_laai.solvers import Status
from tl_laai.tasks import Example

EXAMPLES = tuple(Example(a, b) for a, b in (("ab", "x"), ("cde", "yz"), ("f", "w"), ("gh", "x")))
ALPHAS = (1.0, 0.7, 0.4, 0.1)
LAYER = 1


@pytest.fixture
def backend() -> str:
    """One is enough: nothing here looks into a model, and fits are tested on both."""
    return "bridge"


@pytest.fixture
def model(windowed: Any) -> Any:
    return windowed


@functools.cache
def path_of(backend: str) -> Path:
    """One path for all tests that only look at it."""
    return fit_path(
        oracle.shared_model(backend), EXAMPLES, layer=LAYER, alphas=ALPHAS, max_evaluations=400
    )


@pytest.fixture
def path(backend: str) -> Path:
    return path_of(backend)


def slow_objective(model: Any, path: Path, index: int) -> float:
    """Loss by full forwards plus the penalty by hand."""
    point = path.points[index]
    [(layer, delta)] = point.fit.intervention.deltas.items()
    with torch.no_grad():
        loss = oracle.loss(model, tokenise(model, EXAMPLES), {layer: delta}).item()
    return loss + point.alpha * path.lambda_max * delta.norm(dim=-1).sum().item()


def test_each_point_has_the_objective_of_its_delta_at_its_penalty(model: Any, path: Path) -> None:
    assert [point.alpha for point in path.points] == list(ALPHAS)
    for i, point in enumerate(path.points):
        assert point.fit.penalty.group == pytest.approx(point.alpha * path.lambda_max, rel=1e-12)
        assert point.fit.solution.objective == pytest.approx(slow_objective(model, path, i))


def test_nothing_but_zero_is_found_on_the_way_down_from_lambda_max(model: Any, path: Path) -> None:
    with torch.no_grad():
        at_zero = oracle.loss(model, tokenise(model, EXAMPLES)).item()
    strongest = path.points[0]
    assert strongest.objectives["down"] == pytest.approx(at_zero, rel=1e-12)
    if strongest.direction == "down":
        assert strongest.fit.intervention.n_heads_used == 0
    # A little less, and a head moves: lambda_max is no larger than it must be.
    [nearly] = fit_path(model, EXAMPLES, layer=LAYER, alphas=[0.999], tolerance=1e-6).points
    assert nearly.fit.intervention.n_heads_used >= 1
    # And it is the largest norm of a head's gradient.
    zero = torch.zeros(model.cfg.n_heads, model.cfg.d_head, dtype=torch.float64)
    _, gradient = oracle.loss_and_gradient(model, tokenise(model, EXAMPLES), LAYER, zero)
    assert path.lambda_max == pytest.approx(gradient.norm(dim=-1).max().item(), rel=1e-9)


def test_the_better_of_two_directions_is_kept(path: Path) -> None:
    for point in path.points:
        assert point.fit.solution.objective == min(point.objectives.values())
        assert point.fit.solution.objective == point.objectives[point.direction]


def test_neither_direction_of_a_point_hides_a_fit_that_has_not_converged(path: Path) -> None:
    assert {point.fit.solution.status for point in path.points} == {Status.CONVERGED}


def test_objectives_fall_and_losses_too_where_the_penalty_weakens(path: Path) -> None:
    objectives = [point.fit.solution.objective for point in path.points]
    assert objectives == sorted(objectives, reverse=True)
    assert path.points[-1].fit.solution.loss < path.points[0].fit.solution.loss


def test_a_point_is_never_worse_than_the_fit_from_zero(model: Any, path: Path) -> None:
    for point in path.points[:2]:
        alone = fit(model, EXAMPLES, layer=LAYER, alpha=point.alpha, max_evaluations=400)
        assert point.fit.solution.objective <= alone.solution.objective + 1e-4
        assert point.fit.lambda_max == alone.lambda_max == path.lambda_max


def test_norms_and_the_order_of_entry_are_read_off_the_points(path: Path) -> None:
    norms = path.norms
    assert norms.shape == (len(ALPHAS), 4)
    for own, point in zip(norms, path.points, strict=True):
        [delta] = point.fit.intervention.deltas.values()
        for head in range(4):
            assert own[head].item() == pytest.approx(delta[head].square().sum().sqrt().item())
    first = {
        head: next(i for i in range(len(ALPHAS)) if norms[i, head] > 0)
        for head in range(4)
        if (norms[:, head] > 0).any()
    }
    slow = sorted(first, key=lambda head: (first[head], -norms[first[head], head]))
    assert path.entry_order == tuple(slow)
    assert len(slow) >= 2


def test_paths_in_one_batch_are_those_walked_one_by_one(model: Any) -> None:
    problems = [
        FitProblem(EXAMPLES, 2, provenance={"seed": 7}),
        FitProblem(EXAMPLES[:2], 0),
        FitProblem(EXAMPLES[1:], 2),
    ]
    options: dict[str, Any] = {"alphas": (0.9, 0.8), "tolerance": 1e-4, "l1_ratio": 0.05}
    options |= {"position": "every_step", "max_evaluations": 400}
    together = fit_paths(model, problems, **options)
    assert together[0].points[0].fit.intervention.provenance["seed"] == 7
    for problem, own in zip(problems, together, strict=True):
        alone = fit_path(model, problem.examples, layer=problem.layer, **options)
        assert own.lambda_max == pytest.approx(alone.lambda_max, rel=1e-10)
        assert own.entry_order == alone.entry_order
        for a, b in zip(own.points, alone.points, strict=True):
            assert a.fit.solution.status is b.fit.solution.status is Status.CONVERGED
            assert a.fit.solution.objective == pytest.approx(b.fit.solution.objective, rel=1e-6)
            assert a.fit.layer == problem.layer
            assert a.fit.penalty.l1 == pytest.approx(0.05 * a.fit.penalty.group)


def test_weights_of_a_problems_examples_are_those_of_its_path(model: Any) -> None:
    first = tuple(float(i == 0) for i in range(len(EXAMPLES)))
    problem = FitProblem(EXAMPLES, 2, weights=first)
    [weighed] = fit_paths(model, [problem], alphas=[0.9], max_evaluations=3)
    [alone] = fit_paths(model, [FitProblem(EXAMPLES[:1], 2)], alphas=[0.9], max_evaluations=3)
    assert weighed.lambda_max == pytest.approx(alone.lambda_max, rel=1e-9)
    assert weighed.points[0].fit.intervention.provenance["weights"] == list(first)


def test_the_grid_is_even_on_a_log_scale_from_lambda_max_down(model: Any) -> None:
    path = fit_path(model, EXAMPLES[:1], layer=3, n_lambdas=3, ratio=0.25, max_evaluations=2)
    assert [point.alpha for point in path.points] == pytest.approx([1.0, 0.5, 0.25])


def test_alphas_are_walked_once_each_from_the_strongest(model: Any) -> None:
    path = fit_path(model, EXAMPLES[:1], layer=3, alphas=[0.0, 0.5, 2.0, 0.5], max_evaluations=2)
    assert [point.alpha for point in path.points] == [2.0, 0.5, 0.0]
    assert path.points[-1].fit.penalty.group == 0.0


def test_the_callback_sees_every_evaluation_of_both_directions(model: Any) -> None:
    seen: list[Any] = []
    fit_path(
        model, EXAMPLES[:1], layer=3, alphas=[0.5], max_evaluations=3, tolerance=1e-12,
        callback=seen.append,
    )  # fmt: skip
    assert [progress.evaluation for progress in seen] == [1, 2, 3, 1, 2, 3]


def test_each_point_starts_where_the_one_before_it_ended(model: Any) -> None:
    walks: list[list[float]] = []

    def watch(progress: Any) -> None:
        if progress.evaluation == 1:
            walks.append([])
        walks[-1].append(progress.objectives[0])

    [strong, weak] = fit_path(
        model, EXAMPLES, layer=LAYER, alphas=[0.6, 0.3], max_evaluations=400, callback=watch
    ).points
    [down_strong, down_weak, up_weak, up_strong] = walks
    at_zero = down_strong[0]
    assert down_weak[0] < at_zero  # at 0.6's delta
    assert len(up_weak) == 1  # that is where the way up begins, and it is stationary
    assert up_weak[0] == pytest.approx(weak.objectives["down"])
    assert up_strong[0] != pytest.approx(at_zero)
    assert strong.objectives["up"] == pytest.approx(up_strong[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": []}, r"alphas is \[\]; give at least one share"),
        ({"alphas": [0.5, -0.1]}, r"alphas is \[0\.5, -0\.1\]"),
        ({"alphas": [0.5, float("nan")]}, r"alphas is \[0\.5, nan\]"),
        ({"alphas": [float("inf")]}, r"alphas is \[inf\]"),
        ({"n_lambdas": 1}, "n_lambdas is 1; a path needs at least 2 points"),
        ({"ratio": 1.0}, r"ratio is 1\.0; give the weakest share, between 0 and 1"),
        ({"layer": 4}, "layer is 4; this model has layers 0 to 3"),
        ({"examples": ()}, "examples is empty"),
    ],
)
def test_a_path_that_cannot_be_walked_is_refused(
    model: Any, options: dict[str, Any], message: str
) -> None:
    options = {"examples": EXAMPLES, "layer": LAYER, **options}
    with pytest.raises(ValueError, match=message):
        fit_path(model, options.pop("examples"), **options)
