from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

from tl_laai import (
    Intervention,
    Task,
    __version__,
    demo,
    evaluate,
    fit_options,
    fitting,
    hooking,
    load_model,
    models,
    rounds,
)
from tl_laai.cli import app
from tl_laai.controls import permuted_heads, random_direction
from tl_laai.evaluation import as_edit, evaluate_edits
from tl_laai.options import Backend
from tl_laai.recipes import draw
from tl_laai.tasks import available_tasks, load_task

COMMANDS = ("demo", "fit", "evaluate", "generate", "show", "tasks", "models", "opinions")
ROWS = [{"input": a, "output": a.upper()} for a in "abcdefghijklmno"]


def laai(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = laai(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, code: int) -> str:
    """The one line of an error; nothing on standard output, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]
    return errors[0].removeprefix("Error: ")


def save_checkpoint(folder: Path, *, seed: int = 0, family: str = "llama") -> Path:
    tiny.tiny_hf(family, torch.float32, seed).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a task, and an intervention fitted by the command line."""
    room = tmp_path_factory.mktemp("room")
    save_checkpoint(room / "model")
    (room / "upper.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        done(*fit_arguments(room), "--alpha", 0.5, "--out", "upper")
    return room


def fit_arguments(room: Path, **changes: object) -> list[object]:
    options = {
        "--model": "model",
        "--task": "upper.json",
        "--train": 3,
        "--test": 5,
        "--layer": 1,
        "--max-evaluations": 20,
    } | {f"--{name}": value for name, value in changes.items()}
    return ["fit", *(part for option in options.items() for part in option)]


@pytest.fixture
def inside(room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(room)
    return room


# ------------------------------------------------------------------------------ help and lists


def test_help_and_tasks_need_no_torch() -> None:
    script = (
        "import sys; from tl_laai.cli import app\n"
        "for words in (['--help'], ['fit', '--help'], ['tasks']):\n"
        "    app(words, standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = done(command, "--help")
    assert f"laai {command}" in result.stdout.partition("Example:")[2]
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_names_every_command() -> None:
    assert set(COMMANDS) <= set(done("--help").stdout.split())


def test_the_version_is_shown() -> None:
    assert done("--version").stdout == f"laai {__version__}\n"


def test_every_built_in_task_is_listed_with_its_size() -> None:
    lines = done("tasks").stdout.splitlines()
    for name in available_tasks():
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert str(len(Task.load(name))) in line.split()


def test_every_built_in_model_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_LAAI_CACHE", str(tmp_path))
    lines = done("models").stdout.splitlines()
    for name in models.BUILT_IN:
        assert any(line.startswith(f"{name} ") and "on first use" in line for line in lines)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (Backend, models.Backend),
        (fit_options.Position, hooking.Position),
        (fit_options.Solver, fitting.Solver),
    ],
)
def test_the_choices_are_those_of_the_library(here: Any, there: Any) -> None:
    assert get_args(here) == get_args(there)


# --------------------------------------------------------------------------------- fit and show


def test_fit_saves_what_the_library_fits(inside: Path) -> None:
    saved = Intervention.from_pretrained(inside / "upper")
    data = draw(load_task("upper.json"), train=3, test=5)
    model = load_model(inside / "model")
    fitted = fitting.fit(model, data.train, layer=1, alpha=0.5, max_evaluations=20)
    assert saved == fitted.intervention
    assert saved.provenance["split"] == {"train": 3, "test": 5, "seed": 0}
    assert saved.provenance["model"] == str(inside / "model")
    assert saved.provenance["task"]["digest"] == data.task.digest


def test_fit_prints_one_json_object(inside: Path, tmp_path: Path) -> None:
    result = done(*fit_arguments(inside, group=0.1, out=tmp_path / "new"), "--json")
    shown = json.loads(result.stdout)
    assert shown["status"] == shown["solution"]["status"]
    assert shown["penalty"]["group"] == pytest.approx(0.1)
    assert shown["penalty"]["l1"] == 0.0
    saved = Intervention.from_pretrained(tmp_path / "new")
    assert sum(norm > 0 for norm in shown["heads"]["1"]) == saved.n_heads_used
    assert len(shown["heads"]["1"]) == 4


def test_fit_says_loudly_that_it_has_not_converged(inside: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(inside, alpha=0.1, out=tmp_path / "new")
    arguments[arguments.index("--max-evaluations") + 1] = 2
    assert "NOT CONVERGED (max_evaluations) after 2 evaluations" in done(*arguments).stdout
    assert json.loads(done(*arguments, "--json").stdout)["status"] == "max_evaluations"


def test_fit_says_loudly_that_every_head_is_zero(inside: Path, tmp_path: Path) -> None:
    result = done(*fit_arguments(inside, alpha=2, out=tmp_path / "new"))
    assert "Every head is zero" in result.stderr
    assert "0 of 4 heads, 0 of 32 entries" in result.stdout
    assert "█" not in result.stdout
    arguments = fit_arguments(inside, alpha=0.9, out=tmp_path / "new")
    arguments[arguments.index("--max-evaluations") + 1] = 1
    assert "Every head is still zero: give more --max-evaluations" in done(*arguments).stderr


def test_fit_passes_every_option_on(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def spy(model: Any, problems: Any, **options: Any) -> None:
        given.update(options, problems=problems)
        raise ValueError("seen")

    monkeypatch.setattr(fitting, "fit_many", spy)
    options = {"layer": 2, "l1": 0.25, "group": 0.5, "solver": "adam", "position": "every_step"}
    options |= {"max-evaluations": 7, "tolerance": 0.5, "learning-rate": 0.25, "train": 4}
    template = r"{input}\nto:"
    refused(laai(*fit_arguments(inside, **options, template=template, out=tmp_path / "x")), 2)
    [problem] = given.pop("problems")
    assert (problem.layer, problem.alpha, problem.l1_ratio) == (2, None, 0.0)
    assert (problem.penalty.l1, problem.penalty.group) == (0.25, 0.5)
    assert problem.provenance["split"]["train"] == len(problem.examples) == 4
    assert given.pop("template").text == "{input}\nto:"
    assert callable(given.pop("callback"))
    assert given == {
        "position": "every_step",
        "solver": "adam",
        "tolerance": 0.5,
        "max_evaluations": 7,
        "learning_rate": 0.25,
        "relax_steps": 0,
    }


def test_fit_distils_on_inputs_from_a_file(inside: Path, tmp_path: Path) -> None:
    (tmp_path / "inputs.txt").write_text("q\r\n\n r \n", encoding="utf-8-sig")
    options = {"objective": "distill", "inputs": tmp_path / "inputs.txt", "label-share": 0.25}
    options |= {"teacher-steps": 2, "teachers": 3, "shown": 1}
    out = tmp_path / "distilled"
    changes = {"alpha": 0.5, "max-evaluations": 3, "out": out}
    done(*fit_arguments(inside, **(options | changes)))
    origin = Intervention.from_pretrained(out).provenance["objective"]
    assert origin["objective"] == "distill"
    assert (origin["inputs"], origin["label_share"]) == (["q", "r"], 0.25)
    assert (origin["teacher_steps"], origin["n_teachers"], origin["n_shown"]) == (2, 3, 1)
    arguments = fit_arguments(inside, **(options | changes))
    message = refused(laai(*arguments, "--made-up", 3), 2)
    assert "inputs.txt are given, so that --made-up has none" in message
    fewer = {key: options[key] for key in ("objective", "shown")}
    message = refused(laai(*fit_arguments(inside, **(fewer | changes))), 2)
    assert "--shown is for --teachers 2 or more" in message


def test_evaluate_counts_the_held_out_inputs_that_were_distilled_on(
    inside: Path, tmp_path: Path
) -> None:
    held_out = draw(load_task("upper.json"), train=3, test=5).test
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("\n".join(["q", *(example.input.upper() for example in held_out[:2])]))
    changes = {"objective": "distill", "inputs": inputs, "alpha": 0.5, "max-evaluations": 3}
    done(*fit_arguments(inside, **changes, out=tmp_path / "distilled"))
    (2 * Intervention.from_pretrained(tmp_path / "distilled")).save_pretrained(tmp_path / "double")
    for name in ("distilled", "double"):
        result = done("evaluate", tmp_path / name, "--json", "--no-few-shot")
        assert json.loads(result.stdout)["intervened"]["n_seen_unlabelled"] == 2
        assert "distilled on 2 of the 5 held-out inputs" in result.stderr
    assert "distilled on" not in done("evaluate", "upper", "--no-few-shot").stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("label-share", 0.5), ("teacher-steps", 0), ("made-up", 5), ("teachers", 2), ("shown", 3)],
)
def test_settings_of_distillation_without_it_are_refused(
    inside: Path, tmp_path: Path, option: str, value: float
) -> None:
    arguments = fit_arguments(inside, out=tmp_path / "x", alpha=0.5, **{option: value})
    assert f"--{option} is for distilling" in refused(laai(*arguments), 2)


def test_fit_replaces_an_intervention_but_nothing_else(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(*fit_arguments(inside, alpha=0.5, out=out))
    done(*fit_arguments(inside, alpha=0.5, seed=1, out=out))
    assert Intervention.from_pretrained(out).provenance["split"]["seed"] == 1
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    message = refused(laai(*fit_arguments(inside, out=tmp_path / "thesis")), 2)
    assert "holds something else than an intervention" in message
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter"]
    message = refused(laai(*fit_arguments(inside, out=tmp_path / "thesis" / "chapter")), 2)
    assert "is a file; give a folder" in message
    out = tmp_path / "thesis" / "chapter" / "1"
    result = laai(*fit_arguments(inside, alpha=0.5, out=out))
    assert f"--out {out} cannot be written" in refused(result, 2)
    assert "Loading" not in result.stderr


def test_show_has_a_line_for_every_head_and_the_provenance(inside: Path) -> None:
    saved = Intervention.from_pretrained("upper")
    lines = done("show", "upper").stdout.splitlines()
    assert lines[0].startswith("Layer 1 of model, prompt_end: ")
    bars = [line for line in lines if line.split()[:1] == ["1"]]
    assert [("█" in line or "▏" in line) for line in bars] == [
        head in {h.head for h in saved.heads()} for head in range(4)
    ]
    assert any(line.split() == ["split.train", "3"] for line in lines)
    shown = json.loads(done("show", "upper", "--json").stdout)
    assert shown["provenance"] == dict(saved.provenance)
    for head in saved.heads():
        assert shown["heads"]["1"][head.head] == pytest.approx(head.norm)


def test_a_fit_points_to_evaluate_only_where_something_is_held_out(
    inside: Path, tmp_path: Path
) -> None:
    for changes, following in (({"test": 2}, "evaluate"), ({"train": len(ROWS)}, "show")):
        out = tmp_path / following
        shown = done(*fit_arguments(inside, **changes), "--alpha", 0.5, "--out", out)
        assert f"Next: laai {following} {out}" in " ".join((shown.stdout + shown.stderr).split())


# ------------------------------------------------------------------------ evaluate and generate


def test_evaluate_needs_nothing_but_the_folder(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = json.loads(done("evaluate", inside / "upper", "--json").stdout)
    model = load_model(inside / "model")
    split = load_task(inside / "upper.json").split(train=3, test=5, seed=0)
    saved = Intervention.from_pretrained(inside / "upper")
    expected = {
        "zero_shot": evaluate(model, split.test),
        "few_shot": evaluate(model, split.test, demonstrations=split.train),
        "intervened": evaluate(model, split.test, intervention=saved),
    }
    edit = as_edit(model, saved)
    controls = {
        "random_direction": random_direction(edit, seed=0),
        "permuted_heads": permuted_heads(edit, seed=0),
    }
    expected |= evaluate_edits(model, split.test, controls)
    assert list(shown) == list(expected)
    for name, evaluation in expected.items():
        assert shown[name] == pytest.approx(evaluation.to_dict(), rel=1e-5)
    assert all(condition["n"] == 5 for condition in shown.values())
    assert shown["intervened"]["log_probability"] > shown["zero_shot"]["log_probability"]


def test_evaluate_prints_a_table(inside: Path) -> None:
    lines = done("evaluate", "upper", "--test", 2).stdout.splitlines()
    assert "upper, 2 held-out examples" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["zero-shot", "3-shot", "zero-shot,"]
    assert [line.split()[:2] for line in lines[4:6]] == [
        ["control:", "random"],
        ["control:", "heads"],
    ]
    lines = done("evaluate", "upper", "--test", 2, "--no-controls").stdout.splitlines()
    assert not any("control" in line for line in lines)


def test_evaluate_can_leave_few_shot_out_and_take_another_split_or_task(
    inside: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text(
        "\n".join(json.dumps({"input": str(i), "output": "x"}) for i in range(6))
    )
    options = ["--no-few-shot", "--json", "--backend", "bridge"]
    shown = json.loads(done("evaluate", "upper", "--seed", 4, *options).stdout)
    assert shown["few_shot"] is None
    assert shown["intervened"]["n"] == 5
    result = done("evaluate", "upper", "--task", tmp_path / "other.jsonl", *options)
    assert json.loads(result.stdout)["intervened"]["n"] == 3
    assert "may contain some" not in result.stderr


def test_what_few_shot_alone_cannot_do_is_refused_with_a_way_out(
    inside: Path, tmp_path: Path
) -> None:
    two, long = tmp_path / "two.json", tmp_path / "long.json"
    two.write_text(json.dumps([{"input": i, "output": "x"} for i in "?!"]))
    long.write_text(json.dumps([{"input": i * 30, "output": "x"} for i in "!?#$%"]))
    for file, message in ((two, "none is left to hold out"), (long, "context of 128")):
        refusal = refused(laai("evaluate", "upper", "--task", file), 2)
        assert message in refusal
        assert "leave few-shot out (--no-few-shot)" in refusal
        result = done("evaluate", "upper", "--task", file, "--no-few-shot", "--json")
        assert json.loads(result.stdout)["few_shot"] is None


def test_evaluate_of_an_intervention_without_provenance_asks_and_warns(
    inside: Path, tmp_path: Path
) -> None:
    saved = Intervention.from_pretrained("upper")
    bare = tmp_path / "bare"
    replace(saved, provenance={}).save_pretrained(bare)
    assert "give --task" in refused(laai("evaluate", bare), 2)
    assert "give --task" in refused(laai("ablate", bare), 2)
    assert "give --model" in refused(laai("generate", bare, "Q"), 2)
    given = ["--task", "upper.json", "--model", "model", "--json"]
    result = done("evaluate", bare, *given, "--no-few-shot")
    assert json.loads(result.stdout)["intervened"]["n"] == 5
    assert "may contain some" in result.stderr
    result = done("ablate", bare, *given)
    assert json.loads(result.stdout)["rows"][0]["n"] == 5
    assert "may contain some" in result.stderr


def test_algebra_keeps_model_task_split_and_template(inside: Path, tmp_path: Path) -> None:
    options = {"alpha": 0.5, "seed": 2, "template": "In: {input} Out:"}
    done(*fit_arguments(inside, **options, out=tmp_path / "fit"))
    fitted = Intervention.from_pretrained(tmp_path / "fit")
    (1 * fitted.only_heads(fitted.heads())).save_pretrained(tmp_path / "same")
    for command in ("evaluate", "ablate"):
        expected, shown = (done(command, tmp_path / n, "--json") for n in ("fit", "same"))
        assert json.loads(shown.stdout) == json.loads(expected.stdout)
    (fitted + Intervention.from_pretrained("upper")).save_pretrained(tmp_path / "sum")
    result = done("evaluate", tmp_path / "sum", "--json")
    assert json.loads(result.stdout)["intervened"]["n"] <= 12
    assert "different prompt templates" in result.stderr


def test_generate_writes_what_the_model_generates(inside: Path) -> None:
    shown = json.loads(done("generate", "upper", r"Q: a\nA:", "--json").stdout)
    assert shown["prompt"] == "Q: a\nA:"
    model = load_model(inside / "model")
    saved = Intervention.from_pretrained("upper")

    def written() -> str:
        options = {"max_new_tokens": 20, "do_sample": False, "verbose": False}
        tokens = model.to_tokens(shown["prompt"])
        text = model.generate(tokens, return_type="tokens", **options)[0, tokens.shape[1] :]
        return str(model.tokenizer.decode(text, skip_special_tokens=True)).split("\n")[0]

    assert shown["plain"] == written()
    with saved.applied_to(model):
        assert shown["intervened"] == written()
    assert shown["plain"] != shown["intervened"]


def test_generate_prints_both_completions(inside: Path) -> None:
    lines = done("generate", "upper", r"Q: a\nA:", "--max-new-tokens", 3).stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["intervention", "without", "with"]


# ------------------------------------------------------------------------------------ the demo


def test_the_demo_fits_compares_shows_and_saves(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DEMO_MODEL", "model")
    monkeypatch.setattr(demo, "DEMO_LAYER", 1)
    monkeypatch.setattr(demo, "DEMO_TASK", "upper.json")
    text = done("demo", "--out", tmp_path / "demo").stdout
    for part in ("zero-shot", "10-shot", "intervened", "relaxed", "right answer", "Saved to"):
        assert part in text.lower() or part in text
    saved = Intervention.from_pretrained(tmp_path / "demo")
    assert saved.provenance["split"]["train"] == 10
    assert len(json.loads(done("evaluate", tmp_path / "demo", "--json").stdout)) == 5


# ---------------------------------------------------------------------------------- bad usage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-model"}, "'no-such-model' could not be loaded"),
        ({"model": "./nothing"}, "there is no such file or folder"),
        ({"task": "capitals"}, "task must be a file or one of"),
        ({"layer": 3}, "layer is 3; this model has layers 0 to 2"),
        ({"layer": -1}, "layer is -1; this model has layers 0 to 2"),
        ({"train": 16}, "has 15 distinct inputs, fewer than 16"),
        ({"alpha": 0.5, "group": 1}, "--alpha is a share of lambda_max"),
        ({"l1-ratio": 0.5, "group": 1}, "--l1-ratio 0.5 sets the L1 penalty beside --alpha"),
        ({"template": "no place"}, "text must contain {input}"),
        ({"tolerance": -1}, "--tolerance is -1.0; give a finite number above 0"),
        # Of the two faults the option is told: it is checked before a model is looked for.
        ({"learning-rate": "inf", "model": "no-such-model"}, "--learning-rate is inf"),
        ({"learning-rate": 0.5}, "--learning-rate 0.5 is for --solver adam and --relax"),
        ({"folds": 3}, "--folds 3 is for what is chosen by cross-validation, and nothing is"),
        (
            {"folds": 3, "objective": "distill", "label-share": 0.5, "layer": "auto"},
            "--folds 3 is for fits on labels and for the share of labels, and both are given",
        ),
        ({"template": "x" * 200 + "{input}"}, "more than the model's context of 128"),
    ],
)
def test_fit_refuses_bad_arguments_in_one_line(
    inside: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    penalty = {} if {"alpha", "group"} & changes.keys() else {"alpha": 0.5}
    result = laai(*fit_arguments(inside, out=tmp_path / "out", **penalty, **changes))
    assert message in refused(result, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--task", "antonym"),
        ("evaluate",),
        ("nonsense",),
        ("fit", "--solver", "newton"),
        ("evaluate", "x", "--test", "0"),
    ],
)
def test_wrong_words_end_with_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = laai(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


@pytest.mark.parametrize("command", [("evaluate",), ("generate", "Q"), ("show",)])
def test_what_is_no_intervention_is_refused(
    inside: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *more = command
    assert "is neither a folder nor a Hub name" in refused(laai(name, "nothing/here/", *more), 2)
    assert "holds no saved intervention" in refused(laai(name, "model", *more), 2)
    shutil.copytree("upper", tmp_path / "cut")
    tensors = tmp_path / "cut" / "intervention.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert "is truncated, altered" in refused(laai(name, tmp_path / "cut", *more), 2)


def test_another_model_than_that_of_the_fit_is_refused(inside: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "twin", seed=1)
    save_checkpoint(tmp_path / "wide", family="gemma")
    for command in (("evaluate", "upper"), ("generate", "upper", "Q")):
        message = refused(laai(*command, "--model", tmp_path / "twin"), 2)
        assert "not the one that this intervention was fitted on" in message
        assert "strict=False in Python; laai has no option for it" in message
    message = refused(laai("evaluate", "upper", "--model", tmp_path / "wide"), 2)
    assert "not the one that this intervention was fitted on" in message


# -------------------------------------------------------------------------------- failed runs


@pytest.mark.parametrize(
    "failure",
    [
        FloatingPointError("the loss is not finite"),
        torch.OutOfMemoryError("out of memory:\n tried to allocate"),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("the kernel failed"),
    ],
)
def test_a_failed_run_ends_with_exit_code_1_and_one_line(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(fitting, "fit_many", raising(failure))
    message = refused(laai(*fit_arguments(inside, out=tmp_path / "out", alpha=0.5)), 1)
    assert message.split()[0] in (*str(failure).split(), "MemoryError")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_is_not_hidden(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "fit_many", raising(KeyError("a bug")))
    result = laai(*fit_arguments(inside, out=tmp_path / "out", alpha=0.5))
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_shows_where_an_error_arose(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "environment":
        monkeypatch.setenv("TL_LAAI_DEBUG", "1")
    result = laai(*(["--debug"] if by == "option" else []), "show", "nothing/here/")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "find_artifact" in result.stderr


def raising(failure: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    return fail


# ------------------------------------------------------------------- choosing, and looking into


def test_fit_chooses_layer_and_penalty_unless_told(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "ALPHAS", (0.9, 0.5))
    options = {"train": 4, "out": tmp_path / "chosen", "layer": "auto"}
    result = done(*fit_arguments(inside, **options))
    assert "chosen" in result.stdout
    table = Intervention.from_pretrained(tmp_path / "chosen").provenance["selection"]["table"]
    assert {row["layer"] for row in table} == {0, 1, 2}
    assert max(len(line) for line in result.stdout.splitlines() if "±" in line) <= 80
    lines = [line.split() for line in result.stdout.splitlines()]
    [chosen] = [words for words in lines if words[-1:] == ["chosen"] and "±" in words]
    final = [row for row in table if row["round"] == "final"]
    best = max(final, key=lambda row: row["validation_probability"])
    assert chosen[:3] == [str(best["layer"]), f"{best['alpha']:g}", str(best["relax_steps"])]


def test_fit_relaxes_as_often_as_asked(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(*fit_arguments(inside, alpha=0.5, relax=4, out=out))
    assert Intervention.from_pretrained(out).provenance["solver"]["relax_steps"] == 4
    done(*fit_arguments(inside, layer="auto", relax=3, train=4, folds=3, out=out))
    kept = Intervention.from_pretrained(out).provenance
    assert {row["relax_steps"] for row in kept["selection"]["table"]} == {3}
    rows = [row for row in kept["selection"]["table"] if row["round"] == "final"]
    assert {len(row["fold_losses"]) for row in rows} == {3}
    assert kept["solver"]["max_evaluations"] == 20
    message = refused(laai(*fit_arguments(inside, layer="auto", tolerance=1e-4, out=out)), 2)
    assert "--tolerance 0.0001 is for a given --layer" in message
    done(*fit_arguments(inside, preset="relaxed", alpha=0.5, train=4, seed=3, out=out))
    kept = Intervention.from_pretrained(out).provenance
    assert {row["relax_steps"] for row in kept["selection"]["table"]} == set(rounds.RELAX_STEPS)
    assert kept["selection"]["seed"] == 3
    message = refused(laai(*fit_arguments(inside, relax=3, preset="paper", out=out)), 2)
    assert "--preset paper sets" in message


def test_fit_keeps_to_as_many_heads_as_allowed(inside: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    allowed = {"train": 4, "relax": 2, "out": out, "max-heads": 2, "layer": "auto"}
    done(*fit_arguments(inside, **allowed))
    assert 1 <= len(Intervention.from_pretrained(out).heads()) <= 2
    message = refused(laai(*fit_arguments(inside, **allowed, group=0.1)), 2)
    assert "--max-heads 2 chooses among --alpha penalties" in message


def test_choosing_a_layer_by_an_absolute_penalty_is_refused(inside: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(inside, layer="auto", group=0.1, out=tmp_path / "out")
    assert "--layer auto chooses among --alpha" in refused(laai(*arguments), 2)
    arguments = fit_arguments(inside, layer=1, solver="adam", out=tmp_path / "out")
    assert "--penalty auto chooses among" in refused(laai(*arguments), 2)
    arguments = fit_arguments(inside, layer=1, preset="relaxed", group=0.3, out=tmp_path / "out")
    assert "leave it out, and give --relax a number" in refused(laai(*arguments), 2)
    for more in ({"group": 0.3}, {"penalty": "none"}):
        arguments = fit_arguments(inside, layer=1, preset="paper", **more, out=tmp_path / "out")
        message = refused(laai(*arguments), 2)
        assert "--preset paper sets the L1 penalty beside --alpha" in message


def test_a_sweep_is_kept_gone_on_with_and_drawn(inside: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["sweep", "--model", "model", "--task", "upper.json", "--layers", "0,2"]
    words += ["--train", 3, "--test", 4]
    done(*words, "--seeds", 1, "--out", rows)
    first = rows.read_text()
    shown = json.loads(done(*words, "--seeds", 2, "--out", rows, "--json").stdout)
    assert shown["rows"] == 4
    assert rows.read_text().startswith(first)
    done("figure", rows, "--out", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert "holds no rows" in refused(
        laai("figure", rows, "--task", "none", "--out", tmp_path / "x.png"), 2
    )
    words[-1] = 5
    assert "other n_train" in refused(laai(*words, "--seeds", 1, "--out", rows, "--train", 4), 2)


def test_attribution_and_ablation_write_rows_that_can_be_drawn(
    inside: Path, tmp_path: Path
) -> None:
    out = tmp_path / "attribution.jsonl"
    words = ("attribute", "--model", "model", "--task", "upper.json", "--train", 3)
    values = json.loads(done(*words, "--out", out, "--json").stdout)["values"]
    assert len(values) == 3
    shown = done(*words, "--top", 2).stdout.splitlines()
    assert float(shown[1].split()[2]) == pytest.approx(max(map(max, values)), rel=1e-2)
    assert shown[4].startswith("The 2 strongest of 12 heads.")
    done("figure", out, "--out", tmp_path / "attribution.svg")
    grown = tmp_path / "grown.jsonl"
    grown.write_bytes(out.read_bytes())
    other = (*words[:4], "antonym", *words[5:], "--out", grown)
    assert "0 rows replaced, 12 others kept" in done(*other).stderr
    assert "12 rows replaced, 12 others kept" in done(*other).stderr
    assert json.loads(done(*words, "--out", grown, "--json").stdout)["values"] == values
    done("figure", grown, "--task", "upper", "--out", tmp_path / "attribution.svg")
    out = tmp_path / "ablation.jsonl"
    table = done("ablate", "upper", "--test", 4, "--out", out).stdout
    assert "cumulative" in table
    done("figure", out, "--out", tmp_path / "ablation.pdf")
    again = "0 others kept"
    assert again in done("ablate", "upper", "--test", 4, "--out", out).stderr
    (0.5 * Intervention.from_pretrained("upper")).save_pretrained(tmp_path / "weak")
    rows = out.read_bytes()
    message = refused(laai("ablate", tmp_path / "weak", "--test", 4, "--out", out), 2)
    assert "holds the ablation of another intervention on 'upper' (at layer" in message
    assert out.read_bytes() == rows
    both = tmp_path / "both.jsonl"
    both.write_bytes(out.read_bytes() + (tmp_path / "attribution.jsonl").read_bytes())
    words = ("figure", both, "--out", tmp_path / "both.pdf")
    assert "say which by kind (--kind)" in refused(laai(*words), 2)
    done(*words, "--kind", "attribution")
    assert "holds none of kind 'path'" in refused(laai(*words, "--kind", "path"), 2)


def test_rows_that_could_not_be_written_are_refused_before_a_model_is_loaded(
    inside: Path, tmp_path: Path
) -> None:
    kept = (inside / "upper" / "intervention.safetensors").read_bytes()
    result = laai("ablate", "upper", "--out", "upper/intervention.safetensors")
    assert "holds something else than rows" in refused(result, 2)
    assert (inside / "upper" / "intervention.safetensors").read_bytes() == kept
    assert "Loading" not in result.stderr
    for command in ("attribute", "baselines"):
        words = (command, "--model", "none", "--task", "upper.json", "--train", 4)
        assert "is a folder" in refused(laai(*words, "--out", tmp_path), 2)
    result = laai("sweep", "--model", "model", "--task", "upper.json", "--out", tmp_path)
    assert "is a folder" in refused(result, 2)
    assert "Loading" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"kind": "sweep"}\n', encoding="utf-8")
    for command in ("attribute", "baselines"):
        words = (command, "--model", "none", "--task", "upper.json", "--train", 4)
        assert "rows of other kinds: sweep" in refused(laai(*words, "--out", rows), 2)
