"""The frozen prefix: what is kept, how tokens are packed, who sees whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from tiny import tiny_model

from tl_laai.backends import backend_of
from tl_laai.interventions import Intervention
from tl_laai.prefix import freeze
from tl_laai.prompts import TokenisedExample

# -------------------------------------------------------------------------------- what is kept


def test_suffix_tokens_are_the_last_of_the_prompt_and_the_answer_but_its_last() -> None:
    prompts = oracle.frozen()
    for i, example in enumerate(prompts.examples):
        rows = slice(int(prompts.offsets[i]), int(prompts.offsets[i + 1]))
        assert prompts.tokens[rows].tolist() == [example.prompt[-1], *example.answer[:-1]]
        assert prompts.targets[rows].tolist() == list(example.answer)
        start = len(example.prompt) - 1
        assert prompts.positions[rows].tolist() == [start + j for j in range(len(example.answer))]
        assert prompts.is_prompt_end[rows].tolist() == [True] + [False] * (len(example.answer) - 1)
        assert int(prompts.prompt_ends[i]) == rows.start
        assert int(prompts.prefix_lengths[prompts.prefix_of[i]]) == start


def test_a_shared_prefix_leaves_the_rest_of_each_prompt_to_the_suffix() -> None:
    prompts = oracle.frozen(((12, 1), (9, 2), (8, 1)), shared=7)
    assert prompts.prefix_lengths.tolist() == [7]
    for i, example in enumerate(prompts.examples):
        rows = slice(int(prompts.offsets[i]), int(prompts.offsets[i + 1]))
        left = len(example.prompt) - 7 - 1
        assert prompts.tokens[rows].tolist() == [*example.prompt[7:], *example.answer[:-1]]
        assert prompts.targets[rows].tolist() == [-1] * left + list(example.answer)
        assert int(prompts.prompt_ends[i]) == rows.start + left


def test_a_prompt_that_is_the_whole_shared_prefix_keeps_its_last_token() -> None:
    base = oracle.random_examples([(6, 1)])[0]
    longer = TokenisedExample((*base.prompt, 9, 10), (4,), "b", "c")
    prompts = freeze(oracle.shared_model("bridge", "gemma"), [base, longer], share_prefix=True)
    assert sorted(prompts.prefix_lengths.tolist()) == [5, 6]
    assert prompts.tokens[prompts.prompt_ends].tolist() == [base.prompt[-1], 10]


def test_equal_prefixes_are_frozen_once() -> None:
    one, other = oracle.random_examples([(6, 1), (8, 1)])
    again = TokenisedExample((*one.prompt[:-1], 77), (5,), "x", "y")
    prompts = freeze(oracle.shared_model("bridge", "gemma"), [one, other, again, one])
    assert prompts.prefix_of.tolist() == [0, 1, 0, 0]
    assert prompts.keys[0].shape[0] == 2


def test_an_example_without_an_answer_still_has_its_last_prompt_token() -> None:
    silent = TokenisedExample((5, 6, 7), (), "x", "")
    prompts = freeze(
        oracle.shared_model("bridge", "gemma"), [silent, *oracle.random_examples([(5, 2)])]
    )
    assert prompts.tokens[:1].tolist() == [7]
    assert prompts.targets[:1].tolist() == [-1]


@pytest.mark.parametrize("share", [False, True])
def test_entry_residuals_are_those_of_the_full_forward(model: Any, share: bool) -> None:
    examples = oracle.random_examples([(9, 1), (7, 3), (13, 4)], shared=5)
    prompts = freeze(model, examples, share_prefix=share)
    layers = [model.cfg.n_layers - 1, 0, 1]
    prompts.enter_at(layers[:1])  # in two calls: what is there is not computed again
    prompts.enter_at(layers)
    for layer in layers:
        for i, example in enumerate(examples):
            rows = slice(int(prompts.offsets[i]), int(prompts.offsets[i + 1]))
            tokens = torch.tensor([[*example.prompt, *example.answer[:-1]]])
            full = oracle.activations(model, tokens, f"blocks.{layer}.hook_resid_pre")[0]
            own = full[prompts.positions[rows]]
            torch.testing.assert_close(prompts.residuals[layer][rows], own, rtol=1e-10, atol=1e-11)


def test_keys_do_not_depend_on_the_company(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = oracle.random_examples([(6, 1), (6, 1), (9, 3), (6, 2), (9, 1)])
    monkeypatch.setattr("tl_laai.prefix._PREFILL_TOKENS", 10)  # a few prefixes at a time
    together = freeze(model, examples)
    for i, example in enumerate(examples):
        alone, at = freeze(model, [example]), together.prefix_of[i]
        n = len(example.prompt) - 1
        for layer in range(model.cfg.n_layers):
            for name in ("keys", "values"):
                got = getattr(together, name)[layer][at][:, :n]
                own = getattr(alone, name)[layer][0][:, :n]
                torch.testing.assert_close(got, own, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------- packing


# ----------------------------------------------------------------------- refused, left as found


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples is empty: give at least one"):
        freeze(oracle.shared_model("bridge", "gemma"), [])


def test_freezing_leaves_the_model_as_found(model: Any) -> None:
    before = oracle.state_of(model)
    freeze(model, oracle.random_examples(oracle.LENGTHS)).enter_at([0, 1])
    assert oracle.state_of(model) == before


def test_a_leftover_hook_is_refused_even_after_the_model_was_checked(backend: str) -> None:
    model = tiny_model(backend, "llama")
    examples = oracle.random_examples(oracle.LENGTHS)
    freeze(model, examples)
    model.add_hook("blocks.1.hook_resid_post", lambda x, hook: x * 1.5)
    with pytest.raises(ValueError, match=r"hooks at \['blocks\.1.*reset_hooks"):
        freeze(model, examples)
    model.reset_hooks()
    freeze(model, examples)
    model.add_perma_hook("blocks.1.hook_resid_post", lambda x, hook: x * 1.5)
    with pytest.raises(ValueError, match=r"reset_hooks\(including_permanent=True\)"):
        freeze(model, examples)
    model.reset_hooks(including_permanent=True)
    freeze(model, examples)


@pytest.mark.parametrize("place", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_torch_hook_is_refused_even_after_the_model_was_checked(backend: str, place: str) -> None:
    model = tiny_model(backend, "llama")
    examples = oracle.random_examples(oracle.LENGTHS)
    freeze(model, examples)
    handle = getattr(model.blocks[1], place)(lambda *_: None)
    with pytest.raises(ValueError, match=r"torch hooks at 'blocks\.1'.*has remove\(\)"):
        freeze(model, examples)
    handle.remove()
    freeze(model, examples)


def test_tokens_that_the_model_does_not_embed_are_refused(backend: str) -> None:
    model = tiny_model(backend, "llama")
    (example,) = oracle.random_examples([(4, 2)])
    last = model.cfg.d_vocab - 1
    freeze(model, [replace(example, answer=(last, 1))])
    for change in ({"answer": (1, last + 1)}, {"prompt": (1, last + 1, 2)}):
        with pytest.raises(ValueError, match=rf"gives token {last + 1}, .* tokens 0 to {last}"):
            freeze(model, [replace(example, **change)])


def test_a_model_that_multiplies_its_logits_is_frozen_exactly() -> None:
    """Cohere's: freezing compares logits with the model's own."""
    model = tiny_model("bridge", "cohere")
    assert backend_of(model).logit_scale == 0.25
    freeze(model, oracle.random_examples(oracle.LENGTHS))


def test_freezing_under_an_applied_intervention_is_refused(backend: str) -> None:
    model = oracle.shared_model(backend, "llama")
    intervention = Intervention({1: oracle.random_delta(model)})
    with intervention.applied_to(model), pytest.raises(ValueError, match="applied_to"):
        freeze(model, oracle.random_examples(oracle.LENGTHS))
    freeze(model, oracle.random_examples(oracle.LENGTHS))


def test_a_changed_module_that_the_engine_does_not_know_is_refused_by_its_results(
    backend: str,
) -> None:
    model = tiny_model(backend, "llama")

    attention = model.blocks[1].attn
    own = type(attention).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(attention, *args, **kwargs)
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    vars(attention)["forward"] = forward
    with pytest.raises(ValueError, match="own forward and the frozen-prefix engine differ by"):
        freeze(model, oracle.random_examples([(6, 2)]))
    assert vars(attention)["forward"] is forward


def test_a_projection_before_the_unembedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its last norm gives 32 .* its unembedding takes 16"):
        freeze(tiny_model("bridge", "opt-projected"), oracle.random_examples([(9, 3)]))


def test_blocks_that_do_not_run_one_by_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not run one by one.*TypeError.*list"):
        freeze(tiny_model("bridge", "openai-gpt"), oracle.random_examples([(9, 3)]))


def test_longer_prompts_than_were_checked_are_checked(backend: str) -> None:
    """A window of 6 looks like none to prompts of 5 tokens."""
    model = tiny_model(backend, "gemma")
    rules = {layer: 6 for layer in (0, 1, 3)}
    backend_seen = freeze(model, oracle.random_examples([(3, 1)])).backend
    own = type(backend_seen).rule

    def wrong(layer: int) -> Any:
        rule = own(backend_seen, layer)
        return type(rule)(rule.scale, rule.softcap, rules.get(layer))

    backend_seen.rule = wrong  # type: ignore[method-assign]  # plays a backend with a wrong rule
    freeze(model, oracle.random_examples([(3, 1)]))
    with pytest.raises(ValueError, match="differ by"):
        freeze(model, oracle.random_examples([(12, 1)]))


def test_weights_that_are_not_finite_are_named_as_the_reason(backend: str) -> None:
    model = tiny_model(backend, "gpt2")
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*NaN among its weights"):
        freeze(model, oracle.random_examples([(6, 2)]))
