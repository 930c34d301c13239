"""Commands that look into a model or a fit: `laai sweep`, `attribute`, `ablate`, `figure`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tl_laai import display
from tl_laai.options import (
    AnyBackend,
    AnyModel,
    AtMost,
    Folder,
    Json,
    OneTask,
    OtherModel,
    OtherTask,
    Out,
    Seed,
    Test,
    Train,
    held_out,
    layer_number,
    load,
    load_for,
)
from tl_laai.recipes import DEFAULT_TEST, DEFAULT_TRAIN, draw
from tl_laai.rows import check_rows_file, read_rows, replace_rows
from tl_laai.tasks import load_task

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tl_laai.interventions import Intervention


def sweep(
    model: AnyModel,
    task: Annotated[list[str], typer.Option(help="Built-in name or file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="File of rows; a stopped sweep goes on there.")],
    layers: Annotated[str, typer.Option(help="Such as 0,3,6; all by default.")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 5,
    train: Train = DEFAULT_TRAIN,
    test: Test = DEFAULT_TEST,
    alpha: Annotated[
        float | None, typer.Option(min=0, help="Group penalty / lambda_max; none by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 0,
    json: Json = False,
) -> None:
    """Fit and evaluate every task, layer and seed; rows are kept as they come."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    chosen = None if layers == "all" else _layers(layers)
    tasks = [load_task(name) for name in task]
    with display.step("Importing TransformerLens"):
        from tl_laai.sweeps import sweep_layers
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
    try:
        with display.row_bar("Sweeping") as progress:
            rows = sweep_layers(
                model,
                tasks,
                out=out,
                layers=chosen,
                seeds=range(seeds),
                n_train=train,
                n_test=test,
                alpha=alpha,
                executor=executor,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = f"Stopped. The rows so far are in {out}; the same command goes on from there."
        display.message(kept, style="yellow")
        raise
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
    scores: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        scores.setdefault(row["task"], {}).setdefault(row["layer"], []).append(row["exact_match"])
    means = {
        name: {layer: sum(s) / len(s) for layer, s in by_layer.items()}
        for name, by_layer in scores.items()
    }
    if json:
        display.show_json({"rows": len(rows), "out": str(out), "exact_match": means})
        return
    for name, by_layer in means.items():
        cells = [(str(layer), f"{100 * mean:.1f} %") for layer, mean in by_layer.items()]
        display.show(display.text_table((f"{name}: layer", "exact match"), cells))
    display.say(f"{len(rows)} rows in {out}. Next: laai figure {out} --out sweep.png")


def attribute(
    model: AnyModel,
    task: OneTask,
    train: Annotated[int, typer.Option(min=1, help="Examples to measure on.")] = DEFAULT_TRAIN,
    seed: Seed = 0,
    backend: AnyBackend = "auto",
    top: Annotated[int, typer.Option(min=1, help="How many heads to show.")] = 20,
    out: Out = None,
    json: Json = False,
) -> None:
    """Gradient attribution of every head: one forward and one backward.

    Shown are the strongest heads; --out and --json have all of them. A file
    given as --out keeps its rows of other models and tasks.
    """
    if out is not None:
        check_rows_file(out, "attribution")
    data = draw(load_task(task), train=train, seed=seed)
    loaded = load(model, backend)
    from tl_laai.attribution import attribute as gradient_attribution

    with display.step("Attributing"):
        values = gradient_attribution(loaded, data.train).values
    rows = [
        {
            "kind": "attribution",
            "model": model,
            "task": data.task.name,
            "layer": layer,
            "head": head,
            "value": float(values[layer, head]),
            "seed": seed,
        }
        for layer in range(values.shape[0])
        for head in range(values.shape[1])
    ]
    if out is not None:
        _tell_replaced(out, replace_rows(out, rows, by=("model", "task")))
    if json:
        display.show_json({"values": values.tolist(), "by_layer": values.amax(-1).tolist()})
        return
    by_layer = dict(enumerate(values.tolist()))
    display.show(display.head_bars(by_layer, column="attribution", strongest=top))
    display.say(
        f"The {min(top, values.numel())} strongest of {values.numel()} heads. The bar is the group "
        "penalty at which the head's fit leaves zero, in nats."
    )


def ablate(
    folder: Folder,
    task: OtherTask = None,
    test: AtMost = None,
    model: OtherModel = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """What each head of an intervention carries.

    "without" one head, with "only" one, "cumulative": with its strongest, one
    more a row; for comparison without the intervention, the model's own output
    of one head at the last prompt token put to "zero", or to its "mean".

    A file given as --out keeps its rows of other tasks.
    """
    from tl_laai.interventions import Intervention

    if out is not None:
        check_rows_file(out, "ablation")
    intervention = Intervention.from_pretrained(folder)
    data, template = held_out(intervention, task=task, test=test)
    which = {"task": data.task.name, "intervention": _digest(intervention)}
    if out is not None:
        _check_ablated(out, which)
    loaded = load_for(intervention, model, None)
    from tl_laai.attribution import ablate_heads
    from tl_laai.fingerprints import fingerprint

    with display.step(f"Answering {len(data.test)} questions in all variants"):
        ablations = ablate_heads(loaded, intervention, data.test, template=template)
    rows = [
        {
            "kind": "ablation",
            "model": fingerprint(loaded).name,
            **which,
            "layer": intervention.layers[0],
            "variant": ablation.variant,
            "heads": list(ablation.heads),
            "exact_match": ablation.evaluation.exact_match,
            "n": ablation.evaluation.n,
            "loss": -ablation.evaluation.log_probability,
        }
        for ablation in ablations
    ]
    if out is not None:
        _tell_replaced(out, replace_rows(out, rows, by=tuple(which)))
    if json:
        display.show_json({"rows": rows})
        return
    cells = [
        (
            str(row["variant"]),
            ", ".join(map(str, cast("list[int]", row["heads"]))) or "-",
            f"{100 * cast('float', row['exact_match']):.1f} %",
            f"{row['loss']:.2f}",
        )
        for row in rows
    ]
    display.show(display.text_table(("variant", "heads", "exact match", "-log p of answer"), cells))


def figure(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="A file of rows.")],
    out: Annotated[Path, typer.Option(help="A .png, .svg or .pdf file.")],
    task: Annotated[str | None, typer.Option(help="Only rows of this task.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only rows of this kind.")] = None,
) -> None:
    """Draw rows: a layer sweep, Delta's values, a path, an attribution map, an ablation."""
    from tl_laai import figures

    chosen = [row for row in read_rows(rows) if task in (None, row.get("task"))]
    if not chosen:
        raise ValueError(f"--task {task}: {rows} holds no rows of it")
    figures.save(figures.draw(chosen, kind), out)
    display.say(f"Drawn to {out}")


def _digest(intervention: Intervention) -> str:
    """Tells the rows of one intervention from those of another, whatever they are called."""
    values = [delta.double().numpy().tobytes() for delta in intervention.deltas.values()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


def _check_ablated(out: Path, which: Mapping[str, str]) -> None:
    """Refuse, before the work, to put one ablation in the place of another's rows."""
    rows = read_rows(out) if out.exists() and out.stat().st_size else []
    for row in rows:
        if row.get("task") == which["task"] and row.get("intervention") != which["intervention"]:
            raise ValueError(
                f"--out: {out} holds the ablation of another intervention on {which['task']!r} (at "
                f"layer {row.get('layer')}), and a picture shows one: give another file"
            )


def _tell_replaced(out: Path, counts: tuple[int, int]) -> None:
    others, replaced = counts
    if others or replaced:
        told = f"{out}: {replaced} rows replaced, {others} others kept"
        display.err.print(told, markup=False, soft_wrap=True)


def _layers(text: str) -> list[int]:
    allowed = "numbers such as 0,3,6, or all"
    return [layer_number(part, option="--layers", allowed=allowed) for part in text.split(",")]
