"""What the table of rules shows of its rows: methods, differences, and how choices came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from common import FIGURES, tasks
from tables import (
    MORE,
    TAUGHT,
    Row,
    average,
    by_method,
    difference,
    markdown,
    mean_difference,
    of_all_tasks,
    percent,
)

from tl_laai.rows import read_rows

N_TRAIN, N_TEST = 10, 100
MADE_UP = "made_up"  # rows of `made_up.py`
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
    "preset distill",
    "preset relaxed",
    "relaxed",
    "relaxed, half",
    "unregularised",
    "unregularised, taught layer",
    TAUGHT,
    "fitted, taught",
    "distilled",
    "distilled, every step",
    "distilled, half",
)
FIRST = (
    "zero-shot",
    "few-shot",
    "few-shot, fitted",
    *OURS,
    "preset paper",
    "penalised",
    "penalised, weaker",
)
OTHERS = (
    "zero-shot",
    "few-shot",
    "few-shot, fitted",
    "task-vector",
    "task-vector, begins right",
    "function-vector, begins right",
    "in-context-vector, begins right",
    "mean-difference, begins right",
    "inference-time-intervention, begins right",
    "learnt-heads",
    "learnt-heads, wider",
    "learnt-heads, taught",
    "lora",
    "lora, wider",
    "lora, taught",
    "ia3",
    "ia3, wider",
    "ia3, taught",
    "unregularised",
    "unregularised, taught layer",
    "fitted, taught",
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
        mean = percent(whole) if whole else "-"
        lines.append([method, n_seeds, *cells, mean, average(heads), average(moved)])
    header = ["exact match, %", "seeds", *names, "mean", "heads", "KL elsewhere"]
    print(markdown(header, lines))
    print(
        "\nIn brackets 95 % bootstrap intervals over fits, then their examples (those that several "
        "seeds hold out count as several); the mean's, over the seeds that ran for all tasks, is "
        "for these tasks. 0 to 0 says that no answer was right. KL elsewhere: nats by which the "
        "next token after unrelated text moves."
    )
    print(MORE)
    for method, own in found.items():
        norms = [row["norm"] for these in own.values() for row in these if "norm" in row]
        if norms:
            print(f"{method}: norms {min(norms):.1f} to {max(norms):.1f}")
    _left_out(found, names, "that the model made up", _made_up())
    _left_out(found, names, f"of the split of seed {SET_ON} too", _also_set_on(rows))
    for method, column, part in (
        ("penalised", "status", 0),
        ("penalised", "setting", 2),
        ("penalised, weaker", "status", 0),
        ("penalised, weaker", "setting", 2),
        ("relaxed", "n_heads", 0),
        ("relaxed", "setting", 3),
        ("relaxed, half", "n_heads", 0),
        ("unregularised", "setting", 3),
        ("distilled, half", "n_heads", 0),
        ("best by validation", "setting", 0),
        ("learnt-heads", "setting", 0),
        ("learnt-heads, wider", "setting", 0),
        ("learnt-heads, wider", "setting", 2),
        ("learnt-heads, taught", "setting", 0),
        ("function-vector", "setting", 1),
        ("inference-time-intervention", "setting", 0),
        ("in-context-vector", "setting", 0),
    ):
        # Of a setting, one of the parts between commas.
        rows_of = [row for own in found.get(method, {}).values() for row in own]
        values = Counter(str(row[column]).split(", ")[part] for row in rows_of)
        if values:
            print(f"{method}: {dict(values)}")
    for method in (
        f"{name}{kind}" for kind in ("", ", wider", ", taught") for name in ("lora", "ia3")
    ):
        # Learning rates and steps apart: either may be at the edge of what was offered.
        settings = [row["setting"] for own in found.get(method, {}).values() for row in own]
        parts = [Counter(setting.split(", ")[i] for setting in settings) for i in (0, 1)]
        if settings:
            print(f"{method}: {', '.join(str(dict(part)) for part in parts)}")
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
            cells.append(mean_difference(a, b, names))
            lines.append([f"{ours} - {other}", *cells])
    print(markdown(["difference in points", *names, "mean"], lines))


def _left_out(
    found: dict[str, dict[str, list[Row]]],
    names: list[str],
    what: str,
    masks: Mapping[tuple[str, int], Sequence[bool]],
) -> None:
    """Distilled fits on the held-out inputs that are not masked."""

    def kept(method: str) -> dict[tuple[str, int], Row]:
        rows = {key: row for key, row in _by_fit(found.get(method, {})).items() if key in masks}
        return {
            key: row
            | {"correct": [x for x, m in zip(row["correct"], masks[key], strict=True) if not m]}
            for key, row in rows.items()
        }

    counts = {n: [sum(own) for (task, _), own in masks.items() if task == n] for n in names}
    print(f"held-out inputs {what}, by seed: {counts}")
    lines = []
    for ours in (TAUGHT, "distilled"):
        own = kept(ours)
        for other in (method for method in OTHERS if method in found and method != ours):
            lines.append([f"{ours} - {other}", mean_difference(own, kept(other), names)])
        whole = of_all_tasks({n: [r for k, r in own.items() if k[0] == n] for n in names}, names)
        lines.append([ours, percent(whole) if whole else "-"])
    print(markdown(["without those, mean over tasks", "%"], lines) + "\n")


def _made_up() -> dict[tuple[str, int], list[bool]]:
    """Which held-out inputs the model made up itself, and was taught, by task and seed."""
    path = FIGURES / f"{MADE_UP}.jsonl"
    rows = read_rows(path) if path.exists() else []
    return {(row["task"], row["seed"]): row["made_up"] for row in rows}


def _also_set_on(rows: list[Row]) -> dict[tuple[str, int], list[bool]]:
    """Which held-out inputs had a part in what the fits choose from, by task and seed."""
    from tl_laai.recipes import draw
    from tl_laai.tasks import same_input_key

    found = {}
    seeds = sorted({row["seed"] for row in rows})
    for task in tasks(list(dict.fromkeys(row["task"] for row in rows))):
        split = draw(task, train=N_TRAIN, test=N_TEST, seed=SET_ON)
        known = (*split.train, *split.test) if task.name in SET_ON_TASKS else ()
        seen = {same_input_key(e.input) for e in known}
        for seed in seeds:
            own = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
            found[task.name, seed] = [same_input_key(e.input) in seen for e in own.test]
    return found


def _by_fit(rows: dict[str, list[Row]]) -> dict[tuple[str, int], Row]:
    """One method's rows by task and seed."""
    return {(name, row["seed"]): row for name, own in rows.items() for row in own}
