"""Interventions: the models that they refuse, their algebra, and their files."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import BACKENDS, POSITIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

from tl_laai.artifacts import CONFIG_FILE, TENSORS_FILE, load_artifact
from tl_laai.fingerprints import fingerprint
from tl_laai.interventions import Intervention

# ------------------------------------------------------------------------------------ another model


def test_another_model_is_refused_unless_told_otherwise(backend: str) -> None:
    model, other = oracle.shared_model(backend, "gpt2"), tiny_model(backend, "gpt2", seed=1)
    intervention = Intervention(oracle.random_deltas(), fingerprint=fingerprint(model))
    before = oracle.state_of(other)
    with (
        pytest.raises(ValueError, match=r"not the one .* was fitted on: .*strict=False"),
        intervention.applied_to(other),
    ):
        pytest.fail("entered the block")
    assert oracle.state_of(other) == before
    tokens = oracle.random_tokens(1, 4)
    for target, strict in ((model, True), (other, False)):
        with intervention.applied_to(target, strict=strict):
            changed = target(tokens)
        assert not torch.equal(changed, target(tokens))


@pytest.mark.parametrize(
    "deltas", [{3: torch.ones(4, 8)}, {0: torch.ones(2, 8)}, {0: torch.ones(4, 16)}]
)
@pytest.mark.parametrize("strict", [True, False])
def test_layers_and_heads_that_a_model_lacks_are_always_refused(
    deltas: dict[int, Tensor], strict: bool
) -> None:
    model = oracle.shared_model("bridge", "gpt2")
    with (
        pytest.raises(ValueError, match=r"model has 3 layers of .* = \(4, 8\), but the interv"),
        Intervention(deltas).applied_to(model, strict=strict),
    ):
        pytest.fail("entered the block")


def test_interventions_of_different_models_are_added_only_when_told_to() -> None:
    marks = [fingerprint(oracle.shared_model("bridge", "gpt2", seed)) for seed in (0, 1)]
    first, second = (Intervention(oracle.random_deltas(), fingerprint=mark) for mark in marks)
    with pytest.raises(ValueError, match=r"different models are not added: .*strict=False"):
        _ = first + second
    total = first.add(second, strict=False)
    assert total.fingerprint == marks[0]
    assert torch.equal(total.deltas[1], 2 * first.deltas[1])
    unknown = Intervention(oracle.random_deltas())
    assert (unknown + second).fingerprint == marks[1]
    assert (second + unknown).fingerprint == marks[1]


# ------------------------------------------------------------------------------------------ algebra

small_integers = st.lists(st.integers(-9, 9), min_size=6, max_size=6)
deltas_strategy = st.dictionaries(st.integers(0, 3), small_integers, min_size=1).map(
    lambda rows: {n: torch.tensor(row, dtype=torch.float64).view(2, 3) for n, row in rows.items()}
)
interventions = deltas_strategy.map(Intervention)
few = settings(deadline=None, max_examples=40)


@few
@given(interventions, interventions, interventions, st.sampled_from([-2, 0.5, 3]))
def test_addition_and_scaling_keep_the_laws_of_a_vector_space(
    a: Intervention, b: Intervention, c: Intervention, factor: float
) -> None:
    # Small integers and halves: float64 arithmetic on them is exact, so the laws are too.
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + a.zeros_like() == a
    assert a - a == a.zeros_like()
    assert a - b == a + (-b)
    assert -1 * (-a) == a
    assert -a == -1 * a
    assert factor * (a + b) == factor * a + factor * b
    assert a * factor == factor * a
    assert (a * 4) / 4 == a
    assert a + a == 2 * a


@few
@given(interventions, interventions)
def test_a_sum_has_the_layers_of_both_and_entrywise_sums(a: Intervention, b: Intervention) -> None:
    total = a + b
    assert total.layers == tuple(sorted({*a.layers, *b.layers}))
    for layer in total.layers:
        parts = [x.deltas[layer] for x in (a, b) if layer in x.deltas]
        assert torch.equal(total.deltas[layer], torch.stack(parts).sum(0))


@few
@given(interventions, st.data())
def test_chosen_heads_and_the_rest_add_up_to_the_whole(a: Intervention, data: Any) -> None:
    pairs = [(layer, head) for layer in a.layers for head in range(2)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True))
    kept, rest = a.only_heads(chosen), a.without_heads(chosen)
    assert kept + rest == a
    assert {(h.layer, h.head) for h in kept.heads()} <= set(chosen)
    assert not {(h.layer, h.head) for h in rest.heads()} & set(chosen)
    for part in (kept, rest):  # exactly zero, not minus zero
        for delta in part.deltas.values():
            assert not torch.signbit(delta[delta == 0]).any()


@few
@given(interventions)
def test_heads_lists_what_a_loop_finds_by_falling_norm(a: Intervention) -> None:
    expected = {}
    for layer, delta in a.deltas.items():
        for head in range(2):
            norm = sum(x * x for x in delta[head].tolist()) ** 0.5
            if norm > 0:
                expected[layer, head] = norm
    found = a.heads()
    assert {(h.layer, h.head): h.norm for h in found} == pytest.approx(expected)
    assert [h.norm for h in found] == sorted((h.norm for h in found), reverse=True)
    assert a.n_heads_used == len(expected)
    assert a.norm() == pytest.approx(sum(n * n for n in expected.values()) ** 0.5)
    assert a.only_heads(found) == a
    numpys = a.only_heads([(np.int64(h.layer), np.int64(h.head)) for h in found])
    assert numpys == a
    assert numpys.provenance == a.only_heads(found).provenance
    for layer in a.layers:
        assert a.heads(layer) == [h for h in found if h.layer == layer]


def test_equality_looks_at_tensors_dtype_rule_and_model_but_not_at_provenance() -> None:
    delta, mark = torch.ones(4, 8), fingerprint(oracle.shared_model("bridge", "gpt2"))
    one = Intervention({1: delta}, provenance={"seed": 0})
    assert one == Intervention({1: delta}, provenance={"seed": 1})
    assert one != Intervention({1: delta * (1 + 1e-6)})
    assert one != Intervention({2: delta})
    assert one != Intervention({1: delta, 2: delta})
    assert one != Intervention({1: delta.double()})
    assert one != Intervention({1: delta}, position="every_step")
    assert one != Intervention({1: delta}, fingerprint=mark)
    assert one != 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_the_built_in_sum_adds_several() -> None:
    one = Intervention({0: torch.ones(2, 3)})
    assert sum([one, one]) == one + one  # type: ignore[comparison-overlap]  # sum's type is wide
    with pytest.raises(TypeError):
        0.5 + one


def test_provenance_of_a_sum_and_of_a_multiple_tells_the_parts() -> None:
    a = Intervention({0: torch.ones(2, 3)}, provenance={"task": "a"})
    b = Intervention({0: torch.ones(2, 3)}, provenance={"task": "b"})
    assert dict((a + b).provenance) == {
        "operation": "add",
        "parts": [{"task": "a"}, {"task": "b"}],
    }
    half = dict((a / 2).provenance)
    assert half == {"operation": "divide", "argument": 2, "parts": [{"task": "a"}]}
    kept = dict(a.only_heads([(0, 1)]).provenance)
    assert kept == {"operation": "only_heads", "argument": [[0, 1]], "parts": [{"task": "a"}]}


def test_different_rules_shapes_and_types_are_not_added_or_multiplied() -> None:
    a = Intervention({0: torch.ones(2, 3)})
    with pytest.raises(ValueError, match="'prompt_end' and 'every_step' cannot be added"):
        a.add(Intervention({0: torch.ones(2, 3)}, position="every_step"), strict=False)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(3, 2\) cannot be added"):
        _ = a + Intervention({0: torch.ones(3, 2)})
    for wrong in (lambda: a + 1, lambda: a - 1, lambda: a * a, lambda: a / a, lambda: "x" * a):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ZeroDivisionError, match="cannot be divided by zero"):
        _ = a / 0
    with pytest.raises(ValueError, match="factor=inf"):
        _ = a * float("inf")
    with pytest.raises(ValueError, match="6 values that are not finite"):
        _ = a * 1e30 * 1e30


def test_heads_out_of_range_are_refused() -> None:
    a = Intervention({0: torch.ones(2, 3)})
    for heads in ([(1, 0)], [(0, 2)], [(0, -1)]):
        with pytest.raises(ValueError, match=r"layers are \(0,\) and heads 0 to 1"):
            a.only_heads(heads)
    with pytest.raises(ValueError, match=r"layer=1: this intervention has the layers \(0,\)"):
        a.heads(1)


# ------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("deltas", "error", "words"),
    [
        ({}, ValueError, "give at least one layer"),
        ({-1: torch.ones(4, 8)}, ValueError, "layer -1: layers are 0 to 2"),
        ({3: torch.ones(4, 8)}, ValueError, "layer 3: layers are 0 to 2"),
        ({"1": torch.ones(4, 8)}, TypeError, "key '1': layers are integers"),
        ({True: torch.ones(4, 8)}, TypeError, "key True: layers are integers"),
        ({1: [[1.0]]}, TypeError, r"deltas\[1\] is of list: give a float32"),
        ({1: torch.ones(4, 8).half()}, TypeError, "of torch.float16: give a float32"),
        ({1: torch.ones(4, 8).long()}, TypeError, "of torch.int64: give a float32"),
        ({1: torch.ones(32)}, ValueError, r"shape \(32,\): expected \[n_heads, d_head\]"),
        ({1: torch.ones(8, 4)}, ValueError, r"shape \(8, 4\): expected .*\(4, 8\)"),
        ({1: torch.full((4, 8), float("nan"))}, ValueError, r"deltas\[1\] has 32 values"),
    ],
)
def test_a_bad_delta_is_refused_in_words(deltas: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Intervention(deltas, fingerprint=fingerprint(oracle.shared_model("bridge", "gpt2")))


def test_unequal_shapes_an_unknown_rule_and_provenance_without_json_are_refused() -> None:
    with pytest.raises(ValueError, match=r"deltas\[2\] has shape \(3, 8\)"):
        Intervention({1: torch.ones(4, 8), 2: torch.ones(3, 8)})
    with pytest.raises(ValueError, match="position='last': allowed are"):
        Intervention({1: torch.ones(4, 8)}, position="last")  # type: ignore[arg-type]  # on purpose
    for provenance in ({"delta": torch.ones(1)}, {"loss": float("nan")}):
        with pytest.raises(TypeError, match=r"provenance=.* is not JSON"):
            Intervention({1: torch.ones(4, 8)}, provenance=provenance)


def test_an_intervention_keeps_its_own_copy_and_its_layers_in_order() -> None:
    delta, notes = torch.ones(4, 8, requires_grad=True), {"split": {"seed": 0}}
    intervention = Intervention({2: delta, 0: delta}, provenance=notes)
    with torch.no_grad():
        delta.zero_()
    notes["split"]["seed"] = 1
    assert intervention.layers == (0, 2)
    assert torch.equal(intervention.deltas[2], torch.ones(4, 8))
    assert not intervention.deltas[2].requires_grad
    assert intervention.provenance["split"]["seed"] == 0
    with pytest.raises(TypeError):
        intervention.deltas[1] = delta  # type: ignore[index]  # on purpose
    with pytest.raises(dataclasses.FrozenInstanceError):
        intervention.position = "every_step"  # type: ignore[misc]  # on purpose
    assert repr(intervention) == (
        "Intervention(layers=(0, 2), heads=8/8, norm=8, position='prompt_end', model='unknown')"
    )


def test_interventions_survive_pickle_and_deepcopy() -> None:
    mark = fingerprint(oracle.shared_model("bridge", "gpt2"))
    intervention = Intervention(oracle.random_deltas(), "every_step", mark, {"seed": 3})
    for twin in (pickle.loads(pickle.dumps(intervention)), copy.deepcopy(intervention)):
        assert twin == intervention
        assert twin.provenance == intervention.provenance


# -------------------------------------------------------------------------------------------- files

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@few
@given(
    st.lists(floats, min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(POSITIONS),
    st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans())),
)
def test_saving_and_loading_gives_the_same_bits(
    values: list[float], dtype: torch.dtype, position: Any, provenance: dict[str, Any]
) -> None:
    delta = torch.tensor(values, dtype=dtype).view(2, 3)
    saved = Intervention({0: delta, 11: delta.flip(0)}, position, None, provenance)
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        loaded = Intervention.from_pretrained(folder)
    assert loaded == saved
    assert loaded.provenance == saved.provenance
    as_integers = torch.int32 if dtype == torch.float32 else torch.int64
    for layer, tensor in saved.deltas.items():  # == does not tell 0 from -0
        assert torch.equal(loaded.deltas[layer].view(as_integers), tensor.view(as_integers))


def test_a_saved_folder_is_two_plain_files_and_loads_with_its_model_and_rule(
    tmp_path: Path,
) -> None:
    model = oracle.shared_model("bridge", "gpt2")
    saved = Intervention(oracle.random_deltas(), "every_step", fingerprint(model), {"task": "t"})
    folder = saved.save_pretrained(tmp_path / "new" / "capital")
    assert sorted(os.listdir(folder)) == [TENSORS_FILE, CONFIG_FILE]
    assert os.listdir(tmp_path / "new") == ["capital"]
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert sorted(load_artifact(folder).tensors) == ["blocks.1.attn.hook_z", "blocks.2.attn.hook_z"]
    loaded = Intervention.from_pretrained(str(folder))
    assert loaded == saved
    tokens = oracle.random_tokens(1, 4)
    with saved.applied_to(model):
        expected = oracle.generate(model, tokens)
    with loaded.applied_to(model):
        assert torch.equal(oracle.generate(model, tokens), expected)


def generations(folder: Path) -> dict[str, dict[str, list[int]]]:
    """What models made from their seed write with the interventions kept in a folder."""
    found = {}
    for place in sorted(folder.iterdir()):
        model, tokens = oracle.shared_model(place.name.split("-")[0]), oracle.random_tokens(1, 6)
        written = {"plain": oracle.generate(model, tokens)}
        with Intervention.from_pretrained(place).applied_to(model):
            for name, cached in (("cached", True), ("uncached", False)):
                written[name] = oracle.generate(model, tokens, use_past_kv_cache=cached)
        found[place.name] = {name: row[0].tolist() for name, row in written.items()}
    return found


def test_another_process_writes_the_same_with_and_without_a_cache(tmp_path: Path) -> None:
    for backend in BACKENDS:
        mark = fingerprint(oracle.shared_model(backend))
        for position in POSITIONS:
            saved = Intervention(oracle.random_deltas(), position, mark)
            saved.save_pretrained(tmp_path / f"{backend}-{position}")
    here = generations(tmp_path)
    for written in here.values():
        assert written["cached"] == written["uncached"] != written["plain"]
    tests = Path(__file__).resolve().parent
    script = "import sys, json, pathlib, test_interventions as t\n"
    script += "print(json.dumps(t.generations(pathlib.Path(sys.argv[1]))))"
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == here
