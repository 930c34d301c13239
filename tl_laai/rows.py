"""Rows of results: what each kind holds, read from a file and checked.

A row is a plain dict, one JSON object a line of a file, and says its `kind`:

- `sweep`, a fit: `task`, `layer`, `seed`, `penalty` ("none" or its text), `exact_match` (a share,
  or null), `n` (held-out examples), `status` (of the solver);
- `delta`, a head: `model`, `task`, `layer`, `head`, `penalty`, `values` (`[d_head]`), `norm`;
- `path`, a point: `task`, `layer`, `seed`, `direction` ("down", "up" or "best"), `lambda`,
  `lambda_max`, `norms` (`[n_heads]`), `exact_match`, `n`, `objective`, `loss`, `status`;
- `attribution`, a head of a layer: `model`, `task`, `layer`, `head`, `value`;
- `ablation`, a variant: `task`, `layer`, `variant`, `heads`, `exact_match`, `n`, `loss`. The
  intervention in "all" its heads, or not at all ("none"); "without" one head, with "only" one, or
  "cumulative" with its strongest ones, strongest first; or the model's own output of one head
  replaced by "zero" or its "mean";
- `baseline`, a method: `model`, `task`, `method`, `setting` (its text, or empty), `seed`,
  `exact_match`, `n`, `log_probability`.

More fields may stand in a row. A row that breaks its schema, that comes twice, or that belongs to
another picture is refused: a figure never averages over what it does not name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

Row: TypeAlias = Mapping[str, Any]

_LOG = logging.getLogger("tl_laai")


@dataclass(frozen=True)
class _Schema:
    """What rows of one kind must hold, have in common, and have no two of."""

    fields: dict[str, Any]  # a type, the texts allowed, or `_SHARE`
    common: tuple[str, ...]
    unique: tuple[str, ...]


_SHARE = "a share between 0 and 1"
_SCORED = {"exact_match": _SHARE, "n": int}
_HEAD = {"model": str, "task": str, "layer": int, "head": int}
_SCHEMAS = {
    "sweep": _Schema(
        {"task": str, "layer": int, "seed": int, "penalty": str, **_SCORED, "status": str},
        common=("penalty",),
        unique=("task", "layer", "seed"),
    ),
    "delta": _Schema(
        {**_HEAD, "penalty": str, "values": list, "norm": float},
        common=("model", "task", "layer"),
        unique=("penalty", "head"),
    ),
    "path": _Schema(
        {"task": str, "layer": int, "seed": int, "direction": ("down", "up", "best")}
        | {"lambda": float, "lambda_max": float, "norms": list, **_SCORED},
        common=("task", "layer"),
        unique=("direction", "seed", "lambda"),
    ),
    "attribution": _Schema(
        {**_HEAD, "value": float}, common=("model", "task"), unique=("layer", "head")
    ),
    "ablation": _Schema(
        {
            "task": str,
            "layer": int,
            "variant": ("all", "none", "without", "only", "cumulative", "zero", "mean"),
            "heads": list,
            **_SCORED,
            "loss": float,
        },
        common=("task", "layer"),
        unique=("variant", "heads"),
    ),
    "baseline": _Schema(
        {"model": str, "task": str, "method": str, "setting": str, "seed": int, **_SCORED}
        | {"log_probability": float},
        common=(),
        unique=("model", "task", "method", "seed"),
    ),
}
# What a fit that failed could not tell: a gap in the picture.
_MAY_BE_MISSING = {"exact_match", "loss"}


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read rows from a file with one JSON object a line.

    Example:
        >>> rows = read_rows("figures/figure1.jsonl")  # doctest: +SKIP

    Args:
        path: A file in UTF-8; blank lines are skipped.

    Returns:
        The rows in the file's order, of whatever kinds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no rows, its last line is cut off, or a line is not a row.
    """
    rows = _parsed(Path(path).read_bytes(), path)
    if not rows:
        raise ValueError(f"{path} holds no rows; give a file with one JSON object a line.")
    return rows


