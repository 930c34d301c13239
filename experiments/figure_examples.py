"""Little data as a picture: exact match against the number of examples, a panel a task.

python experiments/figure_examples.py   # draws from the rows of table_examples.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common import FIGURES, mark, save_picture
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tables import TAUGHT, Row, by_method, interval

from tl_laai.canvas import WIDTH, dress, new_figure, percent_axis, styled
from tl_laai.rows import read_rows

METHODS = {
    TAUGHT: "distilled, fitted teacher (ours)",
    "fitted": "fitted on labels (ours)",
    "few-shot": "few-shot prompt",
    "lora": "LoRA",
    "ia3": "IA3",
}
NAME = "examples"


@styled
def picture(rows: Sequence[Row]) -> Figure:
    """A line a method, with the intervals that the table prints."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    sizes = sorted({row["n_train"] for row in rows})
    figure = new_figure(2.2, 2 * WIDTH)
    panels = figure.subplots(1, len(names), sharey=True)
    for ax, name in zip(panels, names, strict=True):
        dress(ax)
        found = by_method([row for row in rows if row["task"] == name], "n_train")
        for i, (method, label) in enumerate(METHODS.items()):
            places = np.array(sizes) * 1.03 ** (i - len(METHODS) // 2)
            cells = [interval(found[method][str(n)]) for n in sizes]
            mark(ax, i, places, cells, label=label if ax is panels[0] else None)
        ax.set_xscale("log")
        ax.set_xticks(sizes, labels=[str(n) for n in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        percent_axis(ax, 100.0)
        ax.set_title(name)
        ax.set_xlabel("training examples")
    panels[0].set_ylabel("exact match, %")
    figure.legend(loc="outside lower center", ncols=len(METHODS), columnspacing=1.0)
    return figure


def main() -> None:
    save_picture(picture(read_rows(FIGURES / "table_examples.jsonl")), NAME)


if __name__ == "__main__":
    main()
