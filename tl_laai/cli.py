"""The command `laai`: fit, evaluate, use and look at interventions from a terminal.

Exit codes: 0 done (a fit that has not converged is done, and says so), 1 a failed run, 2 bad usage.
What is heavy (torch, TransformerLens) is imported where it is used: `laai --help` is instant.
"""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from tl_laai import __version__, display
from tl_laai.recipes import (
    DEFAULT_TEST,
    DEFAULT_TRAIN,
    compare,
    draw,
    record,
    recorded_data,
    recorded_model,
    recorded_template,
)
from tl_laai.tasks import Task, available_tasks, load_task

if TYPE_CHECKING:
    from tl_laai.interventions import Intervention
    from tl_laai.penalties import SparseGroupLasso

# The same as in the library's rooms, whose import takes seconds; a test compares them.
Backend = Literal["auto", "hooked", "bridge"]
Position = Literal["prompt_end", "every_step"]
Solver = Literal["proximal", "adam"]

DEFAULT_ALPHA = 0.9
DEMO_MODEL, DEMO_TASK, DEMO_LAYER, DEMO_ALPHA = "gemma-3-270m", "country-capital", 9, 0.9

_USAGE = (ValueError, TypeError, FileNotFoundError)
_FAILED = (ArithmeticError, MemoryError, OSError, RuntimeError)


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

Folder = Annotated[str, typer.Argument(metavar="DIR", help="A saved intervention.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
OtherModel = Annotated[str | None, typer.Option("--model", help="Not the recorded model.")]
OtherBackend = Annotated[Backend | None, typer.Option("--backend", help="Not the recorded one.")]


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


@app.command(epilog="Example: laai demo --out capital-demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where to save it.")] = Path("capital-demo"),
) -> None:
    """See it work: Gemma 3 270M learns country to capital from ten examples, in minutes."""
    from tl_laai.fitting import fit as fit_one

    _check_out(out)
    data = draw(load_task(DEMO_TASK))
    model = _load(DEMO_MODEL)
    with display.solver_bar(f"Fitting layer {DEMO_LAYER} on {len(data.train)} examples") as bar:
        fitted = fit_one(
            model,
            data.train,
            layer=DEMO_LAYER,
            alpha=DEMO_ALPHA,
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


@app.command(
    epilog="Example:\n\nlaai fit --model gemma-3-270m --task country-capital --train 10\n\n"
    "--seed 0 --layer 9 --group 0.3 --out capital/"
)
def fit(
    model: Annotated[str, typer.Option(help="Built-in name, folder, GGUF file or Hub name.")],
    task: Annotated[str, typer.Option(help="Built-in name, or a JSON or JSONL file.")],
    layer: Annotated[int, typer.Option(help="The edited layer, from 0.")],
    out: Annotated[Path, typer.Option(help="Folder to save the intervention in.")],
    train: Annotated[int, typer.Option(min=1, help="Examples to fit on.")] = DEFAULT_TRAIN,
    test: Annotated[int, typer.Option(min=1, help="Held out, or all there are.")] = DEFAULT_TEST,
    seed: Annotated[int, typer.Option(min=0, help="Which examples.")] = 0,
    group: Annotated[
        float | None, typer.Option(min=0, help="Penalty on whole heads (absolute).")
    ] = None,
    l1: Annotated[
        float | None, typer.Option(min=0, help="Penalty on single entries (absolute).")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Instead: the group penalty as a share of lambda_max, where all is zero; "
            f"{DEFAULT_ALPHA} if no penalty is given.",
        ),
    ] = None,
    l1_ratio: Annotated[float, typer.Option(min=0, help="With --alpha: l1 / group.")] = 0.0,
    solver: Annotated[Solver, typer.Option(help="Only proximal makes exact zeros.")] = "proximal",
    max_evaluations: Annotated[int, typer.Option(min=1, help="At most; adam's steps.")] = 150,
    tolerance: Annotated[float, typer.Option(help="Of stationarity.")] = 1e-3,
    learning_rate: Annotated[float, typer.Option(help="Of adam.")] = 0.1,
    position: Annotated[
        Position, typer.Option(help="Only the prompt's last token, or every step's.")
    ] = "prompt_end",
    template: Annotated[
        str | None, typer.Option(help="Prompt with {input}; backslash-n is a newline.")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="TransformerLens class.")] = "auto",
    json: Json = False,
) -> None:
    """Fit an intervention on a few examples of a task, and save it to a folder."""
    data = draw(load_task(task), train=train, test=test, seed=seed)

    from tl_laai.fitting import fit as fit_one
    from tl_laai.prompts import DEFAULT_TEMPLATE, PromptTemplate

    _check_out(out)
    penalty, alpha = _penalty(group, l1, alpha)
    prompt = DEFAULT_TEMPLATE if template is None else PromptTemplate(_newlines(template))
    loaded = _load(model, backend)
    with display.solver_bar(f"Fitting layer {layer} on {train} examples", max_evaluations) as bar:
        fitted = fit_one(
            loaded,
            data.train,
            layer=layer,
            penalty=penalty,
            alpha=alpha,
            l1_ratio=l1_ratio,
            position=position,
            template=prompt,
            solver=solver,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            learning_rate=learning_rate,
            provenance=record(model, backend, data),
            callback=bar,
        )
    fitted.intervention.save_pretrained(out)
    if json:
        known = fitted.intervention.provenance
        shown = {name: known[name] for name in ("layer", "solution", "penalty", "task", "split")}
        heads = display.head_norms(fitted.intervention)
        status = fitted.solution.status.name.lower()
        display.show_json({"status": status, "out": str(out), "heads": heads, **shown})
    else:
        display.show_fit(fitted)
        display.say(f"Saved to {out}. Next: laai evaluate {out}")


