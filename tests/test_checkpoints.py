from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tl_laai import checkpoints
from tl_laai.checkpoints import BUILT_IN, MARKER_FILE, BuiltIn, find_source, quiet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TL_LAAI_CACHE", str(folder))
    return folder


def write_gguf(path: Path, without: str = "no tensor", words: Sequence[str] = ()) -> Path:
    """The tiny Llama as a GGUF file, by the rules of llama.cpp, written without transformers.

    `words` come in the place of the last tokens; nothing says how they are merged of letters.
    """
    gguf = pytest.importorskip("gguf")
    model, tokenizer = tiny_hf("llama", torch.float32), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_token_list([*tokens[: len(tokens) - len(words)], *words])
    writer.add_token_scores([0.0] * len(tokenizer))
    writer.add_token_types([3, 3, 3] + [1] * (len(tokenizer) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    for name, weight in model.state_dict().items():
        if without in name:
            continue
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbouring pairs
            n = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows, columns = array.shape
            array = array.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2)
            array = array.reshape(rows, columns)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """The name of a tensor in llama.cpp: "model.layers.0.mlp.up_proj" is "blk.0.ffn_up"."""
    for old, new in {
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }.items():
        name = name.replace(old, new)
    return name


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_a_gguf_file_becomes_a_checkpoint_with_the_same_logits_and_tokens(gguf_file: Path) -> None:
    folder = find_source(gguf_file).folder
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.randint(3, 259, (2, 9))
    expected = tiny_hf("llama", torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    text = "Q: Zoë\nA: 12"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids


def test_a_file_is_converted_once_and_says_so_on_stderr(
    gguf_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = find_source(gguf_file)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Converting tiny" in told.err
    assert str(cache) in told.err
    second = find_source(str(gguf_file))
    assert second == first
    assert capsys.readouterr().err == ""
    assert first.name == "tiny"
    assert first.official_name is None
    assert first.revision == f"sha256:{first.folder.name.split('-')[1]}"


def test_a_known_model_is_recognised_by_its_content_whatever_the_file_is_called(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = BuiltIn("known", "no_package", "pip", checkpoints._sha256(gguf_file), "org/known")
    monkeypatch.setattr(checkpoints, "BUILT_IN", MappingProxyType({"known": known}))
    source = find_source(gguf_file)
    assert (source.name, source.official_name) == ("known", "org/known")
    assert find_source(source.folder) == source


def test_a_failed_conversion_leaves_nothing_behind(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_write_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        find_source(gguf_file)
    assert list(cache.iterdir()) == []


def test_a_gguf_file_without_all_weights_is_refused_instead_of_made_up(
    tmp_path: Path, cache: Path
) -> None:
    file = write_gguf(tmp_path / "part.gguf", without="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"no tensor for \['model\.layers\.1\.mlp\.up_proj"):
        find_source(file)
    assert list(cache.iterdir()) == []


def test_a_tokenizer_that_takes_its_words_apart_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "apart.gguf", words=["ĠKenya", "ĠFrance"])
    with pytest.raises(ValueError, match="takes apart 2 of 2 words of its own vocabulary"):
        find_source(path)
    assert list(cache.iterdir()) == []


def test_a_truncated_gguf_file_is_refused_by_name_and_leaves_nothing_behind(
    gguf_file: Path, cache: Path
) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as a GGUF file"):
        find_source(gguf_file)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "no marker"])
def test_a_damaged_folder_is_converted_again(gguf_file: Path, damage: str) -> None:
    folder = find_source(gguf_file).folder
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:100])
    else:
        (weights if damage == "missing" else folder / MARKER_FILE).unlink()
    assert find_source(gguf_file).folder == folder
    assert weights.read_bytes() == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_of_two_conversions_at_once_the_first_result_stays_whole(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(gguf_file)
    of_the_other = shutil.move(source.folder, cache.parent / "other")

    def write_while_the_other_finishes(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text('{"whose": "mine"}')
        shutil.copytree(of_the_other, source.folder)

    monkeypatch.setattr(checkpoints, "_write_checkpoint", write_while_the_other_finishes)
    assert find_source(gguf_file) == source
    assert "whose" not in (source.folder / "config.json").read_text()
    assert [path.name for path in cache.iterdir()] == [source.folder.name]


def test_threads_that_load_at_once_leave_logging_as_it_was() -> None:
    disabled, stdout = logging.root.manager.disable, sys.stdout
    barrier = threading.Barrier(2, timeout=30)

    def load() -> None:
        barrier.wait()
        with quiet(progress_bars=False):
            time.sleep(0.05)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (logging.root.manager.disable, sys.stdout) == (disabled, stdout)


def test_what_a_killed_conversion_left_is_removed_a_day_later(gguf_file: Path, cache: Path) -> None:
    old, new = cache / ".converting-old", cache / ".converting-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    find_source(gguf_file)
    assert not old.exists()
    assert new.exists()


def test_a_packaged_file_with_another_hash_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fake_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "model.gguf").write_bytes(b"GGUF, but not the one")
    monkeypatch.syspath_prepend(tmp_path)
    fake = BuiltIn("fake", "fake_package", "pip", "0" * 64, None, gguf_file="model.gguf")
    monkeypatch.setattr(checkpoints, "BUILT_IN", MappingProxyType({"fake": fake}))
    assert fake.installed
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is not 0000"):
        find_source("fake")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_missing_package_is_named_with_its_install_command(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(BUILT_IN[name], package="no_such_package")
    monkeypatch.setattr(checkpoints, "BUILT_IN", MappingProxyType({name: absent}))
    with pytest.raises(ValueError, match="no_such_package") as refusal:
        find_source(name)
    assert absent.install in str(refusal.value)
    assert not cache.exists()


def test_the_hash_of_the_packaged_gemma_is_the_one_that_its_package_states() -> None:
    model = BUILT_IN["gemma-3-270m"]
    if not model.installed:
        pytest.skip(f"{model.package} is not installed")
    assert model.sha256 == importlib.import_module(model.package).EXPECTED_SHA256


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nowhere", "there is no such file or folder"),
        ("missing.gguf", "there is no such file or folder"),
        ("a/b/c", "there is no such file or folder"),
        ("", "there is no such file or folder"),
    ],
)
def test_a_path_to_nothing_is_refused_with_what_is_allowed(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        find_source(name)
    assert f"name_or_path={name!r}" in str(refusal.value)
    assert all(known in str(refusal.value) for known in BUILT_IN)


def test_a_file_that_is_not_gguf_and_a_folder_without_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        find_source(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        find_source(tmp_path)


def test_a_plain_folder_and_a_hub_name_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = find_source(tmp_path)
    assert (source.folder, source.official_name, source.revision) == (tmp_path, None, None)
    assert find_source("openai-community/gpt2").folder is None
    assert find_source("gpt2").name == "gpt2"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TL_LAAI_CACHE", "/somewhere")
    assert checkpoints.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("TL_LAAI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert checkpoints.cache_folder() == Path("/xdg/tl_laai")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert checkpoints.cache_folder() == Path.home() / ".cache" / "tl_laai"


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_restores_logging_warnings_streams_and_bars_even_after_an_error(
    bars: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> tuple[Any, ...]:
        shown = transformers_logging.is_progress_bar_enabled()
        return logging.root.manager.disable, shown, sys.stdout, list(warnings.filters)

    def load() -> None:
        with quiet(progress_bars=bars):
            assert transformers_logging.is_progress_bar_enabled() == bars
            print("printed")
            logging.warning("logged")
            warnings.warn("warned", stacklevel=1)
            raise RuntimeError

    before = state()
    with pytest.raises(RuntimeError):
        load()
    assert state() == before
    assert capsys.readouterr() == ("", "")


def test_the_marker_of_a_folder_is_plain_json(gguf_file: Path) -> None:
    folder = find_source(gguf_file).folder
    marker = json.loads((folder / MARKER_FILE).read_text())
    assert marker["sha256"] == checkpoints._sha256(gguf_file)
    assert set(marker["sizes"]) == {path.name for path in folder.iterdir()} - {MARKER_FILE}
