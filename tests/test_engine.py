"""The engine against full forwards through `run_with_hooks`: loss, gradient, batches, chunks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import oracle
import pytest
import torch
from conftest import POSITIONS, every_position, exact_in_float32, exact_products
from tiny import tiny_model
from torch import Tensor

from tl_laai import objectives
from tl_laai.attention import room_for_keys
from tl_laai.engine import Engine
from tl_laai.memory import bytes_per_token
from tl_laai.packing import FrozenPrompts
from tl_laai.prefix import freeze
from tl_laai.problems import engine_for
from tl_laai.prompts import TokenisedExample, tokenise
from tl_laai.tasks import Task


# Prompts of one token, shorter and longer than the Gemma-like window of 4; answers of 1 to 4.
def everything(prompts: FrozenPrompts) -> list[int]:
    return list(range(len(prompts.examples)))


def deltas_for(model: Any, count: int) -> Tensor:
    return torch.stack([oracle.random_delta(model, seed=seed) for seed in range(count)])


def assert_like_the_oracle(
    model: Any,
    engine: Engine,
    deltas: Tensor,
    problems: list[int],
    *,
    tolerance: float = 1e-10,
) -> None:
    losses, gradients = engine.value_and_grad(deltas, torch.tensor(problems))
    for at, problem in enumerate(problems):
        examples = [engine.prompts.examples[row] for row in engine.rows[problem].tolist()]
        loss, gradient = oracle.loss_and_gradient(
            model, examples, engine.layers[problem], deltas[at], engine.position
        )
        assert losses[at].item() == pytest.approx(loss, rel=tolerance)
        assert gradient.norm() > 1e-3  # otherwise the comparison says nothing
        assert oracle.relative(gradients[at], gradient) < tolerance


# ------------------------------------------------------------------------------ the oracle


@every_position
def test_loss_and_gradient_of_one_problem_equal_the_full_forward_at_every_layer(
    model: Any, position: str
) -> None:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    for layer in range(model.cfg.n_layers):
        engine = Engine(prompts, layers=[layer], rows=[everything(prompts)], position=position)
        assert_like_the_oracle(model, engine, deltas_for(model, 1), [0])


@every_position
def test_problems_at_many_layers_with_own_and_shared_examples_equal_the_full_forward(
    model: Any, position: str
) -> None:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    last = model.cfg.n_layers - 1
    engine = Engine(
        prompts,
        layers=[last, 0, 1, 1, last, 0],  # not in order, and several problems a layer
        rows=[[0], [4, 1], [2], [1, 3, 4], [0, 1, 2, 3, 4], [3, 0]],
        position=position,
    )
    assert_like_the_oracle(model, engine, deltas_for(model, 6), [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "lengths", [((7, 1),), ((7, 3),), ((5, 1), (5, 1)), ((1, 1),), ((2, 5), (11, 1))]
)
def test_single_examples_equal_lengths_and_single_tokens_equal_the_full_forward(
    windowed: Any, lengths: tuple[tuple[int, int], ...]
) -> None:
    prompts = freeze(windowed, oracle.random_examples(lengths))
    engine = Engine(prompts, layers=[1], rows=[everything(prompts)], position="every_step")
    assert_like_the_oracle(windowed, engine, deltas_for(windowed, 1), [0])


def test_zero_delta_gives_the_plain_loss(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[0], rows=[everything(prompts)])
    zero = torch.zeros(1, windowed.cfg.n_heads, windowed.cfg.d_head, dtype=torch.float64)
    plain = oracle.loss(windowed, prompts.examples).item()
    assert engine.losses(zero, torch.tensor([0])).item() == pytest.approx(plain, rel=1e-10)


def test_examples_with_one_prompt_and_different_answers_share_its_prefix(windowed: Any) -> None:
    prompt = oracle.random_examples([(8, 1)])[0].prompt
    examples = [TokenisedExample(prompt, answer, "a", "b") for answer in ((7,), (9, 8), (30, 31))]
    prompts = freeze(windowed, examples)
    assert len(prompts.prefix_lengths) == 1
    engine = Engine(prompts, layers=[1, 2], rows=[[0, 1, 2], [2, 0]], position="every_step")
    assert_like_the_oracle(windowed, engine, deltas_for(windowed, 2), [0, 1])


@every_position
def test_a_shared_prefix_shorter_than_the_prompts_changes_nothing(
    model: Any, position: str
) -> None:
    examples = oracle.random_examples([(12, 1), (9, 2), (10, 3)], shared=7)
    prompts = freeze(model, examples, share_prefix=True)
    assert prompts.prefix_lengths.tolist() == [7]
    engine = Engine(prompts, layers=[1, 0], rows=[[0, 1, 2], [1, 2]], position=position)
    assert_like_the_oracle(model, engine, deltas_for(model, 2), [0, 1])


def test_an_example_may_count_twice_in_a_problem(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[1], rows=[[1, 0, 1]])
    [delta] = deltas_for(windowed, 1)
    losses, gradients = engine.value_and_grad(delta[None], torch.tensor([0]))
    examples = [prompts.examples[row] for row in (1, 0, 1)]
    loss, gradient = oracle.loss_and_gradient(windowed, examples, 1, delta, "prompt_end")
    assert losses.item() == pytest.approx(loss, rel=1e-10)
    assert oracle.relative(gradients[0], gradient) < 1e-10
    assert engine.rows[0].tolist() == [1, 0]  # and runs once


# ----------------------------------------------------------------------- batches and chunks


@exact_products
@every_position
def test_a_batch_equals_its_problems_one_by_one_bit_for_bit(model: Any, position: str) -> None:
    examples = oracle.random_examples(oracle.LENGTHS * 4)
    layers, rows = [2, 0, 1, 1], [[0, 1, 2], [3], [4, 1], list(range(20))]
    deltas = deltas_for(model, 4)
    batched = Engine(freeze(model, examples), layers=layers, rows=rows, position=position)
    losses, gradients = batched.value_and_grad(deltas, torch.arange(4))
    for i, own in enumerate(rows):
        prompts = freeze(model, [examples[row] for row in own])
        alone = Engine(prompts, layers=[layers[i]], rows=[range(len(own))], position=position)
        loss, gradient = alone.value_and_grad(deltas[i : i + 1], torch.tensor([0]))
        assert torch.equal(loss[0], losses[i])
        assert torch.equal(gradient[0], gradients[i])


@pytest.mark.parametrize("tokens_a_chunk", [1, 5, 9, 20])
def test_chunks_add_up_to_the_whole(windowed: Any, tokens_a_chunk: int) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    layers, rows = [1, 0, 2, 1], [[0, 1, 2, 3, 4], [2, 3], [4, 0], [1]]
    deltas, problems = deltas_for(windowed, 4), torch.arange(4)
    whole = Engine(prompts, layers=layers, rows=rows, position="every_step")
    assert len(whole.plans(range(4))) == 1
    n_keys = room_for_keys(int(prompts.prefix_lengths.max())) + 1
    memory = tokens_a_chunk * bytes_per_token(prompts.backend, n_keys, min(layers)) / 2**30
    cut = Engine(prompts, layers=layers, rows=rows, position="every_step", max_memory=memory)
    plans = cut.plans(range(4))
    assert len(plans) > 1
    longest = max(len(e.answer) for e in prompts.examples)
    for plan in plans:
        assert len(plan.packing.token) <= max(tokens_a_chunk, longest)
    for got, expected in zip(
        cut.value_and_grad(deltas, problems), whole.value_and_grad(deltas, problems), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        cut.losses(deltas, problems), whole.losses(deltas, problems), rtol=1e-12, atol=0
    )


def test_any_subset_of_problems_in_any_order_is_evaluated(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[2, 0, 1], rows=[[0], [1, 2], [3, 4]])
    deltas = deltas_for(windowed, 3)
    losses, gradients = engine.value_and_grad(deltas, torch.arange(3))
    for chosen in ([2, 0], [1], [2, 1, 0], [0], [1, 2], [0, 2]):  # more than are kept as plans
        got = engine.value_and_grad(deltas[chosen], torch.tensor(chosen))
        torch.testing.assert_close(got[0], losses[chosen], rtol=1e-12, atol=0)
        torch.testing.assert_close(got[1], gradients[chosen], rtol=1e-10, atol=1e-13)


def test_losses_are_those_of_value_and_grad(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[1, 0], rows=[[0, 1], [2, 3]], position="every_step")
    deltas, problems = deltas_for(windowed, 2), torch.arange(2)
    losses = engine.losses(deltas, problems)
    assert not losses.requires_grad
    torch.testing.assert_close(
        losses, engine.value_and_grad(deltas, problems)[0], rtol=1e-12, atol=0
    )


def test_one_chunk_a_row_serves_problems_at_every_layer(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    layers = list(range(windowed.cfg.n_layers))
    engine = Engine(prompts, layers=layers, rows=[[layer] for layer in layers], max_memory=1e-12)
    assert len(engine.plans(layers)) == len(layers)
    assert_like_the_oracle(windowed, engine, deltas_for(windowed, len(layers)), layers)


# ------------------------------------------------------------------------ finite differences


@every_position
def test_gradient_agrees_with_finite_differences(model: Any, position: str) -> None:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[1], rows=[everything(prompts)], position=position)
    delta, problem = deltas_for(model, 1), torch.tensor([0])
    direction = oracle.random_delta(model, seed=9, scale=1.0)[None]
    gradient = engine.value_and_grad(delta, problem)[1]
    step = 1e-5
    ahead, behind = (engine.losses(delta + s * direction, problem) for s in (step, -step))
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


# ------------------------------------------------------------------------------ left as found


@every_position
def test_parameters_that_require_gradients_get_none(backend: str, position: str) -> None:
    model = oracle.run_once(tiny_model(backend, "llama")).requires_grad_(True)
    before = oracle.state_of(model)
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[1], rows=[everything(prompts)], position=position)
    assert_like_the_oracle(model, engine, deltas_for(model, 1), [0])
    assert oracle.state_of(model) == before


def test_values_and_gradients_are_given_where_gradients_are_switched_off(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[1], rows=[everything(prompts)])
    delta, problem = deltas_for(windowed, 1), torch.tensor([0])
    expected = engine.value_and_grad(delta, problem)
    with torch.no_grad():
        got = engine.value_and_grad(delta, problem)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert not delta.requires_grad


@pytest.mark.parametrize("place", ["block", "loss"])
def test_a_failure_in_the_middle_leaves_the_model_as_found(
    windowed: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[0], rows=[everything(prompts)])
    before = oracle.state_of(windowed)
    logits = oracle.logits_under_edits(windowed, [5, 6, 7], 3)
    own = prompts.backend.call_block

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        if place == "loss" or args[0] == 1:
            raise RuntimeError("in the middle")
        return own(*args)

    owner, name = {
        "block": (prompts.backend, "call_block"),
        "loss": (objectives, "cross_entropy"),
    }[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            engine.value_and_grad(deltas_for(windowed, 1), torch.tensor([0]))
    assert oracle.state_of(windowed) == before
    assert torch.equal(oracle.logits_under_edits(windowed, [5, 6, 7], 3), logits)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("layer", [-1, 3, 18])
def test_a_layer_out_of_range_is_refused_with_the_layers_there_are(layer: int) -> None:
    prompts = freeze(oracle.shared_model("bridge", "gpt2"), oracle.random_examples(oracle.LENGTHS))
    with pytest.raises(ValueError, match=rf"layer is {layer}.*layers 0 to 2"):
        Engine(prompts, layers=[0, layer], rows=[[0], [1]])


def test_an_unknown_position_rule_is_refused() -> None:
    prompts = freeze(oracle.shared_model("bridge", "gpt2"), oracle.random_examples(oracle.LENGTHS))
    with pytest.raises(ValueError, match="position is 'last'; use 'prompt_end' or 'every_step'"):
        Engine(prompts, layers=[0], rows=[[0]], position="last")


def test_a_problem_without_examples_is_refused() -> None:
    prompts = freeze(oracle.shared_model("bridge", "gpt2"), oracle.random_examples(oracle.LENGTHS))
    with pytest.raises(ValueError, match=r"rows\[1\] is empty"):
        Engine(prompts, layers=[0, 1], rows=[[0], []])


def test_as_many_layers_as_sets_of_examples_are_needed() -> None:
    prompts = freeze(oracle.shared_model("bridge", "gpt2"), oracle.random_examples(oracle.LENGTHS))
    with pytest.raises(ValueError, match="layers has 2 entries and rows 1"):
        Engine(prompts, layers=[0, 1], rows=[[0]])


def test_an_example_without_an_answer_cannot_be_fitted() -> None:
    plain = oracle.random_examples(oracle.LENGTHS)
    silent = TokenisedExample(plain[1].prompt, (), "Kenya", "")
    prompts = freeze(oracle.shared_model("bridge", "gpt2"), [plain[0], silent])
    with pytest.raises(ValueError, match=r"Kenya.*no answer"):
        Engine(prompts, layers=[0], rows=[[0, 1]])


def test_an_engine_frees_its_memory_with_the_last_reference_to_it(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    engine = Engine(prompts, layers=[0], rows=[[0, 1]])
    engine.value_and_grad(deltas_for(windowed, 1), torch.tensor([0]))
    plan = weakref.ref(engine.plans([0])[0])
    gc.disable()
    try:
        del engine
        assert plan() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------- real Gemma


def test_engine_equals_the_full_forward_on_gemma_in_float32(gemma: Any) -> None:
    split = Task.load("country-capital").split(train=3, seed=0)
    prompts = freeze(gemma, tokenise(gemma, split.train))
    assert len({len(e.prompt) + len(e.answer) for e in prompts.examples}) > 1
    deltas = torch.stack([oracle.random_delta(gemma, seed=s, scale=0.3) for s in (0, 1)]).float()
    for position in POSITIONS:
        engine = Engine(prompts, layers=[9, 3], rows=[[0, 1], [1, 2]], position=position)
        losses, gradients = engine.value_and_grad(deltas, torch.tensor([0, 1]))
        for i in range(2) if position == "prompt_end" else range(1):
            examples = [prompts.examples[row] for row in engine.rows[i].tolist()]
            loss, gradient = oracle.loss_and_gradient(
                gemma, examples, engine.layers[i], deltas[i], position
            )
            assert losses[i].item() == pytest.approx(loss, rel=1e-5)  # measured: 2e-6
            assert oracle.relative(gradients[i], gradient) < 1e-4  # measured: 8e-6


@exact_products
@pytest.mark.parametrize("tokens_a_chunk", [20, 62, 67, 86])
def test_terms_of_many_rows_round_alike_in_any_chunk(windowed: Any, tokens_a_chunk: int) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    rows = [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4] * 8]
    n_keys = room_for_keys(int(prompts.prefix_lengths.max())) + 1
    memory = tokens_a_chunk * bytes_per_token(prompts.backend, n_keys, 1) / 2**30
    cut = Engine(prompts, layers=[1, 1], rows=rows, max_memory=memory)
    assert len(cut.plans([0, 1])) > 1
    assert max(len(plan.packing.token) for plan in cut.plans([0, 1])) <= tokens_a_chunk
    deltas = deltas_for(windowed, 2)
    losses, gradients = cut.value_and_grad(deltas, torch.arange(2))
    alone = Engine(prompts, layers=[1], rows=rows[1:])
    loss, gradient = alone.value_and_grad(deltas[1:], torch.tensor([0]))
    assert torch.equal(loss[0], losses[1])
    assert torch.equal(gradient[0], gradients[1])


@exact_in_float32
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_batch_equals_its_problems_one_by_one_on_gemma_bit_for_bit(
    gemma: Any, n_threads: int
) -> None:
    names = ("country-capital", "english-french")
    sets = [Task.load(name).split(train=k, seed=0).train for name in names for k in (1, 10)]
    layers = [9, 3, 0, 12]
    deltas = torch.stack([oracle.random_delta(gemma, seed=s, scale=0.3) for s in range(4)]).float()
    torch.set_num_threads(n_threads)
    try:
        whole = engine_for(gemma, sets, layers=layers)
        cut = engine_for(gemma, sets, layers=layers, max_memory=0.03)
        assert len(cut.plans(range(4))) > len(whole.plans(range(4)))
        got = [engine.value_and_grad(deltas, torch.arange(4)) for engine in (whole, cut)]
        for i in range(4):
            alone = engine_for(gemma, [sets[i]], layers=[layers[i]])
            loss, gradient = alone.value_and_grad(deltas[i : i + 1], torch.tensor([0]))
            for losses, gradients in got:
                assert torch.equal(loss[0], losses[i])
                assert torch.equal(gradient[0], gradients[i])
    finally:
        torch.set_num_threads(1)
