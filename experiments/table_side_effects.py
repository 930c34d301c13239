"""Side effects: how far methods move next tokens on other tasks' prompts and on unrelated text.

    python experiments/table_side_effects.py              # all tasks; resumes
    python experiments/table_side_effects.py --from-rows  # print the table only

Every method is made again from the same ten examples with what it chose in the rows of
`table_rules.py`, which has to be run first; one seed. Controls of the distilled fit stand beside
it: the same norms in random directions, its heads permuted, and a fit that learns from the ten
with shuffled answers, by a teacher that reads those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common import FIGURES, RULES, parser, tasks
from rules_shown import N_TEST, N_TRAIN
from shared_fits import distilled_controls, labelled_again, layer_in
from tables import (
    MODEL,
    MORE,
    TAUGHT,
    Row,
    answer_row,
    by_method,
    markdown,
    percent,
    resume,
    unit,
)

from tl_laai.rows import read_rows

SEED = 0
N_OTHER = 5  # prompts of each other task
LABELLED = ("relaxed", "unregularised")
FINE_TUNED = ("lora", "ia3")
NAME = "table_side_effects"


def compute(model: Any, plain: Any, names: Sequence[str], data: Any) -> list[Row]:
    """Every method's row on one task.

    Args:
        model: a `TransformerBridge` or `HookedTransformer`.
        plain: the same model of Hugging Face, which adapters are put into.
        names: of all tasks.
        data: the task's split.
    """
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.finetuning import fine_tune
    from tl_laai.side_effects import next_token_kl

    prompts = _prompts(names, data)
    settings = _settings(data)
    edits = _edits(model, data, settings)
    scores = evaluate_edits(model, data.test, edits)
    moved = {where: next_token_kl(model, edits, texts) for where, texts in prompts.items()}
    rows = []
    for name, score in scores.items():
        own = {where: float(of[name].mean()) for where, of in moved.items()}
        rows.append(answer_row(name, score, settings.get(name, ""), **own))
    for name in FINE_TUNED:
        rate, steps = re.search(r"rate ([\d.e-]+), (\d+) steps", settings[name]).groups()
        options = {"learning_rate": float(rate), "steps": int(steps), "hf_model": plain}
        tuned = fine_tune(model, data.train, method=name, seed=SEED, **options)
        own = {where: _moved(tuned, texts) for where, texts in prompts.items()}
        rows.append(answer_row(name, tuned.evaluate(data.test), settings[name], **own))
    return rows


def _prompts(names: Sequence[str], data: Any) -> dict[str, Sequence[str]]:
    """Held-out prompts of the task itself and of the others, and text that is no task's."""
    from tl_laai.prompts import DEFAULT_TEMPLATE
    from tl_laai.recipes import draw
    from tl_laai.side_effects import UNRELATED

    others = [
        example
        for task in tasks([name for name in names if name != data.task.name])
        for example in draw(task, train=N_TRAIN, test=N_TEST, seed=SEED).test[:N_OTHER]
    ]
    own = data.test[: len(others)]
    asked = {"kl_own": own, "kl_others": others}
    texts = {k: [DEFAULT_TEMPLATE.render(e.input) for e in some] for k, some in asked.items()}
    return {**texts, "kl_unrelated": UNRELATED}


def _settings(data: Any) -> dict[str, str]:
    """What each method chose on this task."""
    rows = read_rows(FIGURES / "table_rules.jsonl")
    own = [row for row in rows if row["task"] == data.task.name and row["seed"] == SEED]
    if not own:
        raise ValueError(f"table_rules.jsonl has no rows of {data.task.name}: run that table first")
    return {row["method"]: row["setting"] for row in own}


def _edits(model: Any, data: Any, settings: dict[str, str]) -> dict[str, Any]:
    from tl_laai.baselines import METHODS
    from tl_laai.evaluation import as_edit
    from tl_laai.methods import Setting

    edits = {
        name: as_edit(model, labelled_again(model, data.train, settings[name]).intervention)
        for name in LABELLED
    }
    edits |= distilled_controls(model, data, layer_in(settings[TAUGHT]), SEED)
    for name, method in METHODS.items():
        found = re.findall(r"(\w+) ([\d.e-]+)", settings[name].replace("n heads", "n_heads"))
        numbers = {("learning_rate" if k == "rate" else k): float(v) for k, v in found}
        numbers |= {k: int(numbers[k]) for k in ("layer", "n_heads") if k in numbers}
        setting = Setting(**numbers)
        edits[name] = method.candidates(model, data.train, [setting])[setting]
    return edits


def _moved(tuned: Any, texts: Sequence[str]) -> float:
    """The same of an adapter, by plain forwards of the Hugging Face model."""
    import torch

    from tl_laai.prompts import tokenise_prompts

    tokens = [torch.tensor([own]) for own in tokenise_prompts(tuned.model, texts)]

    def after(model: Any) -> Any:
        with torch.no_grad():
            return torch.stack(
                [model(own).logits[0, -1].double().log_softmax(-1) for own in tokens]
            )

    before = after(tuned.hf_model)
    with tuned.applied() as adapted:
        changed = after(adapted)
    return float((before.exp() * (before - changed)).sum(-1).mean())


def show(rows: list[Row]) -> None:
    columns = {
        "kl_own": "KL, own prompts",
        "kl_others": "KL, other tasks' prompts",
        "kl_unrelated": "KL, unrelated text",
    }
    lines = []
    for method, own in by_method(rows, "task").items():
        these = [row for of_task in own.values() for row in of_task]
        means = [sum(row[key] for row in these) / len(these) for key in columns]
        lines.append([method, percent(these), *(f"{mean:.2f}" for mean in means)])
    print(markdown(["mean over tasks", "exact match, %", *columns.values()], lines))
    names = list(dict.fromkeys(row["task"] for row in rows))
    print(
        f"\nTasks: {', '.join(names)}; seed {SEED}. In nats: how far the distribution of the next "
        "token moves; controls are those of the distilled fit. In brackets 95 % bootstrap "
        "intervals over examples."
    )
    print(MORE)
    lines = [
        [method, *(percent(own[name]) if name in own else "-" for name in names)]
        for method, own in by_method(rows, "task").items()
    ]
    print(markdown(["exact match, %", *names], lines))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    arguments = options.parse_args()
    if not arguments.from_rows:
        from tl_laai import load_model
        from tl_laai.adapters import hugging_face_model
        from tl_laai.recipes import draw

        model = load_model(MODEL, device="cpu")
        plain = hugging_face_model(MODEL, like=model)
        jobs: list[tuple[Row, Callable[[], list[Row]]]] = []
        for task in tasks(arguments.tasks):
            data = draw(task, train=N_TRAIN, test=N_TEST, seed=SEED)
            shared = unit(task, SEED, "side effects", "cpu") | {"n_train": N_TRAIN}
            jobs.append((shared, partial(compute, model, plain, RULES, data)))
        resume(NAME, ("model", "task", "seed", "group", "digest"), jobs)
    show(read_rows(FIGURES / f"{NAME}.jsonl"))


if __name__ == "__main__":
    main()
