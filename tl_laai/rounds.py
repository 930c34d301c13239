"""What the rounds of a choice try, by default and as asked for.

Every layer is tried briefly on few folds; the best few that are not neighbours go on to every
penalty and number of steps; of distilled fits, layer and steps first, then the share of labels.
Where heads are counted, all of that is chosen without counting (on all heads, if fits are relaxed),
then which heads of that layer are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_laai.candidates import Candidate, Trial
from tl_laai.objectives import ObjectiveName

# Of relaxed fits: the fewest heads, or all of them.
ALPHAS = (0.9, 0.0)
# What `max_heads` is looked for among.
SPARSE_ALPHAS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
RELAX_STEPS = (15, 30, 45)
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
DISTILLED_ALPHAS = (0.0,)
DISTILLED_STEPS = (30, 45, 60)
# Layer and steps are chosen at the last of these shares of labels.
DISTILLED_SHARES = (0.0, 0.5)
DISTILLED_INPUTS, MIXED_FOLDS = 32, 2  # while choosing


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
