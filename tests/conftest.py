"""Fixtures for all tests: tiny random models by backend and family, and the real packaged Gemma.

No test may need a network, so the Hub is switched off before anything imports its library.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import tiny
import torch

from tl_laai import products

# Called for every operation of torch, where checking annotations that all say Any takes a third of
# the time of many tests.
products._FrozenProducts.__torch_function__.__no_type_check__ = True

BACKENDS = ("hooked", "bridge") if tiny.HAS_HOOKED else ("bridge",)
BUILT_IN_MODEL = "gemma-3-270m"

needs_hooked = pytest.mark.skipif(
    not tiny.HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer"
)

_MKL_IS_STRICT = (
    products.INTEL
    and torch.backends.mkl.is_available()
    and os.environ["MKL_CBWR"].endswith("STRICT")
)
exact_products = pytest.mark.skipif(
    not _MKL_IS_STRICT,
    reason="MKL_CBWR is set, or is not obeyed: torch does without MKL, or no CPU of Intel's",
)
exact_in_float32 = pytest.mark.skipif(
    not (_MKL_IS_STRICT or products.USE_ONEDNN),
    reason="neither MKL, told to by MKL_CBWR, nor oneDNN rounds a row alike in any batch here",
)

POSITIONS = ("prompt_end", "every_step")
every_position = pytest.mark.parametrize("position", POSITIONS)


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they save on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[pytest.param("hooked", marks=needs_hooked), "bridge"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that this TransformerLens has."""
    return str(request.param)


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family of tiny models."""
    return str(request.param)


@pytest.fixture
def any_tiny_model(backend: str, family: str) -> Any:
    """A tiny float64 model, new for every test, of each family on each backend."""
    return tiny.tiny_model(backend, family)


@pytest.fixture
def model(backend: str, family: str) -> Iterator[Any]:
    """A tiny float64 model of each family on each backend: shared, and left as found."""
    yield from oracle.watched(oracle.shared_model(backend, family))


@pytest.fixture
def windowed(backend: str) -> Iterator[Any]:
    """On each backend the family with most to get wrong: windows, grouped queries, their norms."""
    yield from oracle.watched(oracle.shared_model(backend, "gemma"))


def _load_gemma(backend: str) -> Any:
    from tl_laai.models import BUILT_IN, load_model

    if not BUILT_IN[BUILT_IN_MODEL].installed:
        pytest.skip(f"{BUILT_IN[BUILT_IN_MODEL].package} is not installed")
    return load_model(BUILT_IN_MODEL, backend=backend, device="cpu")  # type: ignore[arg-type]  # a parametrised name


@pytest.fixture(scope="session")
def gemma_hooked() -> Any:
    """The packaged Gemma 3 270M as a HookedTransformer in float32; shared, so leave it as it is."""
    if not tiny.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return _load_gemma("hooked")


@pytest.fixture(scope="session")
def gemma_bridge() -> Any:
    """The packaged Gemma 3 270M as a TransformerBridge in float32; shared, so leave it as it is."""
    return _load_gemma("bridge")


@pytest.fixture
def gemma(backend: str, request: pytest.FixtureRequest) -> Any:
    """The packaged Gemma 3 270M on each backend in turn."""
    return request.getfixturevalue(f"gemma_{backend}")
