"""Regularisation: no penalty, L1, group, and both, at one layer, on few examples.

    python experiments/table_regularisation.py                # fits, evaluates; resumes
    python experiments/table_regularisation.py --from-rows    # print the table only

The layer is chosen without a penalty, by cross-validation inside the ten examples; then, for each
kind of penalty anew, its strength, as a share of the weight at which all of Delta is zero, and the
steps of the relaxed fit. Beside it stands the penalised fit itself, not relaxed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from common import FIGURES, RULES, parser, tasks
from shared_fits import (
    HALF_ALPHAS,
    described,
    fitted_teacher,
    labelled_again,
    layers_of,
    search,
    setting_of,
    zeros,
)
from tables import (
    CONTROLS,
    MODEL,
    MORE,
    TAUGHT,
    Row,
    answer_row,
    average,
    by_method,
    differences,
    markdown,
    percent,
    resume,
    seeds_of,
    unit,
)

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)
N_TRAIN, N_TEST = 10, 100
ALPHAS = (0.9, 0.5)
# Weight of L1 as a multiple of the group weight. A pure L1 penalty is all but so.
KINDS = {"group": 0.0, "both": 0.02, "L1": 1e3}
NAME = "table_regularisation"
CONTROLLED = "group, relaxed"


def fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Fits on labels under each kind of penalty, relaxed and not."""
    from tl_laai import fit_auto
    from tl_laai.evaluation import as_edit, evaluate_edits

    free = fit_auto(model, data.train, layers=layers_of(model), alphas=[0.0], **search(seed))
    fits = {"none": (free.fit, described(free.candidate))}
    for kind, ratio in KINDS.items():
        for relaxed in (True, False):
            options = search(seed) | ({} if relaxed else {"relax_steps": ()})
            chosen = fit_auto(
                model, data.train, layers=[free.layer], alphas=ALPHAS, l1_ratio=ratio, **options
            )
            name = f"{kind}, relaxed" if relaxed else kind
            fits[name] = (chosen.fit, described(chosen.candidate))
    edits = {name: as_edit(model, f.intervention) for name, (f, _) in fits.items()}
    scores = evaluate_edits(model, data.test, edits)
    return [
        answer_row(
            name,
            scores[name],
            setting,
            **zeros(f),
            train_loss=f.solution.loss,
            status=f.solution.status.value,
        )
        for name, (f, setting) in fits.items()
    ]


def controls(model: Any, data: Any, seed: int) -> list[Row]:
    """Controls of the relaxed fit under a group penalty: random, permuted, shuffled answers."""
    from tl_laai.controls import permuted_heads, random_direction, shuffled_answers
    from tl_laai.evaluation import as_edit, evaluate_edits

    setting = setting_of(NAME, CONTROLLED, data.task.name, seed)
    itself, shuffled = (
        as_edit(model, labelled_again(model, examples, setting).intervention)
        for examples in (data.train, shuffled_answers(data.train, seed))
    )
    edits = dict(
        zip(
            CONTROLS,
            (shuffled, random_direction(itself, seed), permuted_heads(itself, seed)),
            strict=True,
        )
    )
    scores = evaluate_edits(model, data.test, edits)
    return [answer_row(f"{name}, {CONTROLLED}", scores[name], setting) for name in CONTROLS]


def half(model: Any, data: Any, seed: int) -> list[Row]:
    """A distilled fit on at most half of the heads, which a group penalty chooses."""
    n_heads = model.cfg.n_heads // 2
    rows = fitted_teacher(model, data, seed, alphas=HALF_ALPHAS, max_heads=n_heads)
    return [{**row, "method": f"{row['method']}, half"} for row in rows]


GROUPS: dict[str, Callable[[Any, Any, int], list[Row]]] = {
    "fits": fits,
    "controls": controls,
    "fitted teacher": fitted_teacher,
    "fitted teacher, half": half,
}


def compute(groups: list[str], names: list[str], seeds: list[int]) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    model = load_model(MODEL, device="cpu")
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            data = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
            for group in groups:
                shared = unit(task, seed, group, "cpu")
                jobs.append((shared, partial(GROUPS[group], model, data, seed)))
    resume(NAME, ("model", "task", "seed", "group", "digest"), jobs)


def show(rows: list[Row]) -> None:
    found = by_method(rows, "task")
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for method, own in found.items():
        everything = [row for name in names for row in own.get(name, [])]
        lines.append(
            [
                method,
                *(percent(own[name]) if name in own else "-" for name in names),
                percent(everything),
                average([row["n_heads"] for row in everything if "n_heads" in row]),
                average([100 * row["zeros"] for row in everything if "zeros" in row]),
            ]
        )
    print(markdown(["exact match, %", *names, "mean", "heads", "zeros, %"], lines))
    print(seeds_of(rows))
    print(MORE)
    print(differences(found, names, [(f"{TAUGHT}, half", TAUGHT), (TAUGHT, "none")]))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.groups, arguments.tasks, arguments.seeds)
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
