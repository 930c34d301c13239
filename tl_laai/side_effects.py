"""What an intervention does where it should do nothing: how far next-token distributions move.

    KL( model(prompt) || model(prompt + edit) ), over the whole vocabulary, after the last token

on text that has nothing to do with any task (`UNRELATED`), or on another task's prompts. An edit
that is only wanted on one task's prompts costs this much when it is left on by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.decoding import last_hidden
from tl_laai.distributions import mean_distribution
from tl_laai.edits import Edit
from tl_laai.objectives import VocabularyKL
from tl_laai.prefix import freeze
from tl_laai.prompts import TokenisedExample, tokenise_prompts

UNRELATED = (
    "The ferry was late again, so we sat on the pier and",
    "To replace the filter, first switch off the pump and",
    "My grandmother kept her letters in a tin box under",
    "Snow had fallen overnight, and by morning the road",
    "The committee will publish its report at the end of",
    "He tuned the second string a little higher, listened, and",
    "Mix the flour with a pinch of salt before you add",
    "In the back of the workshop stood a lathe that",
    "She read the last page twice and then put the book",
    "The train leaves from platform four, which is",
    "Most of the garden lies in shade until",
    "After three days of rain the river rose above",
    "Our neighbour's dog barks whenever somebody",
    "The experiment was repeated with a smaller sample, and",
    "They painted the fence green because",
    "A light breeze moved the curtains while",
    "If the printer does not respond, check whether",
    "The museum is closed on Mondays, but visitors",
    "Years later he could still remember the smell of",
    "Between the two hills runs a narrow path that",
)
"""Beginnings of sentences, written for this purpose."""


def next_token_kl(
    model: Any, edits: Mapping[str, Edit], prompts: Sequence[str] = UNRELATED
) -> dict[str, Float[Tensor, " n_prompts"]]:
    """How far each edit moves the distribution of the token after each prompt.

    Example:
        >>> moved = next_token_kl(model, {"capital": as_edit(model, capital)})  # doctest: +SKIP
        >>> float(moved["capital"].mean())  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        edits: name -> edit; its position is each prompt's last token.
        prompts: texts, used as they are.

    Returns:
        name -> KL in nats, one a prompt.

    Raises:
        ValueError: no prompts.
    """
    tokens = tokenise_prompts(model, prompts)
    examples = [
        TokenisedExample(own, (), text, "") for own, text in zip(tokens, prompts, strict=True)
    ]
    frozen = freeze(model, examples)
    head = frozen.backend.unembedding()
    with torch.no_grad():
        plain, *edited = last_hidden(frozen, [Edit(), *edits.values()])
        which = torch.arange(len(prompts), device=plain.device)
        target = VocabularyKL(
            torch.full_like(which, -1), which, mean_distribution(plain[None], head)
        )
        moved = [target.losses(hidden, which, head).double().cpu() for hidden in edited]
    return dict(zip(edits, moved, strict=True))
