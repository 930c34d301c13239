"""Backends: each piece of a model that they expose, against the model's own forward."""

from __future__ import annotations

import gc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import tiny
import torch
from conftest import needs_hooked
from tiny import N_CTX, SLIDING_WINDOW, tiny_bridge, tiny_model
from torch import Tensor, nn

from tl_laai.backends import backend_of, rank_within
from tl_laai.decoding import answer_log_probabilities
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.prefix import freeze

TOKENS = torch.tensor([[5, 9, 200, 31, 7, 8, 66, 120, 77]])


def nothing(*_: Any) -> None:
    """A callback that does nothing."""


def capture_all(backend: Any, tokens: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    blocks: list[Tensor] = []
    attentions: list[Tensor] = []
    final = backend.capture(
        tokens,
        at_block=lambda _, x: blocks.append(x.clone()),
        at_attention=lambda _, x: attentions.append(x.clone()),
    )
    return blocks, attentions, final


# ------------------------------------------------------------------------------ what it reads


def test_logits_are_the_models_own(model: Any) -> None:
    expected = oracle.logits_under_edits(model, TOKENS[0].tolist(), 1)
    assert torch.equal(backend_of(model).logits(TOKENS)[0], expected)


def test_capture_sees_every_residual_and_what_is_unembedded(model: Any) -> None:
    backend = backend_of(model)
    blocks, attentions, final = capture_all(backend, TOKENS)
    assert len(blocks) == len(attentions) == model.cfg.n_layers
    for layer, residual in enumerate(blocks):
        own = oracle.activations(model, TOKENS, f"blocks.{layer}.hook_resid_pre")
        torch.testing.assert_close(residual, own, rtol=1e-12, atol=1e-12)
    head = backend.unembedding()
    logits = final @ head.weight.T + (0 if head.bias is None else head.bias)
    torch.testing.assert_close(logits, backend.logits(TOKENS), rtol=1e-11, atol=1e-11)


def test_packed_tokens_embed_as_in_a_sequence_at_any_positions(model: Any) -> None:
    tokens = torch.tensor([9, 44, 9, 120, 7])
    positions = torch.tensor([3, 0, 3, 11, 0])  # positions repeat and are in no order
    got = backend_of(model).embed(tokens, positions)
    for token, position, residual in zip(tokens, positions, got, strict=True):
        sequence = torch.full((1, int(position) + 1), 65)
        sequence[0, -1] = token
        own = oracle.activations(model, sequence, "blocks.0.hook_resid_pre")[0, -1]
        torch.testing.assert_close(residual, own, rtol=1e-12, atol=1e-12)


def test_packed_blocks_with_plain_causal_attention_are_the_models_own(model: Any) -> None:
    """With attention written out as loops, one sequence packed equals the model's forward."""
    backend = backend_of(model)
    backend.ensure_positions(TOKENS.shape[1])
    n = TOKENS.shape[1]
    positions = torch.arange(n)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rule = backend.rule(layer)
        out = torch.zeros(n, backend.n_heads, backend.d_head, dtype=q.dtype)
        for head in range(backend.n_heads):
            shared = head // (backend.n_heads // backend.n_kv_heads)
            for query in range(n):
                first = 0 if rule.window is None else max(0, query - rule.window + 1)
                scores = k[first : query + 1, shared] @ q[query, head] * rule.scale
                out[query, head] = scores.softmax(dim=0) @ v[first : query + 1, shared]
        return out

    blocks, _, final = capture_all(backend, TOKENS)
    x = backend.embed(TOKENS[0], positions)
    with torch.no_grad(), backend.attending(attend, [positions] * backend.n_layers):
        for layer in range(backend.n_layers):
            torch.testing.assert_close(x, blocks[layer][0], rtol=1e-10, atol=1e-11)
            x = backend.call_block(layer, x)
        x = backend.final_norm(x)
    torch.testing.assert_close(x, final[0], rtol=1e-10, atol=1e-11)


def test_windows_are_those_of_the_layers(backend: str) -> None:
    gemma = backend_of(oracle.shared_model(backend, "gemma"))
    windows = [gemma.rule(layer).window for layer in range(4)]
    assert windows == [SLIDING_WINDOW, SLIDING_WINDOW, None, SLIDING_WINDOW]
    llama = backend_of(oracle.shared_model(backend, "llama"))
    assert [llama.rule(layer).window for layer in range(3)] == [None] * 3


def test_unembedding_is_a_view_of_the_models_own_memory(model: Any) -> None:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weight = backend_of(model).unembedding().weight
    assert weight.untyped_storage().data_ptr() in own
    assert not weight.requires_grad


@pytest.mark.parametrize("groups", [[], [0], [2, 0, 2, 2, 0], [1, 1, 1]])
def test_rank_within_counts_earlier_entries_of_the_same_group(groups: list[int]) -> None:
    slow = [groups[:i].count(group) for i, group in enumerate(groups)]
    assert rank_within(torch.tensor(groups, dtype=torch.long)).tolist() == slow


# ------------------------------------------------------------------------------ left as found


def test_capture_removes_its_hooks_also_when_a_callback_raises(model: Any) -> None:
    before = oracle.state_of(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        backend_of(model).capture(TOKENS, at_block=nothing, at_attention=fails)
    assert oracle.state_of(model) == before
    expected = oracle.logits_under_edits(model, TOKENS[0].tolist(), 1)
    assert bool(expected.isfinite().all())


def test_attending_gives_every_attention_its_forward_back(model: Any) -> None:
    backend = backend_of(model)
    before = oracle.state_of(model)

    def fails_within() -> None:
        with backend.attending(nothing, []):
            assert "forward" in vars(backend.attention(0))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails_within()
    assert oracle.state_of(model) == before


def test_a_forward_that_another_library_put_there_is_kept(backend: str) -> None:
    """Accelerate, for one, replaces `forward` on the modules of a dispatched model."""
    model = tiny_model(backend, "llama")
    attention = backend_of(model).attention(1)
    found = types.MethodType(type(attention).forward, attention)
    vars(attention)["forward"] = found
    freeze(model, oracle.random_examples([(6, 2)]))
    assert vars(attention)["forward"] is found
    assert "forward" not in vars(backend_of(model).attention(0))


def test_a_model_in_train_mode_runs_without_dropout_and_stays_in_train_mode(backend: str) -> None:
    model = oracle.run_once(tiny_model(backend, "gpt2"))  # this family's configuration drops 10 %
    plain = backend_of(model).logits(TOKENS)
    model.train()
    before = oracle.state_of(model)
    assert torch.equal(backend_of(model).logits(TOKENS), plain)
    prompts = freeze(model, oracle.random_examples([(6, 2), (4, 1)]))
    prompts.enter_at([2])
    assert oracle.state_of(model) == before
    model.eval()
    again = freeze(model, oracle.random_examples([(6, 2), (4, 1)]))
    again.enter_at([2])
    assert torch.equal(prompts.residuals[2], again.residuals[2])


# ------------------------------------------------------------------------- one backend a model


def test_a_model_has_one_backend_which_does_not_keep_it_alive(backend: str) -> None:
    model = tiny_model(backend, "gpt2")
    assert backend_of(model) is backend_of(model)
    freeze(model, oracle.random_examples([(6, 2)]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_cast_to_another_dtype_is_looked_at_afresh(backend: str) -> None:
    model = tiny_model(backend, "llama")
    examples = oracle.random_examples([(6, 2)])
    assert freeze(model, examples).keys[0].dtype == torch.float64
    model.to(torch.float32)
    prompts = freeze(model, examples)
    assert prompts.keys[0].dtype == torch.float32
    assert prompts.backend.dtype == torch.float32


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "gpt2", None])
def test_another_class_of_model_is_refused_with_what_to_do(model: Any) -> None:
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}.*load_model"):
        backend_of(model)


@pytest.mark.parametrize("flag", ["use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"])
def test_inputs_split_by_head_are_refused_whenever_they_are_switched_on(
    backend: str, flag: str
) -> None:
    model = tiny_model(backend, "gpt2")
    freeze(model, oracle.random_examples([(6, 2)]))
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(ValueError, match=rf"{flag} is True.*set_{flag}\(False\)"):
        freeze(model, oracle.random_examples([(6, 2)]))
    getattr(model, f"set_{flag}")(False)
    freeze(model, oracle.random_examples([(6, 2)]))


@needs_hooked
def test_ungrouped_queries_are_refused_whenever_they_are_switched_on() -> None:
    examples = oracle.random_examples([(6, 2)])
    model = tiny_model("hooked", "llama")
    freeze(model, examples)
    model.set_ungroup_grouped_query_attention(True)
    with pytest.raises(ValueError, match=r"is True.*set_ungroup_grouped_query_attention\(False\)"):
        freeze(model, examples)
    model.set_ungroup_grouped_query_attention(False)
    freeze(model, examples)
    plain = tiny_model("hooked", "gpt2")  # has no groups
    plain.set_ungroup_grouped_query_attention(True)
    freeze(plain, examples)


def test_results_split_by_head_change_nothing(backend: str) -> None:
    model = tiny_model(backend, "llama")
    examples = oracle.random_examples([(7, 2), (5, 1)])
    plain = freeze(model, examples)
    model.set_use_attn_result(True)
    split = freeze(model, examples)
    for prompts in (plain, split):
        prompts.enter_at([2])
    torch.testing.assert_close(plain.residuals[2], split.residuals[2])


def hooked_model(**changes: Any) -> Any:
    """A random two-layer `HookedTransformer` with a changed configuration."""
    if not tiny.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_vocab": 300}
    cfg |= {"act_fn": "gelu", "dtype": torch.float64, "seed": 0, "device": "cpu"}
    with tiny._quiet():
        return HookedTransformer(HookedTransformerConfig(**(cfg | changes))).eval()


def assert_exact(model: Any) -> None:
    """Loss and gradient equal the full forward's."""
    prompts = freeze(model, oracle.random_examples([(9, 3), (5, 1)]))
    delta = oracle.random_delta(model)
    engine = Engine(prompts, layers=[0], rows=[[0, 1]], position="every_step")
    loss, gradient = engine.value_and_grad(delta[None], torch.tensor([0]))
    expected = oracle.loss_and_gradient(model, prompts.examples, 0, delta, "every_step")
    assert loss.item() == pytest.approx(expected[0], rel=1e-10)
    assert oracle.relative(gradient[0], expected[1]) < 1e-10


@pytest.mark.parametrize("kind", ["alibi", "shortformer"])
def test_positions_that_depend_on_the_pair_of_tokens_are_refused(kind: str) -> None:
    model = hooked_model(positional_embedding_type=kind)
    with pytest.raises(ValueError, match=rf"positional_embedding_type is '{kind}'.*'rotary'"):
        backend_of(model)


def test_attention_in_both_directions_is_refused_by_its_results() -> None:
    model = hooked_model(attention_dir="bidirectional")
    with pytest.raises(ValueError, match="its own forward and the frozen-prefix engine differ"):
        freeze(model, oracle.random_examples([(9, 3)]))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_only": True},
        {"normalization_type": None},
        {"normalization_type": "RMS"},
        {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
        {"use_attn_scale": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"parallel_attn_mlp": True},
        {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]},
        {"positional_embedding_type": "rotary", "rotary_dim": 2},
        {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
        {"gated_mlp": True, "n_key_value_heads": 2},
        {"use_attention_sinks": True},
    ],
)
def test_other_hooked_configurations_are_exact(changes: dict[str, Any]) -> None:
    model = hooked_model(**changes)
    for parameter in model.parameters():  # initial biases are zero and would hide
        parameter.data += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    assert_exact(model)


