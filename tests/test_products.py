"""Products by oneDNN against torch's own, in forward and backward; when they are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_laai import products
from tl_laai.products import add_product_, frozen_products, linear

needs_onednn = pytest.mark.skipif(
    products._onednn is None or not torch.backends.mkldnn.is_available(),
    reason="this torch does without oneDNN",
)


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["onednn", "torch"])
def by_onednn(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether products go to oneDNN, whatever this CPU is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(products, "USE_ONEDNN", request.param)
        yield request.param


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    d_in=st.integers(1, 33),
    d_out=st.integers(1, 33),
    layout=st.sampled_from(["rows", "columns", "slice"]),
    seed=st.integers(0, 10**6),
)
def test_linear_maps_and_their_gradient_equal_those_in_float64(
    n: int, d_in: int, d_out: int, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out + 2, d_in, generator=generator)
    if layout == "columns":
        weight = weight.T.contiguous().T
    weight = weight[1 : d_out + 1] if layout == "slice" else weight[:d_out]
    x, upstream = (torch.randn(n, d, generator=generator) for d in (d_in, d_out))
    bias = torch.randn(d_out, generator=generator)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(products, "USE_ONEDNN", True)
        leaf = x.clone().requires_grad_()
        got = linear(leaf, weight, bias)
        close(got, x.double() @ weight.double().T + bias)
        (gradient,) = torch.autograd.grad(got, leaf, upstream)
        close(gradient, upstream.double() @ weight.double())
        total = torch.ones(n, d_in)
        close(add_product_(total, upstream, weight), upstream.double() @ weight.double() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_and_number_of_axes_is_taken(by_onednn: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 3, 5)


@needs_onednn
@pytest.mark.parametrize("d_in", [7, 64, 640])
def test_a_row_is_rounded_alike_alone_and_beside_others(
    d_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "USE_ONEDNN", True)
    x, weight = torch.randn(40, d_in), torch.randn(50, d_in)
    whole = linear(x, weight)
    for n in (1, 2, 3, 17):
        assert torch.equal(linear(x[:n], weight), whole[:n])


def test_the_modules_of_a_model_give_the_same_within_the_context(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, product = [], products._product

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        made.append(weight.shape)
        return product(x, weight)

    monkeypatch.setattr(products, "_product", counted)
    layer = torch.nn.Linear(6, 4)
    weight, bias = torch.randn(4, 3), torch.randn(3)
    x = torch.randn(2, 5, 6)

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        hidden = layer(leaf)
        out = torch.addmm(bias, hidden.flatten(0, 1), weight)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        return hidden, out, gradient

    expected = outputs()
    with frozen_products():
        got = outputs()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(made) == (4 if by_onednn else 0)  # two forward, two backward


@needs_onednn
def test_weights_of_a_class_of_their_own_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "USE_ONEDNN", True)
    asked = []

    class Quantised(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    weight = torch.randn(4, 6).as_subclass(Quantised)
    linear(torch.randn(2, 6), weight)
    assert F.linear in asked


@pytest.mark.parametrize(
    ("cut", "taken"), [((slice(1, 4), slice(None)), True), ((slice(None), slice(1, 4)), False)]
)
def test_weights_with_gaps_in_memory_are_left_to_torch(
    cut: tuple[slice, slice], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "USE_ONEDNN", True)
    weight = torch.randn(5, 6)[cut]
    for own in (weight, weight.T):
        x = torch.randn(2, own.shape[1])
        assert products._suits(x, own) is taken
        torch.testing.assert_close(linear(x, own), x @ own.T)


def test_intels_cpus_keep_mkl_whose_rounding_is_asked_for() -> None:
    assert not products.takes_onednn(intel=True, capability="AVX512")
    assert products.takes_onednn(intel=False, capability="AVX512")
    assert products.takes_onednn(intel=False, capability="AVX2")
    assert not products.takes_onednn(intel=False, capability="DEFAULT")
    assert products.takes_onednn(products.INTEL, products.CAPABILITY) == products.USE_ONEDNN
