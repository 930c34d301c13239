"""Adding vectors to `hook_z`: hooks for one forward, and for every forward of a `generate` call.

    hook_z[layer][:, position] += delta[layer]   (position: the prompt's last token, or from it on)

Limits: a plain forward is a prompt of its own, so a decoding loop written by hand over a key-value
cache says `prompt_length=0` for the steps behind the prompt. `model.generate`, `generate_stream`
and `hf_generate` are followed without help, in one thread; `generate` called on the Hugging Face
model inside a bridge, and prefill in chunks, are not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Position = Literal["prompt_end", "every_step"]
PromptLength = int | Int[Tensor, " batch"] | None
HookFunction = Callable[..., Tensor]

_MISSING = object()


def hook_name(layer: int) -> str:
    """TransformerLens' name of a layer's `hook_z`: `hook_name(9) == "blocks.9.attn.hook_z"`."""
    return f"blocks.{layer}.attn.hook_z"


def checked_prompt_length(prompt_length: PromptLength) -> PromptLength:
    """`prompt_length` if it can be one; a tensor comes back on the CPU.

    Raises:
        TypeError: neither an integer, nor a 1-D integer tensor, nor None.
        ValueError: a negative length.
    """
    remedy = "give an integer, a LongTensor [batch] (right padding), or None for the last position."
    if isinstance(prompt_length, Tensor):
        kind = prompt_length.dtype
        if (
            prompt_length.ndim != 1
            or kind.is_floating_point
            or kind.is_complex
            or kind == torch.bool
        ):
            shape = tuple(prompt_length.shape)
            raise TypeError(f"prompt_length is a tensor of shape {shape} and {kind}: {remedy}")
        prompt_length = prompt_length.detach().to("cpu", torch.long)
        if bool((prompt_length < 0).any()):
            raise ValueError(f"prompt_length={prompt_length.tolist()}: lengths are 0 or more.")
    elif isinstance(prompt_length, bool) or not isinstance(prompt_length, int | None):
        raise TypeError(f"prompt_length={prompt_length!r}: {remedy}")
    elif prompt_length is not None and prompt_length < 0:
        raise ValueError(f"prompt_length={prompt_length}: lengths are 0 or more; {remedy}")
    return prompt_length


def add_delta(
    z: Float[Tensor, "batch pos n_heads d_head"],
    delta: Float[Tensor, "n_heads d_head"],
    *,
    position: Position,
    prompt_length: PromptLength = None,
) -> Float[Tensor, "batch pos n_heads d_head"]:
    """A copy of `z` with delta added where the position rule says; differentiable in both.

    Example:
        z = add_delta(z, delta, position="prompt_end", prompt_length=torch.tensor([5, 3]))

    Args:
        z: activations before `W_O`. Its dtype and device win.
        delta: one vector a head.
        position: `"prompt_end"`: the prompt's last token; `"every_step"`: it and all behind it.
        prompt_length: tokens of the prompt in this forward, `[batch]` or one number; None: all of
            them; 0: the prompt lies in the key-value cache, and these are decoding steps.

    Raises:
        ValueError: z of other heads than delta, or a prompt longer than the forward.
    """
    batch, n_positions = z.shape[:2]
    if z.shape[2:] != delta.shape:
        raise ValueError(
            f"delta has shape {tuple(delta.shape)} but hook_z has {tuple(z.shape)}, which must be "
            "[batch, pos, n_heads, d_head]: this model is not the one that delta was made for."
        )
    delta = delta.to(device=z.device, dtype=z.dtype)
    if prompt_length is None:
        prompt_length = n_positions
    longest = prompt_length if isinstance(prompt_length, int) else int(prompt_length.max())
    if longest > n_positions:
        raise ValueError(
            f"prompt_length={longest} but the forward has {n_positions} positions: give the "
            "prompt's own length, or 0 where the prompt lies in the key-value cache."
        )
    if isinstance(prompt_length, int):
        start = max(prompt_length - 1, 0)
        stop = prompt_length if position == "prompt_end" else n_positions
        edited = z.clone()
        edited[:, start:stop] += delta
        return edited
    if prompt_length.shape != (batch,):
        raise ValueError(
            f"prompt_length has {len(prompt_length)} rows but the forward has {batch}: give one "
            "length a row."
        )
    end = prompt_length.to(z.device)[:, None] - 1
    positions = torch.arange(n_positions, device=z.device)
    chosen = positions == end if position == "prompt_end" else positions >= end
    return torch.where(chosen[:, :, None, None], z + delta, z)


def delta_hooks(
    deltas: Mapping[int, Tensor], *, position: Position, prompt_length: PromptLength = None
) -> list[tuple[str, HookFunction]]:
    """`fwd_hooks` for one forward with `model.run_with_hooks`: `[(name, function), ...]`."""
    length = checked_prompt_length(prompt_length)

    def hook_of(delta: Tensor) -> HookFunction:
        def hook_z(z: Tensor, hook: Any) -> Tensor:
            return add_delta(z, delta, position=position, prompt_length=length)

        return hook_z

    return [(hook_name(layer), hook_of(delta)) for layer, delta in deltas.items()]


class _Generation:
    """Where the prompt ends within one call of `generate`, read off the forwards that it makes."""

    def __init__(self) -> None:
        self.prompt_length = 0
        self.layers_seen: set[int] = set()

    def prompt_length_in(self, layer: int, n_positions: int, expected: PromptLength) -> int:
        """How many of a forward's positions are the prompt's; 0 once it lies in the cache."""
        if layer not in self.layers_seen:  # the first forward: the prompt, the whole prompt
            self.layers_seen.add(layer)
            lengths = expected.tolist() if isinstance(expected, Tensor) else [expected]
            if any(length not in (None, n_positions) for length in lengths):
                raise ValueError(
                    f"prompt_length={lengths} but generate's prompt has {n_positions} positions: "
                    "leave prompt_length out, generate begins behind the last position."
                )
            self.prompt_length = n_positions
            return n_positions
        if n_positions == 1:
            return 0
        if n_positions > self.prompt_length:  # no cache: everything again, one token longer
            return self.prompt_length
        raise ValueError(
            f"generate ran {n_positions} positions after a prompt of {self.prompt_length}, neither "
            "one new token nor the whole sequence: where the prompt ends cannot be told. Generate "
            "token by token (no assisted decoding, no prefill in chunks)."
        )


class _Follower:
    """Knows whether a forward belongs to a `generate` call: wraps the instance's own methods."""

    def __init__(self) -> None:
        self.generation: _Generation | None = None
        self.ended = False

    @contextlib.contextmanager
    def within(self, generation: _Generation) -> Iterator[None]:
        before, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = before

    def following(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:  # a stand-in: the signature is the method's
            with self.within(_Generation()):
                return method(*args, **kwargs)

        return call

    def following_stream(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
            generation, chunks = _Generation(), method(*args, **kwargs)
            with contextlib.closing(chunks):
                while True:
                    if self.ended:
                        raise RuntimeError(
                            "generate_stream went on after `with intervention.applied_to(model)` "
                            "had ended: read the stream to its end inside the block."
                        )
                    # Between two chunks the caller may run forwards of their own.
                    with self.within(generation):
                        chunk = next(chunks, _MISSING)
                    if chunk is _MISSING:
                        return
                    yield chunk

        return call


def deltas_applied(
    model: Any,
    deltas: Mapping[int, Tensor],
    *,
    position: Position,
    prompt_length: PromptLength = None,
) -> AbstractContextManager[None]:
    """Within the block every forward and every `generate` of the model carries the deltas.

    Example:
        with deltas_applied(model, {9: delta}, position="prompt_end"):
            model.generate(tokens, use_past_kv_cache=False)  # the same tokens as with the cache

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found, whatever is raised.
        deltas: layer -> delta, `[n_heads, d_head]`.
        position: see `add_delta`; in `generate` it is the same with and without a cache.
        prompt_length: see `add_delta`; for forwards outside `generate`, where the first forward
            shows how long the prompt is.

    Raises:
        ValueError: the model has no such hook, or `add_delta` refuses.
        RuntimeError: a stream begun in the block is read after it.
    """
    absent = [hook_name(layer) for layer in deltas if hook_name(layer) not in model.hook_dict]
    if absent:  # a bridge would skip an unknown name silently
        raise ValueError(
            f"the model has no hook points {absent}: use a "
            "TransformerLens model whose attention has hook_z."
        )
    length = checked_prompt_length(prompt_length)

    def hook_of(layer: int, delta: Tensor) -> HookFunction:
        def hook_z(z: Tensor, hook: Any) -> Tensor:
            here = length
            if follower.generation is not None:
                here = follower.generation.prompt_length_in(layer, z.shape[1], length)
            return add_delta(z, delta, position=position, prompt_length=here)

        return hook_z

    follower = _Follower()
    hooks = [(hook_name(layer), hook_of(layer, delta)) for layer, delta in deltas.items()]
    return _followed(model, hooks, follower)


@contextlib.contextmanager
def _followed(
    model: Any, hooks: list[tuple[str, HookFunction]], follower: _Follower
) -> Iterator[None]:
    wrappers = {
        "generate": follower.following,
        "hf_generate": follower.following,
        "generate_stream": follower.following_stream,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.hooks(fwd_hooks=hooks))
        for name, wrap in wrappers.items():
            if hasattr(type(model), name):
                stack.callback(_restore, model, name, vars(model).get(name, _MISSING))
                setattr(model, name, wrap(getattr(model, name)))
        try:
            yield
        finally:
            follower.ended = True


def _restore(model: Any, name: str, attribute: Any) -> None:
    """Put an instance attribute back, or take it away where there was none."""
    if attribute is _MISSING:
        delattr(model, name)
    else:
        setattr(model, name, attribute)
