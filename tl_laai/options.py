"""What the commands of `laai` share: options, and loading a model with its steps shown."""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from tl_laai import display
from tl_laai.recipes import TaskData, recorded_data, recorded_model, recorded_template

if TYPE_CHECKING:
    from tl_laai.interventions import Intervention
    from tl_laai.prompts import PromptTemplate

# The same as in models.py, whose import takes seconds; a test compares them.
Backend = Literal["auto", "hooked", "bridge"]

AnyModel = Annotated[str, typer.Option(help="Built-in name, folder, GGUF file or Hub name.")]
AnyBackend = Annotated[Backend, typer.Option(help="TransformerLens class.")]
OneTask = Annotated[str, typer.Option(help="Built-in name, or a JSON or JSONL file.")]
Train = Annotated[int, typer.Option(min=1, help="Examples to fit on.")]
Test = Annotated[int, typer.Option(min=1, help="Held out, or all there are.")]
Seed = Annotated[int, typer.Option(min=0, help="Which examples.")]
Out = Annotated[Path | None, typer.Option(help="File to write the rows to.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

Folder = Annotated[str, typer.Argument(metavar="DIR", help="A saved intervention.")]
OtherModel = Annotated[
    str | None,
    typer.Option("--model", help="Where the weights of the fit are, if not as recorded."),
]
OtherBackend = Annotated[Backend | None, typer.Option("--backend", help="Not the recorded one.")]
OtherTask = Annotated[str | None, typer.Option("--task", help="Not the recorded task.")]
AtMost = Annotated[int | None, typer.Option(min=1, help="At most so many examples.")]


class _Shown(logging.Handler):
    """Shows what the library logs, such as how much memory a batch will take."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record on standard error."""
        display.message(record.getMessage(), style="dim")


def _show_log() -> None:
    log = logging.getLogger("tl_laai")
    if not any(isinstance(handler, _Shown) for handler in log.handlers):
        log.addHandler(_Shown())
        log.setLevel(logging.INFO)


def load(name: str, backend: str = "auto") -> Any:
    """Load a model by name, showing what takes time."""
    _show_log()
    with display.step("Importing TransformerLens"):
        importlib.import_module("transformer_lens")
        from tl_laai.checkpoints import find_source
        from tl_laai.models import load_model

    source = find_source(name)  # converts a packaged model on first use, and shows that
    with display.step(f"Loading {name}", spinner=source.folder is not None):
        return load_model(name, backend=cast("Backend", backend))


def load_for(intervention: Intervention, model: str | None, backend: str | None) -> Any:
    """Load the model that an intervention was fitted on, or the one given instead."""
    loaded = load(*recorded_model(intervention.provenance, model=model, backend=backend))
    intervention.check_model(loaded, strict=True)
    return loaded


def held_out(
    intervention: Intervention,
    *,
    task: str | None,
    test: int | None,
    seed: int | None = None,
    few_shot: bool = False,
) -> tuple[TaskData, PromptTemplate]:
    """What an intervention is evaluated on, and its template; doubts about them are shown."""
    _show_log()
    known = intervention.provenance
    data = recorded_data(known, task=task, test=test, seed=seed, few_shot=few_shot)
    if not data.origin_known:
        display.message(
            "It is not recorded on which of these data the intervention was fitted: the held-out "
            "examples may contain some.",
            style="yellow",
        )
    if data.n_seen_unlabelled:
        display.message(
            f"The fit was distilled on {data.n_seen_unlabelled} of the {len(data.test)} held-out "
            "inputs: it has seen them, but not their answers.",
            style="yellow",
        )
    return data, recorded_template(known)


def layer_number(text: str, *, option: str, allowed: str) -> int:
    """Read the number of a layer, or say which option holds something else."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} holds {text!r}; give {allowed}") from None


def newlines(text: str) -> str:
    """Make newlines of the two characters that a shell hands over for one; two backslashes: one."""
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", text)


def check_out(out: Path) -> None:
    """Refuse, before the work and not after it, where an intervention must not or cannot be."""
    from tl_laai.artifacts import check_folder

    try:
        check_folder(out)
    except ValueError as error:
        raise ValueError(f"--out {error}") from error
