"""The commands on opinions, on a tiny model and a poll of its own letters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import done, laai, refused, save_checkpoint

from tl_laai import Intervention, opinions


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a poll."""
    room = tmp_path_factory.mktemp("room")
    save_checkpoint(room / "model")
    row = {"options": ["x", "y"], "group": "all", "distribution": [0.9, 0.1]}
    lines = [json.dumps(row | {"question": f"is {letter}?"}) for letter in "abcdefgh"]
    (room / "poll.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return room


@pytest.fixture
def poll(room: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Letters are one token each for a tokenizer of bytes, in short prompts."""
    monkeypatch.chdir(room)
    template = opinions.OpinionTemplate(
        text="{question}\n{options}\n=", option="{letter}{option}", answer_prefix=""
    )
    monkeypatch.setattr(opinions, "DEFAULT_OPINION_TEMPLATE", template)
    return room


def test_opinions_are_fitted_and_compared_with_floors_and_prompts(poll: Path) -> None:
    arguments = ("--model", "model", "--file", "poll.jsonl", "--group", "all", "--layer", 1)
    options = ("--train", 4, "--max-evaluations", 20, "--shots", 2)
    shown = done("opinions", *arguments, *options, "--out", "opinion", "--json").stdout
    results = json.loads(shown)["results"]
    assert list(results) == ["uniform", "train_mean", "zero_shot", "few_shot", "fitted"]
    assert {result["n"] for result in results.values()} == {4}
    assert results["train_mean"]["kl"] == pytest.approx(0, abs=1e-12)
    assert results["fitted"]["prompt_kl"] < results["zero_shot"]["prompt_kl"]
    saved = Intervention.from_pretrained("opinion")
    assert saved.layers == (1,)
    assert saved.provenance["opinions"]["group"] == "all"
    assert saved.provenance["loss"] == {"outside_weight": 1, "objective": "answers"}
    assert saved.provenance["penalty"]["group"] == 0
    by = saved.provenance["solver"]
    assert by == {"solver": "proximal", "tolerance": 1e-6, "max_evaluations": 20}
    distilled = (*options, "--objective", "distill", "--out", "taught", "--json")
    told = json.loads(done("opinions", *arguments, *distilled).stdout)
    for name, apart in told["kl_from_few_shot"].items():
        shares = zip(*(told["results"][n]["rows"] for n in ("few_shot", name)), strict=True)
        pairs = [zip(a["predicted"], b["predicted"], strict=True) for a, b in shares]
        kls = [sum(p * math.log(p / q) for p, q in pair) for pair in pairs]
        assert apart == pytest.approx(sum(kls) / len(kls))
    assert (told["layer"], told["out"]) == (1, "taught")
    assert {"heads", "solution", "penalty", "opinions", "split", "loss"} <= told.keys()
    taught = told["results"]
    assert taught["few_shot"] == results["few_shot"]
    assert taught["fitted"] != results["fitted"]
    table = done("evaluate", "taught").stdout
    assert f"intervened {told['kl_from_few_shot']['fitted']:.4f}" in table
    loss = Intervention.from_pretrained("taught").provenance["loss"]
    assert loss == {"outside_weight": 1, "objective": "distill"}
    words = ("opinions", *arguments, *options, "--outside-weight", 0, "--out", "letters", "--json")
    letters = json.loads(done(*words).stdout)["results"]
    assert letters["fitted"] != results["fitted"]
    both = saved + Intervention.from_pretrained("letters")
    both.save_pretrained("both")  # fitted on the same questions, if not for the same loss
    assert json.loads(done("evaluate", "both", "--json").stdout)["results"].keys() == results.keys()
    other = (*options[:-1], 4, "--baseline", "task-vector", "--json")
    beside = json.loads(done("opinions", *arguments, *other).stdout)["results"]
    assert list(beside) == [*results, "task-vector"]
    assert beside["task-vector"] != beside["zero_shot"]
    table = done("opinions", *arguments, *other[:-1]).stdout
    assert "\ntask-vector: layer " in table
    message = refused(laai("opinions", *arguments, *options, "--baseline", "task-vector"), 2)
    assert "the 2 questions that few-shot prompts show, and needs four" in message
    table = done("opinions", *arguments, *options, "--alpha", 0.5, "--shots", 0).stdout
    assert "all: 4 held-out questions" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "training mean  0.000 [.00, .00]" in table
    assert "few-shot" not in table
    assert "Not saved: --out FOLDER" in table


def test_a_saved_opinion_fit_is_evaluated_on_the_same_questions_again(
    poll: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", "model", "--file", "poll.jsonl", "--group", "all", "--layer", 1)
    options = ("--train", 4, "--max-evaluations", 5, "--shots", 2, "--seed", 3, "--orders", 2)
    out = tmp_path / "opinion"
    first = json.loads(done("opinions", *arguments, *options, "--out", out, "--json").stdout)
    monkeypatch.chdir(tmp_path)  # from any folder
    shown = json.loads(done("evaluate", out, "--json").stdout)
    assert shown == {name: first[name] for name in ("group", "results", "layer")}
    table = done("evaluate", out, "--no-few-shot").stdout
    assert "all: 4 held-out questions" in table
    assert "few-shot" not in table
    assert "are for tasks" in refused(laai("evaluate", out, "--test", 3), 2)
    fitted = Intervention.from_pretrained(out)
    (0.5 * fitted + 0.5 * fitted).save_pretrained(tmp_path / "mean")
    assert json.loads(done("evaluate", tmp_path / "mean", "--json").stdout) == shown
    other = replace(fitted, provenance={**fitted.provenance, "split": {"train": 5}})
    (fitted + other).save_pretrained(tmp_path / "sum")
    message = refused(laai("evaluate", tmp_path / "sum"), 2)
    assert "not all fitted on the same questions" in message
    text = (poll / "poll.jsonl").read_text(encoding="utf-8")
    (poll / "poll.jsonl").write_text(text.replace("is a?", "is z?"), encoding="utf-8")
    assert "have changed since the fit" in refused(laai("evaluate", out), 2)
    (poll / "poll.jsonl").write_text(text, encoding="utf-8")


def test_opinions_choose_a_layer_by_cross_validation_over_questions(poll: Path) -> None:
    arguments = ("--model", "model", "--file", "poll.jsonl", "--group", "all", "--shots", 0)
    options = ("--orders", 2, "--max-evaluations", 5, "--out", "chosen", "--json")
    told = json.loads(done("opinions", *arguments, *options).stdout)
    provenance = Intervention.from_pretrained("chosen").provenance
    tried = {(row["layer"], row["alpha"]) for row in provenance["selection"]["table"]}
    assert tried == {(1, 0), (2, 0)}  # a third, a half and two thirds of three layers
    assert told["layer"] in (1, 2)
    assert provenance["solver"]["max_evaluations"] == 5
    assert provenance["solver"]["tolerance"] == 1e-6
    told = json.loads(done("opinions", *arguments, *options[:-3], "--alpha", 0.5, "--json").stdout)
    assert told["penalty"]["group"] > 0


def test_opinions_may_be_fitted_by_adam(poll: Path) -> None:
    words = ("opinions", "--model", "model", "--file", "poll.jsonl", "--group", "all", "--shots", 0)
    own = ("--max-evaluations", 5, "--learning-rate", 0.1, "--out", "by_adam")
    done(*words, "--layer", 1, *own)
    solver = Intervention.from_pretrained("by_adam").provenance["solver"]
    assert (solver["solver"], solver["learning_rate"]) == ("adam", 0.1)
    message = refused(laai(*words, *own), 2)
    assert "--learning-rate does not go with --layer auto: give it a number" in message


def test_more_questions_than_a_prompt_can_show_are_refused_before_the_fit(poll: Path) -> None:
    words = ("--model", "model", "--file", "poll.jsonl", "--group", "all", "--layer", 1)
    long = {"options": ["x", "y"], "group": "all", "distribution": [0.9, 0.1]}
    lines = [json.dumps(long | {"question": f"is {letter * 40}?"}) for letter in "abcdefgh"]
    (poll / "long.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ("opinions", *words[:3], "long.jsonl", *words[4:], "--train", 6)
    result = laai(*words)
    message = refused(result, 2)
    assert "show fewer demonstrations than 6 (--shots), or none (--shots 0)" in message
    assert "Fitting" not in result.stderr
    assert "Fitting" in done(*words, "--shots", 1, "--max-evaluations", 2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--group", "Whig"), "group must be one of ['Democrat', 'Independent', 'Republican'"),
        (("--group", "65+", "--train", 19), "--train 19 leaves 1 to hold out; give fewer"),
        (
            ("--group", "65+", "--train", 9, "--shots", 10),
            "--shots 10: few-shot prompts show fitted",
        ),
        (("--group", "65+", "--objective", "distill", "--shots", 1), "show two questions or more"),
        (("--group", "65+", "--outside-weight", "inf"), "--outside-weight is inf; give a number"),
        (
            ("--group", "65+", "--layer", 1, "--alpha", 0.5, "--learning-rate", 0.1),
            "--learning-rate is adam's, and --alpha is solved by proximal gradient",
        ),
        (("--group", "65+", "--baseline", "lora"), "--baseline lora: on opinions there are"),
        (("--group", "65+", "--layer", "x"), "--layer holds 'x'; give a number from 0, or auto"),
    ],
)
def test_opinions_that_cannot_be_fitted_are_refused(
    arguments: tuple[object, ...], message: str
) -> None:
    assert message in refused(laai("opinions", "--model", "none", *arguments), 2)


def test_opinions_are_not_saved_over_other_files_nor_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "chapter").write_text("mine", encoding="utf-8")
    for out, message in (
        (tmp_path, "holds something else than an intervention; give a new folder"),
        (tmp_path / "chapter", "chapter is a file; give a folder"),
        (tmp_path / "chapter" / "1", "1 cannot be written"),
    ):
        words = ("--model", "none", "--group", "65+", "--layer", 1, "--out", out)
        assert message in refused(laai("opinions", *words), 2)
    assert [file.name for file in tmp_path.iterdir()] == ["chapter"]