@pytest.mark.parametrize("family", [*tiny.BRIDGE_ONLY, *tiny.OTHERS])
def test_other_families_are_exact_as_a_bridge(family: str) -> None:
    assert_exact(tiny_bridge(family))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_weights_processed_as_transformer_lens_likes_are_exact(backend: str, family: str) -> None:
    """Folded norms, centred weights: the default of `HookedTransformer.from_pretrained`."""
    model = tiny_model(backend, family)
    freeze(model, oracle.random_examples([(9, 3)]))  # its backend is known before and after
    before = model.unembed.W_U.clone()
    with tiny._quiet():
        if backend == "bridge":
            model.enable_compatibility_mode()
        else:
            model.load_and_process_state_dict(
                dict(model.state_dict()), center_writing_weights=family == "gpt2"
            )
    assert not torch.equal(model.unembed.W_U, before)
    assert_exact(model.requires_grad_(False))


def test_a_bridge_that_scales_attention_by_depth_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tiny.tiny_config

    def scaled(family: str) -> Any:
        config = configuration(family)
        config.scale_attn_by_inverse_layer_idx = True
        return config

    monkeypatch.setattr(tiny, "tiny_config", scaled)
    model = tiny_bridge("gpt2")
    scales = [backend_of(model).rule(layer).scale for layer in range(3)]
    assert scales == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])
    freeze(model, oracle.random_examples([(9, 3)]))  # refused if the model disagreed


