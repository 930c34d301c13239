"""Scores fits on examples that they were not fitted on, fold by fold, many settings as one batch.

Labelled answers are scored by their probability, the whole answer's, averaged over the held-out
examples: the exact match to be expected if the model's answers were drawn instead of decoded. It
follows exact match, but moves before an answer is right. The cross-entropy, told beside it,
does not: one held-out answer of a probability near zero outweighs nine that are right. Opinion
questions are scored by what they are fitted by, the KL from the group, but after averaging the
answers to the prompts of a question, as surveys report it: what a model says of positions, which
averaging takes out, would let fits win that do little.

Distilled fits are scored in two ways. How near they come to the teacher on inputs that were held
out from them says which layer and how many steps; no label is needed for that, and the teacher
reads all examples. What share the labels should have, only labels can say: there each fold's
teacher reads that fold's training part alone, and the end of an answer is not scored, since
teachers end answers in their own way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tl_laai.batches import Fit, FitBatch, FitProblem
from tl_laai.candidates import Candidate, Trial, candidates_of
from tl_laai.distillation import Distillation, ask_teacher
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.evaluation import AnswerRow, Evaluation, answer_scores, evaluate_edits
from tl_laai.fitting import fit_many, taught_problem
from tl_laai.hooking import Position
from tl_laai.lessons import Lessons
from tl_laai.opinions import OptionExample
from tl_laai.problems import FitExample, engine_for
from tl_laai.prompts import PromptTemplate, TaughtExample
from tl_laai.splits import cross_validation_folds
from tl_laai.surveys import question_losses
from tl_laai.tasks import Example
from tl_laai.work import Work


class TooManyHeadsError(ValueError):
    """No setting leaves as few heads as are allowed."""


@dataclass
class CrossValidation:
    """What all rounds of one choice share.

    Attributes:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: what may be fitted on; nothing else is looked at.
        folds: indices of the examples that are held out together.
        l1_ratio: the l1 weight as a multiple of the group weight.
        max_evaluations: of a penalised fit.
        tolerance: of its stationarity.
        learning_rate: of the relaxed fits.
        position: where Delta is added.
        template: how inputs become prompts.
        max_memory: GiB that one chunk of rows may take above the model.
        progress: called with `(what, work done, work in all)`.
        distillation: settings of distilled fits.
        n_inputs: of how many of their inputs they learn, at most, until one is chosen.
        drop_below: relaxed fits whose held-out answers have lower odds than this share of the best
            ones' are not followed to more steps.
    """

    model: Any
    examples: Sequence[FitExample]
    folds: Sequence[Sequence[int]]
    l1_ratio: float
    max_evaluations: int
    tolerance: float
    learning_rate: float
    position: Position
    template: PromptTemplate
    max_memory: float
    progress: Callable[[str, int, int], None] | None
    distillation: Distillation
    n_inputs: int
    drop_below: float
    _deltas: dict[Candidate, Tensor] = field(default_factory=dict)

    @cached_property
    def work(self) -> Work:
        """What was done and is to be done."""
        return Work(
            len(self.examples), self.max_evaluations, self.distillation, self.n_inputs,
            self.progress,
        )  # fmt: skip

    @cached_property
    def _lessons(self) -> Lessons:
        labelled, settings = cast("Sequence[Example]", self.examples), self.distillation
        return Lessons(self.model, labelled, settings, self.template, self.n_inputs)

    @cached_property
    def _held_out_answers(self) -> tuple[tuple[TaughtExample, ...], tuple[TaughtExample, ...]]:
        found = self._lessons.held_out_split()
        self.work.tell("teacher", self.work.of_inputs + self.work.of_teacher)
        return found

    def score(
        self,
        name: str,
        grid: Sequence[Trial],
        folds: Sequence[Sequence[int]],
        relax_steps: Sequence[int],
        max_evaluations: int | None = None,
    ) -> list[Candidate]:
        """Rows of a grid on some folds, all fits as one batch.

        Args:
            name: of the round.
            grid: what is tried.
            folds: indices of the examples that are held out together.
            relax_steps: numbers of steps of relaxed fits, one candidate each, until one is
                dropped; none for the penalised fits themselves.
            max_evaluations: of a penalised fit; None for that of all rounds.
        """
        limit = self.max_evaluations if max_evaluations is None else max_evaluations
        known = [[e for i, e in enumerate(self.examples) if i not in out] for out in folds]
        asked = [[self.examples[i] for i in out] for out in folds]
        shares = {trial.label_share for trial in grid if trial.objective == "distill"}
        labelled = cast("list[list[Example]]", known)
        lessons = {}
        if shares:
            lessons = self._lessons.of_folds(labelled, shares)
            self.work.tell("teacher", len(folds) * self.work.of_teacher)
        problems = []
        for trial in grid:
            for k, part in enumerate(known):
                problem = FitProblem(part, trial.layer, None, trial.alpha, self.l1_ratio)
                if trial.objective == "distill":
                    problem = taught_problem(problem, lessons[k, trial.label_share])
                problems.append(problem)
        parts = self.work.parts(folds, taught=bool(shares))
        candidates: dict[int, list[Candidate]] = {}
        followed = list(range(len(grid)))

        def compare(steps: int, deltas: Tensor) -> Tensor:
            """Rows of the trials that are followed; which go on, one answer a fit."""
            own = deltas.unflatten(0, (len(grid), len(folds)))[followed]
            trials = [grid[i] for i in followed]
            losses, probabilities = self._held_out(trials, own.nan_to_num(), asked)
            rows = candidates_of(name, trials, steps, own, losses, probabilities)
            self._deltas |= dict(zip(rows, own.nan_to_num(), strict=True))
            candidates[steps] = rows
            if probabilities is not None and self.drop_below:
                least = self.drop_below * max(row.odds() for row in rows)
                kept = [i for i, row in zip(followed, rows, strict=True) if row.odds() >= least]
                left = len(followed) - len(kept)
                self.work.leave_out(left * sum(parts) * (max(relax_steps, default=0) - steps))
                followed[:] = kept
            goes_on = torch.zeros(len(grid), dtype=torch.bool)
            goes_on[followed] = True
            return goes_on.repeat_interleave(len(folds))

        with self.work.reaching(self.work.of_fits(grid, parts, relax_steps, limit)):
            found = self._fit(name, problems, relax_steps, limit, compare)
        for steps, deltas in found.items():
            if steps not in candidates:
                compare(steps, deltas)
        return [row for rows in candidates.values() for row in rows]

    def score_by_teacher(
        self, name: str, grid: Sequence[Trial], relax_steps: Sequence[int]
    ) -> list[Candidate]:
        """Rows of a grid of distilled fits, by the KL from the teacher on held-out inputs.

        Args:
            name: of the round.
            grid: what is tried, fitted on all examples and a few of the inputs.
            relax_steps: as in `score`.

        Raises:
            NothingTaughtError: the teacher answered fewer than two inputs.
        """
        kept, held_out = self._held_out_answers
        problems = [self._problem(trial, kept) for trial in grid]
        parts = self.work.parts([()], taught=True)
        with self.work.reaching(self.work.of_fits(grid, parts, relax_steps)):
            found = self._fit(name, problems, relax_steps, self.max_evaluations)
        candidates = []
        engine = self._engine(grid, [[example] for example in held_out])
        for steps, deltas in found.items():
            everywhere = deltas.nan_to_num()[:, None].expand(-1, len(held_out), -1, -1)
            losses = _losses(engine, everywhere)
            candidates += candidates_of(name, grid, steps, deltas[:, None], losses, None)
        return candidates

    def within(self, name: str, grid: Sequence[Trial], max_heads: int) -> Trial:
        """The trial that leaves the most heads up to `max_heads`.

        Args:
            name: of the round.
            grid: what is fitted, on all examples; where two leave as many, the first is taken.
            max_heads: the most heads that may be left.

        Raises:
            TooManyHeadsError: all leave more heads, or none.
        """
        problems = [self._problem(trial) for trial in grid]
        taught = any(trial.objective == "distill" for trial in grid)
        with self.work.reaching(self.work.of_fits(grid, [self.work.largest(taught=taught)], ())):
            found = self._fit(name, problems, (), self.max_evaluations)[0]
        left: list[int] = (found.norm(dim=-1) > 0).sum(dim=-1).tolist()
        most = max((n for n in left if n <= max_heads), default=0)
        if not most:
            of_alpha = ", ".join(f"{n} at {t.alpha:g}" for t, n in zip(grid, left, strict=True))
            if 0 in left:
                do = "smaller ones" if not any(left) else "some in between, or allow more heads"
            else:
                do = "larger ones, or allow more heads"
            raise TooManyHeadsError(
                f"max_heads is {max_heads}, but of layer {grid[0].layer} alphas leave so many "
                f"heads: {of_alpha}. Give {do} (all are left at 0, none from 1 on)."
            )
        return grid[left.index(most)]

    def _fit(
        self,
        name: str,
        problems: Sequence[FitProblem],
        relax_steps: Sequence[int],
        max_evaluations: int,
        follow: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Mapping[int, Tensor]:
        """All fits as one batch: number of relaxed steps (0 for none) -> deltas."""
        batch = FitBatch(
            self.model,
            problems,
            position=self.position,
            template=self.template,
            max_memory=self.max_memory,
        )

        each = sum(len(problem.examples) for problem in problems) // len(problems)

        def callback(state: Any) -> None:
            self.work.tell(name, state.n_active * each)

        if relax_steps:
            return batch.relaxed(
                steps=max(relax_steps),
                at=relax_steps,
                tolerance=self.tolerance,
                max_evaluations=max_evaluations,
                learning_rate=self.learning_rate,
                follow=follow,
                callback=callback,
            ).iterates
        solutions = batch.solve(
            tolerance=self.tolerance, max_evaluations=max_evaluations, callback=callback
        )
        return {0: torch.stack([solution.delta for solution in solutions])}

    def _held_out(
        self, grid: Sequence[Trial], deltas: Tensor, asked: Sequence[Sequence[FitExample]]
    ) -> tuple[Tensor, Tensor | None]:
        """Losses and probabilities on the held-out parts, `[n_trials, n_folds]` each."""
        is_taught = any(trial.objective == "distill" for trial in grid)
        template = replace(self.template, answer_end="") if is_taught else self.template
        loss, probability = [], []
        for k, part in enumerate(asked):
            edits = [
                Edit({trial.layer: own}, self.position)
                for trial, own in zip(grid, deltas[:, k], strict=True)
            ]
            if all(isinstance(example, OptionExample) for example in part):
                options = cast("Sequence[OptionExample]", part)
                loss.append(question_losses(self.model, options, edits).mean(dim=1))
                continue
            labelled = cast("Sequence[Example]", part)
            found = answer_scores(self.model, labelled, edits, template=template)
            loss.append(found[0].mean(dim=1))
            probability.append(found[1].mean(dim=1))
        likely = torch.stack(probability, dim=1) if probability else None
        return torch.stack(loss, dim=1), likely

    def _engine(self, grid: Sequence[Trial], asked: Sequence[Sequence[FitExample]]) -> Engine:
        """Every trial on every part, in this order."""
        return engine_for(
            self.model,
            [part for _ in grid for part in asked],
            layers=[trial.layer for trial in grid for _ in asked],
            position=self.position,
            template=self.template,
            max_memory=self.max_memory,
        )

    def answers(self, candidate: Candidate) -> Evaluation:
        """How each fold's fit of a candidate answers the examples that were held out from it."""
        rows: list[AnswerRow] = []
        for own, part in zip(self._deltas[candidate], self.folds, strict=False):
            asked = cast("Sequence[Example]", [self.examples[i] for i in part])
            edits = {"it": Edit({candidate.layer: own}, self.position)}
            rows += evaluate_edits(self.model, asked, edits, template=self.template)["it"].rows
        return Evaluation(tuple(rows))

    def teacher(self, labels: Sequence[Hashable]) -> Evaluation:
        """How the teacher answers each example after the others, or a fold's after other folds'.

        Args:
            labels: one an example; those with its own are not shown to it either.
        """
        settings, each = self.distillation, cross_validation_folds(labels, len(set(labels)), 0)
        return ask_teacher(
            self.model,
            cast("Sequence[Example]", self.examples),
            template=self.template,
            folds=self.folds if settings.teacher_steps else each,  # one fit a fold
            settings=settings,
            after_fold=lambda: self.work.tell("teacher", self.work.of_teacher),
        )

    def _problem(self, trial: Trial, taught: Sequence[TaughtExample] = ()) -> FitProblem:
        """A trial on all examples; distilled from some of what the teacher answered, or all."""
        problem = FitProblem(self.examples, trial.layer, None, trial.alpha, self.l1_ratio)
        if trial.objective == "answers":
            return problem
        return taught_problem(problem, self._lessons.whole(trial.label_share, taught))

    def refit(self, chosen: Candidate, origin: dict[str, Any]) -> Fit:
        """The choice, fitted on all examples for as long as it was on each fold."""
        trial = Trial(chosen.layer, chosen.alpha, chosen.objective, chosen.label_share)
        problem = self._problem(trial)
        problem = replace(problem, provenance={**origin, **problem.provenance})
        # What was foretold for rounds that were left out, or were shorter, is not to come.
        steps = (chosen.relax_steps,) if chosen.relax_steps else ()
        to_come = self.work.of_fits([trial], [len(problem.examples)], steps)
        self.work.whole = min(self.work.whole, self.work.done + to_come)
        (fitted,) = fit_many(
            self.model,
            [problem],
            position=self.position,
            template=self.template,
            tolerance=self.tolerance,
            max_evaluations=self.max_evaluations,
            learning_rate=self.learning_rate,
            relax_steps=chosen.relax_steps,
            max_memory=self.max_memory,
            callback=lambda _: self.work.tell("refit", len(problem.examples)),
        )
        self.work.tell("refit", self.work.whole)
        return fitted


def _losses(engine: Engine, deltas: Tensor) -> Tensor:
    """Losses of `deltas [n_trials, n_parts, n_heads, d_head]`, `[n_trials, n_parts]` in float64."""
    flat = deltas.flatten(0, 1)
    losses = engine.losses(flat, torch.arange(len(flat), device=flat.device))
    return losses.double().cpu().view(deltas.shape[:2])
