"""Slow twins of the engine: plain `run_with_hooks` over the whole prompt, one example at a time.

No cache, no padding, no batch, no shared prefix: each function reads like the definition of what
it computes. Losses are reduced in float64, because torch's own float32 log-softmax over a large
vocabulary is off by 1e-5.

Example:
    loss, gradient = loss_and_gradient(model, examples, 9, delta, "prompt_end")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tiny
import torch
from torch import Tensor

from tl_laai.packing import FrozenPrompts
from tl_laai.prefix import freeze
from tl_laai.prompts import TokenisedExample

LENGTHS = ((6, 1), (9, 3), (1, 2), (4, 1), (13, 4))
"""Lengths of prompts and answers: one token, windows just filled and filled thrice, repeats."""

N_NEW = 5

NO_DELTAS: Mapping[int, Tensor] = {}
NO_SCALES: Mapping[int, Tensor] = {}
NO_RESIDUALS: Mapping[int, Tensor] = {}


def edit_hooks(
    deltas: Mapping[int, Tensor],
    position: str,
    prompt_length: int,
    scales: Mapping[int, Tensor] = NO_SCALES,
    residuals: Mapping[int, Tensor] = NO_RESIDUALS,
    replacements: Mapping[int, Tensor] = NO_RESIDUALS,
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks of a full, uncached forward: `z` becomes `scale * z + delta` where edited.

    The residual before a block is replaced if `replacements` has the layer, and then added to.
    """

    def edited(index: int) -> bool:
        last = index == prompt_length - 1
        return last or (position == "every_step" and index >= prompt_length)

    def hook_of(layer: int) -> Callable[..., Tensor]:
        def hook_z(z: Tensor, hook: Any) -> Tensor:
            columns = []
            for index in range(z.shape[1]):
                column = z[:, index]
                if edited(index):
                    if layer in scales:
                        column = column * scales[layer].to(z)[None, :, None]
                    if layer in deltas:
                        column = column + deltas[layer].to(z)[None]
                columns.append(column)
            return torch.stack(columns, dim=1)

        return hook_z

    def residual_hook_of(layer: int) -> Callable[..., Tensor]:
        def hook_resid_pre(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            for index in filter(edited, range(x.shape[1])):
                if layer in replacements:
                    x[:, index] = replacements[layer].to(x)
                if layer in residuals:
                    x[:, index] += residuals[layer].to(x)
            return x

        return hook_resid_pre

    hooks = [(f"blocks.{at}.attn.hook_z", hook_of(at)) for at in {*deltas, *scales}]
    hooks += [
        (f"blocks.{at}.hook_resid_pre", residual_hook_of(at)) for at in {*residuals, *replacements}
    ]
    return hooks


def logits_under_edits(
    model: Any,
    tokens: Sequence[int],
    prompt_length: int,
    deltas: Mapping[int, Tensor] = NO_DELTAS,
    position: str = "prompt_end",
    scales: Mapping[int, Tensor] = NO_SCALES,
    residuals: Mapping[int, Tensor] = NO_RESIDUALS,
    replacements: Mapping[int, Tensor] = NO_RESIDUALS,
) -> Tensor:
    """Logits `[pos, d_vocab]` of one sequence."""
    device = next(model.parameters()).device
    logits: Tensor = model.run_with_hooks(
        torch.tensor([list(tokens)], device=device),
        return_type="logits",
        fwd_hooks=edit_hooks(deltas, position, prompt_length, scales, residuals, replacements),
    )
    return logits[0]


def log_probabilities(
    model: Any,
    example: TokenisedExample,
    deltas: Mapping[int, Tensor] = NO_DELTAS,
    position: str = "prompt_end",
    scales: Mapping[int, Tensor] = NO_SCALES,
    residuals: Mapping[int, Tensor] = NO_RESIDUALS,
    replacements: Mapping[int, Tensor] = NO_RESIDUALS,
) -> Tensor:
    """Log-probability of each answer token given those before it, `[n_answer_tokens]`."""
    tokens = [*example.prompt, *example.answer]
    length = len(example.prompt)
    logits = logits_under_edits(
        model, tokens, length, deltas, position, scales, residuals, replacements
    )
    steps = [
        logits[length - 1 + i].double().log_softmax(dim=-1)[token]
        for i, token in enumerate(example.answer)
    ]
    return torch.stack(steps)


def loss(
    model: Any,
    examples: Sequence[TokenisedExample],
    deltas: Mapping[int, Tensor] = NO_DELTAS,
    position: str = "prompt_end",
) -> Tensor:
    """Teacher-forced cross-entropy: mean over an answer's tokens, then over examples."""
    losses = [-log_probabilities(model, e, deltas, position).mean() for e in examples]
    return torch.stack(losses).mean()


def loss_and_gradient(
    model: Any,
    examples: Sequence[TokenisedExample],
    layer: int,
    delta: Tensor,
    position: str = "prompt_end",
) -> tuple[float, Tensor]:
    """The loss and, by autograd through the whole model, its gradient `[n_heads, d_head]`."""
    leaf = delta.detach().clone().requires_grad_()
    value = loss(model, examples, {layer: leaf}, position)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def greedy_continuation(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    ends: Callable[[int], bool],
    deltas: Mapping[int, Tensor] = NO_DELTAS,
    position: str = "prompt_end",
    scales: Mapping[int, Tensor] = NO_SCALES,
    residuals: Mapping[int, Tensor] = NO_RESIDUALS,
    replacements: Mapping[int, Tensor] = NO_RESIDUALS,
) -> tuple[int, ...]:
    """Most probable tokens, the whole sequence afresh at each step, up to one that ends it."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < max_new_tokens:
            tokens = [*prompt, *written]
            logits = logits_under_edits(
                model, tokens, len(prompt), deltas, position, scales, residuals, replacements
            )
            token = int(logits[-1].argmax())
            if ends(token):
                break
            written.append(token)
    return tuple(written)


def random_examples(
    lengths: Sequence[tuple[int, int]], *, seed: int = 0, shared: int = 0
) -> tuple[TokenisedExample, ...]:
    """Examples of random tokens with given (prompt, answer) lengths; the first `shared` agree."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 259, (count,), generator=generator).tolist())

    common = draw(shared)
    return tuple(
        TokenisedExample((*common, *draw(prompt - shared)), draw(answer), f"in {i}", f"out {i}")
        for i, (prompt, answer) in enumerate(lengths)
    )


def random_delta(model: Any, *, seed: int = 0, scale: float = 0.5) -> Tensor:
    """A random float64 delta of the model's shape, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.cfg.n_heads, model.cfg.d_head)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def random_deltas(layers: Sequence[int] = (1, 2), seed: int = 0) -> dict[int, Tensor]:
    """Deltas for any tiny model, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, 4, 8, generator=generator, dtype=torch.float64)
    return {layer: 2 * draw() for layer in layers}


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random bytes as token ids."""
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


def generate(model: Any, tokens: Any, **options: Any) -> Any:
    """The model's own greedy `generate`, of `N_NEW` tokens unless told otherwise."""
    options = {"max_new_tokens": N_NEW, "do_sample": False, "stop_at_eos": False, **options}
    return model.generate(tokens, verbose=False, **options)


