"""Inputs without labels, made up by the model that has read labelled examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tl_laai.decoding import decode
from tl_laai.distributions import NothingTaughtError
from tl_laai.edits import Edit
from tl_laai.prefix import freeze
from tl_laai.prompts import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    TokenisedExample,
    tokenise,
    tokenise_prompts,
)
from tl_laai.tasks import Example, same_input_key

_LONGEST_INPUT = 16  # tokens of an input that the model makes up, unless longer ones are shown
_ROUNDS = 4  # of sampling, before fewer inputs than asked for are accepted


def make_up_inputs(
    model: Any,
    demonstrations: Sequence[Example],
    n: int,
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    seed: int = 0,
) -> tuple[str, ...]:
    """Inputs like those of the demonstrations, sampled from the model after reading them.

    Example:
        >>> make_up_inputs(model, split.train, 3)  # doctest: +SKIP
        ('Mali', 'Peru', 'Norway')

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        demonstrations: what it reads, and whose inputs are not made up again.
        n: how many different inputs to look for.
        template: how inputs become prompts.
        seed: of the samples.

    Returns:
        At most `n` different inputs; fewer where the model keeps repeating itself.

    Raises:
        NothingTaughtError: the model made up none, or it cannot be told where they would end.
        ValueError: the template has several inputs.
    """
    check_can_make_up(template, demonstrations)
    rest = template.text.partition("{input}")[2]
    opening = template.render("", demonstrations).removesuffix(rest)
    # What follows an input in its line, be it of the template or before the answer.
    closing = (rest + template.answer_prefix).split("\n", 1)[0].strip()
    (prompt,) = tokenise_prompts(model, [opening.rstrip(" ")])
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    known = {same_input_key(shown.input) for shown in demonstrations}
    found: dict[str, str] = {}
    if not n:
        return ()
    longest = _longest(model, demonstrations, template, len(prompt))
    prompts = freeze(model, [TokenisedExample(prompt, (), "", "")] * n)
    for _ in range(_ROUNDS):
        (samples,) = decode(prompts, [Edit()], max_new_tokens=longest, generator=generator)
        for sample in samples:
            text = model.tokenizer.decode(list(sample)).split("\n", 1)[0]
            goes_on = bool(closing) and closing in text
            if len(sample) == longest and not goes_on:
                continue  # cut off
            if goes_on:
                text = text.split(closing, 1)[0]
            text = text.strip()
            if text and same_input_key(text) not in known:
                found.setdefault(same_input_key(text), text)
        if len(found) >= n:
            break
    if not found:
        raise NothingTaughtError(
            f"n is {n}, and the model made up no input after {len(demonstrations)} demonstrations; "
            "give inputs of your own"
        )
    return tuple(found.values())[:n]


def check_can_make_up(template: PromptTemplate, demonstrations: Sequence[Example]) -> None:
    """Refuse prompts of which it is not known where an input ends.

    Raises:
        ValueError: the template has several inputs.
        NothingTaughtError: an input has several lines.
    """
    if (n := template.text.count("{input}")) != 1:
        raise ValueError(
            f"template has {{input}} {n} times: where an input that the model makes up would end "
            "is not known. Give inputs of your own."
        )
    several = next((e.input for e in demonstrations if "\n" in e.input.strip()), None)
    if several is not None:
        raise NothingTaughtError(
            f"the input {several!r:.60} has several lines: where one that the model makes up would "
            "end is not known. Give inputs of your own."
        )


def _longest(
    model: Any, demonstrations: Sequence[Example], template: PromptTemplate, n_prompt: int
) -> int:
    """How many tokens an input may have: twice those of the longest shown, where there is room."""
    if not demonstrations:
        return _LONGEST_INPUT
    inputs = tokenise_prompts(model, [shown.input for shown in demonstrations])
    wholes = tokenise(model, demonstrations, template=template)
    # An input comes to stand before the rest of its line and an answer.
    room = int(model.cfg.n_ctx) - n_prompt - max(len(e.prompt) + len(e.answer) for e in wholes)
    return max(_LONGEST_INPUT, min(2 * max(map(len, inputs)), room))
