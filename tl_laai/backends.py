"""Tells `HookedTransformer` from `TransformerBridge`, and keeps one backend a model."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from tl_laai.abstract_backend import Backend, kind_of_weights, own_modes, rank_within
from tl_laai.bridge_backend import BridgeBackend
from tl_laai.hooked_backend import HookedBackend
from tl_laai.prompts import no_model

__all__ = ["Backend", "backend_of", "own_modes", "rank_within"]

_LOCK = threading.Lock()
_BACKENDS: weakref.WeakKeyDictionary[Any, Backend] = weakref.WeakKeyDictionary()


def backend_of(model: Any) -> Backend:
    """The backend of a model, built once a model, and again when its dtype or device changed.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, as loaded by anyone.

    Raises:
        TypeError: the model is of another class.
        ValueError: the model has a feature that cannot be frozen exactly.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    kinds = {"HookedTransformer": HookedBackend, "TransformerBridge": BridgeBackend}
    kind = next((kinds[name] for name in kinds if name in names), None)
    if kind is None:
        raise no_model(model)
    for flag in ("use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"):
        if getattr(model.cfg, flag, False):
            raise ValueError(
                f"model.cfg.{flag} is True: the engine packs tokens and cannot split a block's "
                f"input by head. Set it to False (model.set_{flag}(False)) and fit again."
            )
    flag = "ungroup_grouped_query_attention"
    # Without grouped queries it changes nothing.
    if getattr(model.cfg, flag, False) and getattr(model.cfg, "n_key_value_heads", None):
        raise ValueError(
            f"model.cfg.{flag} is True: the engine keeps each group's keys once and cannot repeat "
            f"them by head. Set it to False (model.set_{flag}(False)) and fit again."
        )
    with _LOCK:
        known = _BACKENDS.get(model)
        if known is None or (known.dtype, known.device) != kind_of_weights(model):
            known = _BACKENDS[model] = kind(model)
    return known