def random_residual(model: Any, *, seed: int = 0, scale: float = 0.5) -> Tensor:
    """A random float64 vector of the residual stream's width."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(model.cfg.d_model, generator=generator, dtype=torch.float64)


def relative(got: Tensor, expected: Tensor) -> float:
    """`||got - expected|| / ||expected||` in float64."""
    wide = expected.detach().double()
    return float((got.detach().double() - wide).norm() / wide.norm())


def run_once(model: Any) -> Any:
    """The model after one forward of its own: a bridge wires hooks of its own in its first."""
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]], device=next(model.parameters()).device))
    return model


@functools.cache
def shared_model(backend: str, family: str = "gemma", seed: int = 0) -> Any:
    """One tiny float64 model for all tests that leave it as found."""
    return run_once(tiny.tiny_model(backend, family, seed=seed))


def watched(model: Any) -> Iterator[Any]:
    """The body of a fixture that hands a model over and finds it as it was."""
    before = state_of(model)
    yield model
    assert state_of(model) == before


def activations(model: Any, tokens: Tensor, name: str) -> Tensor:
    """What flows through one hook point, `[batch, pos, ...]`, in the model's own forward."""
    seen: list[Tensor] = []

    def hook(value: Tensor, hook: Any) -> None:
        seen.append(value.clone())

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
    return seen[0]


def state_of(model: Any) -> dict[str, Any]:
    """All that working with a model could leave behind in it."""
    modules = [*model.modules(), *getattr(model, "original_model", model).modules()]
    return {
        "forward": [id(m) for m in modules if "forward" in vars(m)],
        "torch_hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "hooks": {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()},
        "level": model.context_level,
        "methods": [vars(model).get(n) for n in ("generate", "generate_stream", "hf_generate")],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "training": [m.training for m in modules],
        "grad_mode": torch.is_grad_enabled(),
    }


def values_at(model: Any, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    """What passes the named hook points on one sequence, without its batch axis."""
    seen: dict[str, Tensor] = {}
    device = next(model.parameters()).device

    def hook_of(name: str) -> Callable[..., None]:
        def watch(value: Tensor, hook: Any) -> None:
            seen[name] = value[0]

        return watch

    with torch.no_grad():
        model.run_with_hooks(
            torch.tensor([list(tokens)], device=device),
            fwd_hooks=[(name, hook_of(name)) for name in names],
        )
    return seen


@functools.cache
def frozen(lengths: tuple[tuple[int, int], ...] = LENGTHS, *, shared: int = 0) -> FrozenPrompts:
    examples = random_examples(lengths, shared=shared)
    return freeze(shared_model("bridge", "gemma"), examples, share_prefix=bool(shared))
