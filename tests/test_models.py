from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_hooked
from safetensors.torch import load_file, save_file
from tiny import (
    HAS_HOOKED,
    SLIDING_WINDOW,
    tiny_bridge,
    tiny_config,
    tiny_hf,
    tiny_hooked,
    tiny_model,
    tiny_tokenizer,
)

from tl_laai import models
from tl_laai.checkpoints import BUILT_IN
from tl_laai.fingerprints import compatible, fingerprint
from tl_laai.fitting import fit
from tl_laai.models import check_hook_contract, load_model, make_transposes_contiguous
from tl_laai.tasks import Example


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    """A checkpoint folder of each family."""
    return save_tiny(tmp_path, family)


def save_tiny(path: Path, family: str) -> Path:
    place = path / f"tiny-{family}"
    # Saved in float64: transformers names the classes by the model's own, which tests subclass.
    tiny_hf(family, torch.float32).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


# -------------------------------------------------------- the tiny models that all tests rely on


@needs_hooked
def test_tiny_models_have_the_same_logits_on_both_backends(family: str) -> None:
    tokens = torch.randint(3, 259, (3, 40))
    hooked, bridge = tiny_hooked(family)(tokens), tiny_bridge(family)(tokens)
    assert hooked.dtype == bridge.dtype == torch.float64
    assert (hooked - bridge).abs().max() < 1e-9


def test_tiny_bridges_have_the_logits_of_transformers(family: str) -> None:
    tokens = torch.randint(3, 259, (3, 40))
    assert (tiny_hf(family)(tokens).logits - tiny_bridge(family)(tokens)).abs().max() < 1e-9


def test_tiny_models_are_sensitive_to_order_and_truly_causal(any_tiny_model: Any) -> None:
    tokens = torch.randint(3, 259, (1, 12))
    swapped = tokens.clone()
    swapped[0, 4], swapped[0, 5] = 7, 8
    tokens[0, 4], tokens[0, 5] = 8, 7
    difference = (any_tiny_model(tokens) - any_tiny_model(swapped))[0].abs().amax(dim=-1)
    assert difference[:4].max() == 0.0
    assert difference[-1] > 1e-3


def test_the_tiny_gemma_has_a_window_shorter_than_prompts(backend: str) -> None:
    model = tiny_model(backend, "gemma")
    tokens = torch.randint(3, 259, (1, 12))
    _, cache = model.run_with_cache(tokens)
    windows = [
        int((cache[f"blocks.{layer}.attn.hook_pattern"][0, 0, -1] > 0).sum()) for layer in range(4)
    ]
    assert windows == [SLIDING_WINDOW, SLIDING_WINDOW, 12, SLIDING_WINDOW]


def test_the_tiny_tokenizer_gives_every_text_back(backend: str) -> None:
    tokenizer = tiny_model(backend, "gpt2").tokenizer
    text = 'Q: Zoë said "no" (twice)\nA:\t42 %'
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


# -------------------------------------------------------------------------------------- loading


