"""A folder with tensors and their description: written whole or not at all, checked when read.

intervention.safetensors       the tensors, no pickle
intervention_config.json       format, version, description, SHA-256 of the tensor file
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

TENSORS_FILE = "intervention.safetensors"
CONFIG_FILE = "intervention_config.json"
CARD_FILE = "README.md"
FORMAT = "tl_laai.intervention"
FORMAT_VERSION = 1

_LIBRARIES = ("tl_laai", "torch", "transformer-lens", "transformers", "safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_STAGING = re.compile(r"\.[0-9a-f]{32}\.tmp")


class Artifact(NamedTuple):
    """What a folder holds: named tensors, and the JSON object that describes them."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a result depends on, by distribution name."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def save_artifact(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Path:
    """Write both files; other files in the folder stay, and on failure the old ones do.

    Example:
        save_artifact("capital", {"blocks.9.attn.hook_z": delta}, {"position": "prompt_end"})

    Args:
        folder: made where it does not exist, with its parents.
        tensors: name -> tensor.
        config: a JSON object; format, versions and checksum are added to it.

    Returns:
        The folder.

    Raises:
        ValueError: the path is a file, or a link to nothing.
    """
    if not str(folder):
        raise ValueError("folder is empty: give the path of a folder, or '.' for this one.")
    folder = Path(folder).expanduser()
    _check_place(folder)
    contents = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **config,
        "versions": library_versions(),
        "tensors_sha256": hashlib.sha256(contents).hexdigest(),
    }
    text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that is there, since it may be a disk of its own, into which nothing is moved.
    with _staging_folder(folder if folder.exists() else folder.parent) as staging:
        (staging / TENSORS_FILE).write_bytes(contents)
        # Half a character, as undecodable file names hold, is written as JSON's own escape.
        (staging / CONFIG_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
        if folder.exists():
            # Not one step: a crash between the two is found by the checksum when reading.
            for name in (TENSORS_FILE, CONFIG_FILE):
                os.replace(staging / name, folder / name)
        else:
            os.rename(staging, folder)
    return folder


def check_folder(folder: str | Path) -> None:
    """Find out, before the work and not after it, whether an intervention may be saved there.

    Raises:
        ValueError: the path is a file or a link to nothing, the folder holds something else than
            an intervention, or no folder can be made there.
    """
    folder = Path(folder).expanduser()
    _check_place(folder)
    # What a save that was killed has left behind is nobody's.
    held = [p for p in folder.glob("*") if not _STAGING.fullmatch(p.name)]
    if held and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds something else than an intervention; give a new folder")
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with _staging_folder(there):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {error}; give a folder that you can write to"
        ) from error


def _check_place(folder: Path) -> None:
    """Refuse what is there and is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"{folder} is a link to {folder.readlink()}, which is not there; make that folder, or "
            "give another"
        )


@contextlib.contextmanager
def _staging_folder(place: Path) -> Iterator[Path]:
    """A new folder in `place`, gone at the end."""
    staging = place / f".{uuid.uuid4().hex}.tmp"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_artifact(folder: str | Path) -> Artifact:
    """Read both files and check that they are ours, whole, and belong together.

    Raises:
        ValueError: a file is missing, foreign, truncated, of a newer format, or of another save.
    """
    folder = Path(folder)
    config_path, tensors_path = folder / CONFIG_FILE, folder / TENSORS_FILE
    for path in (config_path, tensors_path):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: {folder} holds no saved intervention.")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors alike
        raise ValueError(f"{config_path} is not JSON, perhaps truncated: {error}.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{config_path} is not of an intervention: no "format": "{FORMAT}".')
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{config_path} has format_version {config.get('format_version')!r}, this version of "
            f"tl_laai reads {FORMAT_VERSION}: upgrade tl_laai, or save the intervention again."
        )
    contents = tensors_path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != config.get("tensors_sha256"):
        raise ValueError(
            f"{tensors_path} is truncated, altered or of another save: its SHA-256 is not the one "
            f"in {CONFIG_FILE}. Save the intervention again, or fetch both files again."
        )
    try:
        return Artifact(load(contents), config)
    except SafetensorError as error:
        raise ValueError(f"{tensors_path} is not a safetensors file: {error}.") from error


def find_artifact(folder_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder: the one given, or a snapshot of `owner/name` from the Hugging Face Hub.

    Raises:
        ValueError: neither a folder nor a Hub repository that can be reached.
    """
    name = str(folder_or_hub_id)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name!r} is neither a folder nor a Hub name (owner/name).")
    from huggingface_hub import snapshot_download  # only here: local use needs no network library
    from huggingface_hub.errors import HFValidationError

    try:
        files = [TENSORS_FILE, CONFIG_FILE]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, HFValidationError) as error:  # HTTP, offline and not-found errors are OSError
        raise ValueError(
            f"{name!r} is not a folder here, and could not be fetched from the Hub at revision "
            f"{revision or 'main'!r}: {error}"
        ) from error


def push_artifact(
    artifact: Artifact,
    heads: Sequence[tuple[int, int, float]],
    *,
    repo_id: str,
    private: bool,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload both files and a model card to the Hub in one commit; returns the address."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_artifact(Path(temporary) / "upload", artifact.tensors, artifact.config)
        card = model_card(repo_id, artifact.config, heads)
        (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        api = HfApi(token=token)
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return address


def model_card(
    repo_id: str, config: Mapping[str, Any], heads: Sequence[tuple[int, int, float]]
) -> str:
    """The README of a repository on the Hub: model, rule, `(layer, head, norm)` rows, origin."""
    known = config["fingerprint"]
    model = "an unknown model" if known is None else f"`{known['name']}`"
    rows = "\n".join(f"| {layer} | {head} | {norm:.4g} |" for layer, head, norm in heads)
    provenance = json.dumps(config["provenance"], indent=2, ensure_ascii=False)
    return f"""---
library_name: tl_laai
tags: [activation-steering, transformer-lens, intervention]
---
# {repo_id}

An additive intervention on `attn.hook_z` of {model}, position rule `{config["position"]}`.

```python
from tl_laai import Intervention

intervention = Intervention.from_pretrained("{repo_id}")
with intervention.applied_to(model):  # the model above, loaded with TransformerLens
    model.generate(prompt)
```

| layer | head | norm |
|---|---|---|
{rows}

How it came about:

```json
{provenance}
```
"""
