"""Fine-tuning baselines: rows, steps and tables against slow twins; the refusals; real Gemma."""

from __future__ import annotations

import functools
import math
from typing import Any

import oracle
import pytest
import torch
from test_adapters import logits_of, slow_answer, slow_losses, state_of
from tiny import N_CTX, tiny_hf

from tl_laai import finetuning
from tl_laai.adapters import AdapterConfig, adapted
from tl_laai.decoding import EndTokens, longest_answer
from tl_laai.evaluation import evaluate
from tl_laai.finetuning import FineTuned, fine_tune
from tl_laai.finetuning_selection import tune_fine_tuning
from tl_laai.prompts import PromptTemplate, decoded_answer, tokenise
from tl_laai.tasks import Example, Task

EXAMPLES = tuple(
    Example(*pair)
    for pair in (("abc", "x"), ("d", "yz"), ("efghi", "uvw"), ("jk", "st"), ("lm", "n"))
)
ASKED = (Example("op", "q"), Example("rstu", "vw"), Example("x", "yza"))


def trained(
    backend: str = "bridge", family: str = "llama", examples: Any = EXAMPLES, **options: Any
) -> FineTuned:
    defaults = {"learning_rate": 0.01, "steps": 1, "hf_model": tiny_hf(family)}
    return fine_tune(oracle.shared_model(backend, family), examples, **(defaults | options))


@functools.cache
def tuned() -> FineTuned:
    """An adapter that answers otherwise than the model does."""
    return trained(learning_rate=0.02, steps=6)


# ------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_an_adapter_that_was_hardly_trained_gives_the_rows_of_the_model_itself(
    backend: str, family: str, method: Any
) -> None:
    model = oracle.shared_model(backend, family)
    got = trained(backend, family, method=method, learning_rate=1e-12).evaluate(ASKED)
    for row, expected in zip(got.rows, evaluate(model, ASKED).rows, strict=True):
        assert (row.input, row.target) == (expected.input, expected.target)
        assert (row.prediction, row.correct) == (expected.prediction, expected.correct)
        # measured 1e-10: what one step of 1e-12 does
        assert row.log_probability == pytest.approx(expected.log_probability, rel=1e-8)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_change_no_adapter_and_no_row(mode: Any) -> None:
    plain, model, hf_model = tuned(), oracle.shared_model("bridge", "llama"), tiny_hf("llama")
    with mode():
        found = fine_tune(model, EXAMPLES, learning_rate=0.02, steps=6, hf_model=hf_model)
        rows = found.evaluate(ASKED).rows
        chosen = tune_fine_tuning(
            model, EXAMPLES, learning_rates=(0.02,), steps=(6,), hf_model=hf_model
        )
    for own in (found, chosen.fine_tuned):
        assert all(torch.equal(own.adapter[name], t) for name, t in plain.adapter.items())
    assert rows == plain.evaluate(ASKED).rows


def test_rows_of_an_adapter_are_those_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "ROWS_AT_ONCE", 2)
    got = tuned().evaluate(ASKED)
    model = oracle.shared_model("bridge", "llama")
    tokenised = tokenise(model, ASKED)
    with tuned().applied() as hf_model:
        for row, example in zip(got.rows, tokenised, strict=True):
            answer = slow_answer(
                hf_model, example.prompt, EndTokens(model), longest_answer(tokenised)
            )
            assert row.prediction == decoded_answer(model.tokenizer.decode(list(answer)))
            slow = -float(slow_losses(hf_model, example).sum())
            assert row.log_probability == pytest.approx(slow, rel=1e-9)
    assert got.rows != evaluate(model, ASKED).rows
    short = tuned().evaluate(ASKED, max_new_tokens=1)
    assert all(len(row.prediction) <= 1 for row in short.rows)


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma", {"method": "lora"}),
        ("gemma", {"method": "ia3"}),
        ("granite", {"method": "lora", "target_modules": "all-linear"}),  # scales its logits
    ],
)
def test_the_first_loss_is_that_of_the_engine(family: str, options: dict[str, Any]) -> None:
    model = oracle.shared_model("bridge", family)
    got = trained(family=family, **options)
    expected = oracle.loss(model, tokenise(model, EXAMPLES))
    assert got.losses[0] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("method", "n_parameters"), [("lora", 2688), ("ia3", 240)])
