"""Engines made of examples of every kind, against plain forwards over the whole prompt."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from tl_laai import packing
from tl_laai.distributions import mean_distribution
from tl_laai.evaluation import evaluate
from tl_laai.fitting import fit
from tl_laai.opinions import OptionExample
from tl_laai.problems import engine_for
from tl_laai.prompts import PromptTemplate, TaughtExample, tokenise
from tl_laai.selection import fit_auto
from tl_laai.tasks import Example, Task
from tl_laai.vocabulary import Unembedding

TEMPLATE = PromptTemplate(answer_prefix="", answer_end="")
LABELLED = Example("abc", "xy")
OPTIONS = (
    OptionExample("Tea?\nA. yes\nB. no\n:", ("A", "B"), (0.25, 0.75)),
    OptionExample("Tea?\nA. yes\nB. no\n:", ("A", "B"), (1.0, 0.0), outside_weight=0.0),
    OptionExample("Sea?\n:", ("A", "B", "C"), (0.2, 0.3, 0.5), outside_weight=0.5),
)


@pytest.fixture(scope="module", params=("llama", "neox"))
def model(request: pytest.FixtureRequest) -> Any:
    return oracle.run_once(tiny_model("bridge", request.param))


def taught(model: Any, prompt: str, answer: str, teacher: str) -> tuple[TaughtExample, Any]:
    """An example whose teacher is the model itself after another prompt; and its probabilities."""
    (tokens,) = tokenise(model, [Example(prompt, answer)], template=TEMPLATE)
    (other,) = tokenise(model, [Example(teacher, answer)], template=TEMPLATE)
    logits = oracle.logits_under_edits(
        model, [*other.prompt, *other.answer[:-1]], len(other.prompt)
    )[len(other.prompt) - 1 :]
    weight = model.unembed.W_U.detach().T
    bias = getattr(model.unembed, "b_U", None)
    # Any hidden states with these logits are teachers as good as the model's own.
    flat = logits if bias is None else logits - bias
    hidden = torch.linalg.lstsq(weight, flat.T).solution.T
    distributions = mean_distribution(hidden[None], Unembedding(weight, bias, None))
    return TaughtExample(tokens, distributions), logits.softmax(dim=-1)


def test_labels_and_teachers_are_mixed_by_their_weights(model: Any) -> None:
    example, shares = taught(model, "de", "pqr", "dedede")
    delta = oracle.random_delta(model)
    engine = engine_for(
        model, [[LABELLED, example]], layers=[1], weights=[[3.0, 1.0]], template=TEMPLATE
    )
    leaf = delta.clone().requires_grad_()
    (labelled,) = tokenise(model, [LABELLED], template=TEMPLATE)
    first = oracle.loss(model, [labelled], {1: leaf})
    sequence = [*example.tokens.prompt, *example.tokens.answer[:-1]]
    logits = oracle.logits_under_edits(model, sequence, len(example.tokens.prompt), {1: leaf})
    log_q = logits[len(example.tokens.prompt) - 1 :].log_softmax(dim=-1)
    second = F.kl_div(log_q, shares, reduction="none").sum(dim=-1).mean()
    expected = 0.75 * first + 0.25 * second
    loss, gradient = engine.value_and_grad(delta[None], torch.tensor([0]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    assert oracle.relative(gradient[0], expected_gradient) < 1e-8


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
@pytest.mark.parametrize("block", [1, 8])
def test_option_shares_are_those_of_a_plain_forward(
    model: Any, position: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = oracle.random_delta(model)
    engine = engine_for(model, [OPTIONS, OPTIONS[:1]], layers=[1, 0], position=position)
    monkeypatch.setattr(packing, "STEP_BLOCK", block)
    _, rows, steps = engine.plans((0, 1))[0].packing.grid
    assert (rows, steps) == (8, 1) if block == 8 else steps > 1
    losses, gradients = engine.value_and_grad(torch.stack([delta, -delta]), torch.tensor([0, 1]))
    for own, layer, sign, loss, gradient in zip(
        (OPTIONS, OPTIONS[:1]), (1, 0), (1, -1), losses, gradients, strict=True
    ):
        leaf = (sign * delta).requires_grad_()
        terms = []
        for example in own:
            tokens = model.to_tokens(example.prompt)[0].tolist()
            names = [model.to_tokens(n, prepend_bos=False)[0, -1].item() for n in example.names]
            logits = oracle.logits_under_edits(model, tokens, len(tokens), {layer: leaf})[-1]
            shares = torch.tensor(example.distribution, dtype=torch.float64)
            among = F.kl_div(logits[names].log_softmax(0), shares, reduction="sum")
            outside = logits.logsumexp(0) - logits[names].logsumexp(0)
            terms.append(among + example.outside_weight * outside)
        expected = torch.stack(terms).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        (expected_gradient,) = torch.autograd.grad(expected, leaf)
        assert oracle.relative(gradient, expected_gradient) < 1e-8


def test_options_among_answers_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="OptionExamples alone"):
        engine_for(model, [[LABELLED, OPTIONS[0]]], layers=[0])


def test_what_is_no_sequence_of_examples_is_refused_with_what_to_give(model: Any) -> None:
    task = Task.load("antonym")
    wrong = {
        "a Task; give some of its examples": task,
        "a Split; give some of its examples": task.split(train=4),
        "holds {'input'.* give Example": [{"input": "a", "output": "b"}],
    }
    for message, examples in wrong.items():
        for call in (
            lambda it: fit(model, it, layer=0, alpha=0.5, max_evaluations=1),
            lambda it: fit_auto(model, it),
            lambda it: evaluate(model, it),
        ):
            with pytest.raises(TypeError, match=f"examples (is )?{message}"):
                call(examples)


def test_an_option_of_several_tokens_is_refused(model: Any) -> None:
    long = OptionExample("Tea?", ("yes", "no"), (0.5, 0.5))
    with pytest.raises(ValueError, match="one token of its own"):
        engine_for(model, [[long]], layers=[0])


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        OptionExample("Tea?", ("A", "B"), (0.5, 0.4))


def test_weights_must_fit_the_rows(model: Any) -> None:
    with pytest.raises(ValueError, match="one number a row"):
        engine_for(model, [[LABELLED]], layers=[0], weights=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="not all 0"):
        engine_for(model, [[LABELLED]], layers=[0], weights=[[0.0]])
