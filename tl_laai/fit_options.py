"""What the options of `laai fit` mean, and which of them exclude each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tl_laai.options import layer_number

if TYPE_CHECKING:
    from tl_laai.distillation import Distillation
    from tl_laai.penalties import SparseGroupLasso

# The same as in the library's rooms, whose import takes seconds; a test compares them.
Position = Literal["prompt_end", "every_step"]
Solver = Literal["proximal", "adam"]

Penalty = Literal["auto", "none"]
Objective = Literal["answers", "distill", "auto"]
Preset = Literal["paper", "relaxed", "distill"]

# Of a fit at a given layer and penalty.
DEFAULT_EVALUATIONS, DEFAULT_TOLERANCE, DEFAULT_LEARNING_RATE = 150, 1e-3, 0.1
# The same as in `distillation.Distillation` and `selection.fit_auto`; a test compares them.
DEFAULT_TEACHER_STEPS, DEFAULT_FOLDS = 5, 4


def asked_penalty(
    penalty: Penalty, group: float | None, l1: float | None, alpha: float | None
) -> tuple[SparseGroupLasso | None, list[float] | None]:
    """What is asked for: absolute weights, shares of lambda_max, or (None, None) to choose."""
    from tl_laai.penalties import SparseGroupLasso

    given = [
        name
        for name, value in (("--alpha", alpha), ("--group", group), ("--l1", l1))
        if value is not None
    ]
    if "--alpha" in given and len(given) > 1:
        raise ValueError("--alpha is a share of lambda_max, --group and --l1 are absolute: choose")
    if penalty == "none":
        if given:
            raise ValueError(f"--penalty none and {given[0]} contradict each other: choose")
        return None, []
    if alpha is not None:
        return None, [alpha]
    return (SparseGroupLasso(l1=l1 or 0.0, group=group or 0.0), []) if given else (None, None)


def preset_settings(preset: Preset) -> tuple[Objective, Position, float, int | None]:
    """Objective, position, L1 ratio and `--relax` of a preset of `fit_auto`."""
    from tl_laai.selection import PRESETS

    chosen = PRESETS[preset]
    objective: Objective = "auto" if len(chosen["objectives"]) > 1 else chosen["objectives"][0]
    relax = 0 if chosen.get("relax_steps") == () else None
    return objective, chosen["position"], chosen.get("l1_ratio", 0.0), relax


def asked_distillation(
    objective: Objective,
    inputs: Path | None,
    label_share: float,
    seed: int,
    **counts: int | None,
) -> Distillation | None:
    """The settings of a distilled fit, or None where nothing is distilled."""
    if objective == "answers":
        given = {"inputs": inputs, "label_share": label_share or None, **counts}
        for name, value in given.items():
            if value is not None:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is for distilling: give --objective distill or auto")
        return None
    from tl_laai.distillation import Distillation

    if inputs is not None and counts["made_up"] is not None:
        raise ValueError(f"--inputs {inputs} are given, so that --made-up has none to make up")
    if counts["shown"] is not None and (counts["teachers"] or 1) < 2:
        raise ValueError("--shown is for --teachers 2 or more: the first shows all examples")
    try:
        # Not splitlines: an input may hold other separators than newlines.
        lines = None if inputs is None else inputs.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--inputs {inputs} is not in UTF-8: {error}") from error
    texts = None if lines is None else tuple(line.strip() for line in lines if line.strip())
    names = {"made_up": "n_inputs", "teachers": "n_teachers", "shown": "n_shown"}
    chosen: dict[str, Any] = {names.get(k, k): n for k, n in counts.items() if n is not None}
    return Distillation(inputs=texts, label_share=label_share, seed=seed, **chosen)


def asked_layer(text: str) -> int:
    """The number of a layer.

    Raises:
        ValueError: it is none.
    """
    return layer_number(text, option="--layer", allowed="a number from 0, or auto")


def chosen_by_validation(
    *,
    layer: int | None,
    weights: SparseGroupLasso | None,
    alphas: list[float] | None,
    objective: Objective,
    label_share: float,
    solver: Solver,
    preset: Preset | None,
    l1_ratio: float,
    max_heads: int | None,
    folds: int | None,
    tolerance: float,
    learning_rate: float,
    relax: int | None,
) -> bool:
    """Whether anything is to be chosen by cross-validation.

    Args:
        layer: None where it is to be chosen.
        weights: as `asked_penalty` gives them.
        alphas: likewise.
        objective: as asked for, or as the preset has it.
        label_share: of a distilled fit; 0 where it is to be chosen.
        solver: as asked for.
        preset: None for none.
        l1_ratio: L1 weight by group weight.
        max_heads: None for no limit.
        folds: None where it was not asked for.
        tolerance: of stationarity.
        learning_rate: of Adam.
        relax: steps of the second fit; None where it was not asked for.

    Raises:
        ValueError: two options contradict each other, or one would be without effect.
    """
    causes = {
        "--layer auto": (layer is None, "give --layer a number"),
        "--objective auto": (objective == "auto", "give --objective answers or distill"),
        # Of a relaxed fit at a given layer and penalty, the steps are still to be chosen.
        "--preset relaxed": (preset == "relaxed", "leave it out, and give --relax a number"),
        "--penalty auto": (alphas is None, "give --penalty none, --group or --l1"),
    }
    wanted = {cause: remedy for cause, (holds, remedy) in causes.items() if holds}
    by_validation = bool(wanted) or max_heads is not None
    if max_heads is not None and (weights or solver == "adam" or alphas == []):
        raise ValueError(
            f"--max-heads {max_heads} chooses among --alpha penalties, with the proximal solver: "
            "leave out --group, --l1, --penalty none and --solver adam"
        )
    if l1_ratio and (weights is not None or alphas == []):
        given = f"--preset {preset}" if preset else f"--l1-ratio {l1_ratio}"
        raise ValueError(
            f"{given} sets the L1 penalty beside --alpha: leave out --group, --l1 and --penalty "
            "none, or give --l1 instead of it"
        )
    if by_validation and (weights is not None or solver == "adam"):
        cause, remedy = next(iter(wanted.items()))
        raise ValueError(
            f"{cause} chooses among --alpha penalties, with the proximal solver: {remedy}"
        )
    if by_validation and tolerance != DEFAULT_TOLERANCE:
        raise ValueError(
            f"--tolerance {tolerance} is for a given --layer and penalty, without --max-heads: "
            "fits that are chosen among are stopped by --max-evaluations"
        )
    if folds is not None and not by_validation:
        raise ValueError(
            f"--folds {folds} is for what is chosen by cross-validation, and nothing is: leave it "
            "out, or leave out --layer or the penalty"
        )
    if folds is not None and objective == "distill" and label_share:
        raise ValueError(
            f"--folds {folds} is for fits on labels and for the share of labels, and both are "
            "given: leave it out, or --label-share"
        )
    if learning_rate != DEFAULT_LEARNING_RATE and not (solver == "adam" or relax or by_validation):
        raise ValueError(
            f"--learning-rate {learning_rate} is for --solver adam and --relax: give one of them, "
            "or leave it out"
        )
    return by_validation
