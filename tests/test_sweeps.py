"""Sweeps on tiny models: rows of single fits, in the file whatever stops a sweep or a worker."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from tiny import tiny_hf, tiny_model, tiny_tokenizer

from tl_laai import sweep_units, sweeps
from tl_laai.evaluation import evaluate
from tl_laai.fitting import fit
from tl_laai.penalties import SparseGroupLasso
from tl_laai.prompts import PromptTemplate, TooLongError
from tl_laai.rows import append_rows, checked, only_writer, read_rows
from tl_laai.sweeps import sweep_layers
from tl_laai.tasks import Example, Split, Task

TESTS = Path(__file__).resolve().parent
LETTERS = "abcdefghijkl"
NEXT = Task("next", tuple(Example(a, b) for a, b in itertools.pairwise(LETTERS)))
CAPITAL = Task("capital", tuple(Example(a, a.upper()) for a in LETTERS), version="2")
QUICK: dict[str, Any] = {"n_train": 3, "n_test": 2, "max_evaluations": 3, "seeds": (0, 1)}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class DeadlyTask(Task):
    """Kills the process that splits it, the first time and at one seed; then the marker exists."""

    marker: str = ""

    def split(self, *, seed: int = 0, **sizes: Any) -> Split:
        if seed == 2 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().split(seed=seed, **sizes)


@pytest.fixture
def model(windowed: Any) -> Any:
    return windowed


@pytest.fixture
def bridge() -> Any:
    return oracle.shared_model("bridge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that workers can load by its path."""
    place = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_hf("llama", torch.float32).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "rows.jsonl"


def keys(rows: Rows) -> list[tuple[str, int, int]]:
    return [(row["task"], row["seed"], row["layer"]) for row in rows]


def in_order(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: (row["task"], row["seed"], row["layer"]))


def all_but(rows: Rows, *names: str) -> Rows:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


# --- what a row holds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "alone", "named"),
    [
        ({}, {"solver": "adam"}, "none"),
        ({"alpha": 0.6}, {"alpha": 0.6}, "0.6 lambda_max"),
        (
            {"penalty": SparseGroupLasso(0.01, 0.2), "position": "every_step"},
            {"penalty": SparseGroupLasso(0.01, 0.2), "position": "every_step"},
            "l1 0.01, group 0.2",
        ),
    ],
)
def test_rows_are_those_of_single_fits_and_their_evaluations(
    model: Any, out: Path, options: dict[str, Any], alone: dict[str, Any], named: str
) -> None:
    rows = sweep_layers(model, [NEXT, CAPITAL], out=out, layers=[2, 0], **(QUICK | options))
    assert keys(rows) == [
        (task, seed, layer) for task in ("next", "capital") for seed in (0, 1) for layer in (0, 2)
    ]
    assert read_rows(out) == rows == checked(rows, "sweep")
    for row in rows[::3]:
        task = {"next": NEXT, "capital": CAPITAL}[row["task"]]
        split = task.split(train=3, test=2, seed=row["seed"])
        own = fit(model, split.train, layer=row["layer"], max_evaluations=3, **alone)
        scored = evaluate(model, split.test, intervention=own.intervention)
        assert row["penalty"] == named
        assert row["exact_match"] == scored.exact_match
        assert row["n"] == scored.n == 2
        assert row["status"] == own.solution.status.value
        assert row["n_evaluations"] == own.solution.n_evaluations
        assert row["n_heads"] == own.intervention.n_heads_used
        for name, value in {
            "log_probability": scored.log_probability,
            "loss": own.solution.loss,
            "objective": own.solution.objective,
            "stationarity": own.solution.stationarity,
            "lambda_max": own.lambda_max,
            "norm": own.intervention.norm(),
        }.items():
            assert row[name] == pytest.approx(value, rel=1e-7), name
        assert row["model"] == "tiny-gemma"
        assert row["provenance"]["task"] == {
            "source": "",
            "version": task.version,
            "digest": task.digest,
        }
        assert set(row["provenance"]) == {"task", "versions", "backend", "dtype", "weights_hash"}
        assert row["settings"]["position"] == options.get("position", "prompt_end")