def test_a_checkpoint_folder_is_loaded_as_a_frozen_bridge(folder: Path, family: str) -> None:
    model = load_model(folder, device="cpu")
    assert type(model).__name__ == "TransformerBridge"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.randint(3, 259, (2, 9))
    expected = tiny_hf(family, torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert fingerprint(model).name == f"tiny-{family}"
    assert compatible(fingerprint(model), fingerprint(tiny_bridge(family))) is None


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_the_dtype_is_the_one_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    place, name = save_tiny(tmp_path, "llama"), str(dtype).removeprefix("torch.")
    for asked in (dtype, name):
        model = load_model(place, device="cpu", dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert fingerprint(model).dtype == name


def test_a_device_map_loads_a_bridge_that_gives_the_same_fit(tmp_path: Path) -> None:
    place = save_tiny(tmp_path, "llama")
    options: dict[str, Any] = {"layer": 1, "max_evaluations": 3, "solver": "adam"}
    fits = [
        fit(load_model(place, **where), [Example("a", "b"), Example("c", "d")], **options)
        for where in ({"device": "cpu"}, {"device_map": {"": "cpu"}})
    ]
    assert torch.equal(*(own.solution.delta for own in fits))


@pytest.mark.parametrize("wrong", ["toaster", {"": "toaster"}, {"": 99}, {}])
def test_a_device_map_that_cannot_be_is_refused_by_name(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="device_map="):
        load_model(save_tiny(tmp_path, "llama"), device_map=wrong)


def test_loading_is_silent_and_leaves_logging_and_warnings_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = save_tiny(tmp_path, "gemma")
    capfd.readouterr()
    before = (logging.root.manager.disable, list(warnings.filters), sys.stdout)
    load_model(place, device="cpu")
    assert (logging.root.manager.disable, list(warnings.filters), sys.stdout) == before
    assert capfd.readouterr() == ("", "")


def test_nothing_is_installed_for_a_model_that_sees_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens has pip install torchvision where its processor does not load."""
    from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny_config("gemma").to_dict() | {"vocab_size": 270}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 262, "boi_token_index": 260, "eoi_token_index": 261}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ran: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, *_, **__: ran.append(command))
    own = vars(AutoProcessor)["from_pretrained"]
    model = load_model(tmp_path, device="cpu")
    assert ran == []
    assert vars(AutoProcessor)["from_pretrained"] is own
    examples = [Example("a", "b"), Example("c", "d")]
    assert fit(model, examples, layer=1, max_evaluations=2).solution.n_evaluations == 2


def test_a_folder_is_refused_as_a_hooked_transformer_with_the_reason(tmp_path: Path) -> None:
    reason = "does not know 'tiny-gpt2' by an official name" if HAS_HOOKED else "3.9 is the last"
    with pytest.raises(ValueError, match=reason) as refusal:
        load_model(save_tiny(tmp_path, "gpt2"), backend="hooked")
    assert str(refusal.value).startswith("backend='hooked': ")


@pytest.mark.parametrize("name", ["no-such-model-at-all", "nobody/no-such-model"])
def test_an_unknown_name_is_refused_in_one_line_that_lists_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match="could not be loaded") as refusal:
        load_model(name)
    message = str(refusal.value)
    assert f"name_or_path={name!r}" in message
    assert all(known in message for known in BUILT_IN)
    assert len(message) < 800
    assert "\n" not in message
    assert refusal.value.__cause__ is not None


def test_a_checkpoint_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    place = save_tiny(tmp_path, "gpt2")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(place)


def test_a_folder_without_a_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    place = save_tiny(tmp_path, "gpt2")
    for file in place.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer; tokenizer\.save_pretrained writes"):
        load_model(place)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    place = save_tiny(tmp_path, "gpt2")
    kept = load_file(place / "model.safetensors")
    lost = next(name for name in kept if name.endswith("h.1.mlp.c_fc.weight"))
    save_file({k: v for k, v in kept.items() if k != lost}, place / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"lacks 1 of the weights, '.*h\.1\.mlp\.c_fc\.weight'"):
        load_model(place, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_path": 3}, TypeError, "name_or_path must be a str or a path, not int"),
        ({"backend": "jax"}, ValueError, "backend='jax': allowed are auto, hooked, bridge"),
        ({"dtype": torch.int8}, ValueError, "dtype=torch.int8: allowed are torch.float32"),
        ({"dtype": "float8"}, ValueError, "dtype='float8': allowed are torch.float32"),
        ({"device": "toaster"}, ValueError, "device='toaster' is not available here"),
        ({"device": "cuda:99"}, ValueError, "device='cuda:99' is not available here"),
        ({"device": "cpu", "device_map": "auto"}, ValueError, "device_map='auto' and device='cpu'"),
        ({"backend": "hooked", "device_map": "auto"}, ValueError, "and backend='hooked' exclude"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(**{"name_or_path": "./nowhere", **arguments})


# ----------------------------------------------------------------------------------- memory layout


@needs_hooked
def test_laying_weights_out_changes_no_value_and_makes_the_transposes_contiguous(
    family: str,
) -> None:
    plain, laid_out = tiny_hooked(family), tiny_hooked(family)
    make_transposes_contiguous(laid_out)
    for (name, before), (_, after) in zip(
        plain.named_parameters(), laid_out.named_parameters(), strict=True
    ):
        assert torch.equal(before, after), name
        assert not after.requires_grad
    tokens = torch.randint(3, 259, (2, 9))
    torch.testing.assert_close(plain(tokens), laid_out(tokens), atol=1e-12, rtol=1e-12)
    assert laid_out.unembed.W_U.T.is_contiguous()
    for block in laid_out.blocks:
        # The transposes, spelt out as TransformerLens takes them at every call.
        assert block.attn.W_O.permute(2, 0, 1).is_contiguous()
        for name in ("W_Q", "_W_K", "W_K", "_W_V", "W_V"):
            weight = block.attn._parameters.get(name)
            assert weight is None or weight.permute(0, 2, 1).is_contiguous()
        if "W_gate" in block.mlp._parameters:
            for name in ("W_in", "W_gate", "W_out"):
                assert getattr(block.mlp, name).T.is_contiguous()


@needs_hooked
def test_laid_out_weights_keep_their_layout_and_their_memory(family: str) -> None:
    model = tiny_hooked(family)
    size = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    make_transposes_contiguous(model)
    model.to(torch.float32)
    assert model.unembed.W_U.T.is_contiguous()
    after = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    assert after == size // 2


# ----------------------------------------------------------------------------- the hook contract


def test_tiny_models_keep_the_hook_contract(any_tiny_model: Any) -> None:
    check_hook_contract(any_tiny_model)


def test_the_check_leaves_the_model_as_found(backend: str) -> None:
    model = tiny_model(backend, "gpt2")
    model.train()
    model.blocks[1].eval()  # a mixture: each module's mode is its own
    roots = (model, getattr(model, "original_model", model))
    modes = [module.training for root in roots for module in root.modules()]
    fired: list[str] = []
    name = "blocks.0.attn.hook_z"
    state = torch.random.get_rng_state()
    with model.hooks(fwd_hooks=[(name, lambda z, hook: fired.append("mine"))]):
        check_hook_contract(model)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert [module.training for root in roots for module in root.modules()] == modes
        fired.clear()
        model(torch.tensor([[1, 2]]))
    assert fired == ["mine"]
    fired.clear()
    model(torch.tensor([[1, 2]]))
    assert fired == []
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@needs_hooked
def test_a_model_whose_value_output_basis_was_rotated_is_refused() -> None:
    model = tiny_hooked("gpt2")
    model.process_weights_(refactor_factored_attn_matrices=True)
    with pytest.raises(ValueError, match="refactor_factored_attn_matrices"):
        check_hook_contract(model)


@needs_hooked
def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny_hooked("gpt2")
    model.cfg.attention_dir = "bidirectional"
    for block in model.blocks:
        block.attn.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match="not causal"):
        check_hook_contract(model)


def test_an_edit_that_does_not_reach_the_logits_is_refused(backend: str) -> None:
    model = tiny_model(backend, "llama")
    for block in model.blocks:
        target = block.attn.W_O if backend == "hooked" else block.attn.o.weight
        target.data.zero_()
    with pytest.raises(ValueError, match="does not reach the logits"):
        check_hook_contract(model)


def test_a_model_without_hook_z_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(backend, "llama")
    points = {name: point for name, point in model.hook_dict.items() if "1.attn" not in name}
    monkeypatch.setattr(type(model), "hook_dict", property(lambda self: points), raising=False)
    with pytest.raises(ValueError, match=r"no hook point blocks\.1\.attn\.hook_z: 1 layers"):
        check_hook_contract(model)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda watch, z, hook: watch(watch(z, hook), hook), "fired 2 times"),
        (lambda watch, z, hook: (watch(z.flatten(2), hook), z)[1], r"with \[\(1, 4, 32\)\]"),
        (lambda watch, z, hook: z, "fired 0 times"),
    ],
)
def test_a_hook_that_fires_twice_never_or_with_another_shape_is_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch, broken: Any, message: str
) -> None:
    model = tiny_model(backend, "llama")
    plain = type(model).run_with_hooks

    def run_with_hooks(self: Any, tokens: Any, fwd_hooks: Any) -> Any:
        name, watch = fwd_hooks[-1]
        wrapped = (name, lambda z, hook: broken(watch, z, hook))
        return plain(self, tokens, fwd_hooks=[*fwd_hooks[:-1], wrapped])

    monkeypatch.setattr(type(model), "run_with_hooks", run_with_hooks)
    with pytest.raises(ValueError, match=message) as refusal:
        check_hook_contract(model)
    assert "must fire once a forward with shape (1, 4, 4, 8)" in str(refusal.value)


# ------------------------------------------------------------------------------ the packaged model


def test_the_packaged_model_is_loaded_frozen_on_each_backend(gemma: Any, backend: str) -> None:
    kind = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[backend]
    assert type(gemma).__name__ == kind
    assert (gemma.cfg.n_layers, gemma.cfg.n_heads, gemma.cfg.d_head) == (18, 4, 256)
    assert not gemma.training
    assert not any(parameter.requires_grad for parameter in gemma.parameters())
    assert gemma.to_tokens("Q: Kenya\nA:")[0, 0] == gemma.tokenizer.bos_token_id


@needs_hooked
def test_both_backends_of_the_packaged_model_give_the_same_probabilities(
    gemma_hooked: Any, gemma_bridge: Any
) -> None:
    text = "One, two, three, four, five, six, seven,"
    tokens = gemma_bridge.to_tokens(text)
    assert torch.equal(gemma_hooked.to_tokens(text), tokens)
    with torch.no_grad():
        hooked = gemma_hooked(tokens).log_softmax(dim=-1)
        bridge = gemma_bridge(tokens).log_softmax(dim=-1)
    assert (hooked - bridge).abs().max() < 1e-3
    assert gemma_bridge.tokenizer.decode(bridge[0, -1].argmax()) == " eight"
    assert compatible(fingerprint(gemma_hooked), fingerprint(gemma_bridge)) is None


@needs_hooked
def test_the_packaged_hooked_model_is_centred_and_copies_no_weights(gemma_hooked: Any) -> None:
    W_U = gemma_hooked.unembed.W_U
    assert W_U.T.is_contiguous()
    assert W_U[:16].mean(dim=-1).abs().max() < 1e-5
    assert gemma_hooked.cfg.normalization_type == "RMSPre"


def test_automatic_choice_takes_hooked_transformer_where_it_is_known() -> None:
    source = models.Source("gemma-3-270m", Path(), official_name="google/gemma-3-270m")
    assert models._official_name(source) == ("google/gemma-3-270m" if HAS_HOOKED else None)
    hub = models._official_name(models.Source("gpt2"))
    assert (hub is not None) == HAS_HOOKED
    assert models._official_name(models.Source("nobody/no-such-model")) is None