def test_prompts_may_fill_the_context(model: Any) -> None:
    prompts = freeze(model, oracle.random_examples([(N_CTX - 2, 3)]))  # the last is not run
    assert int(prompts.positions.max()) == N_CTX - 1


def test_positions_that_depend_on_a_prompts_length_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configuration = tiny.tiny_config

    def longrope(family: str) -> Any:
        config = configuration(family)
        config.original_max_position_embeddings = 64
        config.rope_parameters = {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 64, "factor": 2.0,
        }  # fmt: skip
        return config

    monkeypatch.setattr(tiny, "tiny_config", longrope)
    model = oracle.run_once(tiny_bridge("llama", torch.float32))
    short, long = oracle.random_examples([(9, 2), (90, 2)])
    freeze(model, [short])  # verified against the model's own forward
    with pytest.raises(ValueError, match="its rotary positions depend on the length of a prompt"):
        freeze(model, [short, long])


def test_positions_reach_far_enough_in_every_layer_whatever_ran_before(backend: str) -> None:
    model = tiny_model(backend, "llama")

    def stop(layer: int, _: Any) -> None:
        if layer == 0:
            raise InterruptedError

    four, twenty = (torch.ones((1, n), dtype=torch.long) for n in (4, 20))
    backend_of(model).capture(four, at_block=lambda _, __: None, at_attention=lambda _, __: None)
    with pytest.raises(InterruptedError):  # the first block alone has seen twenty positions
        backend_of(model).capture(twenty, at_block=stop, at_attention=lambda _, __: None)
    freeze(model, oracle.random_examples([(9, 2)]))


def test_threads_take_turns_on_one_model(backend: str) -> None:
    model = oracle.shared_model(backend, "llama")
    examples = [oracle.random_examples([(5 + 3 * i, 2)], seed=i) for i in range(3)]
    expected = [answer_log_probabilities(freeze(model, own), [Edit()]) for own in examples]

    def work(i: int) -> bool:
        found = [answer_log_probabilities(freeze(model, examples[i]), [Edit()]) for _ in range(5)]
        return all(torch.allclose(own, expected[i], rtol=1e-9) for own in found)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    attention = [vars(backend_of(model).attention(layer)) for layer in range(3)]
    assert not any("forward" in own for own in attention)


def test_a_part_of_a_model_in_training_mode_drops_nothing_out() -> None:
    model = oracle.run_once(tiny_bridge("gpt2", torch.float32))
    prompts = freeze(model, oracle.random_examples([(9, 2)]))
    expected = answer_log_probabilities(prompts, [Edit()])
    model.blocks[1].train()
    model.blocks[1].original_component.train()
    assert torch.equal(answer_log_probabilities(prompts, [Edit()]), expected)
    assert model.blocks[1].original_component.training