def test_two_steps_are_those_of_a_loop_over_single_prompts(method: Any, n_parameters: int) -> None:
    model = oracle.shared_model("bridge", "llama")
    got = trained(method=method, steps=2)
    beta1, beta2, rate = 0.9, 0.999, 0.01
    with adapted(tiny_hf("llama"), AdapterConfig(method), 0) as hf_model:
        weights = {n: p for n, p in hf_model.named_parameters() if p.requires_grad}
        first = {n: torch.zeros_like(p) for n, p in weights.items()}
        second = {n: torch.zeros_like(p) for n, p in weights.items()}
        for step in (1, 2):
            losses = []
            for example in tokenise(model, EXAMPLES):
                tokens = torch.tensor([[*example.prompt, *example.answer]])
                rows = hf_model(tokens).logits[0].log_softmax(-1)[len(example.prompt) - 1 : -1]
                losses.append(-rows.gather(1, torch.tensor(example.answer)[:, None]).mean())
            loss = torch.stack(losses).mean()
            assert got.losses[step - 1] == pytest.approx(loss.item(), rel=1e-9)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(weights.items(), gradients, strict=True):
                    first[name] = beta1 * first[name] + (1 - beta1) * gradient
                    second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
                    mean = first[name] / (1 - beta1**step)
                    root = (second[name] / (1 - beta2**step)).sqrt() + 1e-8
                    parameter -= rate * (finetuning.WEIGHT_DECAY * parameter + mean / root)
    assert got.adapter.keys() == weights.keys()
    assert got.n_parameters == n_parameters
    for name, parameter in weights.items():
        # Adam divides by the size of a gradient, so rounding of tiny ones shows
        torch.testing.assert_close(got.adapter[name], parameter, rtol=1e-6, atol=1e-6)


def test_training_lowers_the_loss_and_is_the_same_each_time() -> None:
    assert tuned().losses[-1] < 0.8 * tuned().losses[0]
    assert len(tuned().losses) == tuned().steps == 6
    again = trained(learning_rate=0.02, steps=6)
    assert again.losses == tuned().losses
    assert again.adapter.keys() == tuned().adapter.keys()
    assert all(torch.equal(again.adapter[n], tuned().adapter[n]) for n in again.adapter)


def test_minibatches_take_every_example_once_an_epoch_in_a_seeded_order() -> None:
    batches = finetuning._batches(6, 4, seed=0)
    steps = [next(batches) for _ in range(6)]
    assert [len(step) for step in steps] == [4] * 6
    flat = [i for step in steps for i in step]
    epochs = [flat[start : start + 6] for start in range(0, 24, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 4
    assert epochs[0] != epochs[1]
    assert next(finetuning._batches(6, 4, seed=0)) == steps[0]
    assert next(finetuning._batches(6, 4, seed=1)) != steps[0]
    whole = finetuning._batches(4, 4, seed=0)
    assert [next(whole), next(whole)] == [[0, 1, 2, 3]] * 2


def test_template_and_no_grad_of_the_caller_are_respected() -> None:
    template = PromptTemplate(text="{input}=", answer_prefix="")
    model = oracle.shared_model("bridge", "llama")
    with torch.no_grad():
        got = trained(template=template)
    expected = oracle.loss(model, tokenise(model, EXAMPLES, template=template))
    assert got.losses[0] == pytest.approx(float(expected), rel=1e-9)
    assert got.template == template


def test_both_models_are_left_as_found(backend: str) -> None:
    model, hf_model = oracle.shared_model(backend, "llama"), tiny_hf("llama")
    before, plain = state_of(hf_model), logits_of(hf_model, [1, 5, 9])
    found = oracle.state_of(model)
    chosen = tune_fine_tuning(model, EXAMPLES, learning_rates=[0.01], steps=[1], hf_model=hf_model)
    chosen.fine_tuned.evaluate(ASKED)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        chosen.fine_tuned.applied(),
    ):
        raise RuntimeError("in the middle")
    assert state_of(hf_model) == before
    assert torch.equal(logits_of(hf_model, [1, 5, 9]), plain)
    assert oracle.state_of(model) == found


# ------------------------------------------------------------------------------------ refusals


def test_training_that_diverges_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learning_rate is 1e\+300: training diverged"):
        trained(learning_rate=1e300, steps=3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; use a positive number"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"steps": 0}, "steps is 0; use at least 1"),
        ({"batch_size": 0}, "batch_size is 0; use at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"method": "prefix"}, "method is 'prefix'; use one of"),
        ({"hf_model": tiny_hf("llama", seed=1)}, "hf_model is not the model: it gives the answer"),
        ({"hf_model": None}, "hf_model is needed for 'tiny-llama', which is not built in"),
        ({"hf_model": "no/such/model/here"}, "could not be loaded"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trained(**options)


def test_a_model_that_has_adapters_or_sits_in_the_bridge_is_refused() -> None:
    hf_model = tiny_hf("llama")
    with pytest.raises(ValueError, match="the one inside the bridge"):
        trained(hf_model=oracle.shared_model("bridge", "llama").original_model)
    with (
        adapted(hf_model, AdapterConfig(), 0),
        pytest.raises(ValueError, match="already has adapters"),
    ):
        trained(hf_model=hf_model)


def test_nothing_to_train_or_evaluate_on_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        trained(examples=[])
    with pytest.raises(ValueError, match="examples is empty"):
        tuned().evaluate([])
    with pytest.raises(ValueError, match=f"context holds {N_CTX}"):
        tuned().evaluate(ASKED, max_new_tokens=N_CTX)


# ---------------------------------------------------------------------------------- real Gemma


def test_gemma_fine_tunes_by_its_name(gemma: Any) -> None:
    split = Task.load("country-capital").split(train=2, test=2, seed=0)
    got = fine_tune(gemma, split.train, steps=2, learning_rate=3e-3)
    assert got.losses[1] < got.losses[0]
    assert got.hf_model.dtype == torch.float32
