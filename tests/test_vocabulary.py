"""Passes over slices of the vocabulary against torch's own functions of all logits at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import draw, narrow_slices, slow_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_laai import vocabulary
from tl_laai.distributions import capped_mean_logit, mean_distribution
from tl_laai.vocabulary import Unembedding, cross_entropy, next_token, slice_width


def slow_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, cap: float | None
) -> Tensor:
    return F.cross_entropy(slow_logits(hidden, weight, bias, cap), targets, reduction="none")


problems = {
    "n": st.integers(1, 6),
    "d_vocab": st.integers(1, 23),
    "d_model": st.integers(1, 5),
    "with_bias": st.booleans(),
    "cap": st.sampled_from([None, 0.5, 30.0]),
    "width": st.integers(1, 30),
    "seed": st.integers(0, 10**6),
}


@settings(deadline=None, max_examples=50)
@given(**problems)
def test_loss_and_gradient_equal_torchs_for_any_slices_bias_and_cap(
    n: int,
    d_vocab: int,
    d_model: int,
    with_bias: bool,
    cap: float | None,
    width: int,
    seed: int,
) -> None:
    hidden, weight, targets, some_bias = draw(n, d_vocab, d_model, seed=seed)
    bias = some_bias if with_bias else None
    upstream = torch.randn(n, dtype=torch.float64)
    fast, slow = (hidden.clone().requires_grad_() for _ in range(2))
    expected = slow_cross_entropy(slow, weight, targets, bias, cap)
    with pytest.MonkeyPatch.context() as monkeypatch:
        narrow_slices(monkeypatch, width)
        got = cross_entropy(fast, weight, targets, bias=bias, softcap=cap)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    (gradient,) = torch.autograd.grad(got, fast, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, slow, upstream)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gradient_passes_gradcheck(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, bias = draw(3, 11, 4)
    narrow_slices(monkeypatch, 4)

    def loss(at: Tensor) -> Tensor:
        return cross_entropy(at, weight, targets, bias=bias, softcap=cap)

    assert torch.autograd.gradcheck(loss, hidden.requires_grad_())


def test_second_derivatives_are_refused_and_not_silently_wrong() -> None:
    hidden, weight, targets, _ = draw(2, 7, 3)
    loss = cross_entropy(hidden.requires_grad_(), weight, targets).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


def test_module_constant_bounds_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, bias = draw(5, 3000, 4)
    expected = slow_cross_entropy(hidden, weight, targets, bias, None)
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", 64)
    assert slice_width(weight) < 3000  # more than one slice is used
    torch.testing.assert_close(cross_entropy(hidden, weight, targets, bias=bias), expected)
    assert torch.equal(
        next_token(hidden, Unembedding(weight, bias, None)),
        (hidden @ weight.T + bias).argmax(dim=-1),
    )


@given(d_vocab=st.integers(1, 10**6), d_model=st.integers(0, 10**5))
@settings(deadline=None, max_examples=50)
def test_a_slice_is_never_empty_nor_wider_than_the_vocabulary(d_vocab: int, d_model: int) -> None:
    assert 1 <= slice_width(torch.empty(d_vocab, d_model, device="meta")) <= d_vocab


def test_weights_may_have_any_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, bias = draw(4, 40, 6)
    narrow_slices(monkeypatch, 7)
    expected = slow_cross_entropy(hidden, weight, targets, bias, None)
    transposed = weight.T.contiguous().T
    strided = torch.stack([weight, -weight], dim=1)[:, 0]
    for other in (transposed, strided):
        assert not other.is_contiguous()
        got = cross_entropy(hidden, other, targets, bias=bias)
        # A loss of 3e-4, as some are, is a difference of numbers of order one: 5e-16 off.
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(
            next_token(hidden, Unembedding(other, bias, None)),
            next_token(hidden, Unembedding(weight, bias, None)),
        )


def test_logits_in_the_thousands_neither_overflow_nor_lose_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, targets, _ = draw(4, 30, 5)
    narrow_slices(monkeypatch, 3)
    hidden = 1e4 * hidden
    got = cross_entropy(hidden.requires_grad_(), weight, targets)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, slow_cross_entropy(hidden, weight, targets, None, None))
    assert bool(torch.autograd.grad(got.sum(), hidden)[0].isfinite().all())


def test_tokens_that_a_bias_forbids_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, bias = draw(3, 12, 4)
    narrow_slices(monkeypatch, 3)
    bias[:6] = -math.inf  # the first two slices hold nothing else
    targets = torch.tensor([7, 8, 11])
    got = cross_entropy(hidden.requires_grad_(), weight, targets, bias=bias)
    allowed = slow_cross_entropy(hidden, weight[6:], targets - 6, bias[6:], None)
    torch.testing.assert_close(got, allowed, rtol=1e-11, atol=1e-14)
    gradient, expected = (torch.autograd.grad(x.sum(), hidden)[0] for x in (got, allowed))
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_single_token_vocabulary_has_no_loss_and_no_gradient() -> None:
    hidden, weight, targets, _ = draw(2, 1, 3)
    loss = cross_entropy(hidden.requires_grad_(), weight, targets)
    torch.testing.assert_close(loss, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
    gradient = torch.autograd.grad(loss.sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(hidden), rtol=0, atol=1e-14)


def test_nan_stays_visible() -> None:
    hidden, weight, targets, _ = draw(2, 5, 3)
    hidden[0, 0] = math.nan
    loss = cross_entropy(hidden, weight, targets)
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("dtype", "loss_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.float16, torch.float32, 1e-5),
    ],
)
def test_losses_are_at_least_float32_and_gradients_have_the_dtype_of_hidden(
    dtype: torch.dtype, loss_dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, targets, bias = draw(6, 700, 16, dtype=dtype)
    exact = slow_cross_entropy(hidden.double(), weight.double(), targets, bias.double(), None)
    got = cross_entropy(hidden.requires_grad_(), weight, targets, bias=bias)
    assert got.dtype == loss_dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.autograd.grad(got.sum(), hidden)[0].dtype == dtype


def test_float32_over_a_large_vocabulary_keeps_six_digits() -> None:
    # torch's own float32 cross-entropy is off by 4e-5 here.
    hidden, weight, targets, _ = draw(4, 200_000, 8, dtype=torch.float32)
    exact = slow_cross_entropy(hidden.double(), weight.double(), targets, None, None)
    assert (cross_entropy(hidden, weight, targets).double() - exact).abs().max() < 3e-6


def test_only_hidden_gets_a_gradient() -> None:
    hidden, weight, targets, bias = draw(2, 9, 3)
    weight.requires_grad_()
    loss = cross_entropy(hidden.requires_grad_(), weight, targets, bias=bias).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


@settings(deadline=None, max_examples=50)
@given(**{k: problems[k] for k in ("n", "d_vocab", "d_model", "with_bias", "width", "seed")})
def test_greedy_picks_the_largest_logit(
    n: int, d_vocab: int, d_model: int, with_bias: bool, width: int, seed: int
) -> None:
    hidden, weight, _, some_bias = draw(n, d_vocab, d_model, seed=seed)
    bias = some_bias if with_bias else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        narrow_slices(monkeypatch, width)
        token = next_token(hidden, Unembedding(weight, bias, None))
    assert torch.equal(token, slow_logits(hidden, weight, bias, None).argmax(dim=-1))


def test_greedy_takes_the_first_of_equal_logits_as_argmax_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow_slices(monkeypatch, 2)
    weight = torch.tensor([[1.0], [3.0], [3.0], [0.0], [3.0]])
    assert next_token(torch.ones(1, 1), Unembedding(weight, None, None)).tolist() == [1]


@pytest.mark.parametrize("cap", [None, 3.0])
def test_no_more_logits_are_alive_than_told(
    cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets, _ = draw(40, 5000, 4)
    head = Unembedding(weight, None, cap)
    expected = slow_cross_entropy(hidden, weight, targets, None, cap)
    teacher = mean_distribution(hidden[None], head)
    greedy = (hidden @ weight.T).argmax(dim=-1)
    monkeypatch.setattr(vocabulary, "SLICE_ELEMENTS", 4 * 600)
    monkeypatch.setattr(vocabulary, "LOGITS", 16 * 600)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage() is not None:
                is_view = out.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
                largest = max(largest, 0 if is_view else out.numel())
            return out

    with Watch():
        loss = cross_entropy(hidden.requires_grad_(), weight, targets, softcap=cap)
        torch.autograd.grad(loss.sum(), hidden)
        again = mean_distribution(hidden.detach()[None], head)
        token = next_token(hidden.detach(), head)
        if cap is not None:
            torch.autograd.grad(capped_mean_logit(hidden, again, head).sum(), hidden)
    assert 8 * 600 <= largest <= 16 * 600
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(again.offsets, teacher.offsets)
    assert torch.equal(token, greedy)


@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_logits_far_from_zero_are_summed_relative_to_their_largest(shift: float) -> None:
    hidden, weight, targets, bias = draw(4, 50, 6, dtype=torch.float32)
    bias = bias + shift
    fast, slow = (hidden.clone().requires_grad_() for _ in range(2))
    got = cross_entropy(fast, weight, targets, bias=bias)
    expected = slow_cross_entropy(slow, weight, targets, bias, None)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # logits of 300: 3e-5
    (gradient,) = torch.autograd.grad(got.sum(), fast)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), slow)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_loss_and_gradient_of_single_precision(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = draw(4, 50, 6, dtype=dtype)
    half = hidden.clone().requires_grad_()
    single = hidden.float().requires_grad_()
    got = cross_entropy(half, weight, targets, bias=bias)
    expected = cross_entropy(single, weight.float(), targets, bias=bias.float())
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)
    (gradient,) = torch.autograd.grad(got.sum(), half)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), single)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0.1, atol=0.1)


def test_drawn_tokens_have_the_shares_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow_slices(monkeypatch, 3)
    hidden, weight, _, bias = draw(1, 7, 4)
    head = Unembedding(weight / 4, bias, 2.0)
    shares = slow_logits(hidden, weight / 4, bias, 2.0).softmax(dim=-1)[0]
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    drawn = next_token(hidden.expand(n, -1), head, generator)
    counts = torch.bincount(drawn, minlength=7) / n
    assert (counts - shares).abs().max() < 4 * math.sqrt(0.25 / n)
