"""The table of rules as a picture: exact match of the main methods, task by task, with intervals.

python experiments/figure_rules.py   # draws from the rows of table_rules.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common import FIGURES, mark, save_picture
from matplotlib.figure import Figure
from tables import TAUGHT, Row, by_method, interval, of_all_tasks

from tl_laai.canvas import WIDTH, dress, new_figure, percent_axis, styled
from tl_laai.rows import read_rows

METHODS = {
    TAUGHT: "distilled, fitted teacher (ours)",
    "relaxed": "relaxed (ours)",
    "few-shot": "ten shots",
    "learnt-heads": "learnt head offsets",
    "lora": "LoRA",
    "ia3": "IA3",
}
NAME = "rules"


@styled
def picture(rows: Sequence[Row]) -> Figure:
    """A group of marks a task, and one of the mean of all; a mark a method."""
    found = by_method(rows, "task")
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = new_figure(2.5, 2 * WIDTH)
    ax = dress(figure.subplots())
    for i, (method, label) in enumerate(METHODS.items()):
        own = found[method]
        cells = [interval(own[name]) for name in names]
        cells.append(interval(of_all_tasks(own, names)))
        places = np.arange(len(cells)) + 0.12 * (i - (len(METHODS) - 1) / 2)
        mark(ax, i, places, cells, label=label, linestyle="none", markersize=3.4)
    ax.axvline(len(names) - 0.5, color="#8C8C8C", linewidth=0.6)
    ax.set_xticks(
        range(len(names) + 1), labels=[*(name.replace("-", "-\n") for name in names), "mean"]
    )
    percent_axis(ax, 100.0)
    ax.set_ylabel("exact match, %")
    figure.legend(loc="outside lower center", ncols=len(METHODS), columnspacing=1.0)
    return figure


def main() -> None:
    save_picture(picture(read_rows(FIGURES / "table_rules.jsonl")), NAME)


if __name__ == "__main__":
    main()
