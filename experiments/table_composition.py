"""Composition: sums of two tasks' interventions on the task that does one after the other.

    python experiments/table_composition.py                 # fits, evaluates; resumes
    python experiments/table_composition.py --from-rows     # print the table only

Both parts and the composed task get ten examples each. All interventions are at one layer, chosen
by cross-validation on the composed task's ten, like penalty and steps; the distilled fit of the
composed task is at a layer of its own, which its teacher's answers choose. The weights of the sum
are the best of a grid on ten more composed examples (`tuned sum`); the plain sum has no such help.
`distilled parts` are distilled each from a teacher of its own; those ten more choose their layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from common import FIGURES, ROOT, parser, tasks
from shared_fits import (
    ALPHA,
    CHOOSING_EVALUATIONS,
    LABEL_SHARE,
    TAUGHT_STEPS,
    TEACHER_STEPS,
    control_rows,
    fitted_teacher,
    layers_of,
    search,
)
from tables import (
    CONTROLS,
    MODEL,
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
    unit,
)

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)
N_TRAIN, N_VALIDATION, N_TEST = 10, 10, 100
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
NAME = "table_composition"
# What stands first in the table; what the parts keep, and the grid, behind it.
FIRST = (
    "zero-shot",
    "few-shot",
    "first part alone",
    "second part alone",
    "plain sum",
    "tuned sum",
    "plain sum, distilled parts",
    "tuned sum, distilled parts",
    "fitted jointly",
    TAUGHT,
    *CONTROLS,
)
COMPOSED = ROOT.parent / "shared" / "data" / "composed"
# Composed task -> its two parts among the rules.
PARTS = {
    "antonym_capitalize": ("antonym", "capitalize"),
    "singular-plural_capitalize": ("singular-plural", "capitalize"),
    "english-french_capitalize": ("english-french", "capitalize"),
    "antonym_french": ("antonym", "english-french"),
}


def composed(name: str) -> Any:
    """The composed task from a folder beside the checkout; else its first part, capitalised.

    Raises:
        ValueError: there is no such folder, and the second part is not capitalisation.
    """
    from tl_laai.tasks import Example, Task

    path = COMPOSED / f"{name}.json"
    if path.is_file():
        return Task.from_json(path)
    if PARTS[name][1] != "capitalize":
        raise ValueError(f"task {name!r} needs {path}; name others, see --help")
    [first] = tasks([PARTS[name][0]])
    examples = tuple(Example(e.input, e.output[:1].upper() + e.output[1:]) for e in first.examples)
    return replace(first, name=name, examples=examples)


def fits(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """Prompting, sums of the parts' fits, and a fit of the composed task."""
    from tl_laai import FitProblem, evaluate, fit_auto, fit_many
    from tl_laai.edits import Edit
    from tl_laai.evaluation import as_edit, evaluate_edits

    parts = [task.split(train=N_TRAIN, test=N_TEST, seed=seed) for task in tasks(PARTS[name])]
    joint = fit_auto(
        model, data.train, layers=layers_of(model), alphas=(ALPHA, 0.0), **search(seed)
    )
    fitted = fit_many(
        model,
        [FitProblem(p.train, joint.layer, None, joint.alpha) for p in parts],
        max_evaluations=CHOOSING_EVALUATIONS,
        relax_steps=joint.candidate.relax_steps,
    )
    first, second = (f.intervention for f in fitted)
    grid = {
        (a, b): as_edit(model, a * first + b * second)
        for a, b in itertools.product(STRENGTHS, STRENGTHS)
        if a or b
    }
    best = _likeliest(model, data, grid)
    edits = {f"{a:g} + {b:g}": edit for (a, b), edit in grid.items()}
    edits |= {"zero-shot": Edit(), "fitted jointly": as_edit(model, joint.fit.intervention)}
    scores = evaluate_edits(model, data.test, edits)
    rows = [
        answer_row("few-shot", evaluate(model, data.test, demonstrations=data.train)),
        answer_row("zero-shot", scores["zero-shot"]),
        answer_row("first part alone", scores["1 + 0"]),
        answer_row("second part alone", scores["0 + 1"]),
        answer_row("plain sum", scores["1 + 1"]),
        answer_row("tuned sum", scores[f"{best[0]:g} + {best[1]:g}"], f"{best[0]:g} + {best[1]:g}"),
        answer_row("fitted jointly", scores["fitted jointly"], f"layer {joint.layer}"),
    ]
    rows += [
        answer_row(f"grid {key}", scores[key], f"layer {joint.layer}")
        for key in edits
        if "+" in key
    ]
    for which, part, key in zip(("first", "second"), parts, ("1 + 0", "0 + 1"), strict=True):
        own = {"its own": edits[key], "the sum": edits["1 + 1"]}
        kept = evaluate_edits(model, part.test, own)
        rows += [answer_row(f"{which} part's task, {k}", score) for k, score in kept.items()]
    return rows