def _parsed(content: bytes, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file's content, possibly none."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a file of rows: it is not text in UTF-8.") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0] and rows and not text.endswith("\n"):
                raise ValueError(
                    f"{path}, line {number}: the last line is cut off ({line[:40]!r}); delete it, "
                    "or run what wrote the file again."
                ) from error
            raise ValueError(f"{path}, line {number} is not JSON: {line[:40]!r}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise ValueError(
                f'{path}, line {number} is not a row, an object with a "kind": {line[:40]!r}.'
            )
        rows.append(row)
    return rows


def checked(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows, all of one kind and as its schema says, or an error that names the first fault."""
    schema = _SCHEMAS[kind]
    if not rows:
        raise ValueError(f"rows holds none of kind {kind!r}; give at least one.")
    for number, row in enumerate(rows):
        if row.get("kind") != kind:
            raise ValueError(f"rows[{number}] is of kind {row.get('kind')!r}; give only {kind!r}.")
        for field, allowed in schema.fields.items():
            if not (_fits(row.get(field), allowed) or _is_missing(row, field)):
                told = allowed.__name__ if isinstance(allowed, type) else str(allowed)
                told = f"one of {told}" if isinstance(allowed, tuple) else told
                raise ValueError(
                    f"rows[{number}] of kind {kind!r} has {field} = {row.get(field, 'nothing')!r}; "
                    f"it must be {told.replace('list', 'a list of numbers')}."
                )
    for field in schema.common:
        if len(values := values_of(rows, field)) > 1:
            raise ValueError(f"rows of kind {kind!r} mix several of {field}: {values}; choose one.")
    for field in () if "model" in schema.unique else ("model", "settings"):
        found = {json.dumps(row[field], sort_keys=True) for row in rows if field in row}
        if len(found) > 1:
            raise ValueError(
                f"rows of kind {kind!r} mix several of {field}: {'; '.join(sorted(found))}; choose "
                "one."
            )
    seen: set[str] = set()
    for number, row in enumerate(rows):
        name = json.dumps({field: row[field] for field in schema.unique})
        if name in seen:
            raise ValueError(f"rows[{number}] of kind {kind!r} comes twice: {name}.")
        seen.add(name)
    return list(rows)


def _is_missing(row: Row, field: str) -> bool:
    """Whether a row says that it has no such number: null, or a loss that went out of bounds."""
    value = row.get(field, "")
    return field in _MAY_BE_MISSING and (
        value is None or (isinstance(value, float) and not math.isfinite(value))
    )


def _fits(value: object, allowed: Any) -> bool:
    if isinstance(allowed, tuple):
        return value in allowed
    if allowed == _SHARE:
        return _fits(value, float) and 0 <= cast(float, value) <= 1
    if allowed is list:
        return isinstance(value, list) and all(_fits(entry, float) for entry in value)
    if allowed is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if allowed is int else int | float):
        return False
    return math.isfinite(value)


def number(row: Row, field: str) -> float:
    """A number of a row; NaN where the row says that it has none."""
    return math.nan if _is_missing(row, field) else float(row[field])


def values_of(rows: Sequence[Row], field: str) -> list[Any]:
    """The different values of a field, sorted."""
    return sorted({row[field] for row in rows})


_ROW_START = b'{"kind": '


def complete_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that a killed writer has left whole; a line that was cut off is removed.

    Example:
        >>> done = complete_rows("figures/figure1.jsonl")  # doctest: +SKIP

    Returns:
        The rows, none where there is no file yet. Afterwards the file ends behind a whole line,
        so that `append_rows` can go on.

    Raises:
        ValueError: The file is not one that `append_rows` wrote; it stays as it is.
    """
    file = Path(path)
    if not file.exists():
        return []
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    rows = _parsed(content[:end], path)
    # A power failure can leave zeros where a line was being written.
    torn = content[end:].rstrip(b"\0")
    if torn[: len(_ROW_START)] != _ROW_START[: len(torn)]:
        raise ValueError(
            f"{path} ends in {torn[:40]!r}, which is not the start of a row: it is another kind "
            "of file. Give another one."
        )
    if end < len(content):
        os.truncate(file, end)
    return rows


def append_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Append rows and see them on the disk before returning.

    Raises:
        ValueError: A row holds NaN or infinity, which JSON has not; nothing is written.
    """
    # With the kind in front, `complete_rows` knows the beginning of a row from other text.
    lines = [json.dumps({"kind": row["kind"], **row}, allow_nan=False) + "\n" for row in rows]
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as handle:
        handle.write("".join(lines).encode())
        handle.flush()
        os.fsync(handle.fileno())


_LOCKED: set[IO[bytes]] = set()


def _let_go() -> None:
    """A forked worker must not hold its parent's locks: it may outlive a parent that is killed."""
    for handle in _LOCKED:
        handle.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def check_rows_file(path: str | os.PathLike[str], kind: str | None = None) -> None:
    """Find out, before the work and not after it, whether `write_rows` may and can write there.

    Args:
        path: The file.
        kind: Of the rows to write; None for any.

    Raises:
        ValueError: There is something else than rows, or than rows of that kind, or no file can
            be made there.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"{path} is a folder or a device; give a file for the rows.")
    if file.exists():
        content = file.read_bytes()
        start = content[: len(_ROW_START)].rstrip(b"\0")
        if start != _ROW_START[: len(start)]:  # a killed writer may have left less than a row
            raise ValueError(
                f"{path} holds something else than rows: it begins with {start!r}. Give another "
                "file, or move that one away."
            )
        # The last line may be torn, or another writer's.
        whole = content[: content.rfind(b"\n") + 1]
        with contextlib.suppress(ValueError):
            whole = content if json.loads(content[len(whole) :]) else whole
        others = sorted({row["kind"] for row in _parsed(whole, path)} - {kind})
        if kind is not None and others:
            raise ValueError(
                f"{path} holds rows of other kinds: {', '.join(others)}. Give another file for "
                f"those of kind {kind!r}, or move that one away."
            )
    place = next(folder for folder in file.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error}. Give a file in a folder that you can write to."
        ) from error


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write a file of rows anew, whole or not at all.

    Raises:
        ValueError: There is something else than rows, or no file can be made there; or a row
            holds NaN or infinity.
    """
    check_rows_file(path)
    fresh = Path(f"{path}.new")
    fresh.unlink(missing_ok=True)
    try:
        append_rows(fresh, rows)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def replace_rows(
    path: str | os.PathLike[str], rows: Sequence[Row], by: Sequence[str]
) -> tuple[int, int]:
    """Write rows instead of those that agree with one of them in `by`, behind all others.

    Returns:
        How many others there are, and how many were replaced.

    Raises:
        ValueError: As `write_rows`.
    """
    file = Path(path)
    there = read_rows(file) if file.exists() and file.stat().st_size else []
    own = {tuple(row.get(name) for name in by) for row in rows}
    others = [row for row in there if tuple(row.get(name) for name in by) not in own]
    write_rows(path, [*others, *rows])
    return len(others), len(there) - len(others)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the right to write a file of rows; a second writer at the same time is refused.

    Example:
        >>> with only_writer("rows.jsonl"):  # doctest: +SKIP
        ...     append_rows("rows.jsonl", rows)

    Where a file cannot be locked, that is said, and nothing is refused.

    Raises:
        ValueError: Another writer has the same file.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as handle:
        try:
            import fcntl  # Windows has none

            # The system lets go of it when the process ends, however it ends.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{path} is being written by another process; wait for it, or give another file."
            ) from error
        except (ImportError, OSError) as error:  # as file systems of some clusters say
            _LOG.warning(
                "%s cannot be locked here (%s): take care that nothing else writes it", path, error
            )
        _LOCKED.add(handle)
        try:
            yield
        finally:
            _LOCKED.discard(handle)
