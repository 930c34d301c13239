"""Evaluates interventions on opinion questions: one row a question, and the floors beside it.

A model's distribution over the options of a question is its share of each option's letter among
the letters, averaged over prompts that differ in the order of the options and brought back to
the question's own order. The distances from the group's distribution are taken after averaging:
averaging first takes out what the model says of positions. What a fit minimises is the KL before
averaging, a prompt at a time, which stands in each row as `prompt_kl`, and the surprisal of naming
any letter, whose probability `outside` leaves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.bootstrap import bootstrap_interval
from tl_laai.decoding import option_log_probabilities
from tl_laai.edits import Edit
from tl_laai.evaluation import as_edit
from tl_laai.interventions import Intervention
from tl_laai.metrics import kl_divergence, total_variation, wasserstein_ordered
from tl_laai.opinions import (
    DEFAULT_OPINION_TEMPLATE,
    OpinionQuestion,
    OpinionTemplate,
    OptionExample,
    option_examples,
)
from tl_laai.polls import OpinionSplit, check_no_shared_question
from tl_laai.prefix import freeze
from tl_laai.prompts import TokenisedExample, tokenise_options

Measure = Literal["kl", "total_variation", "wasserstein", "prompt_kl", "outside"]
MEASURES: tuple[Measure, ...] = ("kl", "total_variation", "wasserstein", "prompt_kl", "outside")


@dataclass(frozen=True)
class OpinionRow:
    """How one question was answered.

    Attributes:
        question: its `id`.
        group: the group's share of each option, in the question's own order.
        predicted: the model's, averaged over the orders.
        kl: KL(group || predicted), in nats.
        total_variation: between the two.
        wasserstein: over the options in the question's own order, as a share of the largest.
        prompt_kl: mean over the orders of KL(group || model), in nats.
        outside: probability that the next token is no option's letter; 0 for a floor.
    """

    question: str
    group: tuple[float, ...]
    predicted: tuple[float, ...]
    kl: float
    total_variation: float
    wasserstein: float
    prompt_kl: float
    outside: float


@dataclass(frozen=True)
class OpinionEvaluation:
    """Rows of one condition.

    Attributes:
        rows: one a question, in order.
    """

    rows: tuple[OpinionRow, ...]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def values(self, measure: Measure) -> list[float]:
        """One number a question, in order: what `bootstrap.paired_bootstrap` compares."""
        if measure not in MEASURES:
            raise ValueError(f"measure is {measure!r}; use one of {MEASURES}.")
        return [float(getattr(row, measure)) for row in self.rows]

    def mean(self, measure: Measure) -> float:
        """Mean over questions."""
        return float(np.mean(self.values(measure)))

    def interval(
        self, measure: Measure, *, level: float = 0.95, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean over questions (at least two)."""
        return bootstrap_interval(self.values(measure), level=level, seed=seed)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Figures for scripts, with the rows if asked for."""
        figures: dict[str, Any] = {"n": self.n}
        for measure in MEASURES:
            figures[measure] = self.mean(measure)
            if self.n > 1 and measure != "outside":
                figures[f"{measure}_interval"] = list(self.interval(measure))
        return figures | ({"rows": [asdict(row) for row in self.rows]} if rows else {})


def evaluate_opinions(
    model: Any,
    questions: Sequence[OpinionQuestion],
    edits: Mapping[str, Edit],
    *,
    n_orders: int = 4,
    seed: int = 0,
    demonstrations: Sequence[OpinionQuestion] = (),
    template: OpinionTemplate = DEFAULT_OPINION_TEMPLATE,
) -> dict[str, OpinionEvaluation]:
    """Ask the same questions under many edits, from one prefill.

    Example:
        >>> edits = {"zero_shot": Edit(), "fitted": as_edit(model, it)}  # doctest: +SKIP
        >>> evaluate_opinions(model, split.test, edits)["fitted"].mean("kl")  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        questions: held out.
        edits: name -> edit (`as_edit` makes one of an intervention; `Edit()` changes nothing).
        n_orders: prompts a question; positions are balanced where it is a multiple of the number
            of options.
        seed: of the orders.
        demonstrations: questions shown in every prompt, answered with the letter of the group's
            most frequent option (one letter is all that a prompt can show of a distribution);
            none may be among `questions`.
        template: how questions become prompts.

    Returns:
        name -> evaluation.

    Raises:
        ValueError: no questions, one shown and asked, or a letter that is no single token.
    """
    if not questions:
        raise ValueError("questions is empty: give at least one question to ask.")
    check_no_shared_question(demonstrations, questions)
    examples = option_examples(
        questions, n_orders=n_orders, seed=seed, template=template, demonstrations=demonstrations
    )
    shares = _shares(model, examples, list(edits.values()), share_prefix=bool(demonstrations))
    results = {}
    for name, own in zip(edits, shares, strict=True):
        rows = [
            _row(question, np.array(own[i * n_orders : (i + 1) * n_orders]))
            for i, question in enumerate(questions)
        ]
        results[name] = OpinionEvaluation(tuple(rows))
    return results


def question_losses(
    model: Any, examples: Sequence[OptionExample], edits: Sequence[Edit]
) -> Float[Tensor, "n_edits n_questions"]:
    """What a fit's loss is of each question once the answers to its prompts are averaged.

    The KL from the group to that average among the options, and the mean surprisal of naming any,
    times `outside_weight`: with one prompt a question, the loss itself.

    Example:
        >>> question_losses(model, option_examples(split.test), [Edit()]).mean()  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: prompts with the same `question` and shares are averaged; each that has no
            `question` stands for itself.
        edits: what is done to the model.

    Returns:
        In nats; questions in the order of their first prompts.
    """
    asked: dict[Hashable, list[int]] = {}
    groups = [np.asarray(e.distribution)[_own_order(e)] for e in examples]
    for i, example in enumerate(examples):
        key = (example.question, *groups[i]) if example.question else i
        asked.setdefault(key, []).append(i)
    losses = np.zeros((len(edits), len(asked)))
    for own, shares in zip(losses, _shares(model, examples, edits), strict=True):
        for k, prompts in enumerate(asked.values()):
            inside = np.array([shares[i].sum() for i in prompts])
            among = np.mean([shares[i] / shares[i].sum() for i in prompts], axis=0)
            weights = np.array([examples[i].outside_weight for i in prompts])
            own[k] = kl_divergence(groups[prompts[0]], among) - (weights * np.log(inside)).mean()
    return torch.from_numpy(losses)


def compare_opinions(
    model: Any,
    split: OpinionSplit,
    intervention: Intervention,
    *,
    n_orders: int = 4,
    seed: int = 0,
    shots: int | None = None,
    template: OpinionTemplate = DEFAULT_OPINION_TEMPLATE,
) -> dict[str, OpinionEvaluation]:
    """Floors, zero-shot, few-shot and intervened answers to the held-out questions of a split.

    Example:
        >>> compare_opinions(model, split, it)["fitted"].mean("kl")  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        split: `train` was fitted on and is shown, `test` is asked.
        intervention: fitted on `split.train`.
        n_orders: prompts a question.
        seed: of the orders.
        shots: how many of `split.train` to show, from the first; None for all, 0 leaves the
            few-shot prompts out.
        template: how questions become prompts.

    Returns:
        Evaluations called `uniform`, `train_mean`, `zero_shot`, `few_shot` and `fitted`.
    """
    edits = {"zero_shot": Edit(), "fitted": as_edit(model, intervention)}
    asked = evaluate_opinions(
        model, split.test, edits, n_orders=n_orders, seed=seed, template=template
    )
    results = {
        "uniform": uniform_floor(split.test),
        "train_mean": mean_floor(split.test, split.train),
        "zero_shot": asked["zero_shot"],
    }
    if shots != 0:
        results |= evaluate_opinions(
            model, split.test, {"few_shot": Edit()}, n_orders=n_orders, seed=seed,
            demonstrations=split.train[:shots], template=template,
        )  # fmt: skip
    return results | {"fitted": asked["fitted"]}


def uniform_floor(questions: Sequence[OpinionQuestion]) -> OpinionEvaluation:
    """What saying each option equally often scores.

    Example:
        >>> uniform_floor(split.test).mean("kl")  # doctest: +SKIP
    """
    flat = [np.full((1, len(q.options)), 1 / len(q.options)) for q in questions]
    return OpinionEvaluation(tuple(map(_row, questions, flat)))


def mean_floor(
    questions: Sequence[OpinionQuestion], train: Sequence[OpinionQuestion]
) -> OpinionEvaluation:
    """What repeating the training questions' mean answer scores.

    The mean is by position: the share of a question's first, second, ... option is the mean share
    of the first, second, ... option of the training questions with as many options, each in its
    own order. Where no training question has as many, it is uniform.
    """
    predicted = []
    for question in questions:
        alike = [q.distribution for q in train if len(q.options) == len(question.options)]
        flat = (1 / len(question.options),) * len(question.options)
        predicted.append(np.mean(alike or [flat], axis=0, keepdims=True))
    return OpinionEvaluation(tuple(map(_row, questions, predicted)))


def mean_kl(of: OpinionEvaluation, other: OpinionEvaluation) -> float:
    """Mean KL of one condition's answers from another's, over the questions both were asked.

    Example:
        >>> mean_kl(results["few_shot"], results["fitted"])  # doctest: +SKIP
    """
    pairs = zip(of.rows, other.rows, strict=True)
    return float(np.mean([kl_divergence(a.predicted, b.predicted) for a, b in pairs]))


def _own_order(example: OptionExample) -> list[int]:
    """Where each option of the question, in its own order, stands in the prompt."""
    order = example.order or range(len(example.names))
    return sorted(range(len(order)), key=order.__getitem__)


def _shares(
    model: Any,
    examples: Sequence[OptionExample],
    edits: Sequence[Edit],
    *,
    share_prefix: bool = False,
) -> list[list[np.ndarray]]:
    """Probability of each option, in its question's own order: one array an edit and prompt."""
    tokens = [tokenise_options(model, example) for example in examples]
    prompts = freeze(
        model,
        [
            TokenisedExample(prompt, (), e.question, "")
            for (prompt, _), e in zip(tokens, examples, strict=True)
        ],
        share_prefix=share_prefix,
    )
    options = torch.full((len(examples), max(len(names) for _, names in tokens)), -1)
    for i, (_, names) in enumerate(tokens):
        options[i, : len(names)] = torch.tensor(names)
    shares = option_log_probabilities(prompts, edits, options).exp().numpy()
    orders = [_own_order(example) for example in examples]
    return [[row[order] for row, order in zip(own, orders, strict=True)] for own in shares]


def _row(question: OpinionQuestion, shares: Float[np.ndarray, "n_orders n_options"]) -> OpinionRow:
    """Scores of one question from the probability of each option under each order."""
    inside = shares.sum(axis=-1, keepdims=True)
    among = shares / inside
    group, predicted = np.asarray(question.distribution), among.mean(axis=0)
    return OpinionRow(
        question=question.id,
        group=question.distribution,
        predicted=tuple(predicted.tolist()),
        kl=float(kl_divergence(group, predicted)),
        total_variation=float(total_variation(group, predicted)),
        wasserstein=float(wasserstein_ordered(group, predicted)),
        prompt_kl=float(kl_divergence(np.broadcast_to(group, among.shape), among).mean()),
        # Rounding may leave a little more than 1 inside.
        outside=max(0.0, float(1 - inside.mean())),
    )
