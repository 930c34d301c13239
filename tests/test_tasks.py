"""Tests of tasks: what the built-in data promise, the readers, and the splits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_laai.tasks import (
    Example,
    Split,
    Task,
    available_tasks,
    check_disjoint,
    load_task,
    same_input_key,
)

BUILT_IN = (
    "antonym",
    "capitalize",
    "country-capital",
    "english-french",
    "english-german",
    "present-past",
    "singular-plural",
    "synonym",
)
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tl_laai" / "data"
PAIRS = [{"input": "Kenya", "output": "Nairobi"}, {"input": "Peru", "output": "Lima"}]
EXAMPLES = (Example("Kenya", "Nairobi"), Example("Peru", "Lima"))


def numbers(count: int) -> Task:
    """A task with that many distinct inputs."""
    return Task("double", tuple(Example(str(i), str(2 * i)) for i in range(count)))


def write(folder: Path, text: str, name: str = "mine.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def in_a_fresh_interpreter(code: str) -> str:
    """What the code prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


# --- Built-in tasks


def test_the_eight_promised_tasks_are_built_in() -> None:
    assert available_tasks() == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_has_150_clean_pairs_with_unique_inputs(name: str) -> None:
    raw = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    task = Task.load(name)
    assert task.name == raw["name"] == name
    assert len(task) == len(raw["examples"]) >= 150
    assert len({same_input_key(example.input) for example in task.examples}) == len(task)
    assert task.distinct == task.examples
    for pair, example in zip(raw["examples"], task.examples, strict=True):
        assert set(pair) == {"input", "output"}
        assert (pair["input"], pair["output"]) == (example.input, example.output)
        assert pair["input"] == pair["input"].strip() != ""
        assert pair["output"] == pair["output"].strip() != ""
        assert "\n" not in pair["input"] + pair["output"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_says_what_it_is_and_where_it_came_from(name: str) -> None:
    task = Task.load(name)
    assert task.source == "built-in"
    assert task.version
    assert task.description.endswith(".")


def test_an_unknown_built_in_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'country-capital'.*got 'capitals'"):
        Task.load("capitals")


def test_a_built_in_name_cannot_walk_out_of_the_data_folder() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        Task.load("../data/antonym")


# --- Examples and tasks


@pytest.mark.parametrize("field", ["input", "output"])
@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_an_example_with_an_empty_side_is_refused(field: str, blank: str) -> None:
    fields = {"input": "a", "output": "b"} | {field: blank}
    with pytest.raises(ValueError, match=f"{field} must not be empty"):
        Example(**fields)


@pytest.mark.parametrize("field", ["input", "output"])
def test_half_a_character_is_refused(field: str) -> None:
    texts = {"input": "a", "output": "b", field: "ok \ud83d there"}
    with pytest.raises(ValueError, match=rf"{field} holds half a character, '\\ud83d' in 'ok "):
        Example(**texts)


def test_an_example_that_is_not_text_is_refused() -> None:
    with pytest.raises(TypeError, match="output must be text, got 5"):
        Example("five", 5)  # type: ignore[arg-type]  # the wrong type is the point


def test_an_output_of_several_lines_is_refused_and_an_input_of_them_is_not() -> None:
    with pytest.raises(ValueError, match=r"output must be one line.*got 'Nairobi\\nyes'; give"):
        Example("Kenya", "Nairobi\nyes")
    assert Example("Ke\nnya", "Nairobi\n").input == "Ke\nnya"


def test_an_empty_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task 'void' has no examples"):
        Task("void", ())


def test_a_task_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name must not be empty"):
        Task(" ", EXAMPLES)


def test_the_digest_depends_on_the_examples_and_their_order_and_on_nothing_else() -> None:
    task = Task("capitals", EXAMPLES)
    assert len(task.digest) == 16
    assert task.digest == Task("other", EXAMPLES, version="2", source="x").digest
    assert task.digest != Task("capitals", EXAMPLES[::-1]).digest
    assert task.digest != Task("capitals", EXAMPLES[:1]).digest
    # No pair of examples runs into the next one: where a text ends enters the hash.
    assert Task("t", (Example("ab", "c"),)).digest != Task("t", (Example("a", "bc"),)).digest


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from tl_laai.tasks import Task; print(Task.load('english-french').digest)"
    assert in_a_fresh_interpreter(code) == Task.load("english-french").digest


def test_importing_tasks_loads_neither_torch_nor_datasets() -> None:
    code = "import sys, tl_laai.tasks; print({'torch', 'datasets'} & set(sys.modules))"
    assert in_a_fresh_interpreter(code) == "set()"


# --- Files


def as_list() -> str:
    return json.dumps(PAIRS)


def as_object() -> str:
    return json.dumps({"examples": PAIRS})


def as_lines() -> str:
    return "\n".join(json.dumps(pair) for pair in PAIRS) + "\n\n"


@pytest.mark.parametrize("layout", [as_list, as_object, as_lines])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n"])
def test_every_layout_reads_the_same_whatever_the_suffix(
    tmp_path: Path, layout: object, suffix: str, start: str
) -> None:
    assert callable(layout)
    path = write(tmp_path, start + layout(), f"capitals{suffix}")
    task = Task.from_json(path)
    assert task.examples == EXAMPLES
    assert task.name == "capitals"
    assert task.source == str(path)


def test_lines_end_as_on_windows_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(as_lines().replace("\n", "\r\n").encode())
    assert Task.from_json(path).examples == EXAMPLES


def test_a_single_line_is_json_lines_too(tmp_path: Path) -> None:
    assert Task.from_json(write(tmp_path, json.dumps(PAIRS[0]))).examples == EXAMPLES[:1]


def test_an_object_on_one_line_or_many_may_name_and_describe_the_task(tmp_path: Path) -> None:
    about = {"name": "capitals", "version": 3, "description": "Capitals.", "examples": PAIRS}
    for indent in (None, 2):
        task = Task.from_json(write(tmp_path, json.dumps(about, indent=indent)))
        assert (task.name, task.version, task.description) == ("capitals", "3", "Capitals.")
        assert task.examples == EXAMPLES


def test_white_space_around_texts_is_dropped_and_other_keys_are_ignored(tmp_path: Path) -> None:
    pair = {"input": " Kenya\n", "output": " Nairobi", "id": 7}
    assert Task.from_json(write(tmp_path, json.dumps([pair]))).examples == EXAMPLES[:1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "truncated, or not JSON"),
        (as_list()[:-10], "truncated, or not JSON"),
        (as_object()[:-10], "truncated, or not JSON"),
        (as_lines().strip()[:-5], "line 2: truncated, or not JSON"),
        ("country,capital\nKenya,Nairobi\n", "truncated, or not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected a non-empty list"),
        ('{"examples": []}', "expected a non-empty list"),
        ('{"examples": {"Kenya": "Nairobi"}}', "expected a non-empty list"),
        ('"Kenya"', "expected a non-empty list"),
        ("null", "expected a non-empty list"),
        ('{"a": 1}', "example 1: expected an object"),
        ('["Kenya"]', "example 1: expected an object"),
        ('[{"input": "Kenya"}]', "example 1: expected an object"),
        (json.dumps([PAIRS[0], {"input": "Peru", "output": " "}]), "example 2: output must not"),
        (json.dumps([PAIRS[0], {"input": 5, "output": "x"}]), "example 2: input must be text"),
        (json.dumps([{"input": "x", "output": ["a", "b"]}]), "example 1: output must be text"),
        (json.dumps([PAIRS[0], {"input": "x", "output": "a\nb"}]), "example 2: output must be one"),
    ],
)
def test_a_truncated_or_foreign_file_is_refused_in_one_line_that_opens_with_its_path(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=complaint) as caught:
        Task.from_json(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_a_binary_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="not UTF-8 text at byte 4") as caught:
        Task.from_json(path)
    assert str(caught.value).startswith(str(path))


