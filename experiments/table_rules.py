"""Rules: exact match of fits, prompting, other interventions, fine-tuning and controls.

    python experiments/table_rules.py                       # all groups of methods; resumes
    python experiments/table_rules.py --groups fits         # one group
    python experiments/table_rules.py --from-rows           # print the table only
    python experiments/table_rules.py --from-rows --seeds 0 --tasks antonym  # of some rows

Ten training examples, zero-shot prompts for every intervention, 100 held-out examples, five
seeds. Whatever a method chooses, it chooses by cross-validation inside the ten, but for the layer
of distilled fits, which the teacher's answers to held-out inputs choose. The inputs that
the model makes up for distillation may be among the held-out ones, without their labels: rows say
how many were (`n_test_made_up`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import FIGURES, RULES, parser, tasks
from rules_baselines import begun, begun_others, vectors, wider_finetuning, wider_heads
from rules_fits import (
    NAME,
    distilled,
    distilled_every_step,
    distilled_half,
    fits,
    fitted_teacher,
    half,
    preset,
    taught_layer,
    weaker,
)
from rules_shown import N_TEST, N_TRAIN, show
from rules_taught import taught_finetuning, taught_fits, taught_heads
from shared_fits import finetuning
from tables import (
    MODEL,
    Row,
    resume,
    unit,
)

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)

GROUPS: dict[str, Callable[[Any, Any, int], list[Row]]] = {
    "fits": fits,
    "weaker": weaker,
    "preset paper": partial(preset, "paper"),
    "preset relaxed": partial(preset, "relaxed"),
    "preset distill": partial(preset, "distill"),
    "half": half,
    "distilled": distilled,
    "fitted teacher": fitted_teacher,
    "distilled every step": distilled_every_step,
    "distilled half": distilled_half,
    "vectors": vectors,
    "begun": begun,
    "begun others": begun_others,
    "finetuning": finetuning,
    "wider heads": wider_heads,
    "wider finetuning": wider_finetuning,
    "taught layer": taught_layer,
    "taught fits": taught_fits,
    "taught heads": taught_heads,
    "taught lora": partial(taught_finetuning, "lora"),
    "taught ia3": partial(taught_finetuning, "ia3"),
}


def compute(groups: list[str], names: list[str], seeds: list[int], device: str) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    model = load_model(MODEL, device=device)
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            for group in groups:
                data = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
                shared = unit(task, seed, group, device) | {"n_train": N_TRAIN}
                jobs.append((shared, partial(GROUPS[group], model, data, seed)))
    resume(NAME, ("model", "task", "seed", "group", "digest"), jobs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="rows say which")
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.groups, arguments.tasks, arguments.seeds, arguments.device)
    rows = read_rows(FIGURES / f"{NAME}.jsonl")
    of_seeds = [row for row in rows if row["seed"] in arguments.seeds]
    show([row for row in of_seeds if row["task"] in arguments.tasks])


if __name__ == "__main__":
    main()
