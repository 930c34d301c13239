"""Figure 1: exact match of unregularised interventions at each layer, over five seeds.

python experiments/figure1.py                # fits, evaluates (resumes), draws
python experiments/figure1.py --from-rows    # draws only
"""

from __future__ import annotations

from common import FIGURES, RULES, bar, draw, parser, tasks

from tl_laai.rows import read_rows

MODEL = "gemma-3-270m"
SEEDS = (0, 1, 2, 3, 4)
N_TRAIN, N_TEST = 10, 100
ROWS = FIGURES / "figure1.jsonl"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    arguments = options.parse_args()
    if not arguments.from_rows:
        from tl_laai.sweeps import sweep_layers

        progress, tell = bar("figure 1")
        with progress:
            sweep_layers(
                MODEL,
                tasks(arguments.tasks),
                out=ROWS,
                seeds=SEEDS,
                n_train=N_TRAIN,
                n_test=N_TEST,
                progress=tell,
            )
    draw(read_rows(ROWS), "figure1")


if __name__ == "__main__":
    main()
