"""What an opinion fit was made of: kept in its provenance, and made again from there.

model, backend                     what to load
opinions  group, source, digest    whose answers to which questions, and how they are asked
split     train, orders, seed      the questions fitted on; the others are held out
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
        outside_weight: of the fit's loss; see `OptionExample`.
        template: how questions become prompts.
    """

    task: OpinionTask
    split: OpinionSplit
    n_orders: int
    seed: int
    shots: int | None
    outside_weight: float
    template: OpinionTemplate


def record_poll(model: str, backend: str, poll: PollData) -> dict[str, Any]:
    """What an opinion fit should keep as provenance: see the head of this file.

    Example:
        >>> fit(model, examples, provenance=record_poll("gpt2", "auto", poll))  # doctest: +SKIP

    Args:
        model: the name it was loaded by; a path is kept absolute.
        backend: as given to `load_model`.
        poll: its training questions are those fitted on.
    """
    task = poll.task
    path = Path(task.source)
    return {
        "model": model_name(model),
        "backend": backend,
        "opinions": {
            "group": task.group,
            "source": str(path.resolve()) if path.exists() else task.source,
            "digest": task.digest,
            "template": asdict(poll.template),
            "outside_weight": poll.outside_weight,
        },
        "split": {
            "train": len(poll.split.train),
            "orders": poll.n_orders,
            "seed": poll.seed,
            "shots": poll.shots,
        },
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
    # Fits made before there was a weight took the KL among the options alone.
    weight = asked.get("outside_weight", 0.0)
    return PollData(task, questions, n_orders, seed, shots, weight, template)
