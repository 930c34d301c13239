"""What the command line shows: results as tables and bars, and progress while it works.

Results go to standard output; progress and messages go to standard error, so that `--json` and
pipes see results alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rich.bar import Bar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tl_laai.batches import Fit
    from tl_laai.evaluation import Evaluation
    from tl_laai.interventions import Intervention
    from tl_laai.surveys import OpinionEvaluation

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_BAR_WIDTH = 32


@runtime_checkable
class SolverProgress(Protocol):
    """What a solver tells after each evaluation."""

    @property
    def evaluation(self) -> int:
        """How many evaluations there were so far."""

    @property
    def objectives(self) -> tuple[float, ...]:
        """The lowest objective of each problem so far."""


def message(text: str, *, style: str = "") -> None:
    """Say something on standard error, in one paragraph that the terminal wraps.

    Example:
        >>> message("Saved to capital/", style="green")  # doctest: +SKIP
    """
    err.print(Text(text, style=style), soft_wrap=True)


def error(text: str) -> None:
    """Say on one line of standard error what went wrong."""
    err.print(Text.assemble(("Error: ", "bold red"), " ".join(text.split())), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table on standard output, and an empty line after it."""
    out.print(table)
    out.print()


def say(text: str) -> None:
    """Print a line on standard output as it is, so that what it says to type can be copied."""
    out.print(Text(text), soft_wrap=True)


def show_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object, and nothing else, on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def step(description: str, *, spinner: bool = True) -> Iterator[None]:
    """Show that something is going on, and afterwards how long it took.

    Example:
        >>> with step("Loading gemma-3-270m"):  # doctest: +SKIP
        ...     model = load_model("gemma-3-270m")

    Args:
        description: what is done.
        spinner: False where what is done shows progress of its own.
    """
    started = time.monotonic()
    if spinner:
        with err.status(Text(description)):
            yield
    else:
        yield
    message(f"{description}: {time.monotonic() - started:.1f} s", style="dim")


@contextmanager
def solver_bar(
    description: str, total: int | None = None
) -> Iterator[Callable[[SolverProgress], None]]:
    """A progress bar over a solver's evaluations; yields the callback that moves it.

    Example:
        >>> with solver_bar("Fitting", 150) as callback:  # doctest: +SKIP
        ...     fit(model, examples, layer=9, alpha=0.9, callback=callback)
    """
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[objective]}"),
        TimeElapsedColumn(),
    )
    hidden = not err.is_terminal  # in a log it would leave an empty line
    with Progress(*columns, console=err, transient=True, disable=hidden) as progress:
        bar = progress.add_task(description, total=total, objective="")

        def callback(state: SolverProgress) -> None:
            lowest = f"objective {sum(state.objectives) / len(state.objectives):.4f}"
            progress.update(bar, completed=state.evaluation, objective=lowest)

        yield callback
    message(f"{description}: {time.monotonic() - started:.1f} s", style="dim")


@contextmanager
def row_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over rows, with the time left; yields the callback that moves it.

    Example:
        >>> with row_bar("Sweeping") as progress:  # doctest: +SKIP
        ...     sweep_layers(model, tasks, out="rows.jsonl", progress=progress)
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}"),  # nothing, until it is known how many there are
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task(description, total=None, count="")

        def callback(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, count=f"{done}/{total}")

        yield callback


def head_bars(
    norms: Mapping[int, Sequence[float]], *, column: str = "norm", strongest: int | None = None
) -> Table:
    """Every head of each layer with the norm of its part of delta, or another number, as a bar.

    Example:
        >>> out.print(head_bars({9: [0.0, 3.1, 0.0, 0.2]}))  # doctest: +SKIP

    Args:
        norms: layer -> norm of each head; exactly 0 for a head that is left out.
        column: what the numbers are.
        strongest: show so many, the strongest first; None for all in their order.
    """
    rows = [(layer, i, norm) for layer, heads in norms.items() for i, norm in enumerate(heads)]
    longest = max((norm for *_, norm in rows), default=0.0)
    if strongest is not None:
        rows = sorted(rows, key=lambda row: -row[2])[:strongest]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("head", justify="right")
    table.add_column(column, justify="right")
    table.add_column("")
    for layer, head, norm in rows:
        # A bar of any length is at least seen: a head that is not zero is not out.
        filled = max(norm / longest, 0.02) if norm > 0 else 0.0
        bar = Bar(1.0, 0.0, filled, width=_BAR_WIDTH, color="cyan") if filled else None
        shown = f"{norm:.3f}" if norm >= 5e-4 else f"{norm:.1e}"
        table.add_row(str(layer), str(head), shown if norm else "0", bar or Text("-", style="dim"))
    return table


def head_norms(intervention: Intervention) -> dict[int, list[float]]:
    """Layer -> norm of every head, exactly 0 for a head that is left out."""
    return {
        layer: [float(head.double().norm()) for head in delta]
        for layer, delta in intervention.deltas.items()
    }


