"""What the rounds of a choice try, by default and as asked for.

Every layer is tried briefly on two halves; the best few that are not neighbours go on to every
penalty and number of steps, but those left far behind to no more steps; of distilled fits, layer
and steps first, then the share of labels. Where heads are counted, all of that is chosen without
counting (on all heads, if fits are relaxed), then which heads of that layer are kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_laai.backends import backend_of
from tl_laai.candidates import Candidate, Trial
from tl_laai.objectives import ObjectiveName
from tl_laai.opinions import OptionExample
from tl_laai.problems import FitExample
from tl_laai.tasks import Example

# Of relaxed fits: the fewest heads, or all of them.
ALPHAS = (0.9, 0.0)
# What `max_heads` is looked for among.
SPARSE_ALPHAS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
RELAX_STEPS = (15, 30, 45)
# Fits whose held-out answers had after 15 or 30 steps lower odds than this share of the best ones'
# were the best after more on none of the eight rule tasks (seed 0); one was at a share of a half.
DROP_BELOW = 0.25
PENALISED_ALPHAS = (0.9, 0.5, 0.25)
# A penalised fit that only chooses entries need not be followed to its end.
CHOOSING_EVALUATIONS, PENALISED_EVALUATIONS = 15, 40
SCREENING_STEPS, SCREENING_EVALUATIONS = 15, 12
SCREENING_ALPHA = 0.6  # where there are no relaxed fits
SCREENING_FOLDS = 2
FINALISTS = 3
# Brief fits rank early layers too high, and neighbours alike: layers closer to a better one than
# this share of the model (3 of 18) are left out of the final round.
SEPARATION = 1 / 6
# A fit to opinions soon stands where all questions are answered alike, nearly stationary, and
# learns what sets them apart only behind that: so brief fits rank nothing, and Adam takes thrice
# the steps.
OPINION_ALPHAS, OPINION_EVALUATIONS, OPINION_TOLERANCE = (0.0,), 60, 1e-6
DISTILLED_ALPHAS = (0.0,)
DISTILLED_STEPS = (30, 45, 60)
# Layer and steps are chosen at the last of these shares of labels.
DISTILLED_SHARES = (0.0, 0.5)
DISTILLED_INPUTS = 32  # while choosing

Folds = Sequence[Sequence[int]]  # indices of the examples that are held out together


def opinion_layers(n_layers: int) -> tuple[int, ...]:
    """What opinion fits choose from: a third, a half and two thirds of the way up."""
    return tuple(sorted({n_layers // 3, n_layers // 2, 2 * n_layers // 3}))


def mixed_folds(folds: Folds) -> Folds:
    """The folds on which shares of labels are compared: half of them, and two at least."""
    return folds[: max(2, len(folds) // 2)]


@dataclass(frozen=True)
class Rounds:
    """What was asked for, and the settings that each round tries for it.

    Attributes:
        layers: candidates.
        n_layers: of the model.
        alphas: group weights as shares of `lambda_max`; None for the defaults.
        relax_steps: numbers of steps of relaxed fits; None for the defaults, empty for none.
        objectives: `answers`, `distill`, or both.
        max_heads: how many heads a last round may leave; None for no such round.
        label_share: of distilled fits; 0 if it is to be chosen.
    """

    layers: tuple[int, ...]
    n_layers: int
    alphas: Sequence[float] | None
    relax_steps: Sequence[int] | None
    objectives: tuple[ObjectiveName, ...]
    max_heads: int | None
    label_share: float

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps of fits on labels, ascending; none for penalised fits."""
        return tuple(sorted(RELAX_STEPS if self.relax_steps is None else self.relax_steps))

    @property
    def taught_steps(self) -> tuple[int, ...]:
        """Those of distilled fits."""
        return tuple(sorted(DISTILLED_STEPS if self.relax_steps is None else self.relax_steps))

    @property
    def brief(self) -> tuple[int, ...]:
        """The number of steps of the screening, likewise."""
        return (SCREENING_STEPS,) if self.steps else ()

    def screening(self) -> list[Trial]:
        """Every layer once, unless there are few."""
        alpha = 0.0 if self.steps else SCREENING_ALPHA
        return [Trial(layer, alpha) for layer in self.layers if len(self.layers) > FINALISTS]

    def apart(self, ranked: Sequence[int]) -> list[int]:
        """First the layers that are not near to a better one, then the rest, each best first."""
        leading: list[int] = []
        for layer in ranked:
            if all(abs(layer - other) >= SEPARATION * self.n_layers for other in leading):
                leading.append(layer)
        return leading + [layer for layer in ranked if layer not in leading]

    def labelled(self, ranked: Sequence[int]) -> list[Trial]:
        """The best layers at every penalty, fitted on labels; none if they are not asked for."""
        layers = sorted(ranked[:FINALISTS]) if "answers" in self.objectives else []
        alphas = self._alphas(ALPHAS if self.steps else PENALISED_ALPHAS)
        return [Trial(layer, alpha) for layer in layers for alpha in alphas]

    def taught(self, ranked: Sequence[int]) -> list[Trial]:
        """The same of distilled fits, at one share of labels."""
        layers = sorted(ranked[:FINALISTS]) if "distill" in self.objectives else []
        share = self.label_share or DISTILLED_SHARES[-1]
        alphas = self._alphas(DISTILLED_ALPHAS)
        return [Trial(layer, alpha, "distill", share) for layer in layers for alpha in alphas]

    def mixed(self, chosen: Candidate | Trial) -> list[Trial]:
        """The chosen distilled fit at every share of labels; none if the share is given."""
        shares = () if self.label_share else DISTILLED_SHARES
        return [Trial(chosen.layer, chosen.alpha, "distill", share) for share in shares]

    def sparse(self, chosen: Candidate | Trial) -> list[Trial]:
        """What was chosen at every penalty that may leave few heads, its own among them."""
        alphas = [*(self.alphas or SPARSE_ALPHAS), *([chosen.alpha] if chosen.alpha else [])]
        return [
            Trial(chosen.layer, alpha, chosen.objective, chosen.label_share)
            for alpha in dict.fromkeys(alphas)
        ]

    def _alphas(self, default: Sequence[float]) -> Sequence[float]:
        if self.max_heads is None:
            return self.alphas or default
        return (0.0,) if self.steps else PENALISED_ALPHAS


