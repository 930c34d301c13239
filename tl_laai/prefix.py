"""The frozen prefix: keys and values of prompts, computed once.

Only the last prompt token (and the answer tokens behind it) can depend on an edit there, because
attention is causal. So everything before it is computed once, by the model's own forward, and
each evaluation runs the remaining "suffix" tokens only (`packing.py`). This is exact: it equals a
full forward to rounding error. On the first use of a model, and whenever prompts grow longer, that
is checked against the model's own forward, and a model that does not agree is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_laai.attention import room_for_keys
from tl_laai.backends import Backend, backend_of, own_modes
from tl_laai.packing import FrozenPrompts, Packing, last_residual, run
from tl_laai.products import USE_ONEDNN
from tl_laai.prompts import TokenisedExample

_PREFILL_TOKENS = 2048
_SHORT = 16  # tokens of a prefix; from 12 on no other rounding was seen


@own_modes()
def freeze(
    model: Any, examples: Sequence[TokenisedExample], *, share_prefix: bool = False
) -> FrozenPrompts:
    """Compute the keys and values of prompts once.

    Example:
        >>> prompts = freeze(model, tokenise(model, task.examples[:10]))  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: tokenised prompts with their answers (an answer may be empty for decoding).
        share_prefix: freeze only the tokens common to all prompts, so that a long few-shot
            context is run once for all; right for decoding without an edit in the context.

    Raises:
        TypeError: a model of another class.
        ValueError: no examples, attached hooks, or attention that cannot be frozen exactly.
    """
    if not examples:
        raise ValueError("examples is empty: give at least one tokenised example.")
    backend = backend_of(model)
    with backend.at_work:  # else another thread's own hooks would be found
        _check_no_hooks(model)
    _check_tokens(backend, examples)
    common = _common_prefix(examples) if share_prefix else None
    frozen = [
        e.prompt[: len(e.prompt) - 1 if common is None else min(common, len(e.prompt) - 1)]
        for e in examples
    ]
    prefixes = list(dict.fromkeys(frozen))
    index_of = {prefix: i for i, prefix in enumerate(prefixes)}
    longest_row = max(len(e.prompt) + len(e.answer) for e in examples)
    backend.ensure_positions(longest_row)
    keys, values = _prefill(backend, prefixes)

    tokens, positions, targets, ends, offsets = [], [], [], [], [0]
    for example, prefix in zip(examples, frozen, strict=True):
        sequence = (*example.prompt, *example.answer[:-1])
        end = len(example.prompt) - 1
        for position in range(len(prefix), len(sequence)):
            tokens.append(sequence[position])
            positions.append(position)
            ends.append(position == end)
            answered = position - end
            targets.append(example.answer[answered] if 0 <= answered < len(example.answer) else -1)
        offsets.append(len(tokens))

    def on_device(values_: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values_, device=backend.device)

    prompts = FrozenPrompts(
        backend=backend,
        model=model,
        examples=tuple(examples),
        prefix_of=on_device([index_of[p] for p in frozen]),
        prefix_lengths=on_device([len(p) for p in prefixes]),
        keys=keys,
        values=values,
        offsets=on_device(offsets),
        tokens=on_device(tokens),
        positions=on_device(positions),
        targets=on_device(targets),
        is_prompt_end=on_device(ends),
        prompt_ends=on_device([i for i, end in enumerate(ends) if end]),
    )
    _verify(prompts)
    return prompts


def _check_no_hooks(model: Any) -> None:
    """Refuse attached hooks: they would see packed tokens, at positions that are not theirs."""
    found = {
        name: [h for h in (*point.fwd_hooks, *point.bwd_hooks) if not _passes_on(h)]
        for name, point in model.hook_dict.items()
    }
    points = {id(point) for point in model.hook_dict.values()}
    for name, module in model.named_modules():
        own = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        strange = [hook for hook in own if not _of_a_library(hook)]
        if strange and id(module) not in points:
            raise ValueError(
                f"model has torch hooks at {name!r}: they cannot be honoured where prompts are "
                "frozen. Remove them (the handle that registering gave has remove())."
            )
    hooked = [name for name, handles in found.items() if handles]
    if hooked:
        permanent = any(handle.is_permanent for handles in found.values() for handle in handles)
        reset = "reset_hooks(including_permanent=True)" if permanent else "reset_hooks()"
        raise ValueError(
            f"model has hooks at {hooked[:3]}, {len(hooked)} in all: they cannot be honoured where "
            f"prompts are frozen. Call model.{reset}, or leave the block in which an intervention "
            "is applied_to it."
        )


def _of_a_library(hook: Any) -> bool:
    """Whether a torch hook is one that loading or running a model leaves on its modules."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.split(".")[0] in ("transformer_lens", "transformers", "accelerate", "torch")


def _check_tokens(backend: Backend, examples: Sequence[TokenisedExample]) -> None:
    """Refuse tokens that the model has no embedding of, as of a tokenizer that is not its own."""
    highest = max(max(e.prompt + e.answer) for e in examples)
    if highest >= (known := backend.n_embeddings):
        raise ValueError(
            f"the tokenizer gives token {highest}, and the model embeds tokens 0 to {known - 1}: "
            "it is another model's, or lacks special tokens (which TransformerLens then adds). "
            "Save the model's own tokenizer beside it."
        )


