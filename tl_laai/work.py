"""How much work a choice is, and how much of it is done: what its progress bar goes by.

The unit is one evaluation of loss and gradient on one example; what is not a fit counts as many
of them as take about as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tl_laai.candidates import Trial
from tl_laai.distillation import Distillation
from tl_laai.rounds import SCREENING_EVALUATIONS, Folds, Rounds, mixed_folds

# A step of a teacher's fit, and making up an input, take about as long as so many evaluations:
# measured on two cores, on ten examples of one word each.
TEACHER_COST, INPUTS_COST = 100, 12


@dataclass
class Work:
    """The work of one choice.

    Attributes:
        n_examples: that may be fitted on.
        max_evaluations: of a penalised fit, unless it is told otherwise.
        distillation: settings of distilled fits.
        n_inputs: of how many of their inputs they learn, at most, until one is chosen.
        progress: called with `(what, work done, work in all)`.
        whole: work in all, at most.
        done: how much of it is.
        left_out: how much was foretold and is not to come.
    """

    n_examples: int
    max_evaluations: int
    distillation: Distillation
    n_inputs: int
    progress: Callable[[str, int, int], None] | None = None
    whole: int = 0
    done: int = 0
    left_out: int = 0

    def tell(self, name: str, evaluations: int) -> None:
        """Count work that was done, and tell of it."""
        self.done += evaluations
        if self.progress is not None:
            self.progress(name, min(self.done, self.whole), self.whole)

    @contextmanager
    def reaching(self, evaluations: int) -> Iterator[None]:
        """After the block so much more is done or left out, however much was told inside."""
        before = self.done + self.left_out
        yield
        self.done = before + evaluations - self.left_out

    def leave_out(self, evaluations: int) -> None:
        """Count work that was foretold and is not to come."""
        self.left_out += evaluations
        self.whole -= evaluations

    @property
    def of_teacher(self) -> int:
        """Fitting a teacher."""
        steps = self.distillation.teacher_steps
        return TEACHER_COST * (steps + 1) if steps else 0

    @property
    def of_inputs(self) -> int:
        """Making up inputs."""
        return INPUTS_COST * self.distillation.n_inputs if self.distillation.inputs is None else 0

    def of_fits(
        self,
        grid: Sequence[Trial],
        parts: Sequence[int],
        relax_steps: Sequence[int],
        max_evaluations: int | None = None,
    ) -> int:
        """Fits of a grid, at most.

        Args:
            grid: what is fitted, once a part.
            parts: how many examples there are in each.
            relax_steps: numbers of steps of relaxed fits; none for penalised fits.
            max_evaluations: of a penalised fit; None for that of all rounds.
        """
        limit = self.max_evaluations if max_evaluations is None else max_evaluations
        penalised = len(grid) if not relax_steps else sum(trial.alpha > 0 for trial in grid)
        steps = max(relax_steps) + 1 if relax_steps else 0
        return sum(parts) * (penalised * limit + len(grid) * steps)

    def of_choice(self, tried: Rounds, folds: Folds, halves: Folds) -> int:
        """All rounds and the refit, at most.

        Args:
            tried: what each round tries.
            folds: of the final round.
            halves: what layers are screened on.
        """
        taught, labelled = tried.taught(tried.layers), tried.labelled(tried.layers)
        steps = (*tried.steps, *(tried.taught_steps if taught else ()))
        on_folds, at_once = self.parts(folds, taught=False), self.parts([()], taught=True)
        brief = min(self.max_evaluations, SCREENING_EVALUATIONS)
        halved = self.parts(halves, taught=False)
        work = self.of_fits(tried.screening(), halved, tried.brief, brief)
        work += self.of_fits(labelled, on_folds, tried.steps)
        if taught:
            mixed, few = tried.mixed(taught[0]), mixed_folds(folds)
            n_teachers = (len(folds) if labelled else 0) + 1 + (len(few) if mixed else 0)
            work += n_teachers * self.of_teacher + self.of_inputs
            work += self.of_fits(taught, at_once, tried.taught_steps)
            work += self.of_fits(mixed, self.parts(few, taught=True), tried.taught_steps[-1:])
        if tried.max_heads is not None:
            sparse = max((tried.sparse(trial) for trial in taught or labelled), key=len)
            again = max((on_folds if labelled else [], at_once if taught else []), key=sum)
            work += self.of_fits(sparse, [self.largest(taught=bool(taught))], ())
            work += max(self.of_fits([trial], again, steps) for trial in sparse)
        refit = self.max_evaluations + max(steps, default=-1) + 1
        return work + self.largest(taught=bool(taught)) * refit

    def parts(self, folds: Folds, *, taught: bool) -> list[int]:
        """How many examples a fit on all but each fold has, at most.

        Args:
            folds: what is held out.
            taught: whether it learns a few inputs too.
        """
        more = min(self.n_inputs, self._most_inputs) if taught else 0
        return [self.n_examples - len(out) + more for out in folds]

    def largest(self, *, taught: bool) -> int:
        """How many examples a fit on all has, at most.

        Args:
            taught: whether it learns all inputs too.
        """
        return self.n_examples + (self._most_inputs if taught else 0)

    @property
    def _most_inputs(self) -> int:
        own = self.distillation
        return own.n_inputs if own.inputs is None else len(own.inputs)
