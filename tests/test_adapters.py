"""Adapters in Hugging Face models: padded forwards against single ones, and the way back."""

from __future__ import annotations

import sys
from typing import Any

import oracle
import pytest
import torch
from tiny import N_CTX, tiny_hf, tiny_tokenizer

from tl_laai import adapters
from tl_laai.adapters import AdapterConfig, adapted, answer_loss, greedy_answers, token_losses
from tl_laai.decoding import EndTokens

EXAMPLES = oracle.random_examples([(3, 2), (9, 1), (5, 4), (7, 3)])
TOKENS = torch.tensor([[1, 40, 77, 5, 201, 30, 12, 9]])

pytest.importorskip("peft", reason="peft is not installed")


class Speaker:
    """What `EndTokens` needs of a model."""

    tokenizer = tiny_tokenizer()


def logits_of(hf_model: Any, tokens: Any) -> torch.Tensor:
    """Logits `[pos, d_vocab]` of one sequence by the model's own forward, without padding."""
    with torch.no_grad():
        return hf_model(torch.as_tensor(tokens).view(1, -1), use_cache=False).logits[0]


def slow_losses(hf_model: Any, example: Any) -> torch.Tensor:
    logits = logits_of(hf_model, [*example.prompt, *example.answer])
    rows = logits.log_softmax(-1)[len(example.prompt) - 1 : -1]
    return -torch.stack([row[token] for row, token in zip(rows, example.answer, strict=True)])


def slow_answer(hf_model: Any, prompt: Any, ends: EndTokens, length: int) -> tuple[int, ...]:
    written: list[int] = []
    for _ in range(length):
        token = int(logits_of(hf_model, [*prompt, *written])[-1].argmax())
        belongs, is_last = ends(token)
        written += [token] * belongs
        if is_last:
            break
    return tuple(written)