def _passes_on(handle: Any) -> bool:
    """Whether a hook is TransformerLens' own, which only hands a tensor to another hook point."""
    module = getattr(getattr(handle, "user_hook", None), "__module__", None) or ""
    return handle.is_permanent and module.startswith("transformer_lens.")


def _common_prefix(examples: Sequence[TokenisedExample]) -> int:
    first, last = min(e.prompt for e in examples), max(e.prompt for e in examples)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _prefill(
    backend: Backend, prefixes: Sequence[tuple[int, ...]]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys and values of each prefix; equal lengths together, so that no padding is run."""
    room = room_for_keys(max(len(p) for p in prefixes))
    shape = (len(prefixes), backend.n_kv_heads, room, backend.d_head)
    keys, values = (
        {
            layer: torch.zeros(shape, dtype=backend.dtype, device=backend.device)
            for layer in range(backend.n_layers)
        }
        for _ in range(2)
    )
    by_length: dict[int, list[int]] = {}
    for i, prefix in enumerate(prefixes):
        by_length.setdefault(len(prefix), []).append(i)
    for length, members in by_length.items():
        step = max(1, _PREFILL_TOKENS // max(1, length))
        for start in range(0, len(members) if length else 0, step):
            part = members[start : start + step]
            if len(part) == 1 and length <= _SHORT and USE_ONEDNN:
                # Alone it would take another way through the model's own attention, where heads
                # share keys, and be rounded otherwise than beside others; longer ones are not.
                part = part * 2
            rows = torch.tensor(part, device=backend.device)
            tokens = torch.tensor([prefixes[i] for i in rows.tolist()], device=backend.device)
            positions = torch.arange(length, device=backend.device).repeat(len(rows))

            def keep(
                layer: int, x: Tensor, rows: Tensor = rows, positions: Tensor = positions
            ) -> None:
                _, k, v = backend.qkv(layer, x.flatten(0, 1), positions.to(x.device))
                for kept, new in ((keys, k), (values, v)):
                    new = new.unflatten(0, x.shape[:2]).transpose(1, 2).to(kept[layer])
                    kept[layer][rows, :, : x.shape[1]] = new

            backend.capture(tokens, at_block=lambda _, __: None, at_attention=keep)
    return keys, values


def _verify(prompts: FrozenPrompts) -> None:
    """Refuse a model whose own forward the engine does not reproduce.

    The tolerance is far above rounding (measured 1e-6 relative in float32, 3e-2 in bfloat16) and
    below what a wrong mask, position or missing term does.
    """
    backend = prompts.backend
    lengths = [len(e.prompt) + len(e.answer) for e in prompts.examples]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] <= backend.verified_length:
        return
    example = prompts.examples[longest]
    tokens = torch.tensor([[*example.prompt, *example.answer[:-1]]], device=backend.device)
    packing = Packing(prompts, torch.tensor([longest]))
    with torch.no_grad():
        x = backend.embed(prompts.tokens[packing.token], packing.positions)
        try:
            ours = backend.final_norm(last_residual(run(packing, {0: x}, lambda _, z: z)))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"model {type(prompts.model).__name__}: its blocks do not run one by one, as the "
                f"engine needs them to ({type(error).__name__}: {error}), so this model cannot be "
                "fitted."
            ) from error
        theirs = backend.capture(
            tokens, at_block=lambda _, __: None, at_attention=lambda _, __: None
        )[0, -len(ours) :]
        tolerance = 1e-3 if backend.dtype in (torch.float32, torch.float64) else 0.1
        if ours.shape != theirs.shape:
            raise ValueError(
                f"model {type(prompts.model).__name__}: its last norm gives {ours.shape[-1]} "
                f"numbers a token and its unembedding takes {theirs.shape[-1]}; what stands "
                "between them is not known to the engine, so this model cannot be fitted."
            )
        worst = float((ours - theirs).norm() / theirs.norm())
        if backend.verified_length == 0 and worst <= tolerance:
            head = backend.unembedding()
            logits = ours @ head.weight.T
            logits = head.cap(logits if head.bias is None else logits + head.bias)
            expected = backend.logits(tokens)[0, -len(ours) :]
            # Root mean squares: in bfloat16 the worst of 262,144 logits is off by a tenth of them.
            shift, spread = (x - x.mean(-1, keepdim=True) for x in (logits - expected, expected))
            worst = float(shift.float().norm() / spread.float().norm())
    if not math.isfinite(worst):
        raise ValueError(
            f"model {type(prompts.model).__name__}: its own forward over {example.input!r} is not "
            "finite. Look for NaN among its weights, or load it in a wider dtype (float32)."
        )
    if worst > tolerance:
        raise ValueError(
            f"model {type(prompts.model).__name__}: its own forward and the frozen-prefix engine "
            f"differ by {worst:.1e} (relative; {tolerance:.0e} is allowed), so its attention has "
            "a feature that the engine does not know, or torch hooks are attached to its modules. "
            "Remove those; if that does not help, this model cannot be fitted."
        )
    backend.verified_length = max(backend.verified_length, lengths[longest])
