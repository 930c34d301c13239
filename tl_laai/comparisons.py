"""The command that compares baselines on one task: `laai baselines`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tl_laai import display
from tl_laai.options import AnyBackend, AnyModel, Json, OneTask, Out, Seed, Test, load
from tl_laai.recipes import DEFAULT_TEST, DEFAULT_TRAIN, draw
from tl_laai.rows import check_rows_file, read_rows, replace_rows
from tl_laai.tasks import load_task

if TYPE_CHECKING:
    from tl_laai.evaluation import Evaluation

FINE_TUNING: tuple[Literal["lora", "ia3"], ...] = ("lora", "ia3")


def baselines(
    task: OneTask,
    model: AnyModel = "gemma-3-270m",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Its name; may be repeated; all but lora and ia3 by default."),
    ] = None,
    train: Annotated[int, typer.Option(min=4, help="Examples to tune on.")] = DEFAULT_TRAIN,
    test: Test = DEFAULT_TEST,
    seed: Seed = 0,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation; laai fit has 4.")] = 2,
    backend: AnyBackend = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Tune other methods on a few examples, and compare them on held-out ones.

    Methods: function-vector, task-vector, in-context-vector, mean-difference,
    inference-time-intervention, learnt-heads; and fine-tuning, which takes
    minutes and needs the extra `baselines`: lora, ia3. Zero-shot and few-shot
    prompting stand beside them. Each method's setting is chosen by the same
    cross-validation inside the training examples. Vectors that are read off
    activations are not taught where an answer ends: for them see "begins right".
    A file given as --out keeps its rows of other models, tasks, methods, seeds.

    Sources: Todd et al. 2024, Hendel et al. 2023, Liu et al. 2024, Rimsky et al.
    2024, Li et al. 2023, Yin et al. 2024; Hu et al. 2021, Liu et al. 2022.
    """
    if out is not None:
        check_rows_file(out, "baseline")
    data = draw(load_task(task), train=train, test=test, seed=seed)
    if not data.test:
        raise ValueError(f"--train {train} leaves no example of {data.task.name} to hold out")
    with display.step("Importing TransformerLens"):
        from tl_laai.baselines import METHODS, compare_methods
        from tl_laai.fingerprints import fingerprint
    wanted = list(METHODS) if method is None else list(dict.fromkeys(method))
    unknown = [name for name in wanted if name not in (*METHODS, *FINE_TUNING)]
    if unknown:
        known = ", ".join((*METHODS, *FINE_TUNING))
        raise ValueError(f"--method {unknown[0]}: there are {known}")
    if set(wanted) & set(FINE_TUNING):
        from tl_laai.adapters import import_peft

        import_peft()  # its absence is told before the work
    loaded = load(model, backend)
    which = {
        "model": fingerprint(loaded).name,
        "task": data.task.name,
        "digest": data.task.digest,
        "train": train,
        "folds": folds,
    }
    if out is not None:
        _check_compared(out, which, n=len(data.test))

    with display.row_bar("Tuning") as progress:
        compared = compare_methods(
            loaded,
            data.train,
            data.test,
            methods={name: METHODS[name] for name in wanted if name in METHODS},
            n_folds=folds,
            seed=seed,
            progress=progress,
        )
    found = {one.method: (str(one.setting), one.evaluation) for one in compared}
    for name in FINE_TUNING:
        if name in wanted:
            with display.step(f"Fine-tuning by {name}"):
                found[name] = _fine_tuned(loaded, model, name, data, folds, seed)
    rows = [
        {
            "kind": "baseline",
            **which,
            "method": name,
            "setting": setting,
            "seed": seed,
            **evaluation.to_dict(),
        }
        for name, (setting, evaluation) in found.items()
    ]
    if out is not None:
        replace_rows(out, rows, by=("model", "task", "method", "seed"))
    if json:
        display.show_json({"rows": rows})
        return
    cells = [
        (
            name,
            setting or "-",
            f"{100 * evaluation.exact_match:.1f} %",
            f"{100 * evaluation.begins_right:.1f} %",
            f"{evaluation.log_probability:.2f}",
        )
        for name, (setting, evaluation) in found.items()
    ]
    columns = ("method", "setting", "exact match", "begins right", "log-probability")
    display.show(display.text_table(columns, cells))
    display.say(f"{data.task.name}: tuned on {train} examples, {len(data.test)} held out.")


def _check_compared(out: Path, which: Mapping[str, Any], n: int) -> None:
    """Refuse a file whose rows of this model and task could not be compared with new ones."""
    for row in read_rows(out) if out.exists() and out.stat().st_size else []:
        if all(row.get(name) == which[name] for name in ("model", "task")):
            for name, value in {**which, "n": n}.items():
                if row.get(name) != value:
                    raise ValueError(
                        f"--out {out} holds rows of {which['task']} with {name} {row.get(name)}, "
                        f"and these have {value}: they cannot be compared. Give another file."
                    )


def _fine_tuned(
    loaded: Any, model: str, name: Literal["lora", "ia3"], data: Any, folds: int, seed: int
) -> tuple[str, Evaluation]:
    """The chosen setting of an adapter, and its rows."""
    from tl_laai.finetuning_selection import tune_fine_tuning

    tuned = tune_fine_tuning(
        loaded, data.train, method=name, n_folds=folds, seed=seed, hf_model=model
    )
    setting = f"learning rate {tuned.learning_rate:g}, {tuned.steps} steps"
    return setting, tuned.fine_tuned.evaluate(data.test)
