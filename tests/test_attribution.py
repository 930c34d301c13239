"""Attribution and ablation on tiny models, against the engine, differences and plain hooks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from tl_laai.attribution import Ablation, ablate_heads, attribute
from tl_laai.engine import Engine
from tl_laai.evaluation import Evaluation, evaluate
from tl_laai.fingerprints import fingerprint
from tl_laai.interventions import Intervention
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prefix import freeze
from tl_laai.prompts import PromptTemplate, TokenisedExample, tokenise
from tl_laai.tasks import Example

# Prompts and answers of several lengths, so that means over tokens and over examples differ.
EXAMPLES = tuple(Example(a, b) for a, b in (("ab", "x"), ("cdefg", "yzw"), ("h", "vu")))
LAYER = 1
N_NEW = 3


# --- attribution ---------------------------------------------------------------------------------


def test_values_are_the_thresholds_of_the_engines_gradient_at_each_layer(model: Any) -> None:
    n_layers, n_heads, d_head = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head
    engine = Engine(
        freeze(model, tokenise(model, EXAMPLES)),
        layers=range(n_layers),
        rows=[range(len(EXAMPLES))] * n_layers,
    )
    zero = torch.zeros(n_layers, n_heads, d_head, dtype=torch.float64)
    losses, gradient = engine.value_and_grad(zero, torch.arange(n_layers))
    got = attribute(model, EXAMPLES)
    assert got.values.shape == (n_layers, n_heads)
    torch.testing.assert_close(got.values, gradient.norm(dim=-1), rtol=1e-9, atol=0)
    assert got.loss == pytest.approx(losses[0].item(), rel=1e-12)
    assert got.n_examples == 3
    assert torch.equal(got.by_layer, torch.stack([layer.max() for layer in got.values]))
    for ratio in (0.01, 1.0):
        mixed = attribute(model, EXAMPLES, l1_ratio=ratio).values
        slow = SparseGroupLasso.from_ratio(1.0, ratio).head_thresholds(gradient)
        torch.testing.assert_close(mixed, slow, rtol=1e-9, atol=0)
        assert bool((mixed < got.values).all())


def test_values_are_the_slopes_of_full_forwards(windowed: Any) -> None:
    """Central differences: along its own gradient a head's loss falls at the rate of its value."""
    model = windowed
    tokenised, got = tokenise(model, EXAMPLES), attribute(model, EXAMPLES)
    shape = (model.cfg.n_heads, model.cfg.d_head)
    step = 1e-5
    for layer, head in ((0, 1), (2, 3), (3, 0)):
        slopes = torch.zeros(shape[1], dtype=torch.float64)
        for entry in range(shape[1]):
            delta = torch.zeros(shape, dtype=torch.float64)
            delta[head, entry] = step
            with torch.no_grad():
                up = oracle.loss(model, tokenised, {layer: delta})
                down = oracle.loss(model, tokenised, {layer: -delta})
            slopes[entry] = (up - down) / (2 * step)
        assert got.values[layer, head].item() == pytest.approx(slopes.norm().item(), rel=1e-6)
    assert got.loss == pytest.approx(oracle.loss(model, tokenised).item(), rel=1e-12)


def test_the_template_is_the_callers(windowed: Any) -> None:
    template = PromptTemplate(text="{input}=", answer_prefix="", answer_end="")
    examples = tokenise(windowed, EXAMPLES, template=template)
    got = attribute(windowed, EXAMPLES, template=template)
    assert got.loss == pytest.approx(oracle.loss(windowed, examples).item(), rel=1e-12)


def test_float32_models_are_attributed_in_float32_and_reported_in_float64(backend: str) -> None:
    model = tiny_model(backend, "llama", dtype=torch.float32)
    got = attribute(model, EXAMPLES)
    assert got.values.dtype == torch.float64
    wide = attribute(tiny_model(backend, "llama"), EXAMPLES)
    torch.testing.assert_close(got.values, wide.values, rtol=1e-3, atol=1e-5)


def test_without_examples_nothing_is_attributed(windowed: Any) -> None:
    with pytest.raises(ValueError, match="examples must hold at least one example"):
        attribute(windowed, ())


# --- ablation ------------------------------------------------------------------------------------


@functools.cache
def intervention_of(backend: str, position: Any = "prompt_end") -> Intervention:
    """Three heads of four, of clearly different norms: 2 the strongest, then 0, then 3."""
    model = oracle.shared_model(backend, "gemma")
    delta = oracle.random_delta(model, seed=3)
    delta = delta / delta.norm(dim=-1, keepdim=True)
    delta *= torch.tensor([2.0, 0.0, 3.0, 1.0], dtype=torch.float64)[:, None]
    return Intervention({LAYER: delta}, position, fingerprint(model))


@functools.cache
def ablations_of(backend: str, position: Any = "prompt_end") -> tuple[Ablation, ...]:
    return ablate_heads(
        oracle.shared_model(backend, "gemma"),
        intervention_of(backend, position),
        EXAMPLES,
        max_new_tokens=N_NEW,
    )


