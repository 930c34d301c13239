"""Evaluates interventions on a task: greedy answers from one prefill, one row an example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.decoding import answer_log_probabilities, decode, longest_answer
from tl_laai.edits import Edit
from tl_laai.interventions import Intervention
from tl_laai.metrics import begins_with, exact_match
from tl_laai.prefix import freeze
from tl_laai.prompts import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    TokenisedExample,
    decoded_answer,
    tokenise,
)
from tl_laai.splits import integer
from tl_laai.tasks import Example, check_disjoint, check_examples

# Prompts of unlike lengths are answered apart where together they would be padded to more.
_PADDED_TOKENS = 8192


@dataclass(frozen=True)
class AnswerRow:
    """How one example was answered.

    Attributes:
        input, target: the example.
        prediction: the greedy answer, decoded up to its first newline.
        correct: whether they match exactly.
        log_probability: of the whole target answer, in nats.
    """

    input: str
    target: str
    prediction: str
    correct: bool
    log_probability: float


@dataclass(frozen=True)
class Evaluation:
    """Rows of one condition.

    Attributes:
        rows: one an example, in order.
    """

    rows: tuple[AnswerRow, ...]

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.rows)

    @property
    def exact_match(self) -> float:
        """Share of examples answered exactly, 0 to 1."""
        return sum(row.correct for row in self.rows) / len(self.rows)

    @property
    def begins_right(self) -> float:
        """Share of examples whose answer begins with the right one, whatever follows, 0 to 1."""
        return sum(begins_with(row.prediction, row.target) for row in self.rows) / len(self.rows)

    @property
    def log_probability(self) -> float:
        """Mean log-probability of the target answers, in nats."""
        return sum(row.log_probability for row in self.rows) / len(self.rows)

    @property
    def probability(self) -> float:
        """Mean probability of the target answers: what exact match would be of drawn answers."""
        return sum(math.exp(row.log_probability) for row in self.rows) / len(self.rows)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Figures for scripts, with the rows if asked for."""
        figures = {
            "exact_match": self.exact_match,
            "begins_right": self.begins_right,
            "n": self.n,
            "log_probability": self.log_probability,
        }
        return figures | ({"rows": [asdict(row) for row in self.rows]} if rows else {})


def evaluate(
    model: Any,
    examples: Sequence[Example],
    *,
    intervention: Intervention | None = None,
    demonstrations: Sequence[Example] = (),
    template: PromptTemplate = DEFAULT_TEMPLATE,
    max_new_tokens: int | None = None,
    strict: bool = True,
) -> Evaluation:
    """Answer examples greedily under an intervention, demonstrations, both, or neither.

    Example:
        >>> evaluate(model, split.test, intervention=capital).exact_match  # doctest: +SKIP
        0.78

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: held-out examples.
        intervention: None for the model as it is.
        demonstrations: examples shown in the prompt; none may be among `examples`.
        template: how inputs become prompts.
        max_new_tokens: longest answer to decode; None for the longest target and a margin.
        strict: refuse an intervention that was fitted on another model.

    Returns:
        One row an example.
    """
    edit = None if intervention is None else as_edit(model, intervention, strict=strict)
    return evaluate_edits(
        model,
        examples,
        {"it": edit or Edit()},
        demonstrations=demonstrations,
        template=template,
        max_new_tokens=max_new_tokens,
    )["it"]