def test_load_task_takes_a_built_in_name_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_task("antonym") == Task.load("antonym")
    path = write(tmp_path, as_list())
    assert load_task(path) == load_task(str(path)) == Task.from_json(path)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, as_list(), "antonym")
    assert load_task("antonym").source == "built-in"
    assert load_task("./antonym").examples == EXAMPLES


def test_load_task_refuses_what_is_neither_a_name_nor_a_file() -> None:
    with pytest.raises(ValueError, match=r"one of .*'synonym'.*got 'nosuch.json'"):
        load_task("nosuch.json")


# --- Datasets


def test_a_task_is_read_from_two_columns_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"country": ["Kenya ", "Peru"], "capital": [" Nairobi", "Lima"], "area": [1, 2]}
    )
    task = Task.from_dataset(rows, input="country", output="capital", name="capitals")
    assert task == Task("capitals", EXAMPLES, source="datasets")
    assert Task.from_dataset(rows, input="country", output="capital").name == "dataset"
    with pytest.raises(ValueError, match=r"input must be one of .*'country'.*got 'input'"):
        Task.from_dataset(rows, output="capital")
    with pytest.raises(ValueError, match=r"'dataset', row 0: output must be text, got 1"):
        Task.from_dataset(rows, input="country", output="area")
    with pytest.raises(TypeError, match=r"got DatasetDict; choose one split"):
        Task.from_dataset(datasets.DatasetDict(train=rows))


