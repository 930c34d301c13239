"""What the experiments share: where tasks come from, where rows and pictures go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
# A folder of JSON tasks beside the checkout is used where there is one; else the built-in tasks.
DATA = ROOT.parent / "shared" / "data" / "rules"
RULES = (
    "antonym",
    "synonym",
    "english-french",
    "english-german",
    "country-capital",
    "singular-plural",
    "present-past",
    "capitalize",
)


def tasks(names: Sequence[str] = RULES) -> list[Any]:
    """Tasks by name; their rows say where they came from."""
    from tl_laai.tasks import Task

    if DATA.is_dir():
        return [Task.from_json(DATA / f"{name}.json") for name in names]
    return [Task.load(name) for name in names]


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument(
        "--from-rows", action="store_true", help="print or draw what is on disk, compute nothing"
    )
    return options


def draw(rows: Sequence[dict[str, Any]], name: str) -> None:
    """Draw a picture of rows that the package draws."""
    from tl_laai import figures

    save_picture(figures.draw(rows), name)


def save_picture(figure: Any, name: str) -> None:
    """Write a picture as PNG and SVG."""
    from tl_laai.canvas import save

    for ending in ("png", "svg"):
        save(figure, FIGURES / f"{name}.{ending}")
        print(FIGURES / f"{name}.{ending}")


def mark(
    ax: Any,
    i: int,
    places: Sequence[float],
    cells: Sequence[tuple[float, float, float]],
    **more: Any,
) -> None:
    """Draw means with the ends of their intervals, in the i-th look."""
    import numpy as np

    from tl_laai.canvas import line_looks

    middle, low, high = np.array(cells).T
    looks = {"elinewidth": 0.7, **line_looks(i), **more}
    ax.errorbar(places, middle, yerr=(middle - low, high - middle), **looks)


def bar(what: str) -> tuple[Any, Callable[[int, int], None]]:
    """A progress bar over rows, and the callback that moves it."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    progress = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    line = progress.add_task(what, total=None)
    return progress, lambda done, total: progress.update(line, completed=done, total=total)


def write_rows(rows: Sequence[dict[str, Any]], name: str) -> None:
    """Write an experiment's rows anew, whole or not at all."""
    from tl_laai.rows import write_rows

    write_rows(FIGURES / f"{name}.jsonl", rows)
