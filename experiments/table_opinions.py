"""Opinions: distance from a group's answers, of fits, prompting, baselines, controls and floors.

    python experiments/table_opinions.py                # fits, evaluates; resumes
    python experiments/table_opinions.py --from-rows    # print the table only

Split by question: no fit sees a held-out question of its split. Steps and learning rate of the fits
were chosen on other splits, but questions are shared by splits and groups, so most held-out ones
had a part in that choice. A fit learns from shares, in four orders of the options, over the whole
vocabulary (`fitted, letters alone`: over the options' letters, for half as many steps); few-shot
prompts and baselines see the first eight of its questions, each with its most frequent answer;
`fitted on 8` sees the same eight, with their shares; `few-shot, all 26` shows all; `distilled`
learns what the few-shot prompt answers to all of its questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from common import FIGURES, ROOT, parser
from tables import MORE, Row, by_method, markdown, resume

from tl_laai.bootstrap import PairedDifference, paired_bootstrap
from tl_laai.rows import read_rows

MODEL, LAYER = "gemma-3-270m", 9
GROUPS = ("Democrat", "Republican", "under 30", "30-49", "50-64", "65+")
SEEDS = (0, 1, 2, 3, 4)
TRAIN_SHARE, N_ORDERS, STEPS, LEARNING_RATE = 26 / 46, 4, 90, 0.03
LETTERS_STEPS = 45  # of fits to the letters alone
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
MEASURES = {"kl": "KL", "total_variation": "total variation", "wasserstein": "Wasserstein"}
OURS = ("fitted", "fitted on 8", "distilled")
PARTS = ("fits", SHOWN_ALL, LETTERS, "distilled", "shuffled answers", *BASELINES)
POLL = ROOT.parent / "shared" / "data" / "opinions" / "nonvoters_groups.jsonl"
NAME = "table_opinions"


def opinion_task(group: str) -> Any:
    """The poll from a folder beside the checkout where there is one; else the built-in one."""
    from tl_laai import OpinionTask

    return OpinionTask.from_jsonl(POLL, group=group) if POLL.is_file() else OpinionTask.load(group)


def compute_one(model: Any, task: Any, seed: int, part: str) -> list[Row]:
    """Rows of one part of the table on one split."""
    from tl_laai.baselines import METHODS
    from tl_laai.controls import permuted_heads, random_direction, shuffled_shares
    from tl_laai.edits import Edit
    from tl_laai.opinion_baselines import tune_on_opinions
    from tl_laai.opinion_teachers import taught_questions
    from tl_laai.surveys import evaluate_opinions, mean_floor, uniform_floor

    split = task.split(train=round(TRAIN_SHARE * len(task.distinct)), seed=seed)
    asked = partial(task.examples, n_orders=N_ORDERS, seed=seed)
    found = {}
    if part == "fits":
        edits = {
            "zero-shot": Edit(),
            "fitted": _fitted(model, asked(split.train)),
            "fitted on 8": _fitted(model, asked(split.train[:N_SHOWN])),
        }
        edits["random direction"] = random_direction(edits["fitted"], seed)
        edits["permuted heads"] = permuted_heads(edits["fitted"], seed)
        found = {
            "uniform": uniform_floor(split.test),
            "training mean": mean_floor(split.test, split.train),
        }
    elif part == LETTERS:
        edits = {part: _fitted(model, asked(split.train, outside_weight=0.0), LETTERS_STEPS)}
    elif part == "distilled":
        shown = split.train[:N_SHOWN]
        taught = taught_questions(model, split.train, shown, n_orders=N_ORDERS, seed=seed)
        edits = {part: _fitted(model, asked(taught))}
    elif part == "shuffled answers":
        edits = {part: _fitted(model, asked(shuffled_shares(split.train, seed)))}
    elif part == SHOWN_ALL:
        edits = {}
    else:
        tuned = tune_on_opinions(model, split.train[:N_SHOWN], METHODS[part], seed=seed)
        edits = {part: tuned.edit}
    evaluated = partial(evaluate_opinions, model, split.test, n_orders=N_ORDERS, seed=seed)
    found |= evaluated(edits) if edits else {}
    if part in ("fits", SHOWN_ALL):
        name, shown = ("few-shot", split.train[:N_SHOWN]) if part == "fits" else (part, split.train)
        found |= evaluated({name: Edit()}, demonstrations=shown)
    return [
        {
            "kind": "opinions",
            "method": name,
            "kl": result.values("kl"),
            "total_variation": result.values("total_variation"),
            "wasserstein": result.values("wasserstein"),
            "prompt_kl": result.values("prompt_kl"),
            "outside": result.mean("outside"),
            "questions": [row.question for row in result.rows],
        }
        for name, result in found.items()
    ]


def _fitted(model: Any, examples: Any, steps: int = STEPS) -> Any:
    from tl_laai import FitProblem, fit_many
    from tl_laai.evaluation import as_edit

    [fitted] = fit_many(
        model,
        [FitProblem(examples, LAYER)],
        solver="adam",
        learning_rate=LEARNING_RATE,
        max_evaluations=steps,
    )
    return as_edit(model, fitted.intervention)


def compute(parts: list[str], groups: list[str], seeds: list[int]) -> None:
    from pathlib import Path

    from tl_laai import load_model

    model = load_model(MODEL, device="cpu")
    jobs = []
    for seed in seeds:
        for part in parts:
            for group in groups:
                task = opinion_task(group)
                shared = {"model": MODEL, "group": group, "seed": seed, "part": part}
                shared |= {"digest": task.digest, "source": Path(task.source).name}
                jobs.append((shared, partial(compute_one, model, task, seed, part)))
    resume(NAME, ("model", "group", "seed", "part", "digest"), jobs)


def show(rows: list[Row], measure: str) -> None:
    found = by_method(rows, "group")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines = []
    for method, own in found.items():
        cells = [interval_of(own.get(group, []), None, measure) for group in groups]
        n_seeds = len({row["seed"] for these in own.values() for row in these})
        # Floors name letters alone, to rounding.
        outside = [row["outside"] for these in own.values() for row in these]
        lines.append([method, str(n_seeds), *map(_plain, cells), _share(outside)])
    print(markdown([f"{measure}, held out", "seeds", *groups, "outside"], lines))
    print(
        "\nIn brackets 95 % bootstrap intervals over batteries of questions (which share stem and "
        "options), then their questions. Outside: probability of no option's letter, mean over "
        "groups.\n"
    )
    lines = [
        [method, *(_mean_over_groups(own, name) for name in MEASURES)]
        for method, own in found.items()
    ]
    print(markdown(["mean over groups", *MEASURES.values()], lines))
    print(MORE)
    lines = []
    for ours in OURS if "fitted" in found else ():
        for other in (method for method in found if method != ours):
            cells = [
                interval_of(found[ours].get(g, []), found[other].get(g, []), measure)
                for g in groups
            ]
            lines.append([f"{ours} - {other}", *map(_signed, cells)])
    print(markdown(["difference", *groups], lines))


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
