"""Fine-tuning on the same few examples: LoRA and IA3 of the library peft, as baselines.

Prompts are the tokens of `prompts.tokenise` and the loss is that of a fit: cross-entropy of the
given answer, mean over its tokens, then over examples, in eval mode (no dropout). Optimised by
AdamW at a constant learning rate, on all examples at once, or on seeded minibatches where there
are many. Both adapters start as the identity.

The adapter sits in a Hugging Face model loaded from the same checkpoint (`adapters.py` says why),
which is first checked to score an answer as the caller's model does; that one is never changed.

Limits: decoder-only models that peft has target modules for (or `target_modules` names); the
weights are held twice, once in each library's form.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tl_laai.adapters import (
    AdapterConfig,
    Method,
    adapted,
    answer_loss,
    greedy_answers,
    hugging_face_model,
    import_peft,
    left_as_found,
    token_losses,
)
from tl_laai.backends import own_modes
from tl_laai.checkpoints import BUILT_IN
from tl_laai.decoding import EndTokens, answer_log_probabilities, check_room, longest_answer
from tl_laai.edits import Edit
from tl_laai.evaluation import Evaluation, answer_rows
from tl_laai.fingerprints import fingerprint
from tl_laai.models import load_model
from tl_laai.prefix import freeze
from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate, TokenisedExample, tokenise
from tl_laai.splits import count
from tl_laai.tasks import Example

BATCH_SIZE = 16
WEIGHT_DECAY = 0.01
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class FineTuned:
    """A trained adapter, and all that is needed to train it again.

    Attributes:
        adapter: name -> trained tensor.
        config: which weights these are.
        learning_rate, steps, batch_size, seed: how they were trained.
        template: how inputs became prompts.
        losses: answer cross-entropy of each step's batch, before the step, in nats.
        model: whose tokens are used.
        hf_model: what the adapter is put into, plain again after every use.
    """

    adapter: Mapping[str, Tensor] = field(repr=False)
    config: AdapterConfig
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    template: PromptTemplate
    losses: tuple[float, ...] = field(repr=False)
    model: Any = field(repr=False)
    hf_model: Any = field(repr=False)

    @property
    def n_parameters(self) -> int:
        """How many numbers were trained."""
        return sum(tensor.numel() for tensor in self.adapter.values())

    @contextmanager
    def applied(self) -> Iterator[Any]:
        """The Hugging Face model with the adapter in it; plain again at the end."""
        with adapted(self.hf_model, self.config, self.seed) as hf_model:
            with torch.no_grad():
                for name, parameter in hf_model.named_parameters():
                    if name in self.adapter:
                        parameter.copy_(self.adapter[name])
            yield hf_model

    @own_modes()
    def evaluate(
        self, examples: Sequence[Example], *, max_new_tokens: int | None = None
    ) -> Evaluation:
        """Answer examples greedily: the rows that `evaluation.evaluate` gives.

        Example:
            >>> fine_tuned.evaluate(split.test).exact_match  # doctest: +SKIP
            0.77

        Args:
            examples: held-out examples.
            max_new_tokens: longest answer to decode; None for the longest target and a margin.
        """
        if not examples:
            raise ValueError("examples is empty: give at least one example to evaluate on.")
        tokenised = tokenise(self.model, examples, template=self.template)
        n_ctx = self.model.cfg.n_ctx
        length = longest_answer(tokenised, n_ctx) if max_new_tokens is None else max_new_tokens
        check_room(tokenised, length, n_ctx)
        end_tokens = EndTokens(self.model)
        answers: list[tuple[int, ...]] = []
        scores: list[float] = []
        with self.applied() as hf_model, torch.no_grad():
            for start in range(0, len(tokenised), ROWS_AT_ONCE):
                part = tokenised[start : start + ROWS_AT_ONCE]
                answers += greedy_answers(hf_model, part, end_tokens, length)
                scores += [-float(t.double().sum()) for t in token_losses(hf_model, part)]
        ends = self.template.ends(demonstrated=False)
        return Evaluation(tuple(answer_rows(self.model, examples, answers, scores, ends)))


@own_modes()
def fine_tune(
    model: Any,
    examples: Sequence[Example],
    *,
    method: Method = "lora",
    rank: int = 8,
    target_modules: str | Sequence[str] | None = None,
    learning_rate: float,
    steps: int,
    batch_size: int = BATCH_SIZE,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    seed: int = 0,
    hf_model: Any = None,
) -> FineTuned:
    """Train an adapter on examples.

    Example:
        >>> tuned = fine_tune(model, split.train, learning_rate=1e-4, steps=40)  # doctest: +SKIP
        >>> tuned.evaluate(split.test).exact_match  # doctest: +SKIP
        0.77

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, or a name for `load_model`. It is
            asked for tokens and for the score of one answer, and never changed.
        examples: what to train on.
        method: `lora` or `ia3`, see `AdapterConfig`.
        rank: of LoRA's additions.
        target_modules: of LoRA; None for peft's own choice.
        learning_rate: of AdamW, constant.
        steps: of AdamW.
        batch_size: examples a step; all of them where there are no more.
        template: how inputs become prompts.
        seed: of LoRA's random half and of the order of minibatches.
        hf_model: the same weights as a Hugging Face model (left as found), or a name for
            `hugging_face_model`; None for a built-in model's own. Give one to many calls, and it
            is loaded once.

    Raises:
        ImportError: peft is not installed.
        ValueError: no examples, a setting that cannot be, weights that are not the model's, or a
            loss that is no longer finite.
    """
    config = AdapterConfig(method, rank, target_modules)
    steps = count("steps", steps)
    training = Training.of(model, examples, config, batch_size, template, seed, hf_model)
    return training.fine_tune(learning_rate, steps)


# ------------------------------------------------------------------------- what is trained on


@dataclass(frozen=True)
class Training:
    """Tokenised examples, the two forms of the model, and what all runs share."""

    model: Any
    hf_model: Any
    examples: tuple[TokenisedExample, ...]
    config: AdapterConfig
    batch_size: int
    template: PromptTemplate
    seed: int

    @classmethod
    def of(
        cls,
        model: Any,
        examples: Sequence[Example],
        config: AdapterConfig,
        batch_size: int,
        template: PromptTemplate,
        seed: int,
        hf_model: Any,
    ) -> Training:
        """Check the arguments of `fine_tune`, and load what they name."""
        import_peft()  # its absence is told before anything is loaded
        seed, batch_size = count("seed", seed), count("batch_size", batch_size)
        if batch_size == 0:
            raise ValueError("batch_size is 0; use at least 1.")
        if isinstance(model, (str, os.PathLike)):
            hf_model = model if hf_model is None else hf_model
            model = load_model(model)
        tokenised = tokenise(model, examples, template=template)
        if hf_model is None:
            hf_model = fingerprint(model).name
            if hf_model not in BUILT_IN:
                raise ValueError(
                    f"hf_model is needed for {hf_model!r}, which is not built in: give the name, "
                    "folder or file that it was loaded from, or its Hugging Face model."
                )
        if isinstance(hf_model, (str, os.PathLike)):
            hf_model = hugging_face_model(hf_model, like=model)
        if hasattr(hf_model, "peft_config"):
            raise ValueError("hf_model already has adapters; unload them, or give a plain model.")
        if hf_model is getattr(model, "original_model", None):
            raise ValueError(
                "hf_model is the one inside the bridge, whose layers peft does not know. Give a "
                "second one, loaded from the same checkpoint, or that checkpoint's name."
            )
        _check_same_weights(model, hf_model, tokenised[:1])
        return cls(model, hf_model, tokenised, config, batch_size, template, seed)

    def on(self, examples: Sequence[Example]) -> Training:
        """The same with other examples."""
        return replace(self, examples=tokenise(self.model, examples, template=self.template))

    def fine_tune(self, learning_rate: float, steps: int) -> FineTuned:
        """Train on all examples."""
        losses: list[float] = []
        with adapted(self.hf_model, self.config, self.seed) as hf_model:
            for _ in self.run(hf_model, learning_rate, [steps], losses):
                pass
            adapter = {
                name: parameter.detach().clone()
                for name, parameter in hf_model.named_parameters()
                if parameter.requires_grad
            }
        finite = all(bool(tensor.isfinite().all()) for tensor in adapter.values())
        if not (finite and all(map(math.isfinite, losses))):
            raise ValueError(
                f"learning_rate is {learning_rate}: training diverged, the loss or the adapter is "
                "no longer finite. Use a smaller one."
            )
        return FineTuned(
            adapter,
            self.config,
            learning_rate,
            steps,
            self.batch_size,
            self.seed,
            self.template,
            tuple(losses),
            self.model,
            self.hf_model,
        )

    def run(
        self,
        hf_model: Any,
        learning_rate: float,
        checkpoints: Sequence[int],
        losses: list[float],
    ) -> Iterator[int]:
        """Train the adapter, stopping at each checkpoint; `losses` grows by one a step."""
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate is {learning_rate}; use a positive number.")
        if min(checkpoints) < 1:
            raise ValueError(f"steps is {min(checkpoints)}; use at least 1.")
        trained = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY)
        batches = _batches(len(self.examples), self.batch_size, self.seed)
        for step, batch in enumerate(islice(batches, max(checkpoints)), start=1):
            with torch.enable_grad():
                loss = answer_loss(hf_model, [self.examples[i] for i in batch])
                loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            if step in checkpoints:
                yield step


def _check_same_weights(model: Any, hf_model: Any, examples: Sequence[TokenisedExample]) -> None:
    """Refuse two models that score an answer differently."""
    expected = float(answer_log_probabilities(freeze(model, examples), [Edit()]))
    with left_as_found(hf_model), torch.no_grad():
        got = -float(token_losses(hf_model, examples)[0].double().sum())
    wide = all(next(m.parameters()).dtype.itemsize >= 4 for m in (model, hf_model))
    # Far above rounding (3e-6 for Gemma 3 270M in float32), far below what other weights do.
    if not abs(got - expected) <= (1e-3 if wide else 0.1) * (1 + abs(expected)):
        raise ValueError(
            f"hf_model is not the model: it gives the answer {examples[0].output!r} the "
            f"log-probability {got:.4f}, model gives {expected:.4f}. Give the checkpoint that "
            "model was loaded from."
        )


def _batches(n: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step: all, or the next of seeded orders that follow each other."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        if n <= batch_size:
            yield list(range(n))
            continue
        while len(waiting) < batch_size:
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