def evaluate_edits(
    model: Any,
    examples: Sequence[Example],
    edits: Mapping[str, Edit],
    *,
    demonstrations: Sequence[Example] = (),
    template: PromptTemplate = DEFAULT_TEMPLATE,
    max_new_tokens: int | None = None,
) -> dict[str, Evaluation]:
    """Answer the same examples under many edits, from one prefill.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: held-out examples.
        edits: name -> edit (`as_edit` makes one of an intervention; `Edit()` changes nothing).
        demonstrations: examples shown in the prompt; none may be among `examples`. Answers behind
            them are scored with the end that theirs have, the template's separator.
        template: how inputs become prompts.
        max_new_tokens: longest answer to decode; None for the longest target and a margin.

    Returns:
        name -> evaluation.
    """
    check_examples("examples", examples)
    check_examples("demonstrations", demonstrations)
    if not examples:
        raise ValueError("examples is empty: give at least one example to evaluate on.")
    max_new_tokens = None if max_new_tokens is None else integer("max_new_tokens", max_new_tokens)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give 1 or more, or None.")
    demonstrations = tuple(demonstrations)
    if demonstrations:
        check_disjoint(demonstrations, examples)
        template = template.behind_demonstrations()
    tokenised = tokenise(model, examples, template=template, demonstrations=demonstrations)
    every = list(edits.values())
    n_ctx = int(model.cfg.n_ctx)
    length = longest_answer(tokenised, n_ctx) if max_new_tokens is None else max_new_tokens
    answers: list[list[tuple[int, ...]]] = [[()] * len(examples) for _ in every]
    scores = torch.zeros(len(every), len(examples), dtype=torch.float64)
    for part in _alike(tokenised):
        prompts = freeze(model, [tokenised[i] for i in part], share_prefix=bool(demonstrations))
        for own, written in zip(
            answers, decode(prompts, every, max_new_tokens=length), strict=True
        ):
            for i, answer in zip(part, written, strict=True):
                own[i] = answer
        scores[:, part] = answer_log_probabilities(prompts, every)
    ends = template.ends(demonstrated=bool(demonstrations))
    return {
        name: Evaluation(tuple(answer_rows(model, examples, answers[i], scores[i].tolist(), ends)))
        for i, name in enumerate(edits)
    }


def _alike(examples: Sequence[TokenisedExample]) -> list[list[int]]:
    """Indices of prompts in parts of like length: each part's are padded to its longest."""
    parts: list[list[int]] = [[]]
    n_tokens = 0
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)):
        n_own = len(examples[i].prompt)
        n_padded = (len(parts[-1]) + 1) * n_own
        if n_padded > max(_PADDED_TOKENS, 2 * (n_tokens + n_own)):
            parts.append([])
            n_tokens = 0
        parts[-1].append(i)
        n_tokens += n_own
    return [sorted(part) for part in parts if part]


def answer_scores(
    model: Any,
    examples: Sequence[Example],
    edits: Sequence[Edit],
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[Float[Tensor, "n_edits n_examples"], Float[Tensor, "n_edits n_examples"]]:
    """Cross-entropy of each answer under each edit, and its probability.

    Example:
        >>> answer_scores(model, split.validation, [Edit()])[1].mean()  # doctest: +SKIP

    Returns:
        The mean over the answer's tokens, in nats; the probability of the whole answer.
    """
    tokenised = tokenise(model, examples, template=template)
    lengths = torch.tensor([len(e.answer) for e in tokenised], dtype=torch.float64)
    found = torch.zeros(len(edits), len(tokenised), dtype=torch.float64)
    for part in _alike(tokenised):
        prompts = freeze(model, [tokenised[i] for i in part])
        found[:, part] = answer_log_probabilities(prompts, edits)
    return -found / lengths, found.exp()


def answer_rows(
    model: Any,
    examples: Sequence[Example],
    answers: Sequence[tuple[int, ...]],
    scores: Sequence[float],
    ends: Sequence[str],
) -> Iterable[AnswerRow]:
    """Rows of examples from the tokens that were written and the log-probabilities of targets.

    Args:
        model: whose tokenizer reads the tokens.
        examples: what was asked.
        answers: the tokens that were written, an example each.
        scores: log-probabilities of the targets.
        ends: what ends an answer within its line.
    """
    for example, answer, score in zip(examples, answers, scores, strict=True):
        prediction = decoded_answer(model.tokenizer.decode(list(answer)), ends)
        correct = exact_match(prediction, example.output)
        yield AnswerRow(example.input, example.output, prediction, correct, score)


def as_edit(model: Any, intervention: Intervention, *, strict: bool = True) -> Edit:
    """The edit that an intervention makes, refused where it was fitted on another model."""
    if not isinstance(intervention, Intervention):
        kind = type(intervention).__name__
        has = " Give its .intervention." if hasattr(intervention, "intervention") else ""
        raise TypeError(f"intervention is a {kind}; expected an Intervention.{has}")
    intervention.check_model(model, strict=strict)
    return Edit(dict(intervention.deltas), intervention.position)