def test_without_a_list_of_layers_every_layer_is_swept(bridge: Any, out: Path) -> None:
    rows = sweep_layers(bridge, [NEXT], out=out, **QUICK)
    assert [row["layer"] for row in rows] == [0, 1, 2, 3] * 2


def test_a_model_may_be_named_and_a_task_too(folder: str, out: Path) -> None:
    options = QUICK | {"seeds": [4, 4], "layers": [1]}
    rows = sweep_layers(Path(folder), ["antonym", "antonym"], out=out, **options)
    assert [(row["model"], row["task"], row["seed"]) for row in rows] == [
        ("tiny-llama", "antonym", 4)
    ]


def test_fewer_examples_are_held_out_where_there_are_fewer(bridge: Any, out: Path) -> None:
    rows = sweep_layers(bridge, [NEXT], out=out, layers=[0], **(QUICK | {"n_test": 100}))
    assert [row["n"] for row in rows] == [8, 8]  # of 11


def test_unregularised_fits_take_a_fixed_number_of_steps_of_adam(bridge: Any, out: Path) -> None:
    options = QUICK | {"max_evaluations": None, "seeds": [0], "layers": [3]}
    [row] = sweep_layers(bridge, [NEXT], out=out, **options)
    assert row["n_evaluations"] == sweeps.UNREGULARISED_STEPS + 1
    assert row["settings"]["solver"] == "adam"
    options |= {"layers": [0], "solver": "proximal"}
    [row] = sweep_layers(bridge, [NEXT], out=out.with_name("proximal.jsonl"), **options)
    assert row["settings"]["max_evaluations"] == 150


def test_what_is_not_finite_is_null_in_a_row() -> None:
    assert sweep_units._finite(float("inf")) is None
    assert sweep_units._finite(0.5) == 0.5


def test_progress_counts_rows_from_those_that_are_there_to_all(bridge: Any, out: Path) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"out": out, "layers": [0, 1], "progress": lambda *n: told.append(n)}
    sweep_layers(bridge, [NEXT], **options, **(QUICK | {"seeds": [0]}))
    assert told == [(0, 2), (2, 2)]
    told.clear()
    sweep_layers(bridge, [NEXT], **options, **QUICK)
    assert told == [(2, 4), (4, 4)]
    told.clear()
    sweep_layers(bridge, [NEXT], **options, **QUICK)
    assert told == [(4, 4)]


# --- going on ------------------------------------------------------------------------------------


@functools.cache
def undisturbed(place: str) -> Rows:
    return sweep_layers(
        oracle.shared_model("bridge"), [NEXT, CAPITAL], out=Path(place), layers=[0, 2, 3], **QUICK
    )


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return undisturbed(str(tmp_path_factory.getbasetemp() / "undisturbed.jsonl"))


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 11])
def test_a_sweep_goes_on_behind_a_torn_line_with_the_same_rows(
    bridge: Any, out: Path, whole: Rows, kept: int
) -> None:
    append_rows(out, whole[: kept + 1])
    os.truncate(out, out.stat().st_size - 30)
    rows = sweep_layers(bridge, [NEXT, CAPITAL], out=out, layers=[0, 2, 3], **QUICK)
    assert rows == read_rows(out) == whole


