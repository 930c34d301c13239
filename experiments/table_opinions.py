"""Opinions: distance from a group's answers, of fits, prompting, baselines, controls and floors.

    python experiments/table_opinions.py                # fits, evaluates; resumes
    python experiments/table_opinions.py --from-rows    # print the table only

Split by question: no fit sees a held-out question of its split. Numbers of evaluations and of
orders were chosen on other splits (seeds 100 to 104; eight orders after fits in four had been seen
on seeds 0 and 1), and questions are shared by splits and groups, so most held-out ones had a part
in that choice. A fit learns from shares, in eight orders of the options (`fitted, letters alone`:
without the surprisal of naming no letter); few-shot prompts and baselines see the first eight of
its questions, each with its most frequent answer; `fitted on 8` sees the same eight, with their
shares; `few-shot, all 26` shows all; `distilled` learns what the few-shot prompt answers to all of
its questions. `batteries apart` are splits in which questions of one battery (one stem, the same
options) stand on one side. Groups are fitted as one batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from common import FIGURES, ROOT, parser
from tables import MORE, Row, by_method, markdown, resume

from tl_laai.bootstrap import PairedDifference, paired_bootstrap
from tl_laai.rows import read_rows

MODEL, LAYER = "gemma-3-270m", 9
GROUPS = ("Democrat", "Republican", "under 30", "30-49", "50-64", "65+")
SEEDS = (0, 1, 2, 3, 4)
TRAIN_SHARE, N_ORDERS, FITTED_ORDERS = 26 / 46, 4, 8
EVALUATIONS, TOLERANCE = 60, 1e-6
N_SHOWN = 8  # questions in the prompts from which baselines are made
BASELINES = (
    "task-vector",
    "mean-difference",
    "inference-time-intervention",
    "learnt-heads",
    "in-context-vector",
    "function-vector",
)
LETTERS, SHOWN_ALL = "fitted, letters alone", "few-shot, all 26"
APART = "batteries apart"  # rows of splits in which no battery stands on both sides
MEASURES = {"kl": "KL", "total_variation": "total variation", "wasserstein": "Wasserstein"}
OURS = ("fitted", "fitted on 8", "distilled")
PARTS = (
    "prompting",
    "fits",
    APART,
    SHOWN_ALL,
    LETTERS,
    "distilled",
    "shuffled answers",
    *BASELINES,
)
POLL = ROOT.parent / "shared" / "data" / "opinions" / "nonvoters_groups.jsonl"
ORDER = (
    "uniform",
    "training mean",
    "zero-shot",
    "few-shot",
    SHOWN_ALL,
    "fitted",
    "fitted on 8",
    LETTERS,
    "distilled",
    "random direction",
    "permuted heads",
    "shuffled answers",
    *BASELINES,
    *(f"{name}, {APART}" for name in ("uniform", "training mean", "zero-shot", "fitted")),
)
NAME = "table_opinions"


def opinion_task(group: str) -> Any:
    """The poll from a folder beside the checkout where there is one; else the built-in one."""
    from tl_laai import OpinionTask

    return OpinionTask.from_jsonl(POLL, group=group) if POLL.is_file() else OpinionTask.load(group)


def compute_one(
    model: Any, task: Any, seed: int, part: str, edits: Callable[[], Mapping[str, Any]]
) -> list[Row]:
    """Rows of one part of the table on one split; `edits` are those that were fitted for it."""
    from tl_laai.baselines import METHODS
    from tl_laai.controls import permuted_heads, random_direction
    from tl_laai.edits import Edit
    from tl_laai.opinion_baselines import tune_on_opinions
    from tl_laai.surveys import evaluate_opinions, mean_floor, uniform_floor

    split = split_of(task, seed, part)
    found, asked = {}, dict(edits())
    if part in ("prompting", APART):
        asked["zero-shot"] = Edit()
        found = {
            "uniform": uniform_floor(split.test),
            "training mean": mean_floor(split.test, split.train),
        }
    if part == "fits":
        asked["random direction"] = random_direction(asked["fitted"], seed)
        asked["permuted heads"] = permuted_heads(asked["fitted"], seed)
    elif part in BASELINES:
        tuned = tune_on_opinions(model, split.train[:N_SHOWN], METHODS[part], seed=seed)
        asked[part] = tuned.edit
    evaluated = partial(evaluate_opinions, model, split.test, n_orders=N_ORDERS, seed=seed)
    found |= evaluated(asked) if asked else {}
    if part == "prompting":
        found |= evaluated({"few-shot": Edit()}, demonstrations=split.train[:N_SHOWN])
    if part == SHOWN_ALL:
        found |= evaluated({part: Edit()}, demonstrations=split.train)
    return [
        {
            "kind": "opinions",
            "method": f"{name}, {APART}" if part == APART else name,
            "kl": result.values("kl"),
            "total_variation": result.values("total_variation"),
            "wasserstein": result.values("wasserstein"),
            "prompt_kl": result.values("prompt_kl"),
            "outside": result.mean("outside"),
            "questions": [row.question for row in result.rows],
        }
        for name, result in found.items()
    ]


def split_of(task: Any, seed: int, part: str) -> Any:
    """By question; or by battery, as many whole ones to fit on as hold no more questions."""
    from tl_laai.polls import OpinionSplit

    n_train = round(TRAIN_SHARE * len(task.distinct))
    if part != APART:
        return task.split(train=n_train, seed=seed)
    batteries: dict[str, list[Any]] = {}
    for question in task.distinct:
        batteries.setdefault(_battery(question.id), []).append(question)
    drawn = random.Random(seed).sample(list(batteries.values()), len(batteries))
    train: list[Any] = []
    test: list[Any] = []
    for own in drawn:
        (train if len(train) + len(own) <= n_train else test).extend(own)
    return OpinionSplit(tuple(train), (), tuple(test))


def taught(model: Any, task: Any, seed: int, part: str) -> dict[str, Any]:
    """What each fit of a part learns from."""
    from tl_laai.controls import shuffled_shares
    from tl_laai.opinion_teachers import taught_questions

    train = split_of(task, seed, part).train
    asked = partial(task.examples, n_orders=FITTED_ORDERS, seed=seed)
    if part == "fits":
        return {"fitted": asked(train), "fitted on 8": asked(train[:N_SHOWN])}
    if part == APART:
        return {"fitted": asked(train)}
    if part == LETTERS:
        return {part: asked(train, outside_weight=0.0)}
    if part == "distilled":
        shown = train[:N_SHOWN]
        answered = taught_questions(model, train, shown, n_orders=FITTED_ORDERS, seed=seed)
        return {part: asked(answered)}
    if part == "shuffled answers":
        return {part: asked(shuffled_shares(train, seed))}
    return {}


def fit_groups(
    model: Any, tasks: Mapping[str, Any], seed: int, part: str
) -> dict[str, dict[str, Any]]:
    """Group -> name -> fit, all as one batch: what groups are asked is the same."""
    from tl_laai import FitProblem, fit_many
    from tl_laai.evaluation import as_edit

    wanted = [
        (group, name, FitProblem(examples, LAYER))
        for group, task in tasks.items()
        for name, examples in taught(model, task, seed, part).items()
    ]
    found: dict[str, dict[str, Any]] = {group: {} for group in tasks}
    if wanted:
        problems = [problem for _, _, problem in wanted]
        fits = fit_many(model, problems, tolerance=TOLERANCE, max_evaluations=EVALUATIONS)
        for (group, name, _), fit in zip(wanted, fits, strict=True):
            found[group][name] = as_edit(model, fit.intervention)
    return found


def compute(parts: list[str], groups: list[str], seeds: list[int]) -> None:
    from pathlib import Path

    from tl_laai import load_model

    model = load_model(MODEL, device="cpu")
    tasks = {group: opinion_task(group) for group in groups}
    jobs = []
    for seed in seeds:
        for part in parts:
            fits = cache(partial(fit_groups, model, tasks, seed, part))  # once asked for
            for group, task in tasks.items():
                shared = {"model": MODEL, "group": group, "seed": seed, "part": part}
                shared |= {"digest": task.digest, "source": Path(task.source).name}
                edits = partial(lambda fits, group: fits()[group], fits, group)
                jobs.append((shared, partial(compute_one, model, task, seed, part, edits)))
    resume(NAME, ("model", "group", "seed", "part", "digest"), jobs)


def show(rows: list[Row], measure: str) -> None:
    every = by_method(sorted(rows, key=lambda row: ORDER.index(row["method"])), "group")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    apart = {method: every.pop(method) for method in list(every) if method.endswith(APART)}
    print(_table(every, groups, measure))
    print(
        "\nIn brackets 95 % bootstrap intervals over batteries of questions (which share stem and "
        "options), then their questions. Outside: probability of no option's letter, mean over "
        "groups.\n"
    )
    lines = [
        [method, *(_mean_over_groups(own, name) for name in MEASURES)]
        for method, own in every.items()
    ]
    print(markdown(["mean over groups", *MEASURES.values()], lines))
    if apart:
        print("\nOf splits in which no battery stands on both sides:\n")
        print(_table(apart, groups, measure))
        print()
        print(_differences(apart, [f"fitted, {APART}"], groups, measure))
    print(MORE)
    if "fitted" in every:
        print(_differences(every, OURS, groups, measure))


def _table(
    found: Mapping[str, Mapping[str, list[Row]]], groups: Sequence[str], measure: str
) -> str:
    lines = []
    for method, own in found.items():
        cells = [interval_of(own.get(group, []), None, measure) for group in groups]
        n_seeds = len({row["seed"] for these in own.values() for row in these})
        # Floors name letters alone, to rounding.
        outside = [row["outside"] for these in own.values() for row in these]
        lines.append([method, str(n_seeds), *map(_plain, cells), _share(outside)])
    return markdown([f"{measure}, held out", "seeds", *groups, "outside"], lines)


def _differences(
    found: Mapping[str, Mapping[str, list[Row]]],
    ours: Sequence[str],
    groups: Sequence[str],
    measure: str,
) -> str:
    lines = []
    for one in (method for method in ours if method in found):
        for other in (method for method in found if method != one):
            cells = [
                interval_of(found[one].get(g, []), found[other].get(g, []), measure) for g in groups
            ]
            lines.append([f"{one} - {other}", *map(_signed, cells)])
    return markdown(["difference", *groups], lines)


def _mean_over_groups(own: Mapping[str, Sequence[Row]], measure: str) -> str:
    of_groups = [np.mean([x for row in rows for x in row[measure]]) for rows in own.values()]
    return f"{np.mean(of_groups):.3f}"


def interval_of(ours: list[Row], theirs: list[Row] | None, measure: str) -> PairedDifference | None:
    """Of a mean, or of a difference over the seeds that both ran for.

    Questions of one battery are drawn together, and what one question got in several splits.
    """
    other = {row["seed"]: row for row in (ours if theirs is None else theirs)}
    ours = [row for row in ours if row["seed"] in other]
    a = [value for row in ours for value in row[measure]]
    b = [0.0 if theirs is None else v for row in ours for v in other[row["seed"]][measure]]
    batteries = [_battery(question) for row in ours for question in row["questions"]]
    return paired_bootstrap(a, b, batteries) if ours else None


def _battery(question: str) -> str:
    """What questions share that have the same stem and options: `Q8_1` and `Q8_2` are alike."""
    return question.partition("_")[0]


def _plain(found: PairedDifference | None) -> str:
    return "-" if found is None else f"{found.difference:.3f} ({found.low:.3f} to {found.high:.3f})"


def _share(outside: list[float]) -> str:
    return f"{np.mean(outside):.2f}" if max(outside) > 1e-6 else "-"


def _signed(found: PairedDifference | None) -> str:
    if found is None:
        return "-"
    return f"{found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--groups", nargs="+", default=list(GROUPS), metavar="GROUP")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--measure", default="kl")
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.parts, arguments.groups, arguments.seeds)
    show(read_rows(FIGURES / f"{NAME}.jsonl"), arguments.measure)


if __name__ == "__main__":
    main()
