"""What a fit minimises, token by token: cross-entropy of answers, KL to a given distribution.

Over the whole vocabulary both are `logsumexp(logits) - <target, logits>`, up to a constant.
Over a few options (the letters of a multiple-choice question) only their logits are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
        targets, which = self.targets[tokens].clamp(min=0), self.of[tokens]
        taught = (which >= 0).nonzero().squeeze(1)
        own = self.distributions[which[taught]]
        # Two terms nearly cancel: in half precision their rounding would be the loss.
        wide = torch.promote_types(hidden.dtype, own.offsets.dtype)
        hidden = hidden.to(wide)
        rows = head.weight[targets].to(wide)
        offsets = rows.new_zeros(len(rows)) if head.bias is None else head.bias[targets].to(wide)
        if own.mean_rows is not None:
            rows = rows.index_copy(0, taught, own.mean_rows.to(wide))
            offsets = offsets.index_copy(0, taught, own.offsets.to(wide))
            return log_sum_exp_minus(hidden, head, rows) - offsets
        logits = head.cap((hidden * rows).sum(-1) + offsets)
        means = capped_mean_logit(hidden[taught], own, head) + own.offsets
        none = torch.zeros_like(hidden)
        return log_sum_exp_minus(hidden, head, none) - logits.index_copy(0, taught, means)


@dataclass(frozen=True)
class OptionKL(Objective):
    """KL from a group's answers to the model's own, both over the options of a question alone.

    Attributes:
        of: the question of each suffix token, `[n_tokens]`; -1 where none is answered.
        options: token of each option, `[n_questions, most_options]`; -1 past the last.
        distributions: the group's share of each option, `[n_questions, most_options]`.
    """

    of: Int[Tensor, " n_tokens"]
    options: Int[Tensor, "n_questions most_options"]
    distributions: Float[Tensor, "n_questions most_options"]

    def counted(self) -> Bool[Tensor, " n_tokens"]:
        """The tokens after which an option is named."""
        return self.of >= 0

    def losses(
        self, hidden: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"], head: Unembedding
    ) -> Float[Tensor, " n"]:
        """`sum share log(share / softmax(option logits))`."""
        question = self.of[tokens]
        share = self.distributions[question]
        log_p = option_log_probabilities(hidden, self.options[question], head)
        share = share.to(log_p)
        return (torch.xlogy(share, share) - share * log_p.masked_fill(share == 0, 0)).sum(-1)


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
    present = options >= 0
    index = options.clamp(min=0)
    logits = torch.einsum("nd,nkd->nk", hidden, head.weight[index])
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = logits.to(accumulate)
    if head.bias is not None:
        logits = logits + head.bias[index].to(accumulate)
    return head.cap(logits).masked_fill(~present, -torch.inf).log_softmax(dim=-1)