def test_what_is_done_is_not_done_again(
    bridge: Any, out: Path, whole: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    run_unit = sweeps.run_unit

    def watched(model: Any, unit: Any) -> Rows:
        done.append((unit.task.name, unit.seed))
        if len(done) == 2:
            raise KeyboardInterrupt
        return run_unit(model, unit)

    monkeypatch.setattr(sweeps, "run_unit", watched)
    options = QUICK | {"out": out, "layers": [0, 2, 3]}
    with pytest.raises(KeyboardInterrupt):
        sweep_layers(bridge, [NEXT, CAPITAL], **options)
    assert read_rows(out) == whole[:3]
    assert sweep_layers(bridge, [NEXT, CAPITAL], **options) == whole
    assert done == [("next", 0), ("next", 1), ("next", 1), ("capital", 0), ("capital", 1)]
    assert read_rows(out) == whole


def test_more_tasks_seeds_and_layers_may_join_a_file(bridge: Any, out: Path, whole: Rows) -> None:
    sweep_layers(bridge, [CAPITAL], out=out, layers=[2], **(QUICK | {"seeds": [1]}))
    append_rows(out, [{"kind": "attribution", "note": "another kind is left alone"}])
    rows = sweep_layers(bridge, [NEXT, CAPITAL], out=out, layers=[0, 2, 3], **QUICK)
    assert keys(rows) == keys(whole)
    # To rounding: one of them was fitted in another batch.
    assert [row["objective"] for row in rows] == pytest.approx([r["objective"] for r in whole])
    assert len(read_rows(out)) == len(whole) + 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"n_train": 4}, "other n_train"),
        ({"n_test": 3}, "other n_test"),
        ({"alpha": 0.5}, "other alpha, solver"),
        ({"penalty": SparseGroupLasso(0.1, 0.2)}, "other l1, group, solver"),
        ({"max_evaluations": 4}, "other max_evaluations"),
        ({"learning_rate": 0.1000001}, "other learning_rate"),
        ({"tolerance": 1e-4}, "other tolerance"),
        ({"position": "every_step"}, "other position"),
        ({"template": PromptTemplate(text="{input}:")}, "other template"),
        ({"tasks": [replace(NEXT, examples=NEXT.examples[:-1])]}, r"other examples \(task 'next'"),
    ],
)
def test_a_file_of_another_sweep_is_refused_and_not_touched(
    bridge: Any, out: Path, whole: Rows, change: dict[str, Any], what: str
) -> None:
    append_rows(out, whole)
    before = out.read_bytes()
    options = {"tasks": [NEXT], "layers": [0], "out": out, **QUICK, **change}
    with pytest.raises(ValueError, match=rf"rows of a sweep with {what}.*give another file"):
        sweep_layers(bridge, options.pop("tasks"), **options)
    assert out.read_bytes() == before


def test_rows_of_another_model_are_refused(bridge: Any, out: Path, whole: Rows) -> None:
    append_rows(out, whole)
    for other, what in (
        (tiny_model("bridge", "llama"), "other model"),
        (tiny_model("bridge", "gemma", seed=1), "other weights of the model"),
    ):
        with pytest.raises(ValueError, match=what):
            sweep_layers(other, [NEXT], out=out, layers=[0], **QUICK)


def test_rows_that_no_sweep_wrote_are_refused(bridge: Any, out: Path, whole: Rows) -> None:
    append_rows(out, all_but(whole, "settings", "provenance"))
    with pytest.raises(ValueError, match="rows of a sweep with other model"):
        sweep_layers(bridge, [NEXT], out=out, layers=[0], **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, r"rows\.jsonl' is not of one sweep: rows\[0\] .* has task = None"),
        ({"settings": [1]}, "of a sweep with other model.*give another file"),
        ({"provenance": None}, "of a sweep with other provenance, examples .*give another file"),
        ({"provenance": {"weights_hash": ""}}, "other weights of the model, examples"),
    ],
)
def test_rows_that_were_edited_are_refused(
    bridge: Any, out: Path, whole: Rows, change: dict[str, Any], message: str
) -> None:
    append_rows(out, [whole[0] | change])
    with pytest.raises(ValueError, match=message):
        sweep_layers(bridge, [NEXT], out=out, layers=[0], **QUICK)


def test_rows_of_another_dtype_are_refused(bridge: Any, out: Path, whole: Rows) -> None:
    origin = whole[0]["provenance"]
    assert origin["dtype"] == "float64"
    append_rows(out, [whole[0] | {"provenance": origin | {"dtype": "bfloat16"}}])
    with pytest.raises(ValueError, match=r"of a sweep with other dtype of the model \("):
        sweep_layers(bridge, [NEXT], out=out, layers=[0], **QUICK)


def test_a_task_may_be_given_as_a_path(bridge: Any, out: Path, tmp_path: Path) -> None:
    pairs = [{"input": a, "output": a.upper()} for a in LETTERS]
    (tmp_path / "upper.json").write_text(json.dumps(pairs), encoding="utf-8")
    options = QUICK | {"out": out, "layers": [0], "seeds": [0]}
    rows = sweep_layers(bridge, [tmp_path / "upper.json"], **options)
    assert [row["task"] for row in rows] == ["upper"]
    assert sweep_layers(bridge, [str(tmp_path / "upper.json")], **options) == rows


