"""Little data: fits, prompting and fine-tuning on 5, 10, 20 and 50 examples.

    python experiments/table_examples.py                # fits, trains, evaluates; resumes
    python experiments/table_examples.py --from-rows    # print the table only

A smaller training set is the beginning of a larger one; the held-out examples are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common import FIGURES, parser, tasks
from tables import (
    ALPHA,
    N_FOLDS,
    Row,
    answer_row,
    by_method,
    described,
    layers_of,
    markdown,
    percent,
    resume,
    search,
    seeds_of,
    source,
)

from tl_laai.rows import read_rows

MODEL = "gemma-3-270m"
SEEDS = (0, 1, 2, 3, 4)
SIZES = (5, 10, 20, 50)
N_TEST = 100
TASKS = ("country-capital", "english-french", "singular-plural", "antonym")
# Of distillation, as in table_rules.py.
TAUGHT_STEPS, LABEL_SHARE = (30, 45), 0.2
NAME = "table_examples"


def compute_one(model: Any, task: Any, seed: int, n_train: int) -> list[Row]:
    from tl_laai import evaluate, fit_auto
    from tl_laai.adapters import hugging_face_model
    from tl_laai.distillation import Distillation
    from tl_laai.finetuning_selection import tune_fine_tuning
    from tl_laai.recipes import draw

    data = draw(task, train=n_train, test=N_TEST, seed=seed)
    rows = [answer_row("few-shot", evaluate(model, data.test, demonstrations=data.train))]
    labels = fit_auto(
        model, data.train, layers=layers_of(model), alphas=(ALPHA, 0.0), **search(seed)
    )
    taught = fit_auto(
        model,
        data.train,
        layers=[labels.layer],
        alphas=[0.0],
        relax_steps=TAUGHT_STEPS,
        objectives=("distill",),
        n_folds=N_FOLDS,
        seed=seed,
        distillation=Distillation(label_share=LABEL_SHARE, seed=seed),
    )
    for name, chosen in (("fitted", labels), ("distilled", taught)):
        score = evaluate(model, data.test, intervention=chosen.fit.intervention)
        rows.append(answer_row(name, score, described(chosen.candidate)))
    plain = hugging_face_model(MODEL, like=model)
    for method in ("lora", "ia3"):
        tuned = tune_fine_tuning(model, data.train, method=method, seed=seed, hf_model=plain)
        setting = f"learning rate {tuned.learning_rate:g}, {tuned.steps} steps"
        rows.append(answer_row(method, tuned.fine_tuned.evaluate(data.test), setting))
    return rows


def compute(names: list[str], seeds: list[int], sizes: list[int]) -> None:
    from tl_laai import load_model

    model = load_model(MODEL, device="cpu")
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            for n_train in sizes:
                shared = {"model": MODEL, "task": task.name, "seed": seed, "n_train": n_train}
                job = partial(compute_one, model, task, seed, n_train)
                jobs.append((shared | source(task), job))
    resume(NAME, ("model", "task", "seed", "n_train", "digest"), jobs)


def show(rows: list[Row]) -> None:
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        found = by_method([row for row in rows if row["task"] == task], "n_train")
        sizes = sorted({row["n_train"] for row in rows})
        lines = [
            [method, *(percent(own[str(n)]) if str(n) in own else "-" for n in sizes)]
            for method, own in found.items()
        ]
        tables.append(markdown([f"{task}, %", *(f"{n} examples" for n in sizes)], lines))
    print("\n\n".join(tables))
    print(seeds_of(rows))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.tasks, arguments.seeds, arguments.sizes)
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
