"""Scores fits on examples that they were not fitted on, fold by fold, many settings as one batch.

Labelled answers are scored by their probability, the whole answer's, averaged over the held-out
examples: the exact match to be expected if the model's answers were drawn instead of decoded. It
follows exact match, but moves before an answer is right. The cross-entropy, told beside it,
does not: one held-out answer of a probability near zero outweighs nine that are right. Of distilled
fits the end of an answer is not scored, since teachers end answers in their own way. Opinion
questions are scored by what they are fitted by, the KL from the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from tl_laai.batches import Fit, FitBatch, FitProblem
from tl_laai.decoding import Edit
from tl_laai.distillation import Distillation, Lesson, teach, weighed
from tl_laai.evaluation import AnswerRow, Evaluation, answer_scores, evaluate_edits
from tl_laai.fitting import ObjectiveName, fit_many, taught_problem
from tl_laai.hooking import Position
from tl_laai.made_up_inputs import make_up_inputs
from tl_laai.opinions import OptionExample
from tl_laai.problems import FitExample, engine_for
from tl_laai.prompts import PromptTemplate
from tl_laai.tasks import Example


@dataclass(frozen=True)
class Trial:
    """A setting that is tried on every fold.

    Attributes:
        layer: the edited layer.
        alpha: the group weight as a share of each fit's own `lambda_max`.
        objective: `answers` or `distill`.
        label_share: weight of the labelled answers in a distilled fit.
    """

    layer: int
    alpha: float
    objective: ObjectiveName = "answers"
    label_share: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One row of the validation table.

    Attributes:
        layer: the edited layer.
        alpha: the group weight as a share of each fit's own `lambda_max`.
        round: `screening` (brief fits, few folds), `final`, or `distilled`.
        validation_loss: held-out cross-entropy (opinions: KL) in nats, mean over folds.
        standard_error: of that mean over folds.
        validation_probability: of held-out answers, mean over folds; None for opinions.
        n_heads: mean number of non-zero heads.
        fold_losses: of each fold that was fitted.
        fold_scores: what is compared, the larger the better: the probability of the answers, or
            the loss with its sign turned.
        objective: `answers` or `distill`.
        label_share: weight of the labelled answers in a distilled fit.
        relax_steps: steps of the relaxed fit; 0 for the penalised one itself.
    """

    layer: int
    alpha: float
    round: str
    validation_loss: float
    standard_error: float
    validation_probability: float | None
    n_heads: float
    fold_losses: tuple[float, ...]
    fold_scores: tuple[float, ...]
    objective: ObjectiveName = "answers"
    label_share: float = 0.0
    relax_steps: int = 0

    @property
    def n_folds(self) -> int:
        """How many folds were fitted."""
        return len(self.fold_losses)

    def score(self) -> float:
        """Mean score over folds; minus infinity where it is not a number."""
        mean = sum(self.fold_scores) / len(self.fold_scores)
        return -math.inf if math.isnan(mean) else mean


