"""Figure 2: the values of Delta, one row a head, without and with regularisation, and relaxed.

python experiments/figure2.py                        # Gemma 3 270M, four heads
python experiments/figure2.py --model smollm2-135m   # nine heads, through the Bridge
python experiments/figure2.py --from-rows            # draws only
"""

from __future__ import annotations

from pathlib import Path

from common import FIGURES, draw, parser, tasks, write_rows

from tl_laai.rows import read_rows

TASK, SEED, N_TRAIN = "country-capital", 0, 10
LAYERS = {"gemma-3-270m": 9, "smollm2-135m": 15}
ALPHA = 0.6
UNREGULARISED_STEPS = 30
RELAXED_ALPHA, CHOOSING_EVALUATIONS = 0.9, 15  # as fit_auto relaxes


def compute(name: str) -> list[dict[str, object]]:
    from tl_laai import fit, load_model
    from tl_laai.evaluation import evaluate

    model = load_model(name, device="cpu")
    [task] = tasks([TASK])
    split = task.split(train=N_TRAIN, test=100, seed=SEED)
    layer = LAYERS[name]
    free = fit(model, split.train, layer=layer, solver="adam", max_evaluations=UNREGULARISED_STEPS)
    sparse = fit(model, split.train, layer=layer, alpha=ALPHA)
    relaxed = fit(
        model,
        split.train,
        layer=layer,
        alpha=RELAXED_ALPHA,
        max_evaluations=CHOOSING_EVALUATIONS,
        relax_steps=UNREGULARISED_STEPS,
    )
    rows = []
    for penalty, result in (
        ("none", free),
        (f"{ALPHA:g} lambda_max", sparse),
        (f"{RELAXED_ALPHA:g} lambda_max, relaxed", relaxed),
    ):
        score = evaluate(model, split.test, intervention=result.intervention)
        delta = result.intervention.deltas[layer]
        for head in range(delta.shape[0]):
            rows.append(
                {
                    "kind": "delta",
                    "model": name,
                    "task": TASK,
                    "layer": layer,
                    "head": head,
                    "penalty": penalty,
                    "values": [float(f"{v:.6g}") for v in delta[head].tolist()],
                    "norm": float(delta[head].norm()),
                    "exact_match": score.exact_match,
                    "n": score.n,
                    "status": result.solution.status.value,
                    "seed": SEED,
                    "source": Path(task.source).name,
                    "digest": task.digest,
                }
            )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", choices=LAYERS, default="gemma-3-270m")
    arguments = options.parse_args()
    name = f"figure2_{arguments.model}"
    if not arguments.from_rows:
        write_rows(compute(arguments.model), name)
    rows = read_rows(FIGURES / f"{name}.jsonl")
    draw(rows, name)
    for penalty in dict.fromkeys(str(row["penalty"]) for row in rows):
        own = [row for row in rows if row["penalty"] == penalty]
        used = sum(row["norm"] > 0 for row in own)
        print(
            f"{penalty}: {used} of {len(own)} heads non-zero, exact match "
            f"{own[0]['exact_match']:.2f} on {own[0]['n']}"
        )


if __name__ == "__main__":
    main()
