"""One step of the same fit as a user of pyvene would write it, where that library is installed.

pyvene (Wu et al., NAACL 2024 demonstrations; tried with 0.1.8) hooks Hugging Face models; a
trainable intervention adds Delta at `head_attention_value_output` of the last prompt token, over
whole prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from tl_laai.prompts import TokenisedExample

INSTALLED = find_spec("pyvene") is not None


def pyvene_step(
    model: Any, examples: tuple[TokenisedExample, ...], layer: int, delta: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of Delta at `layer` of a Hugging Face model, right-padded."""
    import pyvene
    from pyvene.models import intervenable_modelcard as known

    kind = type(model)
    if kind not in known.type_to_module_mapping:
        # Its modules are named as those of Gemma 2, which pyvene knows.
        from transformers import Gemma2ForCausalLM

        for mapping in (known.type_to_module_mapping, known.type_to_dimension_mapping):
            mapping[kind] = mapping[Gemma2ForCausalLM]

    class Add(pyvene.SourcelessIntervention, pyvene.TrainableIntervention):  # type: ignore[misc]  # pyvene is untyped
        def __init__(self) -> None:
            super().__init__()
            self.delta = torch.nn.Parameter(delta.clone())

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return base + self.delta.flatten()  # base: [batch, 1, n_heads * d_head]

    added = Add()
    place = pyvene.RepresentationConfig(
        layer, "head_attention_value_output", "h.pos", intervention=added
    )
    intervenable = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model=model)
    rows = [[*e.prompt, *e.answer[:-1]] for e in examples]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    ends = [len(e.prompt) - 1 for e in examples]
    heads = [list(range(len(delta)))] * len(rows)
    where = {"base": [[heads, [[end] for end in ends]]]}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        added.delta.grad = None
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        _, out = intervenable(batch, unit_locations=where)
        losses = []
        for i, example in enumerate(examples):
            answer = torch.tensor(example.answer)
            at = out.logits[i, ends[i] : ends[i] + len(answer)]
            losses.append(torch.nn.functional.cross_entropy(at, answer))
        loss = torch.stack(losses).mean()
        loss.backward()
        assert added.delta.grad is not None
        return loss.detach(), added.delta.grad

    return step
