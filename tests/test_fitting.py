"""Fits: both backends agree, solutions are what they claim to be, bad input is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from conftest import every_position, exact_products, needs_hooked
from tiny import tiny_model

from tl_laai.batches import Fit, FitProblem
from tl_laai.distillation import Distillation
from tl_laai.engine import Engine
from tl_laai.fingerprints import fingerprint
from tl_laai.fitting import fit, fit_many
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import PromptTemplate, TokenisedExample, tokenise
from tl_laai.solvers import Progress, Status
from tl_laai.tasks import Example, Task

# Inputs and answers of differing lengths; one token a character.
EXAMPLES = tuple(
    Example(*pair) for pair in (("abc", "x"), ("d", "yz"), ("efghi", "uvw"), ("jk", "st"))
)


@pytest.fixture
def model(windowed: Any) -> Any:
    return windowed


def delta_of(result: Fit) -> torch.Tensor:
    return result.intervention.deltas[result.layer]


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum() / (first.norm() * second.norm()))


def tokenised(model: Any) -> tuple[TokenisedExample, ...]:
    return tokenise(model, EXAMPLES)


# ------------------------------------------------------------------------- both backends agree


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("solver", ["adam", "proximal"])
def test_both_backends_fit_the_same_delta(family: str, solver: Any) -> None:
    hooked, bridge = (
        fit(
            oracle.shared_model(backend, family),
            EXAMPLES,
            layer=1,
            alpha=0.1,
            position="every_step",
            solver=solver,
            max_evaluations=15,
        )
        for backend in ("hooked", "bridge")
    )
    assert delta_of(hooked).norm() > 0.1
    assert cosine(delta_of(hooked), delta_of(bridge)) > 1 - 1e-6
    assert hooked.lambda_max == pytest.approx(bridge.lambda_max, rel=1e-9)


@needs_hooked
def test_both_backends_fit_the_same_delta_on_gemma(gemma_hooked: Any, gemma_bridge: Any) -> None:
    split = Task.load("country-capital").split(train=4, seed=0)
    hooked, bridge = (
        fit(model, split.train, layer=9, solver="adam", max_evaluations=8)
        for model in (gemma_hooked, gemma_bridge)
    )
    assert hooked.solution.n_evaluations == bridge.solution.n_evaluations
    assert hooked.solution.loss < hooked.solution.history[0].objective - 1
    assert cosine(delta_of(hooked), delta_of(bridge)) > 0.999  # measured: 1.0 when printed
    assert hooked.lambda_max == pytest.approx(bridge.lambda_max, rel=1e-4)


# ------------------------------------------------------------------- what a solution claims


@every_position
def test_a_converged_solution_is_stationary_by_the_full_forward(model: Any, position: Any) -> None:
    result = fit(
        model, EXAMPLES, layer=1, alpha=0.8, position=position, tolerance=1e-3, max_evaluations=400
    )
    solution = result.solution
    assert solution.status is Status.CONVERGED
    delta = delta_of(result)
    loss, gradient = oracle.loss_and_gradient(model, tokenised(model), 1, delta, position)
    assert solution.loss == pytest.approx(loss, rel=1e-10)
    assert solution.objective == pytest.approx(loss + result.penalty.value(delta).item(), rel=1e-10)
    residual = result.penalty.stationarity(delta, gradient).item()
    assert solution.stationarity == pytest.approx(residual, rel=1e-4, abs=1e-9)
    assert residual <= 1e-3 * max(1.0, float(delta.norm()))
    assert solution.objective < oracle.loss(model, tokenised(model)).item()


@every_position
@pytest.mark.parametrize("l1_ratio", [0.0, 0.3])
def test_lambda_max_is_that_of_the_gradient_at_zero(
    model: Any, position: Any, l1_ratio: float
) -> None:
    result = fit(
        model,
        EXAMPLES,
        layer=2,
        alpha=0.9,
        l1_ratio=l1_ratio,
        position=position,
        max_evaluations=2,
    )
    zero = torch.zeros(4, 8, dtype=torch.float64)
    _, gradient = oracle.loss_and_gradient(model, tokenised(model), 2, zero, position)
    expected = SparseGroupLasso.from_ratio(1.0, l1_ratio).lambda_max(gradient).item()
    assert result.lambda_max == pytest.approx(expected, rel=1e-8)
    assert result.penalty.group == pytest.approx(0.9 * expected, rel=1e-6)
    assert result.penalty.l1 == pytest.approx(l1_ratio * 0.9 * expected, rel=1e-6)


def test_alpha_is_a_share_of_lambda_max(model: Any) -> None:
    relative = fit(model, EXAMPLES, layer=1, alpha=0.7, l1_ratio=0.2, max_evaluations=20)
    weights = SparseGroupLasso(l1=0.2 * 0.7 * relative.lambda_max, group=0.7 * relative.lambda_max)
    absolute = fit(model, EXAMPLES, layer=1, penalty=weights, max_evaluations=20)
    torch.testing.assert_close(delta_of(absolute), delta_of(relative), rtol=1e-6, atol=1e-8)
    assert absolute.lambda_max == pytest.approx(relative.lambda_max, rel=1e-9)


def test_lambda_max_of_a_pure_l1_penalty_is_the_largest_slope(model: Any) -> None:
    result = fit(
        model, EXAMPLES, layer=1, penalty=SparseGroupLasso(l1=0.5, group=0.0), max_evaluations=1
    )
    zero = torch.zeros(4, 8, dtype=torch.float64)
    _, gradient = oracle.loss_and_gradient(model, tokenised(model), 1, zero)
    assert result.lambda_max == pytest.approx(float(gradient.abs().max()), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_at_lambda_max_and_above_delta_stays_exactly_zero(
    model: Any, alpha: float, l1_ratio: float
) -> None:
    result = fit(model, EXAMPLES, layer=1, alpha=alpha, l1_ratio=l1_ratio)
    assert result.solution.status is Status.CONVERGED
    assert int(delta_of(result).count_nonzero()) == 0
    assert result.intervention.heads() == []
    plain = oracle.loss(model, tokenised(model)).item()
    assert result.solution.loss == pytest.approx(plain, rel=1e-10)


def test_just_below_lambda_max_one_head_enters_and_the_others_are_exactly_zero(model: Any) -> None:
    result = fit(model, EXAMPLES, layer=2, alpha=0.9)
    assert len(result.intervention.heads()) == 1
    assert 0 < result.solution.loss < oracle.loss(model, tokenised(model)).item()


def test_without_penalty_the_loss_falls_further_than_with_one(model: Any) -> None:
    free = fit(model, EXAMPLES, layer=1, max_evaluations=40)
    bound = fit(model, EXAMPLES, layer=1, alpha=0.9, max_evaluations=40)
    assert free.penalty == SparseGroupLasso(0.0, 0.0)
    assert free.solution.loss < bound.solution.loss
    assert free.solution.objective == pytest.approx(free.solution.loss)
    assert free.lambda_max == pytest.approx(bound.lambda_max, rel=1e-9)


def test_a_fit_stopped_early_says_so(model: Any) -> None:
    result = fit(model, EXAMPLES, layer=0, alpha=0.8, max_evaluations=3)
    assert result.solution.status is Status.MAX_EVALUATIONS
    assert result.solution.n_evaluations == 3
    assert result.intervention.provenance["solution"]["status"] == "max_evaluations"


def test_a_start_is_where_the_fit_begins(model: Any) -> None:
    problem = FitProblem(EXAMPLES, 1, alpha=0.5)
    (first,) = fit_many(model, [problem], max_evaluations=200, tolerance=1e-4)
    again = dataclasses.replace(problem, start=delta_of(first))
    (second,) = fit_many(model, [again], max_evaluations=200, tolerance=1e-4)
    assert first.solution.status is Status.CONVERGED
    assert "start" not in first.intervention.provenance
    norm = float(delta_of(first).norm())
    assert second.intervention.provenance["start"]["norm"] == pytest.approx(norm)
    assert second.solution.n_evaluations <= 2 < first.solution.n_evaluations
    assert second.solution.history[0].objective == pytest.approx(first.solution.objective)
    torch.testing.assert_close(delta_of(second), delta_of(first), rtol=0, atol=1e-3)


# --------------------------------------------------------------------------------- many at once


@exact_products
def test_many_fits_equal_each_alone_bit_for_bit(model: Any) -> None:
    problems = [
        FitProblem(EXAMPLES[:2], 2, alpha=0.5),
        FitProblem(EXAMPLES, 0, penalty=SparseGroupLasso(l1=0.01, group=0.05)),
        FitProblem(EXAMPLES[1:], 1),
        FitProblem(EXAMPLES[:2], 1, alpha=1.2, l1_ratio=0.1),
    ]
    together = fit_many(model, problems, max_evaluations=8, position="every_step")
    for problem, result in zip(problems, together, strict=True):
        (alone,) = fit_many(model, [problem], max_evaluations=8, position="every_step")
        assert result.layer == problem.layer
        assert result.intervention.provenance["n_train"] == len(problem.examples)
        assert result.solution.status == alone.solution.status
        assert result.solution.history == alone.solution.history
        assert torch.equal(delta_of(result), delta_of(alone))
        assert result.lambda_max == alone.lambda_max


def test_fits_in_small_chunks_of_memory_are_the_same(model: Any) -> None:
    problems = [FitProblem(EXAMPLES, layer, alpha=0.5) for layer in (0, 2)]
    whole = fit_many(model, problems, max_evaluations=5)
    cut = fit_many(model, problems, max_evaluations=5, max_memory=1e-9)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(delta_of(one), delta_of(other), rtol=1e-7, atol=1e-9)


def test_weights_are_one_an_example(model: Any) -> None:
    for weights in ([], [1.0]):
        problem = FitProblem(EXAMPLES, 1, alpha=0.5, weights=weights)
        with pytest.raises(ValueError, match="weights must hold one number a row"):
            fit_many(model, [problem], max_evaluations=1)


# --------------------------------------------------------------------- what an intervention knows


def test_provenance_tells_how_the_fit_was_made(model: Any) -> None:
    template = PromptTemplate(text="{input} ->", separator="\n")
    result = fit(
        model,
        EXAMPLES,
        layer=1,
        alpha=0.5,
        position="every_step",
        template=template,
        max_evaluations=4,
        tolerance=0.01,
        provenance={"task": {"name": "letters"}, "seed": 3},
    )
    known = result.intervention.provenance
    json.dumps(dict(known))
    assert known["task"] == {"name": "letters"}
    assert known["seed"] == 3
    assert known["n_train"] == 4
    assert known["layer"] == 1
    assert known["template"] == dataclasses.asdict(template)
    assert known["penalty"] == {
        "l1": 0.0,
        "group": result.penalty.group,
        "lambda_max": result.lambda_max,
    }
    assert known["solver"]["solver"] == "proximal"
    assert known["solver"]["tolerance"] == 0.01
    assert known["solver"]["max_evaluations"] == 4
    assert known["solution"]["loss"] == result.solution.loss
    assert known["solution"]["stationarity"] == result.solution.stationarity
    assert {"torch", "transformer-lens", "transformers"} <= known["versions"].keys()
    assert result.intervention.position == "every_step"
    assert result.intervention.fingerprint == fingerprint(model)
    assert result.intervention.layers == (1,)


def test_penalty_weights_are_recorded_as_they_were_given() -> None:
    model = tiny_model("bridge", "gpt2", dtype=torch.float32)
    given = SparseGroupLasso(l1=0.1, group=0.3)
    result = fit(model, EXAMPLES, layer=1, penalty=given, max_evaluations=2)
    assert result.penalty == given
    assert result.intervention.provenance["penalty"]["group"] == 0.3


def test_adam_takes_as_many_steps_as_told_and_records_its_rate(model: Any) -> None:
    result = fit(model, EXAMPLES, layer=1, solver="adam", max_evaluations=5, learning_rate=0.03)
    zero = torch.zeros(1, 4, 8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([zero], lr=0.03)
    for _ in range(5):
        optimiser.zero_grad()
        _, gradient = oracle.loss_and_gradient(model, tokenised(model), 1, zero[0].detach())
        zero.grad = gradient[None]
        optimiser.step()
    torch.testing.assert_close(delta_of(result), zero[0].detach(), rtol=1e-6, atol=1e-8)
    assert result.intervention.provenance["solver"]["learning_rate"] == 0.03


def test_the_template_shapes_the_prompts(model: Any) -> None:
    template = PromptTemplate(text="{input}=", answer_prefix="")
    result = fit(model, EXAMPLES, layer=1, template=template, max_evaluations=1)
    batch = tokenise(model, EXAMPLES, template=template)
    assert result.solution.loss == pytest.approx(oracle.loss(model, batch).item(), rel=1e-10)


def test_the_callback_hears_of_every_evaluation(model: Any) -> None:
    heard: list[Progress] = []
    result = fit(model, EXAMPLES, layer=1, max_evaluations=4, callback=heard.append)
    assert len(heard) == result.solution.n_evaluations
    assert [progress.n_problems for progress in heard] == [1] * len(heard)


def test_the_model_is_left_as_found(model: Any) -> None:
    before = oracle.state_of(model)
    fit(model, EXAMPLES, layer=1, alpha=0.5, max_evaluations=3)
    assert oracle.state_of(model) == before

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, EXAMPLES, layer=1, max_evaluations=3, callback=stop)
    assert oracle.state_of(model) == before


# ------------------------------------------------------------------------------------ bad input


@pytest.fixture
def any_model() -> Any:
    return oracle.shared_model("bridge")


def test_no_examples_are_refused(any_model: Any) -> None:
    with pytest.raises(ValueError, match="examples is empty: a fit needs at least one"):
        fit(any_model, [], layer=1)


def test_no_problems_are_refused(any_model: Any) -> None:
    with pytest.raises(ValueError, match="problems is empty"):
        fit_many(any_model, [])


@pytest.mark.parametrize("layer", [4, -1, 100])
def test_a_layer_out_of_range_is_refused(any_model: Any, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer is {layer}; this model has layers 0 to 3"):
        fit(any_model, EXAMPLES, layer=layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "sgd"}, "solver is 'sgd'; use 'proximal' or 'adam'"),
        ({"position": "last"}, "position is 'last'; use 'prompt_end' or 'every_step'"),
        ({"alpha": 0.5, "penalty": SparseGroupLasso(0.0, 1.0)}, "penalty and alpha are both given"),
        ({"alpha": -0.1}, "alpha is -0.1; give a share of lambda_max, 0 or more"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"l1_ratio": 0.5}, "l1_ratio is 0.5 without alpha; give alpha too"),
        ({"alpha": 0.5, "l1_ratio": -1.0}, "l1_ratio"),
        ({"max_evaluations": 0}, "max_evaluations is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"solver": "adam", "learning_rate": -1.0}, "learning_rate is -1.0"),
    ],
)
def test_options_that_make_no_sense_are_named(
    any_model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(any_model, EXAMPLES, layer=1, **options)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (4, 1), (8, 4), (2, 4, 8)])
def test_a_start_of_the_wrong_shape_is_refused(any_model: Any, shape: tuple[int, ...]) -> None:
    problem = FitProblem(EXAMPLES, 1)
    object.__setattr__(problem, "start", torch.zeros(shape))
    with pytest.raises(ValueError, match=r"start.*4, 8"):
        fit_many(any_model, [problem], max_evaluations=2)


def test_a_start_that_is_not_finite_is_refused(any_model: Any) -> None:
    start = torch.full((4, 8), torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_many(any_model, [FitProblem(EXAMPLES, 1, start=start)], max_evaluations=2)


def test_a_prompt_longer_than_the_context_is_refused(any_model: Any) -> None:
    long = Example("a" * tiny.N_CTX, "b")
    with pytest.raises(ValueError, match=rf"more than the model's context of {tiny.N_CTX}"):
        fit(any_model, [long], layer=1)


def test_a_model_whose_weights_are_not_finite_is_refused(backend: str) -> None:
    model = tiny_model(backend, "gpt2")
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fit(model, EXAMPLES, layer=1)


@pytest.mark.parametrize("solver", ["proximal", "adam"])
@pytest.mark.parametrize("penalised", [True, False])
def test_a_loss_that_is_not_finite_is_refused_with_what_to_do(
    any_model: Any, solver: Any, penalised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Engine.value_and_grad

    def overflows(self: Engine, deltas: Any, problems: Any) -> Any:
        losses, gradients = own(self, deltas, problems)
        return losses * torch.inf, gradients * torch.nan

    monkeypatch.setattr(Engine, "value_and_grad", overflows)
    with pytest.raises(ValueError, match=r"layer=1: the loss.*not finite.*float32"):
        fit(
            any_model,
            EXAMPLES,
            layer=1,
            solver=solver,
            alpha=0.5 if penalised else None,
            max_evaluations=3,
        )


def test_a_model_of_another_class_is_refused() -> None:
    class Other:
        cfg = oracle.shared_model("bridge").cfg
        to_tokens = oracle.shared_model("bridge").to_tokens

    with pytest.raises(TypeError, match=r"model is a Other.*load_model"):
        fit(Other(), EXAMPLES, layer=1)


def test_numbers_of_numpy_are_taken_and_kept_as_json(any_model: Any) -> None:
    plain = fit(any_model, EXAMPLES, layer=1, alpha=0.5, max_evaluations=3, relax_steps=2)
    two, three = np.int64(2), np.int64(3)
    found = fit(
        any_model, EXAMPLES, layer=np.int64(1), alpha=np.float64(0.5), tolerance=np.float32(0.5),
        learning_rate=np.float32(0.125), max_evaluations=three, relax_steps=two,
    )  # fmt: skip
    assert found.layer == plain.layer == 1
    settings = json.loads(json.dumps(dict(found.intervention.provenance)))["solver"]
    assert (settings["max_evaluations"], settings["relax_steps"]) == (3, 2)
    assert (settings["tolerance"], settings["learning_rate"]) == (0.5, 0.125)
    adam = fit(any_model, EXAMPLES, layer=1, solver="adam", max_evaluations=two)
    assert adam.intervention.provenance["solver"]["max_evaluations"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": True}, "layer is True; give an integer"),
        ({"layer": 1.5}, "layer is 1.5; give an integer"),
        ({"max_evaluations": 2.0}, "max_evaluations is 2.0; give an integer"),
        ({"relax_steps": "2"}, "relax_steps is '2'; give an integer"),
        ({"provenance": {"path": Path()}}, "provenance=.* is not JSON"),
        ({"penalty": 0.5}, r"penalty is 0.5; give SparseGroupLasso\(l1=..., group=...\)"),
        ({"alpha": "0.5"}, "alpha is '0.5'; give a number"),
        ({"alpha": True}, "alpha is True; give a number"),
        ({"template": "Q: {input}"}, "template is 'Q: {input}'; give a PromptTemplate"),
        ({"examples": iter(EXAMPLES)}, "examples is a tuple_iterator; give a list or tuple"),
    ],
)
def test_what_an_intervention_cannot_hold_is_refused_before_the_fit(
    any_model: Any, options: dict[str, Any], message: str
) -> None:
    def callback(_: Progress) -> None:
        raise AssertionError("the fit has started")

    with pytest.raises(TypeError, match=message):
        fit(any_model, **({"examples": EXAMPLES, "layer": 1, "callback": callback} | options))


def test_problems_may_come_one_by_one(any_model: Any) -> None:
    problems = [FitProblem(EXAMPLES, layer, alpha=0.5) for layer in (0, 1)]
    listed = fit_many(any_model, problems, max_evaluations=2)
    found = fit_many(any_model, iter(problems), max_evaluations=2)
    assert [one.intervention for one in found] == [one.intervention for one in listed]


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad]
)
@pytest.mark.parametrize("objective", ["answers", "distill"])
def test_the_callers_modes_change_nothing(backend: str, mode: Any, objective: Any) -> None:
    model = tiny_model(backend, "llama", dtype=torch.float32)
    options: dict[str, Any] = {"layer": 1, "alpha": 0.2, "objective": objective}
    if objective == "distill":
        options["distillation"] = Distillation(inputs=("kl", "m"))
    for solver in ("proximal", "adam"):
        with mode():
            found = fit(model, EXAMPLES, solver=solver, max_evaluations=4, **options)
        plain = fit(model, EXAMPLES, solver=solver, max_evaluations=4, **options)
        assert found.intervention == plain.intervention
        assert found.solution.history == plain.solution.history
        assert not delta_of(found).is_inference()
