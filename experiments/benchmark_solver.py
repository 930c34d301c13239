"""Does the solver converge? Stationarity and objective on real problems, with Adam beside it.

    python experiments/benchmark_solver.py            # table
    python experiments/benchmark_solver.py --json     # one row a line

4 tasks x 4 layers x 3 group penalties on the packaged model, ten examples each. A problem counts
as converged where stationarity is at most 1e-3 * max(1, ||delta||) within 150 gradient
evaluations. Adam's objective is the
lowest that it has seen after the same number of evaluations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import FIGURES, tasks, write_rows

from tl_laai.rows import read_rows

MODEL = "gemma-3-270m"
TASKS = ("country-capital", "antonym", "english-french", "singular-plural")
LAYERS = (3, 6, 9, 12)
ALPHAS = (0.3, 0.6, 0.9)
N_TRAIN, SEED = 10, 0
TOLERANCE, LIMIT, GROUP = 1e-3, 150, 12


def compute(names: list[str], with_adam: bool) -> list[dict[str, object]]:
    from tl_laai import FitProblem, load_model
    from tl_laai.batches import FitBatch

    model = load_model(MODEL, device="cpu")
    rows: list[dict[str, object]] = []
    solved = []
    for task in tasks(names):
        train = task.split(train=N_TRAIN, test=100, seed=SEED).train
        problems = [FitProblem(train, layer, alpha=a) for layer in LAYERS for a in ALPHAS]
        ours = FitBatch(model, problems).solve(tolerance=TOLERANCE, max_evaluations=LIMIT)
        for problem, solution in zip(problems, ours, strict=True):
            solved.append((problem, solution))
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
    if not with_adam:
        return rows
    # In groups of similar length, so that Adam takes few steps that nobody compares with.
    order = sorted(range(len(rows)), key=lambda i: solved[i][1].n_evaluations)
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        steps = solved[group[-1]][1].n_evaluations
        batch = FitBatch(model, [solved[i][0] for i in group])
        for i, adam in zip(group, batch.solve(solver="adam", max_evaluations=steps), strict=True):
            limit = solved[i][1].n_evaluations
            rows[i]["adam_objective"] = min(
                r.objective for r in adam.history if r.evaluation <= limit
            )
        write_rows(rows, "benchmark_solver")
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--from-rows", action="store_true", help="print the rows on disk only")
    options.add_argument("--json", action="store_true", help="print one row a line")
    options.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    options.add_argument("--no-adam", action="store_true", help="leave Adam's column empty")
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.tasks, not arguments.no_adam)
    rows = read_rows(FIGURES / "benchmark_solver.jsonl")
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
