"""The command that shows what this is about: `laai demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_laai import display
from tl_laai.options import check_out, load
from tl_laai.recipes import compare, draw, record
from tl_laai.tasks import load_task

# Layer, penalty and steps are those that did well on other splits than the one shown.
DEMO_MODEL, DEMO_TASK, DEMO_LAYER = "gemma-3-270m", "country-capital", 9
DEMO_ALPHA, DEMO_RELAX = 0.9, 30


def demo(
    out: Annotated[Path, typer.Option(help="Where to save it.")] = Path("capital-demo"),
) -> None:
    """See it work: Gemma 3 270M learns country to capital from ten examples, in minutes."""
    from tl_laai.fitting import fit as fit_one
    from tl_laai.rounds import CHOOSING_EVALUATIONS

    check_out(out)
    data = draw(load_task(DEMO_TASK))
    model = load(DEMO_MODEL)
    title = f"Fitting layer {DEMO_LAYER} on {len(data.train)} examples"
    with display.solver_bar(title, CHOOSING_EVALUATIONS + DEMO_RELAX + 1) as bar:
        fitted = fit_one(
            model,
            data.train,
            layer=DEMO_LAYER,
            alpha=DEMO_ALPHA,
            max_evaluations=CHOOSING_EVALUATIONS,
            relax_steps=DEMO_RELAX,
            provenance=record(DEMO_MODEL, "auto", data),
            callback=bar,
        )
    with display.step(f"Answering {len(data.test)} questions"):
        results = compare(model, fitted.intervention, data)
    fitted.intervention.save_pretrained(out)
    display.show_results(data.task.name, results, n_shown=len(data.train))
    display.show_fit(fitted)
    before, after = (results[name].rows[:3] for name in ("zero_shot", "intervened"))
    cells = [
        (b.input, b.prediction, a.prediction, a.target) for b, a in zip(before, after, strict=True)
    ]
    display.show(display.text_table(("input", "before", "after", "right answer"), cells))
    display.say(f"Saved to {out}. Next: laai generate {out} 'Q: {after[0].input}\\nA:'")
