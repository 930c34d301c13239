"""What a fit minimises, token by token: cross-entropy of answers, KL to a given distribution.

Over the whole vocabulary both are `logsumexp(logits) - <target, logits>`, up to a constant.
Of a question with options the KL among these alone needs only their logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_laai.distributions import Distributions, capped_mean_logit
from tl_laai.vocabulary import Unembedding, cross_entropy, log_sum_exp_minus

ObjectiveName = Literal["answers", "distill"]


class Objective(ABC):
    """What the suffix tokens of frozen prompts should predict; final or abstract classes only."""

    @abstractmethod
    def counted(self) -> Bool[Tensor, " n_tokens"]:
        """Which suffix tokens carry a loss."""

    @abstractmethod
    def losses(
        self,
        hidden: Float[Tensor, "n d_model"],
        tokens: Int[Tensor, " n"],
        head: Unembedding,
    ) -> Float[Tensor, " n"]:
        """Loss of some counted tokens, in nats, differentiable in `hidden`.

        Args:
            hidden: their normalised last residuals, `[n, d_model]`.
            tokens: which suffix tokens they are, `[n]`.
            head: the unembedding.
        """


@dataclass(frozen=True)
class AnswerCrossEntropy(Objective):
    """Cross-entropy of the answer's own tokens.

    Attributes:
        targets: the token that each suffix token should predict, `[n_tokens]`; -1 for none.
    """

    targets: Int[Tensor, " n_tokens"]

    def counted(self) -> Bool[Tensor, " n_tokens"]:
        """Tokens with a target."""
        return self.targets >= 0

    def losses(
        self, hidden: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"], head: Unembedding
    ) -> Float[Tensor, " n"]:
        """`-log softmax(logits)[target]`."""
        return cross_entropy(
            hidden, head.weight, self.targets[tokens], bias=head.bias, softcap=head.softcap
        )


@dataclass(frozen=True)
class VocabularyKL(Objective):
    """KL from a distribution over the vocabulary to the model's own.

    Attributes:
        targets: the only token of a distribution that has but one, `[n_tokens]`; -1 for none.
        of: which of the distributions each token should have, `[n_tokens]`; -1 for none, or for
            that of `targets`.
        distributions: those with more.
    """

    targets: Int[Tensor, " n_tokens"]
    of: Int[Tensor, " n_tokens"]
    distributions: Distributions

    def counted(self) -> Bool[Tensor, " n_tokens"]:
        """Tokens with a target of either kind."""
        return (self.of >= 0) | (self.targets >= 0)

    def losses(
        self, hidden: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"], head: Unembedding
    ) -> Float[Tensor, " n"]:
        """`sum target log(target / softmax(logits))`."""
        which = self.of[tokens]
        targets, taught = self.targets[tokens].clamp(min=0), which >= 0
        # Of all tokens, those that are not taught included: which are is not to be read back.
        own = self.distributions[which.clamp(min=0)]
        wide = torch.promote_types(hidden.dtype, own.offsets.dtype)
        rows = head.weight[targets].to(wide)
        offsets = rows.new_zeros(len(rows)) if head.bias is None else head.bias[targets].to(wide)
        if own.mean_rows is not None:
            rows = torch.where(taught[:, None], own.mean_rows.to(wide), rows)
            offsets = torch.where(taught, own.offsets.to(wide), offsets)
            return log_sum_exp_minus(hidden, head, rows) - offsets
        # Two terms nearly cancel: in half precision their rounding would be the gradient.
        hidden = hidden.to(wide)
        logits = head.cap((hidden * rows).sum(-1) + offsets)
        means = capped_mean_logit(hidden, own, head) + own.offsets
        none = torch.zeros_like(hidden)
        return log_sum_exp_minus(hidden, head, none) - torch.where(taught, means, logits)


@dataclass(frozen=True)
class OptionKL(Objective):
    """KL from a group's answers to the model's own, and the surprisal of naming an option at all.

    `sum share log(share / p(option | some option)) - outside_weight log p(some option)`: with a
    weight of 1 that is the KL over the whole vocabulary, with 0 the KL among the options alone.

    Attributes:
        of: the question of each suffix token, `[n_tokens]`; -1 where none is answered.
        options: token of each option, `[n_questions, most_options]`; -1 past the last.
        distributions: the group's share of each option, `[n_questions, most_options]`.
        outside_weights: of each question, `[n_questions]`.
    """

    of: Int[Tensor, " n_tokens"]
    options: Int[Tensor, "n_questions most_options"]
    distributions: Float[Tensor, "n_questions most_options"]
    outside_weights: Float[Tensor, " n_questions"]

    @cached_property
    def _asks_for_an_option(self) -> bool:
        return bool(self.outside_weights.any())

    def counted(self) -> Bool[Tensor, " n_tokens"]:
        """The tokens after which an option is named."""
        return self.of >= 0

    def losses(
        self, hidden: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"], head: Unembedding
    ) -> Float[Tensor, " n"]:
        """Of the questions that the tokens answer."""
        question = self.of[tokens]
        weight = self.outside_weights[question]
        logits = _option_logits(hidden, self.options[question], head)
        log_p, share = logits.log_softmax(dim=-1), self.distributions[question].to(logits)
        loss = (torch.xlogy(share, share) - share * log_p.masked_fill(share == 0, 0)).sum(-1)
        if not self._asks_for_an_option:
            return loss
        named = logits.logsumexp(dim=-1)
        if hidden.device.type == "cpu":  # where it may be read back which tokens those are
            asked = weight.nonzero().squeeze(-1)
            outside = _surprisal(hidden[asked], named[asked], head) * weight[asked].to(logits)
            return loss.index_add(0, asked, outside)
        return loss + weight.to(logits) * _surprisal(hidden, named, head)


def _surprisal(hidden: Tensor, named: Tensor, head: Unembedding) -> Tensor:
    """`-log p(some option)`, of tokens whose options' logits have the log-sum-exp `named`."""
    # Two terms nearly cancel: in half precision their rounding would be the loss.
    wide = hidden.to(named)
    return log_sum_exp_minus(wide, head, torch.zeros_like(wide)) - named


def option_log_probabilities(
    hidden: Float[Tensor, "n d_model"],
    options: Int[Tensor, "n most_options"],
    head: Unembedding,
) -> Float[Tensor, "n most_options"]:
    """Log-probability of each option among the options, in nats; `-inf` where there is none.

    Args:
        hidden: normalised last residuals, `[n, d_model]`.
        options: token of each option, `[n, most_options]`; -1 past the last.
        head: the unembedding.
    """
    return _option_logits(hidden, options, head).log_softmax(dim=-1)


def _option_logits(hidden: Tensor, options: Tensor, head: Unembedding) -> Tensor:
    """Logit of each option in float32 or float64; `-inf` where there is none."""
    index = options.clamp(min=0)
    # Wide before the product: a loss compares these logits with those of a pass over all tokens.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.einsum("nd,nkd->nk", hidden.to(wide), head.weight[index].to(wide))
    if head.bias is not None:
        logits = logits + head.bias[index].to(wide)
    return head.cap(logits).masked_fill(options < 0, -torch.inf)