# --- Splits


sizes = st.integers(0, 40)
seeds = st.integers(0, 2**64)


@given(
    train=sizes, validation=sizes, test=st.none() | sizes, seed=seeds, total=st.integers(120, 150)
)
@settings(deadline=None, max_examples=50)
def test_a_split_has_the_sizes_asked_for_and_shares_no_input(
    train: int, validation: int, test: int | None, seed: int, total: int
) -> None:
    task = numbers(total)
    split = task.split(train=train, validation=validation, test=test, seed=seed)
    remaining = total - train - validation
    assert len(split.train) == train
    assert len(split.validation) == validation
    assert len(split.test) == (remaining if test is None else test)
    drawn = split.train + split.validation + split.test
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(task.examples)


@pytest.mark.parametrize("name", BUILT_IN)
@given(train=sizes, validation=sizes, seed=seeds)
@settings(deadline=None, max_examples=10)
def test_the_splits_of_a_built_in_task_are_disjoint(
    name: str, train: int, validation: int, seed: int
) -> None:
    task = Task.load(name)
    split = task.split(train=train, validation=validation, seed=seed)
    keys = [
        {example.input.strip().lower() for example in side}
        for side in (split.train, split.validation, split.test)
    ]
    assert sum(map(len, keys)) == len(set.union(*keys)) == len(task)


@given(small=sizes, more=sizes, validation=sizes, test=sizes, seed=seeds)
@settings(deadline=None, max_examples=50)
def test_a_larger_train_extends_a_smaller_one_and_leaves_test_and_validation_alone(
    small: int, more: int, validation: int, test: int, seed: int
) -> None:
    task = numbers(160)
    one = task.split(train=small, validation=validation, test=test, seed=seed)
    two = task.split(train=small + more, validation=validation, test=test, seed=seed)
    assert two.train[:small] == one.train
    assert two.test == one.test
    assert two.validation == one.validation


@given(test=sizes, more=sizes, seed=seeds)
@settings(deadline=None, max_examples=20)
def test_a_larger_test_set_extends_a_smaller_one(test: int, more: int, seed: int) -> None:
    task = numbers(100)
    one = task.split(train=5, test=test, seed=seed)
    two = task.split(train=5, test=test + more, seed=seed)
    everything = task.split(train=5, seed=seed)
    assert two.test[:test] == one.test
    assert everything.test[: test + more] == two.test


def test_the_whole_task_can_be_used_up_exactly() -> None:
    split = numbers(10).split(train=6, validation=1, test=3)
    assert len({*split.train, *split.validation, *split.test}) == 10
    assert numbers(10).split(train=10).test == ()


