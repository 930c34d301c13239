"""Greedy answers and answer log-probabilities under edits, all from one prefill.

Every edit (an intervention, an ablation, or none) runs on the same frozen prompts: the rows are
all (edit, example) pairs. Decoding keeps the keys and values of what it has written and drops a
row as soon as it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_laai import objectives
from tl_laai.backends import own_modes
from tl_laai.edits import Edit
from tl_laai.packing import FrozenPrompts, Packing, SuffixCache, last_residual, run
from tl_laai.prompts import TokenisedExample, TooLongError
from tl_laai.vocabulary import cross_entropy, next_token

ROWS_AT_ONCE = 512


class _Edits:
    """Edits of a batch of rows, stacked by layer."""

    def __init__(self, edits: Sequence[Edit], prompts: FrozenPrompts) -> None:
        backend = prompts.backend
        for edit in edits:
            edit.check_fits(backend)
        self.edits = edits
        self.like = torch.zeros((), dtype=backend.dtype, device=backend.device)
        heads, width = (backend.n_heads, backend.d_head), (backend.d_model,)
        self.deltas = self._stacked("deltas", heads, 0.0)
        self.scales = self._stacked("scale", heads[:1], 1.0)
        self.residuals = self._stacked("residual", width, 0.0)
        self.replacements = self._stacked("replace", width, torch.nan)  # NaN: keep your own
        self.entry = min((min(e.layers) for e in edits if e.layers), default=backend.n_layers - 1)
        self.every_step = torch.tensor(
            [e.position == "every_step" for e in edits], device=backend.device
        )

    def _stacked(self, name: str, shape: tuple[int, ...], nothing: float) -> dict[int, Tensor]:
        """Layer -> `[n_edits, *shape]`; `nothing` in the rows of edits that leave it alone."""
        stacked: dict[int, Tensor] = {}
        for i, edit in enumerate(self.edits):
            for layer, tensor in getattr(edit, name).items():
                if layer not in stacked:
                    stacked[layer] = self.like.new_full((len(self.edits), *shape), nothing)
                stacked[layer][i] = tensor.to(self.like)
        return stacked

    def apply(self, layer: int, z: Tensor, where: Tensor, of: Tensor) -> Tensor:
        """Edit tokens `where` of z with the edits `of`, `[n]` each."""
        if layer in self.scales:
            z = z.index_copy(0, where, z[where] * self.scales[layer][of, :, None])
        if layer in self.deltas:
            z = z.index_add(0, where, self.deltas[layer][of])
        return z

    def apply_to_residual(self, layer: int, x: Tensor, where: Tensor, of: Tensor) -> Tensor:
        """Edit tokens `where` of the residual before `layer` with the edits `of`."""
        if layer in self.replacements:
            new = self.replacements[layer][of]
            x = x.index_copy(0, where, torch.where(new.isnan(), x[where], new))
        if layer in self.residuals:
            x = x.index_add(0, where, self.residuals[layer][of])
        return x

    def run(
        self,
        packing: Packing,
        entries: Mapping[int, Tensor],
        where: Tensor,
        of: Tensor,
        cache: SuffixCache | None = None,
    ) -> Tensor:
        """The last residual of packed tokens, of which `where` are edited by the edits `of`."""
        steps = run(
            packing,
            entries,
            lambda layer, z: self.apply(layer, z, where, of),
            edit_residual=lambda layer, x: self.apply_to_residual(layer, x, where, of),
            cache=cache,
        )
        return last_residual(steps)


def _batches(prompts: FrozenPrompts, n_edits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs `(edit index, example index)` of all rows, a bounded number at a time."""
    n_examples = len(prompts.examples)
    if not n_edits:
        return
    edit = torch.arange(n_edits).repeat_interleave(n_examples)
    example = torch.arange(n_examples).repeat(n_edits)
    yield from zip(edit.split(ROWS_AT_ONCE), example.split(ROWS_AT_ONCE), strict=True)


@own_modes()
def answer_log_probabilities(
    prompts: FrozenPrompts, edits: Sequence[Edit]
) -> Float[Tensor, "n_edits n_examples"]:
    """Log-probability of each example's whole answer under each edit, in nats.

    Example:
        >>> answer_log_probabilities(prompts, [Edit()]).mean()  # doctest: +SKIP
    """
    out = torch.zeros(len(edits), len(prompts.examples), dtype=torch.float64)
    head = prompts.backend.unembedding()
    with torch.no_grad():
        for edit_of, example_of, packing, hidden in _edited(prompts, edits):
            targets = prompts.targets[packing.token]
            counted = targets >= 0
            losses = cross_entropy(
                hidden(counted), head.weight, targets[counted], bias=head.bias, softcap=head.softcap
            ).double()
            summed = losses.new_zeros(len(edit_of)).index_add_(0, packing.row[counted], -losses)
            out[edit_of, example_of] = summed.cpu()
    return out


