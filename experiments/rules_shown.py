"""What the table of rules shows of its rows: methods, differences, and how choices came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common import tasks
from tables import (
    MORE,
    TAUGHT,
    Row,
    average,
    by_method,
    difference,
    markdown,
    percent,
)

N_TRAIN, N_TEST = 10, 100
# What fits choose from, and what they do not choose, was set on this split of these tasks.
SET_ON = 100
SET_ON_TASKS = (
    "antonym",
    "english-french",
    "english-german",
    "country-capital",
    "singular-plural",
    "present-past",
)
OURS = (
    "best by validation",
    "relaxed",
    "relaxed, half",
    "unregularised",
    TAUGHT,
    "distilled",
    "distilled, every step",
    "distilled, half",
)
FIRST = ("zero-shot", "few-shot", "few-shot, fitted", *OURS, "penalised")
OTHERS = (
    "zero-shot",
    "few-shot",
    "few-shot, fitted",
    "task-vector",
    "task-vector, begins right",
    "learnt-heads",
    "lora",
    "ia3",
    "unregularised",
    "distilled",
)


def _best_by_validation(rows: Sequence[Row]) -> list[Row]:
    """Rows as `fit_auto` chooses: labels where they answer two more of ten at least."""
    units: dict[tuple[str, int], dict[bool, Row]] = {}
    for row in rows:
        if "validation" in row and row["method"] != "distilled":
            units.setdefault((row["task"], row["seed"]), {})[row["method"] == TAUGHT] = row
    best = []
    for own in units.values():
        if len(own) == 2:
            labels, taught = (round(N_TRAIN * own[k]["validation"][0]) for k in (False, True))
            best.append({**own[taught + 1 >= labels], "method": "best by validation"})
    return best


def show(rows: list[Row]) -> None:
    found = by_method([*rows, *_best_by_validation(rows)], "task")
    found = {method: found[method] for method in (*FIRST, *found) if method in found}
    names = list(dict.fromkeys(row["task"] for row in rows))
    lines = []
    for method, own in found.items():
        cells = [percent(own[name]) if name in own else "-" for name in names]
        whole = of_all_tasks(own, names)
        heads = [row["n_heads"] for row in whole if "n_heads" in row]
        moved = [row["kl_unrelated"] for row in whole if "kl_unrelated" in row]
        n_seeds = str(len({row["seed"] for row in whole}) or "-")
        mean = percent(whole, by="task") if whole else "-"
        lines.append([method, n_seeds, *cells, mean, average(heads), average(moved)])
    header = ["exact match, %", "seeds", *names, "mean", "heads", "KL elsewhere"]
    print(markdown(header, lines))
    print(
        "\nIn brackets 95 % bootstrap intervals: of a task over fits, then their examples (those "
        "that several seeds hold out count as several); of the mean, which is over the seeds that "
        "ran for all tasks, over tasks, then examples. 0 to 0 says that no answer was right. KL "
        "elsewhere: nats by which the next token after unrelated text moves."
    )
    print(MORE)
    for method, own in found.items():
        norms = [row["norm"] for these in own.values() for row in these if "norm" in row]
        if norms:
            print(f"{method}: norms {min(norms):.1f} to {max(norms):.1f}")
    made_up = {
        name: [row["n_test_made_up"] for row in these]
        for name, these in found.get("distilled", {}).items()
    }
    print(f"held-out inputs that the model made up and was taught on: {made_up}\n")
    for method, column in (
        ("penalised", "status"),
        ("relaxed", "n_heads"),
        ("relaxed, half", "n_heads"),
        ("distilled, half", "n_heads"),
        ("best by validation", "setting"),
        ("learnt-heads", "setting"),
    ):
        # Of a setting, what stands before the first comma: the objective, or how many heads.
        values = [row[column] for own in found.get(method, {}).values() for row in own]
        if not values:
            continue
        print(f"{method}: {dict(Counter(str(value).split(',')[0] for value in values))}")
    for method in ("lora", "ia3"):
        # Learning rates and steps apart: either may be at the edge of what was offered.
        settings = [row["setting"] for own in found.get(method, {}).values() for row in own]
        parts = [Counter(setting.split(", ")[i] for setting in settings) for i in (0, 1)]
        print(f"{method}: {', '.join(str(dict(part)) for part in parts)}")
    print(f"held-out inputs that are in the split of seed {SET_ON} too: {_also_set_on(rows)}\n")
    lines = []
    compared: set[frozenset[str]] = set()
    for ours in (method for method in OURS if method in found):
        for other in (method for method in OTHERS if method in found and method != ours):
            pair = frozenset((ours, other))
            if pair in compared:
                continue
            compared.add(pair)
            a, b = (_by_fit(found[method]) for method in (ours, other))
            shared = {key: a[key] for key in a.keys() & b.keys()}
            cells = [difference({k: r for k, r in shared.items() if k[0] == n}, b) for n in names]
            own: dict[str, list[Row]] = {}
            for row in shared.values():
                own.setdefault(row["task"], []).append(row)
            whole = {(row["task"], row["seed"]): row for row in of_all_tasks(own, names)}
            lines.append([f"{ours} - {other}", *cells, difference(whole, b, by="task")])
    print(markdown(["difference in points", *names, "mean"], lines))


def _also_set_on(rows: list[Row]) -> dict[str, list[int]]:
    """How many held-out inputs of each seed had a part in what the fits choose from."""
    from tl_laai.recipes import draw
    from tl_laai.tasks import same_input_key

    found = {}
    for task in tasks(SET_ON_TASKS):
        split = draw(task, train=N_TRAIN, test=N_TEST, seed=SET_ON)
        seen = {same_input_key(e.input) for e in (*split.train, *split.test)}
        found[task.name] = [
            sum(same_input_key(e.input) in seen for e in own.test)
            for own in (
                draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
                for seed in sorted({row["seed"] for row in rows})
            )
        ]
    return found


def _by_fit(rows: dict[str, list[Row]]) -> dict[tuple[str, int], Row]:
    """One method's rows by task and seed."""
    return {(name, row["seed"]): row for name, own in rows.items() for row in own}


def of_all_tasks(own: dict[str, list[Row]], names: list[str]) -> list[Row]:
    """The rows of those seeds that have one for every task, so that all tasks weigh the same."""
    seeds = [{row["seed"] for row in own.get(name, [])} for name in names]
    whole = set.intersection(*seeds)
    return [row for name in names for row in own.get(name, []) if row["seed"] in whole]