def test_a_split_does_not_depend_on_the_global_random_state() -> None:
    task = numbers(50)
    drawn = set()
    for state in range(5):
        random.seed(state)
        drawn.add(task.split(train=10, validation=5, seed=4))
    assert len(drawn) == 1


def test_a_split_does_not_move_the_global_random_state() -> None:
    # In a fresh interpreter: the run-time type checker of the tests draws from that state itself.
    assert (
        in_a_fresh_interpreter(
            "import random; from tl_laai.tasks import Task; before = random.getstate();"
            "Task.load('antonym').split(train=10, seed=4); print(random.getstate() == before)"
        )
        == "True"
    )


def test_different_seeds_draw_different_sets() -> None:
    task = numbers(50)
    drawn = {task.split(train=10, seed=seed).train for seed in range(20)}
    assert len(drawn) == 20


def test_a_known_seed_draws_known_examples() -> None:
    """Pins the order: a change would silently change every published split."""
    drawn = Task.load("country-capital").split(train=3, test=2, seed=0)
    assert [example.input for example in drawn.train] == ["Cyprus", "Turkey", "Colombia"]
    assert [example.input for example in drawn.test] == ["Liechtenstein", "Samoa"]


@given(seed=seeds, train=st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_one_input_with_several_outputs_stays_on_one_side_with_its_first_output(
    seed: int, train: int
) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    task = Task(
        "synonym",
        (
            Example("big", "large"),
            Example(" BIG ", "huge"),
            Example("fast", "quick"),
            Example("big", "vast"),
            Example(composed, "coffee house"),
            Example(decomposed, "bistro"),
        ),
    )
    split = task.split(train=train, seed=seed)
    assert {*split.train, *split.test} == {
        Example("big", "large"),
        Example("fast", "quick"),
        Example(composed, "coffee house"),
    }
    assert len(split.train) + len(split.test) == 3


@pytest.mark.parametrize("asked", [(8, 0, 3), (11, 0, None), (6, 5, None), (0, 0, 11)])
def test_fewer_examples_than_asked_for_is_refused_with_the_numbers(
    asked: tuple[int, int, int | None],
) -> None:
    train, validation, test = asked
    with pytest.raises(ValueError, match="'double' has 10 distinct inputs, fewer than 11 asked"):
        numbers(10).split(train=train, validation=validation, test=test)


@pytest.mark.parametrize("argument", ["train", "validation", "test", "seed"])
def test_negative_and_fractional_numbers_are_refused(argument: str) -> None:
    sound = {"train": 1, "validation": 1, "test": 1, "seed": 1}
    with pytest.raises(ValueError, match=f"{argument} must be 0 or more, got -1"):
        numbers(10).split(**sound | {argument: -1})
    for wrong in (0.5, True, "1"):
        with pytest.raises(TypeError, match=f"{argument} is .*; give an integer"):
            numbers(10).split(**sound | {argument: wrong})  # type: ignore[arg-type]  # the point


def test_integers_of_numpy_split_as_pythons_do() -> None:
    sound = {"train": 2, "validation": 1, "test": 3, "seed": 4}
    given = {name: np.int64(value) for name, value in sound.items()}
    assert numbers(10).split(**given) == numbers(10).split(**sound)


def test_overlapping_sets_are_refused_by_the_inputs_that_they_share() -> None:
    check_disjoint(EXAMPLES[:1], EXAMPLES[1:])
    with pytest.raises(ValueError, match=r"both have \[' kenya'\]; remove"):
        check_disjoint(EXAMPLES, [Example(" kenya", "Nairobi"), Example("Chad", "N'Djamena")])
    with pytest.raises(ValueError, match=r"'4'\] and 5 more; remove"):
        check_disjoint(numbers(10).examples, numbers(10).examples)


@pytest.mark.parametrize("sides", [(0, 1), (0, 2), (1, 2)])
def test_a_split_with_overlapping_sides_cannot_be_made(sides: tuple[int, int]) -> None:
    sets: list[tuple[Example, ...]] = [(), (), ()]
    for side in sides:
        sets[side] = EXAMPLES
    with pytest.raises(ValueError, match="must not share inputs"):
        Split(*sets)