def state_of(hf_model: Any) -> dict[str, Any]:
    """All that an adapter could leave behind."""
    return {
        "parameters": {n: (id(p), p.requires_grad) for n, p in hf_model.named_parameters()},
        "grads": [p.grad is None for p in hf_model.parameters()],
        "modules": {n: (id(m), m.training) for n, m in hf_model.named_modules()},
        "attributes": sorted(vars(hf_model)),
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


def shaken(hf_model: Any, scale: float = 0.2) -> None:
    """Move an adapter away from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (scale * noise).to(parameter)


# ------------------------------------------------------------------------------------ forwards


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_scores_and_answers_as_one_by_one(family: str, attention: str) -> None:
    hf_model = tiny_hf(family)
    hf_model.set_attn_implementation(attention)
    ends = EndTokens(Speaker())
    with torch.no_grad():
        batched = token_losses(hf_model, EXAMPLES)
        answers = greedy_answers(hf_model, EXAMPLES, ends, 7)
    for example, got, answer in zip(EXAMPLES, batched, answers, strict=True):
        # sdpa sums in another order for another width; measured 1e-15 and 2e-15 relative
        torch.testing.assert_close(got, slow_losses(hf_model, example), rtol=1e-9, atol=1e-9)
        assert answer == slow_answer(hf_model, example.prompt, ends, 7)
    assert len(set(answers)) > 1


def test_an_answer_ends_where_its_text_ends() -> None:
    hf_model = tiny_hf("llama")
    with torch.no_grad():
        [first] = greedy_answers(hf_model, EXAMPLES[:1], lambda _: (True, True), 5)
        assert len(first) == 1
        assert greedy_answers(hf_model, EXAMPLES, lambda _: (False, True), 5) == [()] * 4


def test_the_mean_is_over_an_answers_tokens_then_over_examples() -> None:
    hf_model = tiny_hf("qwen2")
    slow = torch.stack([slow_losses(hf_model, e).mean() for e in EXAMPLES]).mean()
    with torch.no_grad():
        assert float(answer_loss(hf_model, EXAMPLES)) == pytest.approx(float(slow), rel=1e-9)


# ------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_leaves_nothing(
    family: str, method: Any
) -> None:
    hf_model = tiny_hf(family)
    before, plain = state_of(hf_model), logits_of(hf_model, TOKENS)
    with adapted(hf_model, AdapterConfig(method), 0) as inside:
        fresh = logits_of(inside, TOKENS)
        torch.testing.assert_close(fresh, plain, rtol=1e-12, atol=1e-12)
        names = [name for name, p in inside.named_parameters() if p.requires_grad]
        assert names
        assert all(("lora_" if method == "lora" else "ia3_") in name for name in names)
        shaken(inside)
        assert (logits_of(inside, TOKENS) - fresh).abs().max() > 1e-3
    assert state_of(hf_model) == before
    assert torch.equal(logits_of(hf_model, TOKENS), plain)


def test_the_model_is_left_as_found_when_something_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = tiny_hf("gpt2").train().requires_grad_(True)
    hf_model.transformer.h[1].eval()
    before = state_of(hf_model)
    with adapted(hf_model, AdapterConfig(), 0) as inside:
        assert not any(module.training for module in inside.modules())
        inside.forgotten = 1
    assert state_of(hf_model) == before
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        adapted(hf_model, AdapterConfig(), 0),
    ):
        raise RuntimeError("in the middle")
    assert state_of(hf_model) == before
    with (
        pytest.raises(ValueError, match="no_such_layer"),
        adapted(hf_model, AdapterConfig(target_modules=["no_such_layer"]), 0),
    ):
        pass
    assert state_of(hf_model) == before
    peft = adapters.import_peft()
    inject = peft.inject_adapter_in_model

    def half_way(config: Any, model: Any) -> None:
        inject(config, model)
        raise RuntimeError("half way")

    monkeypatch.setattr(peft, "inject_adapter_in_model", half_way)
    with (
        pytest.raises(RuntimeError, match="half way"),
        adapted(hf_model, AdapterConfig(), 0),
    ):
        pass
    assert state_of(hf_model) == before


def test_the_seed_draws_the_adapter_and_nothing_else() -> None:
    hf_model = tiny_hf("llama")

    def drawn(seed: int) -> list[torch.Tensor]:
        with adapted(hf_model, AdapterConfig(), seed) as inside:
            return [p.detach().clone() for p in inside.parameters() if p.requires_grad]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_adapters_of_half_precision_models_are_kept_in_float32() -> None:
    with adapted(tiny_hf("llama", torch.bfloat16), AdapterConfig(), 0) as inside:
        assert {p.dtype for p in inside.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in inside.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert bool(torch.isfinite(answer_loss(inside, EXAMPLES)))


def test_target_modules_and_rank_say_which_weights_are_trained() -> None:
    config = AdapterConfig(rank=3, target_modules="all-linear")
    with adapted(tiny_hf("llama"), config, 0) as inside:
        trained = {n: p for n, p in inside.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2  # layers, linear maps of each, two factors
    assert {min(p.shape) for p in trained.values()} == {3}


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "bitfit"}, "method is 'bitfit'; use one of"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank must be 0 or more"),
        ({"method": "ia3", "target_modules": "all-linear"}, "goes with method='lora' only"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdapterConfig(**options)


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'tl_laai\[baselines\]'"):
        adapters.import_peft()


def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be loaded"):
        adapters.hugging_face_model(tmp_path)


def test_a_checkpoint_folder_gives_its_model_frozen(tmp_path: Any) -> None:
    hf_model = tiny_hf("llama", torch.float32)
    with adapters.quiet(progress_bars=False):
        hf_model.save_pretrained(tmp_path)
    loaded = adapters.hugging_face_model(tmp_path)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits_of(loaded, TOKENS), logits_of(hf_model, TOKENS))
    assert loaded.config.max_position_embeddings == N_CTX
