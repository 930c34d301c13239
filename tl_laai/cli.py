"""The command `laai`: fit, evaluate, use and look at interventions from a terminal.

Exit codes: 0 done (a fit that has not converged is done, and says so), 1 a failed run, 2 bad usage.
What is heavy (torch, TransformerLens) is imported where it is used: `laai --help` is instant.
"""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tl_laai import (
    __version__,
    analyses,
    comparisons,
    demo,
    display,
    fit_commands,
    opinion_commands,
)
from tl_laai.options import (
    AtMost,
    Folder,
    Json,
    OtherBackend,
    OtherModel,
    OtherTask,
    held_out,
    load_for,
    newlines,
)
from tl_laai.recipes import compare, on_opinions
from tl_laai.tasks import Task, available_tasks

_USAGE = (ValueError, TypeError, FileNotFoundError, IsADirectoryError)
_FAILED = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError)


class _Commands(TyperGroup):
    """Says in one line what went wrong, and tells bad usage from a failed run."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own business, though some of these are RuntimeErrors
        except (*_USAGE, *_FAILED) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            display.error(str(error) or type(error).__name__)
            bad_usage = isinstance(error, _USAGE) and not isinstance(error, ArithmeticError)
            raise typer.Exit(2 if bad_usage else 1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Start with: laai demo",
)


def main() -> None:
    """Run the command line; what the script `laai` calls."""
    app()


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"laai {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="TL_LAAI_DEBUG", help="Show where an error arose.")
    ] = False,
) -> None:
    """Sparse additive interventions: fit one on ten examples, save it, apply it, look at it."""


app.command(epilog="Example: laai demo --out capital-demo")(demo.demo)
app.command(
    epilog="Example:\n\nlaai fit --model gemma-3-270m --task country-capital --train 10\n\n"
    "--seed 0 --layer 9 --group 0.3 --out capital/"
)(fit_commands.fit)


@app.command(epilog="Example: laai evaluate capital/ --json")
def evaluate(
    folder: Folder,
    model: OtherModel = None,
    task: OtherTask = None,
    test: AtMost = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another split.")] = None,
    backend: OtherBackend = None,
    few_shot: Annotated[
        bool, typer.Option("--few-shot/--no-few-shot", help="Also prompt with demonstrations.")
    ] = True,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Of tasks: also edits of its size.")
    ] = True,
    json: Json = False,
) -> None:
    """Compare zero-shot, few-shot and intervened answers on held-out examples.

    Model, task (or poll) and split are those of the fit. The demonstrations
    are the examples that it was fitted on; none of these is held out. Controls
    have the norms of its heads in random directions, or its heads permuted: they
    should answer no more than zero-shot.
    """
    from tl_laai.interventions import Intervention

    intervention = Intervention.from_pretrained(folder)
    if on_opinions(intervention.provenance) and task is None:
        if test is not None or seed is not None:
            raise ValueError(
                f"--test and --seed are for tasks: {folder} was fitted on opinions, and is "
                "compared on the questions held out then; leave them out"
            )
        opinion_commands.evaluate_opinion_fit(
            intervention, model, backend, few_shot=few_shot, json=json
        )
        return
    data, template = held_out(intervention, task=task, test=test, seed=seed, few_shot=few_shot)
    loaded = load_for(intervention, model, backend)
    with display.step(f"Answering {len(data.test)} questions"):
        options = {"few_shot": few_shot, "controls": controls}
        results = compare(loaded, intervention, data, template=template, **options)
    if json:
        shown = {name: results[name].to_dict() for name in results}
        if data.n_seen_unlabelled:
            shown["intervened"]["n_seen_unlabelled"] = data.n_seen_unlabelled
        display.show_json({"zero_shot": None, "few_shot": None, "intervened": None} | shown)
    else:
        display.show_results(data.task.name, results, n_shown=len(data.train))


@app.command(epilog=r'Example: laai generate capital/ "Q: Kenya\nA:"')
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Backslash-n in it stands for a newline.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 20,
    model: OtherModel = None,
    backend: OtherBackend = None,
    json: Json = False,
) -> None:
    """Complete a prompt without and with the intervention: greedily, up to a newline."""
    from tl_laai.decoding import decode
    from tl_laai.edits import Edit
    from tl_laai.evaluation import as_edit
    from tl_laai.interventions import Intervention
    from tl_laai.prefix import freeze
    from tl_laai.prompts import TokenisedExample, tokenise_prompts

    intervention = Intervention.from_pretrained(folder)
    prompt = newlines(prompt)
    loaded = load_for(intervention, model, backend)
    [tokens] = tokenise_prompts(loaded, [prompt])
    with display.step("Generating"):
        frozen = freeze(loaded, [TokenisedExample(tokens, (), prompt, "")])
        edits = [Edit(), as_edit(loaded, intervention)]
        written = decode(frozen, edits, max_new_tokens=max_new_tokens)
    plain, intervened = (loaded.tokenizer.decode(list(of_one[0])) for of_one in written)
    if json:
        display.show_json({"prompt": prompt, "plain": plain, "intervened": intervened})
    else:
        rows = [("without", plain.strip()), ("with", intervened.strip())]
        display.show(display.text_table(("intervention", "completion"), rows))


@app.command(epilog="Example: laai show capital/")
def show(folder: Folder, json: Json = False) -> None:
    """Show where an intervention sits and how it came about; no model is loaded."""
    from tl_laai.interventions import Intervention

    intervention = Intervention.from_pretrained(folder)
    known = intervention.fingerprint
    if json:
        display.show_json(
            {
                "position": intervention.position,
                "heads": display.head_norms(intervention),
                "fingerprint": None if known is None else known.to_dict(),
                "provenance": dict(intervention.provenance),
            }
        )
        return
    display.show_heads(intervention)
    display.show(display.record_table(intervention.provenance))


@app.command(epilog="Example: laai tasks")
def tasks() -> None:
    """List the built-in tasks."""
    rows = []
    for task in map(Task.load, available_tasks()):
        example = f"{task.examples[0].input} → {task.examples[0].output}"
        rows.append((task.name, task.version, str(len(task)), example))
    display.show(display.text_table(("task", "version", "n", "example"), rows))


@app.command(epilog="Example: laai models")
def models() -> None:
    """List the built-in models: whether their package is installed, and converted already."""
    from tl_laai.checkpoints import BUILT_IN, CONVERTER_VERSION, MARKER_FILE, cache_folder

    rows = []
    for model in BUILT_IN.values():
        folder = cache_folder() / f"{model.name}-{model.sha256[:12]}-v{CONVERTER_VERSION}"
        cached = "yes" if (folder / MARKER_FILE).is_file() else "on first use"
        rows.append((model.name, "yes" if model.installed else f"no: {model.install}", cached))
    display.show(display.text_table(("model", "installed", "converted"), rows))


app.command(epilog="Example:\n\nlaai sweep --model gemma-3-270m --task antonym --out rows.jsonl")(
    analyses.sweep
)
app.command(epilog="Example: laai attribute --model gemma-3-270m --task antonym")(
    analyses.attribute
)
app.command(epilog="Example: laai ablate capital/ --out ablation.jsonl")(analyses.ablate)
app.command(epilog="Example:\n\nlaai opinions --model gemma-3-270m --group Republican --layer 9")(
    opinion_commands.opinions
)
app.command(epilog="Example: laai figure rows.jsonl --out sweep.png")(analyses.figure)
app.command(epilog="Example: laai baselines --task country-capital --method task-vector")(
    comparisons.baselines
)