def check_choice(
    model: Any,
    examples: Sequence[FitExample],
    labels: Sequence[Hashable],
    layers: Sequence[int],
    alphas: Sequence[float] | None,
    relax_steps: Sequence[int],
    objectives: Sequence[str],
    max_heads: int | None,
) -> None:
    """Refuse what nothing can be chosen from.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        examples: what is chosen by.
        labels: one an example; those with the same are held out together.
        layers: candidates.
        alphas: group weights as shares of `lambda_max`; None for the defaults.
        relax_steps: numbers of steps of relaxed fits.
        objectives: `answers`, `distill`, or both.
        max_heads: how many heads may be left; None for any number.

    Raises:
        TypeError, ValueError: one of them allows no choice.
    """
    if len(labels) != len(examples):
        raise ValueError(
            f"groups has {len(labels)} labels, but there are {len(examples)} examples."
        )
    n_groups = len(set(labels))
    if n_groups < 4:
        raise ValueError(
            f"examples holds {n_groups}: choosing by cross-validation needs at least 4 that may be "
            "held out one without the other. Give more, or choose layer and penalty yourself."
        )
    if alphas is not None and not alphas:
        raise ValueError("alphas is empty: give at least one share of lambda_max.")
    if not layers:
        raise ValueError("layers is empty: give at least one layer, or None for all.")
    last = backend_of(model).n_layers - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"layers holds {layer}; this model has layers 0 to {last}.")
    for steps in relax_steps:
        if steps < 1:
            raise ValueError(f"relax_steps holds {steps}; give 1 or more, or leave it empty.")
    if max_heads is not None and not 1 <= max_heads <= backend_of(model).n_heads:
        raise ValueError(
            f"max_heads is {max_heads}; give 1 to {backend_of(model).n_heads}, which is all that a "
            "layer of this model has, or None."
        )
    unknown = [name for name in objectives if name not in ("answers", "distill")]
    if unknown or not objectives:
        raise ValueError(f"objectives is {list(objectives)}; give 'answers', 'distill' or both.")
    if "distill" in objectives and not all(isinstance(e, Example) for e in examples):
        raise TypeError("objectives holds 'distill', which needs Examples: the teacher reads them.")
    kinds = {type(example) for example in examples}
    if kinds not in ({Example}, {OptionExample}):
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(
            f"examples holds {' and '.join(names)}: a choice scores held-out answers, so give "
            "Examples alone, or OptionExamples alone. Fit others at a layer of your own."
        )