@dataclass
class CrossValidation:
    """What all rounds of one choice share.

    Attributes:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: what may be fitted on; nothing else is looked at.
        folds: indices of the examples that are held out together.
        l1_ratio: the l1 weight as a multiple of the group weight.
        max_evaluations: of a penalised fit.
        learning_rate: of the relaxed fits.
        position: where Delta is added.
        template: how inputs become prompts.
        max_memory: GiB that one chunk of rows may take above the model.
        progress: called with `(what, work done, work in all)`.
        distillation: settings of distilled fits.
        n_inputs: how many of their inputs are used while choosing.
        work: loss-and-gradient evaluations in all, at most.
    """

    model: Any
    examples: Sequence[FitExample]
    folds: Sequence[Sequence[int]]
    l1_ratio: float
    max_evaluations: int
    learning_rate: float
    position: Position
    template: PromptTemplate
    max_memory: float
    progress: Callable[[str, int, int], None] | None
    distillation: Distillation
    n_inputs: int
    work: int = 0
    _done: int = 0
    _made_up: tuple[str, ...] = ()
    _deltas: dict[Candidate, Tensor] = field(default_factory=dict)

    def tell(self, name: str, evaluations: int) -> None:
        """Count work that was done, and tell of it."""
        self._done += evaluations
        if self.progress is not None:
            self.progress(name, min(self._done, self.work), self.work)

    def score(
        self,
        name: str,
        grid: Sequence[Trial],
        n_folds: int,
        relax_steps: Sequence[int],
        max_evaluations: int | None = None,
    ) -> list[Candidate]:
        """Rows of a grid on the first folds, all fits as one batch.

        Args:
            name: of the round.
            grid: what is tried.
            n_folds: on how many folds.
            relax_steps: numbers of steps of relaxed fits, one candidate each; none for the
                penalised fits themselves.
            max_evaluations: of a penalised fit; None for that of all rounds.
        """
        folds, before = self.folds[:n_folds], self._done
        limit = self.max_evaluations if max_evaluations is None else max_evaluations
        known = [[e for i, e in enumerate(self.examples) if i not in out] for out in folds]
        asked = [[self.examples[i] for i in out] for out in folds]
        lessons = self._lessons(known, {t.label_share for t in grid if t.objective == "distill"})
        problems = []
        for trial in grid:
            for k, part in enumerate(known):
                problem = FitProblem(part, trial.layer, None, trial.alpha, self.l1_ratio)
                if trial.objective == "distill":
                    problem = taught_problem(problem, lessons[k, trial.label_share])
                problems.append(problem)
        batch = FitBatch(
            self.model,
            problems,
            position=self.position,
            template=self.template,
            max_memory=self.max_memory,
        )

        def callback(state: Any) -> None:
            self.tell(name, state.n_active)

        if relax_steps:
            found = batch.relaxed(
                steps=max(relax_steps),
                at=relax_steps,
                max_evaluations=limit,
                learning_rate=self.learning_rate,
                callback=callback,
            ).iterates
        else:
            solutions = batch.solve(max_evaluations=limit, callback=callback)
            found = {0: torch.stack([solution.delta for solution in solutions])}
        self._done = before + self.cost(grid, n_folds, relax_steps, limit)
        candidates = []
        for steps, deltas in found.items():
            own = deltas.unflatten(0, (len(grid), len(folds)))
            diverged = ~own.isfinite().flatten(2).all(dim=-1).cpu()
            own = own.nan_to_num()
            losses, probabilities = self._held_out(grid, own, asked)
            losses = losses.masked_fill(diverged, math.nan)
            if probabilities is not None:
                probabilities = probabilities.masked_fill(diverged, math.nan)
            scores = -losses if probabilities is None else probabilities
            heads = (own.norm(dim=-1) > 0).sum(-1).double().cpu()
            for i, trial in enumerate(grid):
                candidate = Candidate(
                    layer=trial.layer,
                    alpha=trial.alpha,
                    round=name,
                    validation_loss=float(losses[i].mean()),
                    standard_error=float(losses[i].std(correction=1) / len(folds) ** 0.5),
                    validation_probability=(
                        None if probabilities is None else float(probabilities[i].mean())
                    ),
                    n_heads=float(heads[i].mean()),
                    fold_losses=tuple(losses[i].tolist()),
                    fold_scores=tuple(scores[i].tolist()),
                    objective=trial.objective,
                    label_share=trial.label_share,
                    relax_steps=steps,
                )
                self._deltas[candidate] = own[i]
                candidates.append(candidate)
        return candidates

    def cost(
        self,
        grid: Sequence[Trial],
        n_folds: int,
        relax_steps: Sequence[int],
        max_evaluations: int | None = None,
    ) -> int:
        """Evaluations that `score` of the same arguments takes at most."""
        limit = self.max_evaluations if max_evaluations is None else max_evaluations
        penalised = len(grid) if not relax_steps else sum(trial.alpha > 0 for trial in grid)
        steps = max(relax_steps) + 1 if relax_steps else 0
        return min(n_folds, len(self.folds)) * (penalised * limit + len(grid) * steps)

    def _held_out(
        self, grid: Sequence[Trial], deltas: Tensor, asked: Sequence[Sequence[FitExample]]
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and probabilities on the held-out parts, `[n_trials, n_folds]` each."""
        if all(isinstance(e, OptionExample) for part in asked for e in part):
            validation = engine_for(
                self.model,
                [part for _ in grid for part in asked],
                layers=[trial.layer for trial in grid for _ in asked],
                position=self.position,
                template=self.template,
                max_memory=self.max_memory,
            )
            flat = deltas.flatten(0, 1)
            everyone = torch.arange(len(flat), device=flat.device)
            losses = validation.losses(flat, everyone).double().cpu()
            return losses.view(len(grid), len(asked)), None
        is_taught = any(trial.objective == "distill" for trial in grid)
        template = replace(self.template, answer_end="") if is_taught else self.template
        loss, probability = [], []
        for k, part in enumerate(asked):
            edits = [
                Edit({trial.layer: own}, self.position)
                for trial, own in zip(grid, deltas[:, k], strict=True)
            ]
            labelled = cast("Sequence[Example]", part)
            found = answer_scores(self.model, labelled, edits, template=template)
            loss.append(found[0].mean(dim=1))
            probability.append(found[1].mean(dim=1))
        return torch.stack(loss, dim=1), torch.stack(probability, dim=1)

    def answers(self, candidate: Candidate) -> Evaluation:
        """How each fold's fit of a candidate answers the examples that were held out from it."""
        rows: list[AnswerRow] = []
        for own, part in zip(self._deltas[candidate], self.folds, strict=False):
            asked = cast("Sequence[Example]", [self.examples[i] for i in part])
            edits = {"it": Edit({candidate.layer: own}, self.position)}
            rows += evaluate_edits(self.model, asked, edits, template=self.template)["it"].rows
        return Evaluation(tuple(rows))

    def _lessons(
        self, known: Sequence[Sequence[FitExample]], shares: set[float]
    ) -> dict[tuple[int, float], Lesson]:
        """Each fold's lesson at each label share; its teacher reads that fold's examples alone."""
        if not shares:
            return {}
        inputs = self._inputs()[: self.n_inputs]
        return {
            (k, share): lesson
            for k, part in enumerate(known)
            for share, lesson in self._taught(part, inputs, shares).items()
        }

    def _taught(
        self, examples: Sequence[FitExample], inputs: tuple[str, ...], shares: set[float]
    ) -> dict[float, Lesson]:
        """The lesson at each label share, from one round of teaching."""
        labelled, settings = cast("Sequence[Example]", examples), self.distillation
        taught = teach(
            self.model,
            inputs,
            labelled,
            template=self.template,
            n_teachers=settings.n_teachers,
            seed=settings.seed,
        )
        made_up = settings.inputs is None
        return {
            share: weighed(
                taught, labelled, replace(settings, label_share=share), inputs, made_up=made_up
            )
            for share in shares
        }

    def _inputs(self) -> tuple[str, ...]:
        """The user's inputs, or those that the model makes up from all examples, once."""
        if self.distillation.inputs is not None:
            return self.distillation.inputs
        if not self._made_up:
            self._made_up = make_up_inputs(
                self.model,
                cast("Sequence[Example]", self.examples),
                self.distillation.n_inputs,
                template=self.template,
                seed=self.distillation.seed,
            )
        return self._made_up

    def refit(self, chosen: Candidate, origin: dict[str, Any]) -> Fit:
        """The choice, fitted on all examples for as long as it was on each fold."""
        problem = FitProblem(
            self.examples, chosen.layer, None, chosen.alpha, self.l1_ratio, None, origin
        )
        if chosen.objective == "distill":
            lessons = self._taught(self.examples, self._inputs(), {chosen.label_share})
            problem = taught_problem(problem, lessons[chosen.label_share])
        (fitted,) = fit_many(
            self.model,
            [problem],
            position=self.position,
            template=self.template,
            max_evaluations=self.max_evaluations,
            learning_rate=self.learning_rate,
            relax_steps=chosen.relax_steps,
            max_memory=self.max_memory,
            callback=lambda _: self.tell("refit", 1),
        )
        self.tell("refit", self.work)
        return fitted
