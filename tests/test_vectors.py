"""Vectors of the residual stream against plain hooks, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from methods_on_tiny import EXAMPLES, heads, prompt_after, residual, tokens

from tl_laai.activations import last_token
from tl_laai.controls import shuffled_answers
from tl_laai.decoding import answer_log_probabilities
from tl_laai.edits import Edit
from tl_laai.methods import Setting, leave_one_out
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, tokenise
from tl_laai.vectors import (
    FunctionVector,
    InContextVector,
    MeanDifference,
    TaskVector,
    average_indirect_effects,
)


@pytest.fixture
def model(backend: str) -> Iterator[Any]:
    """Plain residual wiring, left as found by every test."""
    yield from oracle.watched(oracle.shared_model(backend, "llama"))


def others(i: int, examples: Any = EXAMPLES) -> list[Any]:
    return [e for j, e in enumerate(examples) if j != i]


def slow_effects(model: Any, n_tokens: int = 1) -> torch.Tensor:
    """Average indirect effects, one head, one prompt and one full forward at a time.

    On the probability of each answer's first tokens; its very first is the space.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    effects = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    wrong = shuffled_answers(EXAMPLES, 0)
    for layer in range(n_layers):
        clean = [
            heads(model, prompt_after(model, others(i), e.input), layer)
            for i, e in enumerate(EXAMPLES)
        ]
        mean = torch.stack(clean).mean(dim=0)
        for i, example in enumerate(EXAMPLES):
            prompt = prompt_after(model, others(i, wrong), example.input)
            asked = DEFAULT_TEMPLATE.render("q")
            answer = tokens(model, f"{asked} {example.output}")[len(tokens(model, asked)) :]
            answer = answer[:n_tokens]
            own = heads(model, prompt, layer)

            def likely(deltas: Any = None, prompt: Any = prompt, answer: Any = answer) -> Any:
                read = [*prompt, *answer[:-1]]
                logits = oracle.logits_under_edits(model, read, len(prompt), deltas or {})
                found = logits[len(prompt) - 1 :].softmax(-1)
                return torch.stack([found[k, token] for k, token in enumerate(answer)]).prod()

            for head in range(n_heads):
                delta = torch.zeros_like(own)
                delta[head] = mean[head] - own[head]
                effects[layer, head] += (likely({layer: delta}) - likely()) / len(EXAMPLES)
    return effects


def test_a_function_vector_is_what_the_heads_of_largest_effect_write(model: Any) -> None:
    effects = slow_effects(model, 2)  # all answers begin with a space, which is a token here
    assert not torch.equal(effects, slow_effects(model))
    top = effects.flatten().argsort(descending=True)[:3].tolist()
    total = torch.zeros(model.cfg.d_model, dtype=torch.float64)
    for index in top:
        layer, head = divmod(index, model.cfg.n_heads)
        W_O = model.blocks[layer].attn.W_O[head]
        for i, example in enumerate(EXAMPLES):
            z = heads(model, prompt_after(model, others(i), example.input), layer)
            total += z[head] @ W_O / len(EXAMPLES)
    settings = [Setting(layer=at, n_heads=3, strength=s) for at in (1, 2) for s in (1.0, 0.5)]
    got = FunctionVector().candidates(model, EXAMPLES, settings)
    assert list(got) == settings
    for setting, edit in got.items():
        assert edit.position == "prompt_end"
        assert list(edit.residual) == [setting.layer]
        expected = setting.strength * total
        torch.testing.assert_close(edit.residual[setting.layer], expected, rtol=1e-8, atol=1e-8)


def test_average_indirect_effects_equal_patching_heads_one_by_one(model: Any) -> None:
    mean = last_token(freeze(model, leave_one_out(model, EXAMPLES, EXAMPLES))).z.mean(dim=1)
    wrong = leave_one_out(model, EXAMPLES, shuffled_answers(EXAMPLES, 0))
    prompts = freeze(model, [replace(e, answer=e.answer[:1]) for e in wrong])
    got = average_indirect_effects(prompts, mean)
    torch.testing.assert_close(got, slow_effects(model), rtol=1e-7, atol=1e-12)
    assert float(got.abs().max()) > 1e-4  # heads do something


