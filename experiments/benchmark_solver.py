"""Does the solver converge? Stationarity and objective on real problems, with Adam beside it.

    python experiments/benchmark_solver.py            # table
    python experiments/benchmark_solver.py --json     # one row a line
    python experiments/benchmark_solver.py --only-adam  # Adam beside rows that have none yet

4 tasks x 4 layers x 3 group penalties on the packaged model, ten examples each. A problem counts
as converged where stationarity is at most 1e-3 * max(1, ||delta||) within 150 gradient
evaluations. Adam's objective is the lowest that it has seen after the same number of evaluations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import FIGURES, tasks, write_rows

from tl_laai.rows import read_rows

Row = dict[str, Any]

MODEL = "gemma-3-270m"
TASKS = ("country-capital", "antonym", "english-french", "singular-plural")
LAYERS = (3, 6, 9, 12)
ALPHAS = (0.3, 0.6, 0.9)
N_TRAIN, SEED = 10, 0
TOLERANCE, LIMIT, GROUP = 1e-3, 150, 12


def solve(names: list[str]) -> list[Row]:
    """Rows of our solver, of one task after the other; written as they come."""
    from tl_laai import load_model
    from tl_laai.batches import FitBatch

    model = load_model(MODEL, device="cpu")
    rows: list[Row] = []
    for task in tasks(names):
        problems = [_problem(task, layer, alpha) for layer in LAYERS for alpha in ALPHAS]
        ours = FitBatch(model, problems).solve(tolerance=TOLERANCE, max_evaluations=LIMIT)
        for problem, solution in zip(problems, ours, strict=True):
            rows.append(
                {
                    "kind": "benchmark_solver",
                    "task": task.name,
                    "layer": problem.layer,
                    "alpha": problem.alpha,
                    "status": solution.status.value,
                    "n_evaluations": solution.n_evaluations,
                    "objective": solution.objective,
                    "loss": solution.loss,
                    "relative_stationarity": solution.stationarity
                    / max(1.0, float(solution.delta.norm())),
                    "n_heads": int((solution.delta.norm(dim=-1) > 0).sum()),
                    "adam_objective": None,
                    "source": Path(task.source).name,
                }
            )
        write_rows(rows, "benchmark_solver")
    return rows


def run_adam(rows: list[Row]) -> None:
    """Fill Adam's column where it is empty; rows are written after every group."""
    from tl_laai import load_model
    from tl_laai.batches import FitBatch

    model = load_model(MODEL, device="cpu")
    by_name = {task.name: task for task in tasks(list({str(row["task"]) for row in rows}))}
    # In groups of similar length, so that Adam takes few steps that nobody compares with.
    missing = sorted(
        (row for row in rows if row["adam_objective"] is None), key=lambda r: r["n_evaluations"]
    )
    for start in range(0, len(missing), GROUP):
        group = missing[start : start + GROUP]
        problems = [_problem(by_name[r["task"]], r["layer"], r["alpha"]) for r in group]
        steps = group[-1]["n_evaluations"]
        solved = FitBatch(model, problems).solve(solver="adam", max_evaluations=steps)
        for row, adam in zip(group, solved, strict=True):
            row["adam_objective"] = min(
                r.objective for r in adam.history if r.evaluation <= row["n_evaluations"]
            )
        write_rows(rows, "benchmark_solver")


def _problem(task: Any, layer: int, alpha: float) -> Any:
    from tl_laai import FitProblem

    train = task.split(train=N_TRAIN, test=100, seed=SEED).train
    return FitProblem(train, layer, alpha=alpha)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--from-rows", action="store_true", help="print the rows on disk only")
    options.add_argument("--json", action="store_true", help="print one row a line")
    options.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    options.add_argument("--no-adam", action="store_true", help="leave Adam's column empty")
    options.add_argument("--only-adam", action="store_true", help="fill Adam's column alone")
    arguments = options.parse_args()
    if not (arguments.from_rows or arguments.only_adam):
        solve(arguments.tasks)
    rows = read_rows(FIGURES / "benchmark_solver.jsonl")
    if not (arguments.from_rows or arguments.no_adam):
        run_adam(rows)
    if arguments.json:
        print((FIGURES / "benchmark_solver.jsonl").read_text(), end="")
        return
    print(
        "| task | layer | alpha | status | evaluations | relative stationarity | heads "
        "| objective | Adam's |\n|---|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        print(
            f"| {r['task']} | {r['layer']} | {r['alpha']} | {r['status']} | {r['n_evaluations']} "
            f"| {r['relative_stationarity']:.1e} | {r['n_heads']} | {r['objective']:.4f} "
            f"| {'-' if r['adam_objective'] is None else format(r['adam_objective'], '.4f')} |"
        )
    converged = sum(r["status"] == "converged" for r in rows)
    for column in ("task", "layer", "alpha"):
        for value in dict.fromkeys(r[column] for r in rows):
            own = [r["status"] == "converged" for r in rows if r[column] == value]
            print(f"{column} {value}: {sum(own)} of {len(own)} converged")
    compared = [r for r in rows if r["adam_objective"] is not None]
    worse = sum(r["objective"] > r["adam_objective"] * (1 + 1e-4) for r in compared)
    print(
        f"\nconverged: {converged} of {len(rows)}; Adam's objective is lower in {worse} of "
        f"{len(compared)}"
    )


if __name__ == "__main__":
    main()
