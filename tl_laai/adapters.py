"""Adapters of the library peft in a plain Hugging Face model, and that model's forwards.

A model of its own, loaded from the same checkpoint, and not the one inside a `TransformerBridge`:
the bridge has rewired that in place (`q_proj` is no linear layer any more, GPT-2's `c_attn` is
split), so peft does not know its layers; and a `HookedTransformer` has none inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_laai.checkpoints import find_source, quiet, unknown_model
from tl_laai.prompts import TokenisedExample
from tl_laai.splits import count
from tl_laai.vocabulary import Unembedding, cross_entropy, logit_scale, next_token

Method = Literal["lora", "ia3"]


@dataclass(frozen=True)
class AdapterConfig:
    """Which weights are trained.

    Attributes:
        method: `lora` (Hu et al. 2021: low-rank additions to weight matrices) or `ia3` (factors on
            activations: Liu et al. 2022 have them on keys, values and inside the MLP; peft, whose
            choice for a family is taken, on queries instead of keys for some, Gemma 3 among them).
        rank: of LoRA's additions, which are scaled by `alpha / rank = 2`; IA3 has none.
        target_modules: names of LoRA's layers, or "all-linear"; None for peft's own choice for
            the model's family (queries and values in most). IA3 always takes peft's.
    """

    method: Method = "lora"
    rank: int = 8
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; use one of {get_args(Method)}.")
        object.__setattr__(self, "rank", count("rank", self.rank))
        if self.rank == 0:
            raise ValueError("rank is 0; LoRA needs at least 1.")
        if self.method == "ia3" and self.target_modules is not None:
            raise ValueError("target_modules goes with method='lora' only; leave it out for 'ia3'.")

    def to_peft(self) -> Any:
        """The configuration as peft takes it."""
        peft = import_peft()
        if self.method == "ia3":
            return peft.IA3Config()
        named = self.target_modules is None or isinstance(self.target_modules, str)
        targets = self.target_modules if named else list(self.target_modules or ())
        return peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets)


def hugging_face_model(name_or_path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Load a checkpoint as a plain Hugging Face model, frozen and in eval mode.

    Example:
        >>> hf_model = hugging_face_model("gemma-3-270m")  # doctest: +SKIP

    Args:
        name_or_path: as for `load_model`.
        like: a TransformerLens model whose dtype and device to take; None for float32 on the CPU.
    """
    from transformers import AutoModelForCausalLM

    weights = torch.zeros(()) if like is None else next(like.parameters())
    source = find_source(name_or_path)
    try:
        with quiet(progress_bars=source.folder is None):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder or source.name, dtype=weights.dtype
            )
    except (OSError, ValueError) as error:
        raise ValueError(unknown_model(os.fspath(name_or_path), str(error))) from error
    return loaded.to(weights.device).eval().requires_grad_(False)


def import_peft() -> ModuleType:
    """The library peft, which is optional; raises ImportError with what to install."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "Fine-tuning needs the package peft: pip install 'tl_laai[baselines]'"
        ) from error
    return peft


@contextmanager
def left_as_found(hf_model: Any) -> Iterator[None]:
    """Put the model in eval mode; afterwards its modules, modes and flags are what they were."""
    modules = list(hf_model.modules())
    children = [dict(module._modules) for module in modules]
    training = [module.training for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in hf_model.parameters()]
    attributes = set(vars(hf_model))
    try:
        hf_model.eval()
        yield
    finally:
        # Not peft's own unload, which needs an injection that came to its end.
        for module, own, mode in zip(modules, children, training, strict=True):
            module._modules.clear()
            module._modules.update(own)
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name in set(vars(hf_model)) - attributes:
            delattr(hf_model, name)


@contextmanager
def adapted(hf_model: Any, config: AdapterConfig, seed: int) -> Iterator[Any]:
    """The model with a fresh adapter in it, the only part that is trained."""
    peft = import_peft()
    with left_as_found(hf_model):
        with quiet(progress_bars=False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # adapters are drawn on the CPU
            peft.inject_adapter_in_model(config.to_peft(), hf_model)
        for parameter in hf_model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()  # a small step would round away
        hf_model.eval()
        yield hf_model


# ------------------------------------------------------------------- forwards of the HF model


def answer_loss(hf_model: Any, examples: Sequence[TokenisedExample]) -> Tensor:
    """Answer cross-entropy: mean over an answer's tokens, then over examples."""
    return torch.stack([t.mean() for t in token_losses(hf_model, examples)]).mean()


def _head(hf_model: Any) -> Unembedding:
    """The map from the last hidden states to logits."""
    head = hf_model.get_output_embeddings()
    softcap = getattr(hf_model.config.get_text_config(), "final_logit_softcapping", None)
    return Unembedding(head.weight, getattr(head, "bias", None), softcap)


def _final_hidden(hf_model: Any, **inputs: Any) -> Any:
    """The base model's output, its last hidden state scaled as the model scales its logits."""
    output = hf_model.base_model(**inputs)
    output.last_hidden_state = output.last_hidden_state * logit_scale(
        hf_model.config.get_text_config()
    )
    return output


def token_losses(hf_model: Any, examples: Sequence[TokenisedExample]) -> list[Tensor]:
    """Cross-entropy of each answer token, one tensor `[n_answer_tokens]` an example.

    One forward, padded on the right; logits are computed where an answer token is predicted only.
    """
    head = _head(hf_model)
    rows = [[*e.prompt, *e.answer[:-1]] for e in examples]
    width = max(map(len, rows))
    tokens = torch.tensor(
        [row + [0] * (width - len(row)) for row in rows], device=head.weight.device
    )
    mask = torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=head.weight.device
    )
    hidden = _final_hidden(
        hf_model,
        input_ids=tokens,
        attention_mask=mask,
        position_ids=torch.arange(width, device=head.weight.device).expand(len(rows), -1),
        use_cache=False,
    ).last_hidden_state
    predicting = [hidden[i, len(e.prompt) - 1 : len(rows[i])] for i, e in enumerate(examples)]
    targets = torch.tensor(
        [token for e in examples for token in e.answer], device=head.weight.device
    )
    losses = cross_entropy(
        torch.cat(predicting), head.weight, targets, bias=head.bias, softcap=head.softcap
    )
    return list(losses.split([len(e.answer) for e in examples]))


def greedy_answers(
    hf_model: Any,
    examples: Sequence[TokenisedExample],
    ends: Callable[[int], tuple[bool, bool]],
    max_new_tokens: int,
) -> list[tuple[int, ...]]:
    """Most probable continuations of the prompts, padded on the left, over a key-value cache.

    Args:
        hf_model: plain or with an adapter in it.
        examples: their answers are not read.
        ends: token -> whether it belongs to an answer, and whether it is the last to be read.
        max_new_tokens: longest continuation.
    """
    head = _head(hf_model)
    width = max(len(e.prompt) for e in examples)
    padding = [width - len(e.prompt) for e in examples]
    tokens = torch.tensor(
        [[0] * n + list(e.prompt) for n, e in zip(padding, examples, strict=True)],
        device=head.weight.device,
    )
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=head.weight.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    written: list[list[int]] = [[] for _ in examples]
    going = set(range(len(examples)))
    cache = None
    for _ in range(max_new_tokens):
        out = hf_model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        choice = next_token(out.last_hidden_state[:, -1], head)
        for i, token in enumerate(choice.tolist()):
            if i not in going:
                continue
            belongs, is_last = ends(token)
            if belongs:
                written[i].append(token)
            if is_last:
                going.remove(i)
        if not going:
            break
        tokens, positions = choice[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    return [tuple(row) for row in written]