def show_heads(intervention: Intervention) -> None:
    """Print where an intervention sits: layer, heads and their norms as bars."""
    from tl_laai.metrics import sparsity  # numpy, which `laai --help` can do without

    counts = [sparsity(delta.cpu().numpy()) for delta in intervention.deltas.values()]
    model = intervention.fingerprint
    say(
        f"Layer {', '.join(map(str, intervention.layers))} of "
        f"{'an unknown model' if model is None else model.name}, {intervention.position}: "
        f"{sum(c.n_heads_nonzero for c in counts)} of {sum(c.n_heads for c in counts)} heads, "
        f"{sum(c.n_entries_nonzero for c in counts)} of {sum(c.n_entries for c in counts)} entries"
    )
    show(head_bars(head_norms(intervention)))


def show_results(task: str, results: Mapping[str, Evaluation], *, n_shown: int) -> None:
    """Print how zero-shot, few-shot (`n_shown` demonstrations) and intervened answers compare."""
    labels = {
        "zero_shot": "zero-shot",
        "few_shot": f"{n_shown}-shot",
        "intervened": "zero-shot, intervened",
        "random_direction": "control: random direction",
        "permuted_heads": "control: heads permuted",
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    n = next(iter(results.values())).n
    table.add_column(Text(f"{task}, {n} held-out examples"))
    table.add_column("exact match", justify="right")
    table.add_column("log-probability", justify="right")
    for name, label in labels.items():
        if name in results:
            share, score = results[name].exact_match, results[name].log_probability
            table.add_row(label, f"{100 * share:.1f} %", f"{score:.2f}")
    show(table)


def show_opinions(group: str, results: Mapping[str, OpinionEvaluation]) -> None:
    """Print how floors, prompts and intervention compare with a group, with 95 % intervals."""
    labels = {
        "uniform": "uniform",
        "train_mean": "training mean",
        "zero_shot": "zero-shot",
        "few_shot": "few-shot",
        "fitted": "intervened",
    }

    def short(end: float) -> str:
        return f"{end:.2f}".removeprefix("0")

    cells = []
    for name, result in results.items():
        row = [labels.get(name, name.replace("-", " "))]  # so that it breaks between words
        for measure in ("kl", "total_variation", "wasserstein"):
            low, high = map(short, result.interval(measure))
            row.append(f"{result.mean(measure):.3f} [{low}, {high}]")
        cells.append([*row, f"{100 * result.mean('outside'):.0f} %"])
    n = next(iter(results.values())).n
    say(f"{group}: {n} held-out questions, 95 % intervals over them, options in several orders")
    show(text_table(("", "KL (nats)", "total variation", "Wasserstein", "outside"), cells))


def _solver_of(fitted: Fit) -> str:
    return str(fitted.intervention.provenance["solver"]["solver"])


def show_fit(fitted: Fit) -> None:
    """Print how a fit went and what it found; that it has not converged is said loudly."""
    solution, penalty = fitted.solution, fitted.penalty
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    status, n = solution.status.name.lower(), solution.n_evaluations
    if status == "converged":
        table.add_row("status", Text(f"converged after {n} evaluations", style="green"))
    elif status == "early_stopped":
        table.add_row("status", f"relaxed, stopped after {n} evaluations, as asked for")
    elif status == "max_evaluations" and _solver_of(fitted) == "adam":
        # One more evaluation than steps tells where the last one led.
        table.add_row("status", f"stopped after {n - 1} steps of Adam, as asked for")
    else:
        text = f"NOT CONVERGED ({status}) after {n} evaluations: stationarity "
        table.add_row("status", Text(text + f"{solution.stationarity:.2g}", style="bold yellow"))
    start = solution.history[0].objective  # the fit starts at zero, where there is no penalty
    table.add_row("loss", f"{start:.3f} → {solution.loss:.3f} nats")
    weights = f"group {float(penalty.group):.4g}, l1 {float(penalty.l1):.4g}"
    table.add_row("penalty", f"{weights}; lambda_max {fitted.lambda_max:.4g}")
    show(table)
    show_heads(fitted.intervention)
    if not fitted.intervention.heads():
        if status == "max_evaluations":
            message("Every head is still zero: give more --max-evaluations.", style="bold yellow")
            return
        message(
            f"Every head is zero: the penalty is too close to lambda_max = {fitted.lambda_max:.4g} "
            "or above it. Give a smaller --alpha, --group or --l1.",
            style="bold yellow",
        )


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of text; what is in it is shown as it is, never read as markup."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def record_table(provenance: Mapping[str, Any]) -> Table:
    """A nested record as rows of dotted names and values; of tables in it, how long they are.

    Example:
        >>> out.print(record_table({"split": {"seed": 0}}))  # doctest: +SKIP
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _flat(provenance):
        table.add_row(Text(name), Text(_one_line(value)))
    return table


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name == "parts":  # of a sum or a multiple
            yield from _flat({str(i): part for i, part in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{prefix}{name}", f"{len(value)} rows, which --json prints"
        else:
            yield f"{prefix}{name}", value


def _one_line(value: Any) -> str:
    if isinstance(value, str) and value == value.strip() and "\n" not in value:
        return value  # any other text in quotation marks, with \n for a newline
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)