@app.command(epilog="Example: laai evaluate capital/ --json")
def evaluate(
    folder: Folder,
    model: OtherModel = None,
    task: Annotated[str | None, typer.Option(help="Not the recorded task.")] = None,
    test: Annotated[int | None, typer.Option(min=1, help="At most so many examples.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another split.")] = None,
    backend: OtherBackend = None,
    few_shot: Annotated[
        bool, typer.Option("--few-shot/--no-few-shot", help="Also prompt with demonstrations.")
    ] = True,
    json: Json = False,
) -> None:
    """Compare zero-shot, few-shot and intervened answers on held-out examples.

    Model, task and split are those of the fit. The demonstrations are the
    examples that it was fitted on; none of these is held out.
    """
    from tl_laai.interventions import Intervention

    intervention = Intervention.from_pretrained(folder)
    known = intervention.provenance
    data = recorded_data(known, task=task, test=test, seed=seed)
    template = recorded_template(known)
    if not data.origin_known:
        display.message(
            "It is not recorded on which of these data the intervention was fitted: the held-out "
            "examples may contain some.",
            style="yellow",
        )
    loaded = _load_for(intervention, model, backend)
    with display.step(f"Answering {len(data.test)} questions"):
        results = compare(loaded, intervention, data, template=template, few_shot=few_shot)
    if json:
        shown = {name: results[name].to_dict() for name in results}
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
    from tl_laai.decoding import Edit, decode
    from tl_laai.evaluation import as_edit
    from tl_laai.interventions import Intervention
    from tl_laai.prefix import freeze
    from tl_laai.prompts import TokenisedExample, tokenise_prompts

    intervention = Intervention.from_pretrained(folder)
    prompt = _newlines(prompt)
    loaded = _load_for(intervention, model, backend)
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


# ------------------------------------------------------------------------- what arguments mean


def _penalty(
    group: float | None, l1: float | None, alpha: float | None
) -> tuple[SparseGroupLasso | None, float | None]:
    """What is asked for: absolute weights, or a share of lambda_max."""
    from tl_laai.penalties import SparseGroupLasso

    if group is None and l1 is None:
        return None, DEFAULT_ALPHA if alpha is None else alpha
    if alpha is not None:
        raise ValueError("--alpha is a share of lambda_max, --group and --l1 are absolute: choose")
    return SparseGroupLasso(l1=l1 or 0.0, group=group or 0.0), None


def _newlines(text: str) -> str:
    return text.replace("\\n", "\n")  # a shell hands over the two characters


def _check_out(out: Path) -> None:
    """Refuse, before the work and not after it, to save over anything but an intervention."""
    from tl_laai.artifacts import CONFIG_FILE

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ValueError(
            f"--out {out} holds something else than an intervention; give a new folder"
        )


# --------------------------------------------------------------------------- parts of commands


def _load(name: str, backend: str = "auto") -> Any:
    with display.step("Importing TransformerLens"):
        importlib.import_module("transformer_lens")
        from tl_laai.checkpoints import find_source
        from tl_laai.models import load_model

    source = find_source(name)  # converts a packaged model on first use, and shows that
    with display.step(f"Loading {name}", spinner=source.folder is not None):
        return load_model(name, backend=cast("Backend", backend))


def _load_for(intervention: Intervention, model: str | None, backend: str | None) -> Any:
    loaded = _load(*recorded_model(intervention.provenance, model=model, backend=backend))
    intervention.check_model(loaded, strict=True)
    return loaded
