"""A second device that every machine has: its tensors say "meta" and hold CPU numbers.

Operations on tensors of both devices fail, as they do between two GPUs. So a model of which some
layers stand there tells whether everything is moved where it must be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, FAR = torch.device("cpu"), torch.device("meta")
_aten = torch.ops.aten


class FarTensor(Tensor):
    """A tensor on the far device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FarTensor:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=FAR,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Within this context tensors may be made on, and moved to, the far device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [t for t in tensors if isinstance(t, FarTensor)]
    wanted = kwargs.get("device")
    inner_args, inner_kwargs = tree_map(_inside, (args, kwargs))
    if wanted is not None:
        inner_kwargs["device"] = HERE
    if func is _aten._to_copy.default:
        out = func(*inner_args, **inner_kwargs)
        target = tensors[0].device if wanted is None else torch.device(wanted)
        return FarTensor(out) if target == FAR else out
    if func is _aten.copy_.default:
        func(*inner_args, **inner_kwargs)
        return args[0]
    if func is _aten._local_scalar_dense.default:
        return func(*inner_args, **inner_kwargs)
    if far and any(t.dim() and t.numel() for t in tensors if not isinstance(t, FarTensor)):
        raise RuntimeError(f"{func}: tensors on two devices, {[t.shape for t in tensors]}")
    out = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and isinstance(out, Tensor) and out is _inside(args[0]):
        return args[0]
    is_far = bool(far) if wanted is None else torch.device(wanted) == FAR
    return tree_map(_outside, out) if is_far else out


def _inside(value: Any) -> Any:
    if isinstance(value, FarTensor):
        return value.inner
    if isinstance(value, Tensor) and value.device == FAR:  # torch.tensor([]) makes it itself
        return torch.empty(value.shape, dtype=value.dtype)
    return value


def _outside(value: Any) -> Any:
    return FarTensor(value) if type(value) is Tensor else value


def put_far(model: nn.Module, names: Sequence[str]) -> None:
    """Move some modules, with all below them, and let every module fetch its inputs.

    As `accelerate.dispatch_model` does: outputs stay where they were computed, but for the whole
    model's.
    """
    moved: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        is_far = any(name == far or name.startswith(f"{far}.") for far in names)
        if is_far:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    made = nn.Parameter(FarTensor(parameter.data), requires_grad=False)
                    module._parameters[key] = moved.setdefault(id(parameter), made)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = FarTensor(buffer)
        if name and module.state_dict():
            _fetch(module, FAR if is_far else HERE)
    _fetch(model, HERE, hand_back=True)


def _fetch(module: nn.Module, device: torch.device, *, hand_back: bool = False) -> None:
    forward: Callable[..., Any] = module.forward

    @functools.wraps(forward)
    def fetching(*args: Any, **kwargs: Any) -> Any:
        out = forward(*_send(args, device), **_send(kwargs, device))
        if hand_back:
            out.logits = out.logits.to(HERE)
        return out

    module.forward = fetching  # type: ignore[method-assign]  # as accelerate does


def _send(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_send(v, device) for v in value)
    return {k: _send(v, device) for k, v in value.items()} if type(value) is dict else value
