"""The run-time type checker of the tests: no call that breaks its annotations may return quietly.

jaxtyping decorates every function of the package with this checker while tests run (see the pytest
options in pyproject.toml). Checking arguments *before* a call, as beartype alone does, would hide
the package's own messages for bad input behind the checker's. So arguments and result are checked
together *after* a call that returned: a bad argument must be refused by the package, in its words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import beartype

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def after_the_call(function: AnyCallable) -> AnyCallable:
    """Check a function with beartype, but not when jaxtyping asks for its arguments alone."""
    # jaxtyping asks twice: for the arguments, with the result declared Any, and after the call for
    # both, with the real annotation.
    arguments_alone = function.__annotations__.get("return") is Any
    return function if arguments_alone else beartype(function)
