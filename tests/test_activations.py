"""Activations at the last token and losses under many layers' Deltas, against plain hooks."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_bridge
from torch import Tensor

from tl_laai.activations import gradient_at_zero, last_token, losses_under
from tl_laai.backends import backend_of
from tl_laai.prefix import freeze

LENGTHS = ((6, 1), (9, 3), (1, 2), (13, 2))


def test_last_tokens_equal_the_models_own_cache(model: Any) -> None:
    examples = oracle.random_examples(LENGTHS)
    got = last_token(freeze(model, examples))
    for i, example in enumerate(examples):
        for layer in range(model.cfg.n_layers):
            names = (f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_z")
            seen = oracle.values_at(model, example.prompt, names)
            residual, z = (seen[name][-1] for name in names)
            torch.testing.assert_close(got.residuals[layer, i], residual, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got.z[layer, i], z, rtol=1e-9, atol=1e-9)


def test_what_heads_write_sums_to_what_attention_adds(model: Any) -> None:
    backend = backend_of(model)
    example = oracle.random_examples([(9, 1)])[0]
    z = last_token(freeze(model, [example])).z
    heads = torch.eye(backend.n_heads, dtype=z.dtype)
    for layer in range(backend.n_layers):
        whole = z[layer]
        parts = [backend.written(layer, whole * own[:, None], whole) for own in heads]
        bias = getattr(model.blocks[layer].attn, "b_O", None)
        name = f"blocks.{layer}.hook_attn_out"
        expected = oracle.values_at(model, example.prompt, [name])[name][-1]
        if bias is not None:
            expected = expected - bias
        torch.testing.assert_close(sum(parts)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_heads_write_sums_to_what_a_block_adds_that_scales_it() -> None:
    model = oracle.run_once(tiny_bridge("granite"))
    backend = backend_of(model)
    example = oracle.random_examples([(9, 1)])[0]
    z = last_token(freeze(model, [example])).z
    heads = torch.eye(backend.n_heads, dtype=z.dtype)
    for layer in range(backend.n_layers):
        parts = [backend.written(layer, z[layer] * own[:, None], z[layer]) for own in heads]
        names = [f"blocks.{layer}.hook_resid_{place}" for place in ("pre", "mid")]
        before, after = (own[-1] for own in oracle.values_at(model, example.prompt, names).values())
        torch.testing.assert_close(sum(parts)[0], after - before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
def test_losses_and_gradients_equal_full_forwards(backend: str, position: Any) -> None:
    model = oracle.shared_model(backend, "gemma")
    examples = oracle.random_examples(LENGTHS)
    deltas: dict[int, Tensor] = {
        layer: torch.stack([oracle.random_delta(model, seed=seed + layer) for seed in (1, 5)])
        for layer in (1, 3)
    }
    leaves = {layer: d.clone().requires_grad_() for layer, d in deltas.items()}
    got = losses_under(freeze(model, examples), leaves, position=position)
    got.sum().backward()
    for problem in range(2):
        slow = {layer: d[problem].clone().requires_grad_() for layer, d in deltas.items()}
        expected = oracle.loss(model, examples, slow, position)
        expected.backward()
        assert got[problem].item() == pytest.approx(expected.item(), rel=1e-10)
        for layer, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad[problem], slow[layer].grad, rtol=1e-8, atol=1e-10)


def test_the_gradient_at_zero_equals_each_layers_own(backend: str) -> None:
    model = oracle.shared_model(backend, "gemma")
    examples = oracle.random_examples(LENGTHS[:2])
    loss, gradient = gradient_at_zero(freeze(model, examples))
    for layer in range(model.cfg.n_layers):
        zero = torch.zeros_like(gradient[layer])
        expected, slow = oracle.loss_and_gradient(model, examples, layer, zero)
        assert loss == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(gradient[layer], slow, rtol=1e-8, atol=1e-10)
