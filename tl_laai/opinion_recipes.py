"""What an opinion fit was made of: kept in its provenance, and made again from there.

model, backend                     what to load
opinions  group, source, digest    whose answers to which questions, and how they are asked
split     train, orders, seed      the questions fitted on; the others are held out
loss      outside_weight           how much it counts that an option is named at all
          objective                answers: the group's shares; distill: the few-shot prompt's
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tl_laai.opinions import OpinionTemplate
from tl_laai.polls import OpinionSplit, OpinionTask
from tl_laai.recipes import agreed, model_name


@dataclass(frozen=True)
class PollData:
    """The questions of an opinion fit, and how they are asked.

    Attributes:
        task: whose answers to which questions.
        split: what was fitted on, and what is held out.
        n_orders: prompts a question.
        seed: of split and orders.
        shots: questions that few-shot prompts show; None for all that were fitted on.
        template: how questions become prompts.
    """

    task: OpinionTask
    split: OpinionSplit
    n_orders: int
    seed: int
    shots: int | None
    template: OpinionTemplate


def record_poll(
    model: str, backend: str, poll: PollData, *, outside_weight: float, objective: str = "answers"
) -> dict[str, Any]:
    """What an opinion fit should keep as provenance: see the head of this file.

    Args:
        model: the name it was loaded by; a path is kept absolute.
        backend: as given to `load_model`.
        poll: its training questions are those fitted on, all others held out.
        outside_weight: of the fit's loss; see `OptionExample`.
        objective: `answers`, or `distill` (`tl_laai.opinion_teachers`).
    """
    task = poll.task
    path = Path(task.source)
    from_file = task.source != "built-in" and path.is_file()
    return {
        "model": model_name(model),
        "backend": backend,
        "opinions": {
            "group": task.group,
            "source": str(path.resolve()) if from_file else task.source,
            "digest": task.digest,
            "template": asdict(poll.template),
        },
        "split": {
            "train": len(poll.split.train),
            "orders": poll.n_orders,
            "seed": poll.seed,
            "shots": poll.shots,
        },
        "loss": {"outside_weight": outside_weight, "objective": objective},
    }


def recorded_poll(provenance: Mapping[str, Any]) -> PollData:
    """The questions that an opinion fit was made on, and those held out from it.

    Raises:
        FileNotFoundError, ValueError: the poll is not where it was, or has changed since the fit;
            parts of the intervention were fitted on different questions.
    """
    asked, split = (agreed(provenance, name) for name in ("opinions", "split"))
    if asked is None or split is None:
        raise ValueError(
            "the parts of the intervention were not all fitted on the same questions of one group, "
            "so none are known to be held out; evaluate the parts, or give --task"
        )
    missing = [name for name in ("group", "source", "digest", "template") if name not in asked]
    missing += [name for name in ("train", "orders", "seed", "shots") if name not in split]
    if missing:
        raise ValueError(
            f"provenance does not say {', '.join(missing)} of the questions: the folder is damaged "
            "or written by another program; fit again"
        )
    group, source, digest = (asked[name] for name in ("group", "source", "digest"))
    if source == "built-in":
        task = OpinionTask.load(group)
    else:
        task = OpinionTask.from_jsonl(str(source), group=group)
    if task.digest != digest:
        raise ValueError(
            f"the questions of {group!r} in {source} have changed since the fit (digest {digest}, "
            f"now {task.digest}), so its split cannot be made again; restore them"
        )
    n_train, n_orders, seed, shots = (split[name] for name in ("train", "orders", "seed", "shots"))
    template = OpinionTemplate(**asked["template"])
    questions = task.split(train=n_train, seed=seed)
    return PollData(task, questions, n_orders, seed, shots, template)