def test_a_head_that_is_patched_with_its_own_output_has_no_effect(model: Any) -> None:
    prompts = freeze(model, tokenise(model, EXAMPLES[:1]))
    effects = average_indirect_effects(prompts, last_token(prompts).z[:, 0])
    assert float(effects.abs().max()) < 1e-12


def test_a_task_vector_is_the_mean_residual_behind_demonstrations(model: Any) -> None:
    got = TaskVector().candidates(model, EXAMPLES)
    assert [s.layer for s in got] == [1, 2]
    for setting, edit in got.items():
        layer = setting.layer
        seen = [
            residual(model, prompt_after(model, others(i), e.input), layer)
            for i, e in enumerate(EXAMPLES)
        ]
        assert edit.position == "prompt_end"
        expected = torch.stack(seen).mean(dim=0)
        torch.testing.assert_close(edit.replace[layer], expected, rtol=1e-9, atol=1e-9)


def test_a_residual_written_over_itself_changes_nothing(model: Any) -> None:
    prompts = freeze(model, tokenise(model, EXAMPLES[:1]))
    own = last_token(prompts).residuals[:, 0]
    edits = [Edit(), *(Edit(replace={layer: own[layer]}) for layer in range(len(own)))]
    scores = answer_log_probabilities(prompts, edits)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=1e-10, atol=0)


def test_an_in_context_vector_is_the_main_direction_from_inputs_to_outputs(model: Any) -> None:
    layers = range(1, model.cfg.n_layers)
    rows = [
        torch.cat(
            [
                residual(model, tokens(model, e.output), layer)
                - residual(model, tokens(model, e.input), layer)
                for layer in layers
            ]
        ).numpy()
        for e in EXAMPLES
    ]
    flat = np.stack(rows)
    direction = np.linalg.eigh(flat.T @ flat)[1][:, -1]
    direction *= np.sign(flat.mean(axis=0) @ direction)
    by_layer = torch.tensor(direction).view(len(layers), -1)
    setting = Setting(strength=0.2)
    (edit,) = InContextVector().candidates(model, EXAMPLES, [setting]).values()
    assert edit.position == "every_step"
    assert list(edit.residual) == list(layers)
    for layer, part in zip(layers, by_layer, strict=True):
        norms = [residual(model, prompt_after(model, (), e.input), layer).norm() for e in EXAMPLES]
        expected = 0.2 * torch.stack(norms).mean() * part / part.norm()
        torch.testing.assert_close(edit.residual[layer], expected, rtol=1e-6, atol=1e-8)


def test_an_in_context_vector_needs_outputs_that_are_not_their_inputs(model: Any) -> None:
    same = [replace(e, output=e.input) for e in EXAMPLES]
    with pytest.raises(ValueError, match="outputs are their inputs"):
        InContextVector().candidates(model, same, [Setting(strength=0.2)])


def test_a_mean_difference_is_right_less_wrong_answers(model: Any) -> None:
    wrong = shuffled_answers(EXAMPLES, 0)
    setting = Setting(layer=2, strength=3.0)
    (edit,) = MeanDifference().candidates(model, EXAMPLES, [setting]).values()

    def mean(examples: Any) -> torch.Tensor:
        texts = [DEFAULT_TEMPLATE.render(e.input) + " " + e.output for e in examples]
        return torch.stack([residual(model, tokens(model, t), 2) for t in texts]).mean(dim=0)

    expected = 3 * (mean(EXAMPLES) - mean(wrong))
    assert edit.position == "every_step"
    torch.testing.assert_close(edit.residual[2], expected, rtol=1e-8, atol=1e-8)


def test_right_and_wrong_answers_cancel_before_they_are_compared(model: Any) -> None:
    # The embeddings of the answers' last tokens are the same on both sides.
    (edit,) = (
        MeanDifference().candidates(model, EXAMPLES, [Setting(layer=0, strength=1.0)]).values()
    )
    assert float(edit.residual[0].abs().max()) < 1e-12


@pytest.mark.parametrize("method", [FunctionVector(), MeanDifference()])
def test_grids_hold_every_combination_once(model: Any, method: Any) -> None:
    grid = method.grid(model)
    n_heads = len({s.n_heads for s in grid})
    assert (
        len(set(grid))
        == len(grid)
        == n_heads * len({s.layer for s in grid}) * len(method.strengths)
    )
