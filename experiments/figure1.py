"""Figure 1: exact match of unregularised interventions at each layer, over five seeds.

python experiments/figure1.py                # fits, evaluates (resumes), draws
python experiments/figure1.py --from-rows    # draws only
"""

from __future__ import annotations

import statistics
from typing import Any

from common import FIGURES, RULES, bar, draw, parser, tasks

from tl_laai.rows import read_rows

MODEL = "gemma-3-270m"
SEEDS = (0, 1, 2, 3, 4)
N_TRAIN, N_TEST = 10, 100
ROWS = FIGURES / "figure1.jsonl"


def print_means(rows: list[dict[str, Any]]) -> None:
    """Mean exact match over seeds, in %: a line a task and their average, a column a layer."""
    scores: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["layer"]), []).append(100 * row["exact_match"])
    means = {key: statistics.mean(own) for key, own in scores.items()}
    layers = sorted({layer for _, layer in means})
    names = list(dict.fromkeys(task for task, _ in means))
    lines = [(name, [means[name, layer] for layer in layers]) for name in names]
    average = [statistics.mean(column) for column in zip(*(own for _, own in lines), strict=True)]
    for name, own in [*lines, ("average", average)]:
        print(f"{name:16}", *(f"{mean:3.0f}" for mean in own))


def compare_with_the_plain_loop(rows: list[dict[str, Any]]) -> None:
    """What the fits of one task would take, a problem-step at a time, by the benchmark's rows."""
    from measuring import hardware

    path = FIGURES / "benchmark_fit.jsonl"
    if not path.exists():
        return
    seconds = {
        row["method"]: row["seconds_per_problem_step"]
        for row in read_rows(path)
        if row["prompts"] == "zero-shot" and row["backend"] == "hooked"
        if row["hardware"] == hardware("cpu") and row["dtype"] == "float32"
    }
    if not seconds:  # the benchmark did not run on this CPU
        return
    one = [row for row in rows if row["task"] == rows[0]["task"]]
    steps = sum(row["n_evaluations"] for row in one)
    plain, ours = (steps * seconds[name] / 3600 for name in ("plain-hooked", "engine-16"))
    print(
        f"{len(one)} fits of one task are {steps} problem-steps: {60 * plain:.0f} minutes "
        f"through the plain loop, {60 * ours:.0f} here ({plain / ours:.0f}x), at the benchmark's "
        "seconds a step"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    arguments = options.parse_args()
    if not arguments.from_rows:
        from tl_laai.sweeps import sweep_layers

        progress, tell = bar("figure 1")
        with progress:
            sweep_layers(
                MODEL,
                tasks(arguments.tasks),
                out=ROWS,
                seeds=SEEDS,
                n_train=N_TRAIN,
                n_test=N_TEST,
                progress=tell,
            )
    rows = read_rows(ROWS)
    draw(rows, "figure1")
    print_means(rows)
    compare_with_the_plain_loop(rows)


if __name__ == "__main__":
    main()
