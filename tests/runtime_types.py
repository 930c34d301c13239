"""The run-time type checker of the tests: no call that breaks its annotations may return quietly.

jaxtyping decorates every function of the package with this checker while tests run (see the pytest
options in pyproject.toml). Checking arguments *before* a call, as beartype alone does, would hide
the package's own messages for bad input behind the checker's. So arguments and result are checked
together *after* a call that returned: a bad argument must be refused by the package, in its words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from beartype import beartype

_INNER: dict[tuple[str, str, str], Callable[..., Any]] = {}
AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def after_the_call(function: AnyCallable) -> AnyCallable:
    """Check a function with beartype, but not when jaxtyping asks for its arguments alone."""
    # jaxtyping asks twice: for the arguments, with the result declared Any, and after the call for
    # both, with the real annotation.
    annotations = function.__annotations__
    if annotations.get("return") is Any:
        return function
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    # jaxtyping asks again whenever a function inside another comes to be, for the same check.
    key = (function.__module__, function.__qualname__, repr(annotations))
    if key not in _INNER:
        _INNER[key] = beartype(function)
    return cast(AnyCallable, _INNER[key])
