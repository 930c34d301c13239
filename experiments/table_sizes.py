"""Model sizes: the same fits on several models.

    python experiments/table_sizes.py                            # the two packaged models
    python experiments/table_sizes.py --models google/gemma-3-1b-pt --dtype bfloat16
    python experiments/table_sizes.py --from-rows                # print the table only

Layer (after a sixth, a third or half of the model), penalty (or none) and steps by
cross-validation inside ten examples, the layer of distilled fits by what their teacher says to
held-out inputs; zero-shot prompts; 100 held out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import FIGURES, parser, tasks
from shared_fits import (
    ALPHA,
    control_rows,
    described,
    fitted_teacher,
    layers_of,
    search,
    zeros,
)
from tables import (
    MORE,
    TAUGHT,
    Row,
    answer_row,
    by_method,
    differences,
    markdown,
    percent,
    resume,
    seeds_of,
    source,
)

from tl_laai.rows import read_rows

MODELS = ("smollm2-135m", "gemma-3-270m")
TASKS = ("country-capital", "singular-plural", "antonym", "english-french")
SEEDS = (0, 1, 2, 3, 4)
N_TRAIN, N_TEST = 10, 100
NAME = "table_sizes"


def fits(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """Prompting, and fits on labels."""
    from tl_laai import evaluate, fit_auto
    from tl_laai.recipes import compare

    chosen = fit_auto(
        model, data.train, layers=layers_of(model), alphas=(ALPHA, 0.0), **search(seed)
    )
    scores = compare(model, chosen.fit.intervention, data, few_shot=False)
    scores["few_shot"] = evaluate(model, data.test, demonstrations=data.train)
    return [
        answer_row("zero-shot", scores["zero_shot"]),
        answer_row("few-shot", scores["few_shot"]),
        answer_row(
            "fitted", scores["intervened"], described(chosen.candidate), **zeros(chosen.fit)
        ),
    ]


def distilled(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """A fit on what the model itself answers to few-shot prompts, fitted on the ten."""
    return fitted_teacher(model, data, seed)


def controls(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """Controls of that one."""
    from tl_laai import fingerprint

    return control_rows(
        NAME, data.task.name, model, data, seed, model=name, dtype=fingerprint(model).dtype
    )


GROUPS: dict[str, Callable[[str, Any, Any, int], list[Row]]] = {
    "fits": fits,
    "fitted teacher": distilled,
    "controls": controls,
}


def compute(
    groups: list[str],
    models: list[str],
    names: list[str],
    seeds: list[int],
    dtype: str,
    device: str | None,
    device_map: str | None,
) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    for name in models:
        model = load_model(name, dtype=dtype, device=device, device_map=device_map)
        jobs = []
        for seed in seeds:
            for task in tasks(names):
                data = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
                for group in groups:
                    shared = {"model": name, "dtype": dtype, "task": task.name, "seed": seed}
                    shared |= {"group": group, **source(task)}
                    jobs.append((shared, partial(GROUPS[group], name, model, data, seed)))
        resume(NAME, ("model", "dtype", "task", "seed", "group", "digest"), jobs)


def show(rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for model in dict.fromkeys(f"{row['model']}, {row['dtype']}" for row in rows):
        own_rows = [row for row in rows if f"{row['model']}, {row['dtype']}" == model]
        found = by_method(own_rows, "task")
        for method, own in found.items():
            cells = [percent(own[name]) if name in own else "-" for name in names]
            lines.append([model, method, *cells])
    print(markdown(["exact match, %", "", *names], lines))
    print(seeds_of(rows))
    print(MORE)
    for model in dict.fromkeys(row["model"] for row in rows):
        found = by_method([row for row in rows if row["model"] == model], "task")
        pairs = [(ours, "few-shot") for ours in ("fitted", TAUGHT)] + [(TAUGHT, "fitted")]
        print(f"{model}\n\n{differences(found, names, pairs)}\n")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    options.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--device", help="cpu or cuda; where there is a GPU, that by default")
    options.add_argument("--device-map", help="auto, for a model that needs several devices")
    a = options.parse_args()
    if not a.from_rows:
        compute(a.groups, a.models, a.tasks, a.seeds, a.dtype, a.device, a.device_map)
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
