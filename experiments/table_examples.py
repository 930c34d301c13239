"""Little data: fits, prompting and fine-tuning on 5, 10, 20 and 50 examples.

    python experiments/table_examples.py                # fits, trains, evaluates; resumes
    python experiments/table_examples.py --from-rows    # print the table only

A smaller training set is the beginning of a larger one; the held-out examples are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import FIGURES, parser, tasks
from shared_fits import (
    ALPHA,
    described,
    distilled_row,
    finetuning,
    fitted_teacher,
    layers_of,
    search,
)
from tables import (
    MODEL,
    TAUGHT,
    Row,
    answer_row,
    by_method,
    computed_elsewhere,
    markdown,
    mean_difference,
    percent,
    resume,
    seeds_of,
    unit,
)

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)
SIZES = (5, 10, 20, 50)
N_TEST = 100
TASKS = ("country-capital", "english-french", "singular-plural", "antonym")
OURS = ("fitted", "distilled", TAUGHT)
NAME = "table_examples"


def fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Prompting, and fits on labels."""
    from tl_laai import evaluate, fit_auto

    chosen = fit_auto(
        model, data.train, layers=layers_of(model), alphas=(ALPHA, 0.0), **search(seed)
    )
    score = evaluate(model, data.test, intervention=chosen.fit.intervention)
    few_shot = evaluate(model, data.test, demonstrations=data.train)
    return [
        answer_row("few-shot", few_shot),
        answer_row("fitted", score, described(chosen.candidate)),
    ]


def distilled(model: Any, data: Any, seed: int) -> list[Row]:
    """Fits on what the few-shot prompt answers."""
    return [distilled_row("distilled", model, data, seed, teacher_steps=0)]


GROUPS: dict[str, Callable[[Any, Any, int], list[Row]]] = {
    "fits": fits,
    "distilled": distilled,
    "fitted teacher": fitted_teacher,
    "finetuning": finetuning,
}


def compute(
    groups: list[str], names: list[str], seeds: list[int], sizes: list[int], device: str
) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    model = load_model(MODEL, device=device)
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            for n_train in sizes:
                data = draw(task, train=n_train, test=N_TEST, seed=seed)
                for group in groups:
                    shared = unit(task, seed, group, device) | {"n_train": n_train}
                    jobs.append((shared, partial(GROUPS[group], model, data, seed)))
    resume(NAME, ("model", "task", "seed", "group", "n_train", "digest"), jobs)


def show(rows: list[Row]) -> None:
    sizes = sorted({row["n_train"] for row in rows})
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        most = len({row["seed"] for row in of_task})
        lines = [
            [method, *(_cell(own.get(str(n), []), most) for n in sizes)]
            for method, own in by_method(of_task, "n_train").items()
        ]
        tables.append(markdown([f"{task}, %", *(f"{n} examples" for n in sizes)], lines))
    tables.append(_differences(rows, sizes))
    print("\n\n".join(tables))
    print(
        seeds_of(rows)
        + " *: of fewer of these seeds. Differences: of the seeds for which both methods have all "
        "tasks; after the semicolon the interval over tasks (Student's t)."
        + computed_elsewhere(rows)
    )


def _cell(rows: list[Row], n_seeds: int) -> str:
    """Exact match, marked where rows are of fewer seeds than others of the task."""
    fewer = "*" if len({row["seed"] for row in rows}) < n_seeds else ""
    return percent(rows) + fewer if rows else "-"


def _differences(rows: list[Row], sizes: list[int]) -> str:
    """Ours less every other method's, in points, mean over tasks."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = {
        (method, n): {
            (row["task"], row["seed"]): row
            for row in rows
            if row["method"] == method and row["n_train"] == n
        }
        for method in methods
        for n in sizes
    }
    lines = [
        [
            f"{ours} - {other}",
            *(mean_difference(own[ours, n], own[other, n], names) for n in sizes),
        ]
        for ours in OURS
        for other in methods
        if other not in OURS
    ]
    return markdown(["difference in points", *(f"{n} examples" for n in sizes)], lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="rows say which")
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(
            arguments.groups, arguments.tasks, arguments.seeds, arguments.sizes, arguments.device
        )
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