def assert_same(got: Evaluation, expected: Evaluation) -> None:
    assert [row.prediction for row in got.rows] == [row.prediction for row in expected.rows]
    assert [row.correct for row in got.rows] == [row.correct for row in expected.rows]
    assert got.log_probability == pytest.approx(expected.log_probability, rel=1e-10)


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
def test_variants_are_evaluations_of_the_interventions_that_they_name(
    backend: str, position: str, windowed: Any
) -> None:
    whole = intervention_of(backend, position)

    def plain(intervention: Intervention | None) -> Evaluation:
        return evaluate(windowed, EXAMPLES, intervention=intervention, max_new_tokens=N_NEW)

    variants = {(a.variant, a.heads): a.evaluation for a in ablations_of(backend, position)}
    assert list(variants) == [
        ("none", ()),
        ("all", (2, 0, 3)),
        *[(name, (head,)) for head in (2, 0, 3) for name in ("without", "only")],
        *[("cumulative", heads) for heads in ((2,), (2, 0), (2, 0, 3))],
        *[(name, (head,)) for head in range(4) for name in ("zero", "mean")],
    ]
    assert_same(variants["none", ()], plain(None))
    assert_same(variants["all", (2, 0, 3)], plain(whole))
    for head in (2, 0, 3):
        assert_same(variants["without", (head,)], plain(whole.without_heads([(LAYER, head)])))
        assert_same(variants["only", (head,)], plain(whole.only_heads([(LAYER, head)])))
    assert_same(variants["cumulative", (2,)], variants["only", (2,)])
    assert_same(variants["cumulative", (2, 0)], plain(whole.without_heads([(LAYER, 3)])))
    assert_same(variants["cumulative", (2, 0, 3)], variants["all", (2, 0, 3)])
    scores = {round(own.log_probability, 9) for own in variants.values()}
    assert len(scores) == len(variants) - 3  # all differ, but (2,), (2, 0) and (2, 0, 3) come twice


def replaced_head(head: int, end: int, value: Tensor) -> Callable[..., Tensor]:
    """A hook that puts `value` for one head's z at one position."""

    def hook_z(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[0, end, head] = value
        return z

    return hook_z


def slow_score(model: Any, example: TokenisedExample, head: int, value: Tensor) -> float:
    """Log-probability of an answer while one head's output at the prompt's end is replaced."""
    end = len(example.prompt) - 1
    tokens = torch.tensor([[*example.prompt, *example.answer]])
    hooks = [(f"blocks.{LAYER}.attn.hook_z", replaced_head(head, end, value))]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[0]
    steps = logits.log_softmax(dim=-1)[end : end + len(example.answer)]
    return math.fsum(steps[i, token].item() for i, token in enumerate(example.answer))


def slow_first_token(model: Any, example: TokenisedExample, head: int, value: Tensor) -> int:
    hooks = [(f"blocks.{LAYER}.attn.hook_z", replaced_head(head, len(example.prompt) - 1, value))]
    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([example.prompt]), return_type="logits", fwd_hooks=hooks
        )
    return int(logits[0, -1].argmax())


@pytest.mark.parametrize("position", ["prompt_end", "every_step"])
def test_the_models_own_heads_are_replaced_at_the_last_prompt_token(
    backend: str, position: str, windowed: Any
) -> None:
    model, tokenised = windowed, tokenise(windowed, EXAMPLES)
    ends: list[Tensor] = []

    def keep(z: Tensor, hook: Any) -> Tensor:
        ends.append(z[0, -1])
        return z

    for example in tokenised:
        with torch.no_grad():
            hooks = [(f"blocks.{LAYER}.attn.hook_z", keep)]
            model.run_with_hooks(torch.tensor([example.prompt]), fwd_hooks=hooks)
    mean = torch.stack(ends).mean(dim=0)
    own = {(a.variant, a.heads): a.evaluation for a in ablations_of(backend, position)}
    for head in range(4):
        for name, value in (("zero", torch.zeros_like(mean[head])), ("mean", mean[head])):
            rows = own[name, (head,)].rows
            for row, example in zip(rows, tokenised, strict=True):
                slow = slow_score(model, example, head, value)
                assert row.log_probability == pytest.approx(slow, rel=1e-9)
                first = model.tokenizer.decode([slow_first_token(model, example, head, value)])
                if first.isascii() and first.strip() and not first.startswith("<"):
                    assert row.prediction.startswith(first)


def test_an_intervention_of_zeros_has_no_head_to_leave_out(backend: str, windowed: Any) -> None:
    none = intervention_of(backend).zeros_like()
    variants = ablate_heads(windowed, none, EXAMPLES[:1], max_new_tokens=1)
    assert [a.variant for a in variants[:2]] == ["none", "all"]
    assert {a.variant for a in variants[2:]} == {"zero", "mean"}
    assert_same(variants[1].evaluation, variants[0].evaluation)


def test_an_intervention_at_two_layers_is_refused(backend: str, windowed: Any) -> None:
    one = intervention_of(backend)
    two = Intervention({0: one.deltas[LAYER], 2: one.deltas[LAYER]}, "prompt_end", one.fingerprint)
    with pytest.raises(ValueError, match=r"edits layers \[0, 2\]; heads are ablated at one layer"):
        ablate_heads(windowed, two, EXAMPLES)


def test_another_models_intervention_is_refused(backend: str, windowed: Any) -> None:
    other = tiny_model(backend, "gemma", seed=1)
    foreign = Intervention(dict(intervention_of(backend).deltas), "prompt_end", fingerprint(other))
    with pytest.raises(ValueError, match="different weights"):
        ablate_heads(windowed, foreign, EXAMPLES)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_change_no_attribution(backend: str, mode: Any) -> None:
    model = tiny_model(backend, "llama", dtype=torch.float32)
    with mode():
        found = attribute(model, EXAMPLES)
    plain = attribute(model, EXAMPLES)
    assert torch.equal(found.values, plain.values)
    assert found.loss == plain.loss