@own_modes()
def option_log_probabilities(
    prompts: FrozenPrompts, edits: Sequence[Edit], options: Int[Tensor, "n_examples most_options"]
) -> Float[Tensor, "n_edits n_examples most_options"]:
    """Log-probability of each option as the token after its prompt, under each edit, in nats.

    They are those of the whole vocabulary: what is missing from a sum of 1 went elsewhere.

    Example:
        >>> option_log_probabilities(prompts, [Edit()], options).exp().sum(-1)  # doctest: +SKIP

    Args:
        prompts: frozen prompts; their answers are not read.
        edits: what is done to the model.
        options: token of each option, `[n_examples, most_options]`; -1 past the last.

    Returns:
        `[n_edits, n_examples, most_options]`; `-inf` where there is no option.
    """
    out = torch.zeros(len(edits), *options.shape, dtype=torch.float64)
    head = prompts.backend.unembedding()
    with torch.no_grad():
        for edit_of, example_of, packing, hidden in _edited(prompts, edits):
            own = options[example_of].to(packing.last.device)
            last = hidden(_prompt_ends(prompts, packing))
            # What no option gets is a small difference: logits in half precision would hide it.
            last = last.to(torch.promote_types(last.dtype, torch.float32))
            # Of the first option over the vocabulary; of the others relative to it.
            first = -cross_entropy(
                last, head.weight, own[:, 0], bias=head.bias, softcap=head.softcap
            )
            among = objectives.option_log_probabilities(last, own, head)
            out[edit_of, example_of] = (among - among[:, :1] + first[:, None]).double().cpu()
    return out


@own_modes()
def last_hidden(
    prompts: FrozenPrompts, edits: Sequence[Edit]
) -> Float[Tensor, "n_edits n_examples d_model"]:
    """Normalised last residual at each prompt's last token under each edit.

    Args:
        prompts: frozen prompts; their answers are not read.
        edits: what is done to the model.
    """
    backend = prompts.backend
    shape = (len(edits), len(prompts.examples), backend.d_model)
    out = torch.zeros(shape, dtype=backend.dtype, device=backend.device)
    with torch.no_grad():
        for edit_of, example_of, packing, hidden in _edited(prompts, edits):
            out[edit_of, example_of] = hidden(_prompt_ends(prompts, packing))
    return out


