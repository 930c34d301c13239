"""Which held-out inputs of the rules the model makes up itself, for distillation to learn from.

    python experiments/made_up.py                # asks the model; resumes
    python experiments/made_up.py --from-rows    # print what is on disk

The inputs depend on the ten examples and the seed alone, and none has a label. `table_rules.py`
prints what distilled fits answer of the held-out inputs that are not among them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common import FIGURES, RULES, parser, tasks
from rules_shown import MADE_UP, N_TEST, N_TRAIN
from shared_fits import distilling
from tables import MODEL, Row, resume, source

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)


def made_up(model: Any, data: Any, seed: int) -> list[Row]:
    """Of each held-out example, in order, whether its input is made up."""
    from tl_laai.made_up_inputs import make_up_inputs
    from tl_laai.tasks import same_input_key

    settings = distilling(seed)["distillation"]
    inputs = make_up_inputs(model, data.train, settings.n_inputs, seed=settings.seed)
    known = {same_input_key(text) for text in inputs}
    among = [int(same_input_key(e.input) in known) for e in data.test]
    return [{"kind": "made_up", "n_inputs": len(inputs), "made_up": among}]


def compute(names: list[str], seeds: list[int]) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    model = load_model(MODEL, device="cpu")
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            data = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
            shared = {"model": MODEL, "task": task.name, "seed": seed, **source(task)}
            jobs.append((shared, partial(made_up, model, data, seed)))
    resume(MADE_UP, ("model", "task", "seed", "digest"), jobs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.tasks, arguments.seeds)
    for row in read_rows(FIGURES / f"{MADE_UP}.jsonl"):
        print(f"{row['task']}, seed {row['seed']}: {sum(row['made_up'])} of {len(row['made_up'])}")


if __name__ == "__main__":
    main()