def test_one_task_may_be_given_alone(bridge: Any, out: Path) -> None:
    options = QUICK | {"out": out, "layers": [0], "seeds": [0]}
    rows = sweep_layers(bridge, NEXT, **options)
    assert [row["task"] for row in rows] == ["next"]
    assert sweep_layers(bridge, (task for task in [NEXT]), **options) == rows
    with pytest.raises(ValueError, match="got 'no-such-task'"):
        sweep_layers(bridge, "no-such-task", **options)


def test_an_example_without_room_is_told_before_anything_is_fitted(
    bridge: Any, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_units, "fit_many", lambda *_, **__: pytest.fail("fitted"))
    long = Task("long", (*NEXT.examples, Example("z" * bridge.cfg.n_ctx, "a")))
    with pytest.raises(TooLongError, match=r"task 'long', seed \d: the prompt .* take"):
        sweep_layers(bridge, [NEXT, long], out=out, layers=[0], **QUICK | {"n_test": 9})


def test_two_sweeps_never_write_one_file_at_once(bridge: Any, out: Path) -> None:
    with only_writer(out), pytest.raises(ValueError, match="is being written by another process"):
        sweep_layers(bridge, [NEXT], out=out, layers=[0], **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "tasks, seeds and layers must each hold at least one"),
        ({"seeds": []}, "tasks, seeds and layers must each hold at least one"),
        ({"layers": []}, "tasks, seeds and layers must each hold at least one"),
        ({"layers": [9]}, "layer is 9; this model has layers 0 to 3"),
        ({"n_train": 11}, "n_train is 11 and n_test 2: task 'next' has 11 distinct inputs"),
        ({"n_test": 0}, "n_train is 3 and n_test 0"),
        ({"tasks": [NEXT, replace(CAPITAL, name="next")]}, "two different ones named 'next'"),
        ({"tasks": ["no-such-task"]}, "task must be a file or one of"),
        ({"penalty": SparseGroupLasso(0, 1), "alpha": 0.5}, "penalty and alpha are both given"),
        ({"executor": ThreadPoolExecutor(1)}, "workers load models by name"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(
    bridge: Any, out: Path, change: dict[str, Any], message: str
) -> None:
    options = {"tasks": [NEXT], "out": out, **QUICK, **change}
    with pytest.raises(ValueError, match=message):
        sweep_layers(bridge, options.pop("tasks"), **options)


def test_a_sweep_killed_twenty_times_has_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(TESTS / "killed_sweeps.py"), str(tmp_path), "20"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    sizes = run.stdout.split()
    assert len(sizes) == 20
    assert len(set(sizes)) > 5  # not all at the same place
    rows = read_rows(tmp_path / "undisturbed.jsonl")
    assert read_rows(tmp_path / "killed.jsonl") == rows
    assert len(rows) == 2 * 15 * 3


# --- executors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_name(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What every executor must come to."""
    place = tmp_path_factory.mktemp("rows") / "here.jsonl"
    return sweep_layers(folder, [NEXT], out=place, **(QUICK | {"seeds": range(5)}))


def assert_agree(rows: Rows, expected: Rows) -> None:
    """The same rows, but for the last digits: another process may use other threads."""
    numbers = ("log_probability", "loss", "objective", "lambda_max", "norm")
    approximate = (*numbers, "stationarity")
    assert keys(rows) == keys(expected)
    assert all_but(rows, *approximate) == all_but(expected, *approximate)
    for name in numbers:
        assert [row[name] for row in rows] == pytest.approx([r[name] for r in expected], rel=1e-4)


def test_threads_take_turns_with_their_one_model(
    folder: str, out: Path, by_name: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_unit, inside, most = sweep_units.run_unit, [0], [0]

    def watched(model: Any, unit: Any) -> Rows:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)  # lets another thread in, if it may
        rows = run_unit(model, unit)
        inside[0] -= 1
        return rows

    monkeypatch.setattr(sweep_units, "run_unit", watched)
    with ThreadPoolExecutor(4) as pool:
        options = QUICK | {"seeds": range(5), "out": out, "executor": pool}
        assert_agree(sweep_layers(folder, [NEXT], **options), by_name)
    assert most == [1]
    assert_agree(in_order(read_rows(out)), by_name)


def test_a_pool_of_processes_with_a_killed_worker_says_how_to_go_on_and_does(
    folder: str, out: Path, by_name: Rows, tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    deadly = DeadlyTask(**vars_of(NEXT), marker=str(tmp_path / "died"))
    options = QUICK | {"seeds": range(5), "out": out}
    with ProcessPoolExecutor(1, spawn) as pool:
        message = r"a worker died: .*rows\.jsonl keeps the rows that are done; the same command"
        with pytest.raises(RuntimeError, match=message):
            sweep_layers(folder, [deadly], executor=pool, **options)
    before = read_rows(out)
    assert keys(before) == keys(by_name)[:6]  # seeds 0 and 1
    with ProcessPoolExecutor(1, spawn) as pool:
        rows = sweep_layers(folder, [deadly], executor=pool, **options)
    assert_agree(rows, by_name)
    written = read_rows(out)
    assert written[:6] == before
    assert in_order(written) == rows


def test_dask_survives_a_killed_worker(
    folder: str, out: Path, by_name: Rows, tmp_path: Path
) -> None:
    distributed = pytest.importorskip("distributed")
    deadly = DeadlyTask(**vars_of(NEXT), marker=str(tmp_path / "died"))
    with (
        distributed.LocalCluster(
            n_workers=2, processes=True, threads_per_worker=2, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        options = QUICK | {"seeds": range(5), "out": out, "executor": client.get_executor()}
        rows = sweep_layers(folder, [deadly], **options)
    assert (tmp_path / "died").exists()
    assert_agree(rows, by_name)
    assert in_order(read_rows(out)) == rows


def vars_of(task: Task) -> dict[str, Any]:
    names = ("name", "examples", "version", "description", "source")
    return {name: getattr(task, name) for name in names}


def test_an_error_in_a_worker_is_the_callers(folder: str, out: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="layer is 7; this model"):
        sweep_layers(folder, [NEXT], out=out, layers=[7], executor=pool, **QUICK)
    assert out.read_bytes() == b""


def test_an_executor_that_is_shut_down_under_a_sweep_loses_no_row(folder: str, out: Path) -> None:
    pool = ThreadPoolExecutor(1)
    options = QUICK | {"seeds": range(5), "out": out}

    def shut_down(done: int, total: int) -> None:
        if done:
            pool.shutdown(wait=False, cancel_futures=True)

    with pytest.raises(CancelledError):
        sweep_layers(folder, [NEXT], executor=pool, progress=shut_down, **options)
    done = len(read_rows(out))
    assert 0 < done < 15
    assert done % 3 == 0
    assert len(sweep_layers(folder, [NEXT], **options)) == 15


def test_rows_are_json_whatever_the_penalty_is_made_of(bridge: Any, out: Path) -> None:
    penalty = SparseGroupLasso(torch.tensor(0.25), torch.tensor(0.5))
    [row] = sweep_layers(
        bridge, [NEXT], out=out, layers=[0], penalty=penalty, **(QUICK | {"seeds": [0]})
    )
    assert json.loads(out.read_text()) == row
    assert row["penalty"] == "l1 0.25, group 0.5"


def test_numbers_of_numpy_become_json_in_rows(bridge: Any, out: Path) -> None:
    options = {"n_train": np.int64(3), "n_test": np.int64(2), "max_evaluations": np.int64(2)}
    rows = sweep_layers(
        bridge, [NEXT], out=out, layers=np.arange(2), seeds=np.arange(1), alpha=np.float32(0.5),
        tolerance=np.float32(0.5), learning_rate=np.float32(0.5), **options,
    )  # fmt: skip
    assert read_rows(out) == rows
    assert keys(rows) == [("next", 0, 0), ("next", 0, 1)]
    again = sweep_layers(
        bridge, [NEXT], out=out, layers=[1, 0], seeds=[0], alpha=0.5, tolerance=0.5,
        learning_rate=0.5, n_train=3, n_test=2, max_evaluations=2,
    )  # fmt: skip
    assert again == rows


@pytest.mark.parametrize(
    "options", [{"layers": [True]}, {"seeds": [0.5]}, {"n_train": "3"}, {"max_evaluations": 2.5}]
)
def test_what_is_no_integer_is_refused(bridge: Any, out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(options))} is .*; give an integer"):
        sweep_layers(bridge, [NEXT], out=out, **(QUICK | options))
