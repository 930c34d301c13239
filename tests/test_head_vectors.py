"""Offsets of heads: probes against a slow minimiser, learnt ones against torch's own Adam."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from methods_on_tiny import EXAMPLES, heads, tokens
from tiny import tiny_model
from torch import Tensor

from tl_laai.controls import shuffled_answers
from tl_laai.head_vectors import (
    PROBE_RIDGE,
    InferenceTimeIntervention,
    LearntHeads,
    probe,
    probe_logits,
)
from tl_laai.methods import Setting
from tl_laai.prompts import DEFAULT_TEMPLATE, tokenise
from tl_laai.splits import cross_validation_folds


@pytest.fixture
def model(backend: str) -> Iterator[Any]:
    """On each backend the family with most to get wrong, left as found by every test."""
    yield from oracle.watched(oracle.shared_model(backend, "gemma"))


def slow_logits(known: Tensor, label: Tensor, asked: Tensor) -> Tensor:
    """One head's ridge logistic regression, minimised in its weights by L-BFGS."""
    centre = known.mean(dim=0)
    size = (known - centre).square().sum(dim=1).mean().sqrt()

    def features(part: Tensor) -> Tensor:
        return torch.cat([(part - centre) / size, torch.ones(len(part), 1).to(part)], dim=1)

    x = features(known)
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, label, reduction="sum")
        loss = loss + PROBE_RIDGE / 2 * w.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return (features(asked) @ w).detach()


def some_outputs(n: int, *, apart: float) -> tuple[Tensor, Tensor]:
    """Outputs of three heads, of which the second tells right from wrong."""
    generator = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(2, 3, n, 6, generator=generator, dtype=torch.float64)
    right[1] += apart
    return right, wrong


def test_probes_are_the_minimisers_of_their_loss() -> None:
    right, wrong = some_outputs(5, apart=1.0)
    known = torch.cat([right[:, :4], wrong[:, :4]], dim=1)
    asked = torch.cat([right[:, 4:], wrong[:, 4:]], dim=1)
    label = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    got = probe_logits(known, label, asked)
    for head in range(3):
        slow = slow_logits(known[head], label, asked[head])
        torch.testing.assert_close(got[head], slow, rtol=1e-6, atol=1e-6)


def test_a_probe_is_scored_on_pairs_that_it_has_not_seen() -> None:
    right, wrong = some_outputs(7, apart=4.0)
    accuracy, loss = probe(right, wrong, seed=2)
    for head in range(3):
        margins = []
        for held_out in cross_validation_folds(range(7), 5, 2):
            kept = [i for i in range(7) if i not in held_out]
            known = torch.cat([right[head, kept], wrong[head, kept]])
            label = torch.tensor([1.0] * len(kept) + [0.0] * len(kept), dtype=torch.float64)
            margins.append(slow_logits(known, label, right[head, held_out]))
            margins.append(-slow_logits(known, label, wrong[head, held_out]))
        margin = torch.cat(margins)
        assert accuracy[head].item() == pytest.approx((margin > 0).double().mean().item())
        assert loss[head].item() == pytest.approx((-margin).exp().log1p().mean().item(), rel=1e-5)
    assert accuracy[1] == 1.0
    assert accuracy[1] > accuracy[0]


def test_outputs_that_do_not_differ_are_told_apart_by_no_probe() -> None:
    same = torch.ones(2, 4, 6, dtype=torch.float64)
    _, loss = probe(same, same)
    torch.testing.assert_close(loss, torch.full_like(loss, 2.0).log())


def test_heads_are_shifted_along_their_means_by_standard_deviations(model: Any) -> None:
    setting = Setting(n_heads=3, strength=2.0)
    (edit,) = InferenceTimeIntervention().candidates(model, EXAMPLES, [setting]).values()
    assert edit.position == "every_step"
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    outputs: dict[str, Tensor] = {}
    for name, examples in (("right", EXAMPLES), ("wrong", shuffled_answers(EXAMPLES, 0))):
        texts = [DEFAULT_TEMPLATE.render(e.input) + " " + e.output for e in examples]
        outputs[name] = torch.stack(
            [
                torch.stack([heads(model, tokens(model, t), layer) for t in texts])
                for layer in range(n_layers)
            ]
        )
    right, wrong = (outputs[name].transpose(1, 2).flatten(0, 1) for name in ("right", "wrong"))
    accuracy, loss = probe(right, wrong, seed=0)
    best = sorted(range(len(accuracy)), key=lambda h: (-float(accuracy[h]), float(loss[h])))[:3]
    for index in range(n_layers * n_heads):
        layer, head = divmod(index, n_heads)
        got = edit.deltas.get(layer, torch.zeros(n_heads, model.cfg.d_head))[head]
        if index not in best:
            assert not got.any()
            continue
        difference = right[index].mean(0) - wrong[index].mean(0)
        unit = difference / difference.norm()
        spread = (torch.cat([right[index], wrong[index]]) @ unit).std(correction=0)
        torch.testing.assert_close(got, 2 * spread * unit, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
def test_learnt_offsets_are_those_of_plain_adam_over_full_forwards(
    model: Any, position: Any
) -> None:
    n_steps = 3
    settings = [
        Setting(n_heads=3, learning_rate=0.1),
        Setting(n_heads=5, learning_rate=0.02),
    ]
    method = LearntHeads(steps=n_steps, position=position)
    got = method.candidates(model, EXAMPLES, settings)
    examples = tokenise(model, EXAMPLES)
    n_layers, n_heads, d_head = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    zero = torch.zeros(n_heads, d_head, dtype=torch.float64)
    gradients = [oracle.loss_and_gradient(model, examples, at, zero)[1] for at in range(n_layers)]
    norms = torch.stack(gradients).norm(dim=-1).flatten()
    for setting, edit in got.items():
        mask = torch.zeros(n_layers * n_heads, dtype=torch.float64)
        mask[norms.argsort(descending=True)[: setting.n_heads]] = 1
        mask = mask.view(n_layers, n_heads, 1)
        leaf = torch.zeros(n_layers, n_heads, d_head, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([leaf], lr=setting.learning_rate)
        for _ in range(n_steps):
            optimiser.zero_grad()
            oracle.loss(model, examples, dict(enumerate(leaf * mask)), position).backward()
            optimiser.step()
        expected = (leaf * mask).detach()
        used = {layer for layer in range(n_layers) if expected[layer].any()}
        assert edit.position == position
        assert set(edit.deltas) == used
        for layer in used:
            torch.testing.assert_close(edit.deltas[layer], expected[layer], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_change_no_learnt_offset(backend: str, mode: Any) -> None:
    model, setting = (
        tiny_model(backend, "llama", dtype=torch.float32),
        Setting(n_heads=3, learning_rate=0.1),
    )
    with mode():
        [found] = LearntHeads(steps=2).candidates(model, EXAMPLES, [setting]).values()
    [plain] = LearntHeads(steps=2).candidates(model, EXAMPLES, [setting]).values()
    assert found.deltas.keys() == plain.deltas.keys()
    assert all(torch.equal(found.deltas[layer], own) for layer, own in plain.deltas.items())


def test_grids_keep_to_the_heads_that_there_are(model: Any) -> None:
    assert {s.n_heads for s in InferenceTimeIntervention((4, 99)).grid(model)} == {4, 16}
    assert {s.n_heads for s in LearntHeads((4, 99)).grid(model)} == {4, 16}
