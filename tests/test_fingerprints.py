from __future__ import annotations

import json
import time
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from conftest import needs_hooked
from tiny import tiny_bridge, tiny_hooked, tiny_model

from tl_laai.fingerprints import (
    Fingerprint,
    compatible,
    fingerprint,
    output_weights,
    remember_origin,
)

RMS_FAMILIES = ("llama", "gemma", "qwen2")


@pytest.fixture
def mark() -> Fingerprint:
    return fingerprint(tiny_bridge("gemma"))


def test_a_fingerprint_states_the_model(any_tiny_model: Any, backend: str, family: str) -> None:
    mark = fingerprint(any_tiny_model)
    kind = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}[backend]
    d_model = 16 if family == "gemma" else 32
    assert (mark.name, mark.revision, mark.backend) == (f"tiny-{family}", None, kind)
    assert (mark.n_layers, mark.n_heads) == (any_tiny_model.cfg.n_layers, 4)
    assert (mark.d_head, mark.d_model, mark.dtype) == (8, d_model, "float64")
    assert len(mark.weights_sample) == 48


def test_the_sample_is_of_the_centred_output_weights(any_tiny_model: Any) -> None:
    weights = torch.stack([output_weights(any_tiny_model, layer) for layer in (0, -1)])
    centred = weights - weights.mean(dim=-1, keepdim=True)
    sample = torch.tensor(fingerprint(any_tiny_model).weights_sample)
    for layer, values in ((0, sample[:16]), (1, sample[-16:])):
        nearest = (values[:, None] - centred[layer].flatten()).abs().amin(dim=1)
        assert nearest.max() < 1e-5
    assert len(set(sample.tolist())) > 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(any_tiny_model: Any, dtype: torch.dtype) -> None:
    before, usual = fingerprint(any_tiny_model), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert fingerprint(any_tiny_model) == before
    finally:
        torch.set_default_dtype(usual)


def test_the_same_seed_gives_the_same_fingerprint_and_another_seed_another(
    backend: str, family: str
) -> None:
    first, again = (fingerprint(tiny_model(backend, family, seed=0)) for _ in range(2))
    other = fingerprint(tiny_model(backend, family, seed=1))
    assert first == again
    assert compatible(first, again) is None
    assert first.weights_hash != other.weights_hash
    assert "different weights" in str(compatible(first, other))


@needs_hooked
def test_both_backends_of_one_model_are_compatible(family: str) -> None:
    hooked, bridge = fingerprint(tiny_hooked(family)), fingerprint(tiny_bridge(family))
    assert compatible(hooked, bridge) is None
    assert hooked.weights_hash == bridge.weights_hash


@needs_hooked
def test_weight_processing_does_not_make_another_model(family: str) -> None:
    plain = fingerprint(tiny_hooked(family))
    processed_model = tiny_hooked(family)
    processed_model.process_weights_()
    processed = fingerprint(processed_model)
    assert compatible(plain, processed) is None
    assert compatible(processed, plain) is None
    assert processed.weight_processing != plain.weight_processing
    assert (processed.weights_hash == plain.weights_hash) == (family in RMS_FAMILIES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lower_precision_of_the_same_weights_is_the_same_model(
    backend: str, dtype: torch.dtype
) -> None:
    exact = fingerprint(tiny_model(backend, "gpt2"))
    rounded = fingerprint(tiny_model(backend, "gpt2", dtype=dtype))
    assert rounded.dtype == str(dtype).removeprefix("torch.")
    assert compatible(exact, rounded) is None


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float32, 1e-3), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)]
)
def test_a_model_tuned_a_little_further_is_another(dtype: torch.dtype, change: float) -> None:
    tuned = tiny_bridge("llama", dtype=dtype)
    plain = fingerprint(tuned)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.mul_(1 + change * torch.randn(weight.shape, generator=draw).to(dtype))
    assert "different weights" in str(compatible(plain, fingerprint(tuned)))


@needs_hooked
def test_centring_in_a_low_precision_does_not_make_another_model() -> None:
    plain = fingerprint(tiny_hooked("gpt2"))
    processed_model = tiny_hooked("gpt2", dtype=torch.bfloat16)
    processed_model.process_weights_()
    assert compatible(plain, fingerprint(processed_model)) is None


def test_models_of_other_shapes_are_refused_with_the_size_that_differs(mark: Fingerprint) -> None:
    for size in ("n_layers", "n_heads", "d_head", "d_model"):
        other = replace(mark, **{size: 99})
        assert f"{size}={getattr(mark, size)}, tiny-gemma has 99" in str(compatible(mark, other))


def test_name_revision_and_backend_do_not_matter(mark: Fingerprint) -> None:
    other = replace(mark, name="b", revision="main", backend="HookedTransformer", weights_hash="0")
    assert compatible(mark, other) is None


def test_a_sample_with_nan_agrees_with_none(mark: Fingerprint) -> None:
    broken = replace(mark, weights_sample=(float("nan"), *mark.weights_sample[1:]))
    assert compatible(mark, broken) is not None
    assert compatible(broken, mark) is not None
    assert compatible(broken, broken) is not None


def test_a_fingerprint_survives_json(any_tiny_model: Any) -> None:
    mark = fingerprint(any_tiny_model)
    again = Fingerprint.from_dict(json.loads(json.dumps(mark.to_dict())))
    assert again == mark
    assert hash(again) == hash(mark)


def test_a_fingerprint_cannot_be_changed(mark: Fingerprint) -> None:
    with pytest.raises(FrozenInstanceError):
        mark.name = "another"  # type: ignore[misc]  # on purpose


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "has the keys"),
        ({"n_heads": None}, "values are damaged"),
        ({"weights_sample": ["x"]}, "values are damaged"),
        ({"weights_sample": 3}, "values are damaged"),
        ({"weight_processing": 3}, "values are damaged"),
        ({"name": 3}, "'name' must be text, not 3"),
        ({"revision": 3}, "'revision' must be text, not 3"),
        ({"dtype": None}, "'dtype' must be text, not None"),
    ],
)
def test_a_damaged_record_is_refused(mark: Fingerprint, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fingerprint.from_dict({**mark.to_dict(), **change})


def test_a_record_that_lacks_a_key_or_is_no_object_is_refused(mark: Fingerprint) -> None:
    record = mark.to_dict()
    del record["d_head"]
    with pytest.raises(ValueError, match="has the keys"):
        Fingerprint.from_dict(record)
    with pytest.raises(ValueError, match="not list"):
        Fingerprint.from_dict([])


def test_the_origin_is_remembered_without_touching_the_model() -> None:
    model = tiny_bridge("gpt2")
    before = set(vars(model))
    remember_origin(model, "org/model-x", "abc")
    assert set(vars(model)) == before
    assert (fingerprint(model).name, fingerprint(model).revision) == ("model-x", "abc")


def test_a_model_without_output_weights_is_refused() -> None:
    class Bare:
        blocks = (object(),)

    with pytest.raises(ValueError, match="layer=0 of this model has no attention output weights"):
        output_weights(Bare(), 0)


def test_the_packaged_model_has_one_fingerprint_and_takes_it_quickly(gemma: Any) -> None:
    started = time.perf_counter()
    mark = fingerprint(gemma)
    # Asked for are 50 ms; ten times that, so that a busy machine does not fail it.
    assert time.perf_counter() - started < 0.5
    assert (mark.name, mark.revision) == ("gemma-3-270m", "sha256:a5fd3b62230a")
    # The same on both backends and both TransformerLens versions: noted once, from the Bridge.
    assert mark.weights_hash.startswith("d5d1ac710071407b")
