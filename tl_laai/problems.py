"""From the examples of many problems to one engine: prompts frozen once, each with its objective.

What an example asks for follows from its kind: an `Example` its answer, a `TaughtExample` a
teacher's distributions along an answer (both may stand in one problem), an `OptionExample` a
group's distribution over options.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch

from tl_laai.backends import backend_of, own_modes
from tl_laai.distributions import Distributions
from tl_laai.engine import Engine
from tl_laai.hooking import Position
from tl_laai.memory import memory_estimate
from tl_laai.objectives import AnswerCrossEntropy, Objective, OptionKL, VocabularyKL
from tl_laai.opinions import OptionExample
from tl_laai.packing import FrozenPrompts
from tl_laai.prefix import freeze
from tl_laai.prompts import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    TaughtExample,
    TokenisedExample,
    tokenise,
    tokenise_options,
)
from tl_laai.tasks import Example

FitExample: TypeAlias = Example | TaughtExample | OptionExample

_LOG = logging.getLogger("tl_laai")


@own_modes()
def engine_for(
    model: Any,
    examples: Sequence[Sequence[FitExample]],
    *,
    layers: Sequence[int],
    weights: Sequence[Sequence[float]] | None = None,
    position: Position = "prompt_end",
    template: PromptTemplate = DEFAULT_TEMPLATE,
    max_memory: float = 1.0,
) -> Engine:
    """The engine of many problems; examples that several of them share are frozen once.

    Example:
        >>> engine = engine_for(model, [split.train], layers=[9])  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: those of each problem.
        layers: the edited layer of each problem.
        weights: of each problem's examples; None for all alike.
        position: where Delta is added.
        template: how the inputs of `Example`s become prompts.
        max_memory: GiB that one chunk of rows may take above the model. The estimate for all
            is logged before it is allocated: logger `tl_laai`, at level INFO, and at WARNING,
            which Python prints unasked, from 1 GiB on.

    Raises:
        TypeError: examples of other kinds, or opinion questions among others.
    """
    backend = backend_of(model)
    distinct = list(dict.fromkeys(e for own in examples for e in own))
    index = {example: i for i, example in enumerate(distinct)}
    rows = [[index[e] for e in own] for own in examples]
    kinds = {type(example) for example in distinct}
    if kinds == {OptionExample}:
        tokenised, names = _option_tokens(model, cast("list[OptionExample]", distinct))
    elif kinds <= {Example, TaughtExample}:
        tokenised, names = _answer_tokens(model, distinct, template), []
    else:
        found = sorted(kind.__name__ for kind in kinds)
        raise TypeError(
            f"examples are {found}; give Examples, TaughtExamples or both, or OptionExamples alone."
        )
    if all(0 <= layer < backend.n_layers for layer in layers):  # else the engine refuses them
        needed = memory_estimate(
            backend, tokenised, layers=layers, rows=rows, max_memory=max_memory
        )
        level = logging.WARNING if needed >= 2**30 else logging.INFO
        fits = "1 fit" if len(layers) == 1 else f"{len(layers)} fits"
        message = "%s on %d examples: about %.2f GiB above the model"
        _LOG.log(level, message, fits, len(distinct), needed / 2**30)
    prompts = freeze(model, tokenised)
    return Engine(
        prompts,
        layers=layers,
        rows=rows,
        position=position,
        objective=_objective(prompts, distinct, names),
        weights=weights,
        max_memory=max_memory,
    )


def _answer_tokens(
    model: Any, examples: Sequence[FitExample], template: PromptTemplate
) -> tuple[TokenisedExample, ...]:
    labelled = [example for example in examples if isinstance(example, Example)]
    tokens = iter(tokenise(model, labelled, template=template) if labelled else ())
    return tuple(e.tokens if isinstance(e, TaughtExample) else next(tokens) for e in examples)


def _option_tokens(
    model: Any, examples: Sequence[OptionExample]
) -> tuple[tuple[TokenisedExample, ...], list[tuple[int, ...]]]:
    pairs = [tokenise_options(model, example) for example in examples]
    tokenised = [
        TokenisedExample(prompt, (), example.prompt, "")
        for (prompt, _), example in zip(pairs, examples, strict=True)
    ]
    return tuple(tokenised), [names for _, names in pairs]


def _objective(
    prompts: FrozenPrompts, examples: Sequence[FitExample], names: Sequence[tuple[int, ...]]
) -> Objective:
    if names:
        return _option_objective(prompts, cast("list[OptionExample]", examples), names)
    if not any(isinstance(example, TaughtExample) for example in examples):
        return AnswerCrossEntropy(prompts.targets)
    # The tokens before the last prompt token predict no answer.
    targets, of, parts, n = prompts.targets.clone(), torch.full_like(prompts.targets, -1), [], 0
    for example, stop in zip(examples, prompts.offsets[1:].tolist(), strict=True):
        if isinstance(example, TaughtExample):
            own = example.distributions
            first = stop - len(own)
            of[first:stop] = torch.arange(n, n + len(own))
            targets[first:stop] = -1
            parts.append(own)
            n += len(own)
    return VocabularyKL(targets, of, Distributions.cat(parts).to(targets.device))


def _option_objective(
    prompts: FrozenPrompts, examples: Sequence[OptionExample], names: Sequence[tuple[int, ...]]
) -> OptionKL:
    most = max(len(own) for own in names)
    device = prompts.tokens.device
    shape = (len(examples), most)
    options = torch.full(shape, -1, dtype=torch.long, device=device)
    shares = torch.zeros(shape, dtype=torch.float64, device=device)
    for i, (example, own) in enumerate(zip(examples, names, strict=True)):
        options[i, : len(own)] = torch.tensor(own, device=device)
        shares[i, : len(own)] = torch.tensor(example.distribution, dtype=torch.float64)
    of = torch.full_like(prompts.tokens, -1)
    of[prompts.prompt_ends] = torch.arange(len(examples), device=device)
    weights = torch.tensor([e.outside_weight for e in examples], dtype=torch.float64).to(device)
    return OptionKL(of, options, shares, weights)
