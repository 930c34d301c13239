"""Opinions as a picture: how much nearer to each group a fit is than other ways of asking.

python experiments/figure_opinions.py   # draws from the rows of table_opinions.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from common import FIGURES, mark, save_picture
from matplotlib.figure import Figure
from table_opinions import SHOWN_ALL, interval_of
from tables import Row, by_method

from tl_laai.canvas import WIDTH, dress, new_figure, styled
from tl_laai.rows import read_rows

OTHERS = {
    "zero-shot": "zero-shot",
    "few-shot": "few-shot, 8 questions",
    SHOWN_ALL: "few-shot, all 26",
    "task-vector": "task vector",
    "shuffled answers": "fit on shuffled shares",
    "training mean": "mean of the 26 (no model)",
}
NAME = "opinions"


@styled
def picture(rows: Sequence[Row]) -> Figure:
    """KL of the fit less another's, with intervals: below the line the fit is nearer."""
    found = by_method(rows, "group")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = new_figure(2.4, 2 * WIDTH)
    ax = dress(figure.subplots())
    ax.axhline(0.0, color="#8C8C8C", linewidth=0.6)
    for i, (other, label) in enumerate(OTHERS.items()):
        them = found[other]
        own = [interval_of(found["fitted"][g], them[g], "kl") for g in groups]
        cells = [(d.difference, d.low, d.high) for d in own]
        places = np.arange(len(groups)) + 0.12 * (i - (len(OTHERS) - 1) / 2)
        mark(ax, i, places, cells, label=label, linestyle="none", markersize=3.4)
    ax.set_xticks(range(len(groups)), labels=groups)
    ax.set_ylabel("KL of the fit less that of ..., nats")
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0)
    return figure


def main() -> None:
    save_picture(picture(read_rows(FIGURES / "table_opinions.jsonl")), NAME)


if __name__ == "__main__":
    main()