def distilled(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """A fit of the composed task, distilled; what its parts are does not matter."""
    return fitted_teacher(model, data, seed)


def distilled_parts(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """Sums of distilled parts, at the layer and weights that ten more composed examples choose."""
    from tl_laai import FitProblem, fit_many
    from tl_laai.distillation import Distillation, prepare
    from tl_laai.evaluation import as_edit, evaluate_edits

    parts = [task.split(train=N_TRAIN, test=N_TEST, seed=seed) for task in tasks(PARTS[name])]
    settings = Distillation(label_share=LABEL_SHARE, seed=seed, teacher_steps=TEACHER_STEPS)
    lessons = [prepare(model, part.train, settings) for part in parts]
    problems = [
        FitProblem(lesson.examples, layer, alpha=0.0, weights=lesson.weights)
        for layer in layers_of(model)
        for lesson in lessons
    ]
    fitted = [one.intervention for one in fit_many(model, problems, relax_steps=TAUGHT_STEPS)]
    pairs = list(zip(fitted[::2], fitted[1::2], strict=True))
    grid = {
        (layer, a, b): as_edit(model, a * first + b * second)
        for layer, (first, second) in zip(layers_of(model), pairs, strict=True)
        for a, b in itertools.product(STRENGTHS, STRENGTHS)
        if a or b
    }
    plain = {key: edit for key, edit in grid.items() if key[1:] == (1.0, 1.0)}
    chosen = {
        "plain sum": _likeliest(model, data, plain),
        "tuned sum": _likeliest(model, data, grid),
    }
    scores = evaluate_edits(model, data.test, {name: grid[key] for name, key in chosen.items()})
    rows = [
        answer_row(
            f"{name}, distilled parts",
            scores[name],
            "layer {}: {:g} + {:g}".format(*chosen[name]),
        )
        for name in chosen
    ]
    layer = chosen["plain sum"][0]
    for which, part, weights in zip(
        ("first", "second"), parts, ((1.0, 0.0), (0.0, 1.0)), strict=True
    ):
        own = evaluate_edits(model, part.test, {"it": grid[layer, *weights]})["it"]
        rows.append(answer_row(f"{which} part's task, its own, distilled", own, f"layer {layer}"))
    return rows


def _likeliest(model: Any, data: Any, edits: dict[Any, Any]) -> Any:
    """The key of the edit under which ten more composed examples are answered best."""
    from tl_laai.evaluation import answer_scores

    _, probabilities = answer_scores(model, data.validation, list(edits.values()))
    return list(edits)[int(probabilities.mean(dim=1).argmax())]


def controls(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """Controls of the distilled fit of the composed task."""
    return control_rows(NAME, name, model, data, seed)


GROUPS: dict[str, Callable[[str, Any, Any, int], list[Row]]] = {
    "fits": fits,
    "distilled parts": distilled_parts,
    "fitted teacher": distilled,
    "controls": controls,
}


def compute(groups: list[str], names: list[str], seeds: list[int]) -> None:
    from tl_laai import load_model

    model = load_model(MODEL, device="cpu")
    jobs = []
    for seed in seeds:
        for name in names:
            task = composed(name)
            data = task.split(train=N_TRAIN, validation=N_VALIDATION, test=N_TEST, seed=seed)
            for group in groups:
                shared = unit(task, seed, group, "cpu")
                jobs.append((shared, partial(GROUPS[group], name, model, data, seed)))
    resume(NAME, ("model", "task", "seed", "group", "digest"), jobs)


def show(rows: list[Row]) -> None:
    found = by_method(rows, "task")
    found = {method: found[method] for method in (*FIRST, *found) if method in found}
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        [method, *(percent(own[name]) if name in own else "-" for name in names)]
        for method, own in found.items()
        if not method.startswith("grid")
    ]
    print(markdown(["exact match, %", *names], lines))
    print(seeds_of(rows))
    print(MORE)
    others = ("few-shot", "fitted jointly", "plain sum", "tuned sum")
    print(differences(found, names, [(TAUGHT, other) for other in others]) + "\n")
    for name in names:
        cells = [
            [f"{a:g}", *(
                percent(found[f"grid {a:g} + {b:g}"][name]) if a or b else "-" for b in STRENGTHS
            )]
            for a in STRENGTHS
        ]  # fmt: skip
        print(f"{name}: weight of the first part down, of the second across\n")
        print(markdown(["", *(f"{b:g}" for b in STRENGTHS)], cells) + "\n")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--tasks", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.groups, arguments.tasks, arguments.seeds)
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