@own_modes()
def answer_hidden(prompts: FrozenPrompts, edit: Edit) -> list[Float[Tensor, "n_answer d_model"]]:
    """Normalised last residuals at each example's last prompt token and along its answer.

    They predict the answer's tokens; one tensor an example.

    Args:
        prompts: frozen prompts with their answers.
        edit: what is done to the model.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for _, example_of, packing, hidden in _edited(prompts, [edit]):
            counted = prompts.targets[packing.token] >= 0
            lengths = torch.bincount(packing.row[counted], minlength=len(example_of))
            found += hidden(counted).split(lengths.tolist())
    return found


def _prompt_ends(prompts: FrozenPrompts, packing: Packing) -> Int[Tensor, " n_rows"]:
    return torch.nonzero(prompts.is_prompt_end[packing.token]).squeeze(-1)


def _edited(
    prompts: FrozenPrompts, edits: Sequence[Edit]
) -> Iterator[tuple[Tensor, Tensor, Packing, Callable[[Tensor], Tensor]]]:
    """Batches of rows run to the end: `(edit index, example index, packing, hidden)`.

    `hidden` gives the normalised last residuals of the tokens that an index or mask chooses.
    """
    stacked = _Edits(edits, prompts)
    backend, entry = prompts.backend, stacked.entry
    prompts.enter_at([entry])
    for edit_of, example_of in _batches(prompts, len(edits)):
        packing = Packing(prompts, example_of)
        targets = prompts.targets[packing.token]
        of = edit_of.to(backend.device)[packing.row]
        where = torch.nonzero(
            prompts.is_prompt_end[packing.token] | (stacked.every_step[of] & (targets >= 0))
        ).squeeze(-1)
        entries = {entry: prompts.residuals[entry][packing.token]}
        x = stacked.run(packing, entries, where, of[where])

        def hidden(chosen: Tensor, x: Tensor = x) -> Tensor:
            return backend.final_norm(x[chosen])

        yield edit_of, example_of, packing, hidden


@own_modes()
def decode(
    prompts: FrozenPrompts,
    edits: Sequence[Edit],
    *,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> list[list[tuple[int, ...]]]:
    """Greedy (or drawn) continuations of each prompt under each edit.

    A continuation ends before its first special token (such as an end of text), with its first
    token that contains a newline (left out if nothing but white space stands before the newline),
    or after `max_new_tokens`.

    Example:
        >>> decode(prompts, [Edit(), Edit({9: delta})], max_new_tokens=8)  # doctest: +SKIP

    Args:
        prompts: frozen prompts; their answers are not read.
        edits: what is done to the model, one set of continuations each.
        max_new_tokens: longest continuation, in tokens.
        generator: draw tokens from the model's distribution instead; on the model's device.

    Returns:
        `[n_edits][n_examples]` token tuples.
    """
    check_room(prompts.examples, max_new_tokens, prompts.backend.n_ctx)
    longest = max(len(e.prompt) for e in prompts.examples) + max_new_tokens
    prompts.backend.ensure_positions(longest)
    written: list[list[tuple[int, ...]]] = [[] for _ in edits]
    stacked = _Edits(edits, prompts)
    ends = EndTokens(prompts.model)
    with torch.no_grad():
        for edit_of, example_of in _batches(prompts, len(edits)):
            rows = _decode_rows(
                prompts, stacked, edit_of, example_of, ends, max_new_tokens, generator
            )
            for e, tokens in zip(edit_of.tolist(), rows, strict=True):
                written[e].append(tokens)
    return written


def _decode_rows(
    prompts: FrozenPrompts,
    edits: _Edits,
    edit_of: Tensor,
    example_of: Tensor,
    ends: EndTokens,
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> list[tuple[int, ...]]:
    backend, head = prompts.backend, prompts.backend.unembedding()
    edit_of = edit_of.to(backend.device)
    packing = Packing(prompts, example_of, prompt_only=True)
    tokens, positions = prompts.tokens[packing.token], packing.positions
    where = packing.last
    cache = SuffixCache()
    active = torch.arange(len(edit_of), device=backend.device)
    written: list[list[int]] = [[] for _ in edit_of]
    for step in range(max_new_tokens):
        entries = {0: backend.embed(tokens, positions)}
        x = edits.run(packing, entries, where, edit_of[packing.row][where], cache)
        at_end = x[packing.last] if step == 0 else x
        choice = next_token(backend.final_norm(at_end), head, generator)
        going = []
        for i, (row, token) in enumerate(zip(active.tolist(), choice.tolist(), strict=True)):
            belongs, is_last = ends(token)
            if belongs:
                written[row].append(token)
            if not is_last:
                going.append(i)
        if not going:
            break
        kept = torch.tensor(going, device=backend.device)
        last_position = positions[packing.last] if step == 0 else positions
        active, tokens, positions = active[kept], choice[kept], last_position[kept] + 1
        packing = packing.next_step(active, positions)
        where = torch.nonzero(edits.every_step[edit_of[active]]).squeeze(-1)
    return [tuple(row) for row in written]


class EndTokens:
    """Tells of a token whether it belongs to an answer, and whether it is the last to be read."""

    def __init__(self, model: Any) -> None:
        self.tokenizer = model.tokenizer
        self.known: dict[int, tuple[bool, bool]] = {}

    def __call__(self, token: int) -> tuple[bool, bool]:
        """Such as `(False, True)` for a newline alone."""
        if token not in self.known:
            text = self.tokenizer.decode([token])
            plain = self.tokenizer.decode([token], skip_special_tokens=True)
            if token == self.tokenizer.eos_token_id or (text and not plain):
                self.known[token] = (False, True)
            else:
                line, newline, _ = text.partition("\n")
                # Some tokenizers have a token of, say, a full stop and a newline.
                self.known[token] = (not newline or bool(line.strip()), bool(newline))
        return self.known[token]


def longest_answer(
    examples: Sequence[TokenisedExample], n_ctx: int | None = None, *, margin: int = 4
) -> int:
    """How many tokens to decode for answers like these: the longest one and a margin.

    Args:
        examples: prompts and the answers expected.
        n_ctx: tokens that the model's context holds: no more than fit are asked for.
        margin: tokens more than the longest answer.
    """
    length = max(len(e.answer) for e in examples) + margin
    return length if n_ctx is None else min(length, n_ctx - max(len(e.prompt) for e in examples))


def check_room(examples: Sequence[TokenisedExample], max_new_tokens: int, n_ctx: int) -> None:
    """Refuse continuations of more tokens than the context holds behind a prompt."""
    longest = max(len(e.prompt) for e in examples) + max_new_tokens
    if longest > n_ctx:
        raise TooLongError(
            f"max_new_tokens is {max_new_tokens}: prompt and continuation would take {longest} "
            f"tokens, and the model's context holds {n_ctx}. Ask for fewer."
        )
