"""A model whose layers stand on two devices gives what it gives on one."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from far_device import FarTensor, TwoDevices, put_far
from torch import Tensor

from tl_laai.backends import backend_of
from tl_laai.decoding import answer_log_probabilities, decode
from tl_laai.distillation import Distillation
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.fitting import fit
from tl_laai.prefix import freeze
from tl_laai.prompts import PromptTemplate
from tl_laai.side_effects import next_token_kl
from tl_laai.tasks import Example

TEMPLATE = PromptTemplate(text="{input}>", answer_prefix="", separator=";", answer_end=".")
EXAMPLES = (Example("ab", "x"), Example("c", "yz"), Example("de", "w"))
# What stands on the second device: the last layers, the last norm, an unembedding of its own.
SPLITS = {
    "llama": ("model.layers.1", "model.layers.2", "model.norm", "lm_head"),
    "gemma2": ("model.layers.1", "model.norm"),
    "gptj": ("transformer.h.1", "transformer.h.2", "transformer.ln_f", "lm_head"),
}


def bridge(family: str, far: tuple[str, ...]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = tiny.tiny_hf(family)
    put_far(hf_model, far)
    with tiny._quiet():
        model = TransformerBridge.boot_transformers(
            f"tiny-{family}",
            hf_model=hf_model,
            tokenizer=tiny.tiny_tokenizer(),
            dtype=torch.float64,
            device="cpu",
        )
    tiny._keep_float64(model)
    return model.eval().requires_grad_(False)


def results(model: Any) -> dict[str, list[Tensor]]:
    """What the engine, decoding, fits and side effects give."""
    examples = oracle.random_examples(oracle.LENGTHS)
    dtype = next(model.parameters()).dtype
    delta = oracle.random_delta(model).to(dtype)
    residual = oracle.random_residual(model).to(dtype)
    prompts = freeze(model, examples)
    last = model.cfg.n_layers - 1  # where rows join behind a layer that stands elsewhere
    engine = Engine(prompts, layers=[0, last], rows=[[0, 1, 2], [1, 3]], position="every_step")
    edits = [Edit(), Edit({1: delta}, position="every_step"), Edit(residual={1: residual})]
    shared = {"layer": 1, "template": TEMPLATE, "max_evaluations": 3}
    taught = Distillation(inputs=("f", "gh"), n_teachers=2, label_share=0.5)
    distilled = fit(
        model, EXAMPLES, objective="distill", distillation=taught, solver="adam", **shared
    )
    backend = backend_of(model)
    answers = decode(prompts, edits, max_new_tokens=3)
    return {
        "engine": list(engine.value_and_grad(torch.stack([delta, -delta]), torch.arange(2))),
        "answers": [torch.tensor(t) for own in answers for t in own],
        "log-probabilities": list(answer_log_probabilities(prompts, edits)),
        "fit": [fit(model, EXAMPLES, alpha=0.3, **shared).solution.delta],
        "distilled fit": [distilled.solution.delta],
        "side effects": list(next_token_kl(model, {"it": edits[1]}, ("abc", "d")).values()),
        "written": [backend.written(1, delta[None], 2 * delta[None])],
    }


@pytest.mark.parametrize("family", SPLITS)
def test_layers_on_two_devices_give_what_they_give_on_one(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands on the far device has values.
    place = "transformer_lens.utilities.quantization.unreadable_weight_reason"
    monkeypatch.setattr(place, lambda _: None)
    expected = results(bridge(family, ()))
    with TwoDevices():
        model = bridge(family, SPLITS[family])
        assert any(isinstance(p.data, FarTensor) for p in model.parameters())
        found = results(model)
    for name, tensors in expected.items():
        for one, two in zip(tensors, found[name], strict=True):
            assert not isinstance(two, FarTensor), name
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11, msg=name)


def test_a_mix_of_both_devices_fails() -> None:
    with TwoDevices():
        far = torch.ones(3).to("meta")
        assert (far + far).to("cpu").tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            far + torch.ones(3)
