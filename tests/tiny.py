"""Tiny random language models, the same weights on every backend, for tests without a network.

Example:
    model = tiny_bridge("gemma")                   # float64, frozen, with a byte-level tokenizer
    tokens = torch.tensor(model.tokenizer("Q: a\nA:")["input_ids"])[None]
    logits = model(tokens)

Every weight is drawn at random, norm weights and biases included, so that a wrong position, a
wrong mask or a forgotten bias shows in the logits. Weights lie on a grid of 2**-12: casting them
to float32 and back (TransformerLens does so with Gemma's norms) leaves them as they are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SmolLM3Config,
)

try:
    from transformer_lens import HookedTransformer

    HAS_HOOKED = True
except ImportError:  # TransformerLens 4 has only the Bridge
    HAS_HOOKED = False

N_CTX = 128
SLIDING_WINDOW = 4
GRID = 2.0**12
FAMILIES = ("gpt2", "llama", "gemma", "neox", "qwen2")
BRIDGE_ONLY = ("gemma2", "gptj", "gptneo", "opt", "mistral", "granite", "smollm3")
# As a Bridge too, by transformers' names for them: what their configurations have beside `grouped`.
_GPT: dict[str, Any] = {"n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere2": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"multi_query": True, "alibi": False},
    "glm4": {"head_dim": 8},
    "gpt_bigcode": _GPT,
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "sliding_window": SLIDING_WINDOW},
    "granitemoe": {"num_local_experts": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "internlm3": {},
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": _EXPERTS,
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {},
}


# --------------------------------------------------------------------------------- tokenizer


def tiny_tokenizer(*, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 259 tokens: pad 0, bos 1 (put in front), eos 2, then the 256 bytes.

    Any text survives `decode(encode(text))`; ASCII takes one token a character.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
        model_max_length=N_CTX,
        name_or_path="tiny",
        add_bos_token=True,  # otherwise TransformerLens loads it anew, by its name
    )


VOCABULARY_SIZE = 259


# ------------------------------------------------------------------------------ configurations


def tiny_config(family: str) -> PreTrainedConfig:
    """Configuration of a family.

    | family | layers | heads (key-value) x d_head | d_model | what it stands for |
    |---|---|---|---|---|
    | gpt2 | 3 | 4 x 8 | 32 | learnt positions, biases everywhere, joint QKV |
    | llama | 3 | 4 (2) x 8 | 32 | grouped queries, rotary, RMS norm |
    | gemma | 4 | 4 (1) x 8 | 16 | qk-norm, post norms, windows of 4 on layers 0, 1 and 3 |
    | neox | 3 | 4 x 8 | 32 | attention parallel to the MLP, rotary on a quarter of each head |
    | qwen2 | 3 | 4 (2) x 8 | 32 | grouped queries with query, key and value biases |

    And as a Bridge only:

    | gemma2 | 2 | 4 (1) x 8 | 16 | soft caps on attention scores and logits |
    | gptj | 3 | 4 x 8 | 32 | rotary tables inside the attention, pairs adjacent, half a head |
    | gptneo | 2 | 4 x 8 | 32 | scores not scaled, a window of 4 on layer 1 |
    | opt | 3 | 4 x 8 | 32 | tokens of all rows as one axis inside the block |
    | opt-projected | 3 | 4 x 8 | 32 | a projection before the unembedding: refused |
    | openai-gpt | 3 | 4 x 8 | 32 | blocks that take and give lists: refused |
    | mistral | 3 | 4 (2) x 8 | 32 | windows of 4 on every layer |
    | cohere | 3 | 4 (2) x 8 | 32 | parallel blocks, scaled logits |
    | granite | 3 | 4 (2) x 8 | 32 | scaled embeddings, scores, residuals and logits |
    | smollm3 | 3 | 4 (2) x 8 | 32 | no positions on layer 1 |
    """
    shared = {
        "vocab_size": VOCABULARY_SIZE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": N_CTX,
    }
    usual = {
        **shared,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    grouped = {**usual, "num_key_value_heads": 2, "tie_word_embeddings": False}
    match family:
        case "gpt2":
            return GPT2Config(
                **shared, n_ctx=N_CTX, n_positions=N_CTX, n_embd=32, n_layer=3, n_head=4
            )
        case "llama":
            return LlamaConfig(**grouped)
        case "qwen2":
            return Qwen2Config(**grouped)
        case "neox":
            return GPTNeoXConfig(**usual, rotary_pct=0.25, hidden_act="gelu")
        case "gptj":
            return GPTJConfig(
                **shared, n_positions=N_CTX, n_embd=32, n_layer=3, n_head=4, rotary_dim=4
            )
        case "gptneo":
            return GPTNeoConfig(
                **shared,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=SLIDING_WINDOW,
            )
        case "opt" | "opt-projected":
            size = 32 if family == "opt" else 16
            return OPTConfig(**usual, ffn_dim=48, word_embed_proj_dim=size)
        case "openai-gpt":
            return AutoConfig.for_model(family, **shared, **_GPT)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=SLIDING_WINDOW)
        case "granite":
            return GraniteConfig(
                **grouped,
                embedding_multiplier=3.0,
                attention_multiplier=0.25,
                residual_multiplier=0.5,
                logits_scaling=2.0,
            )
        case "cohere":
            return CohereConfig(**grouped, logit_scale=0.25)
        case "smollm3":
            return SmolLM3Config(**grouped, no_rope_layers=[1, 0, 1])
        case "gemma2":
            return Gemma2Config(
                **{**grouped, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 1},
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=SLIDING_WINDOW,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        case "gemma":
            # d_model 16: its square root, by which embeddings are scaled, is exact in any dtype.
            return Gemma3TextConfig(
                **{
                    **grouped,
                    "hidden_size": 16,
                    "num_hidden_layers": 4,
                    "num_key_value_heads": 1,
                    "tie_word_embeddings": True,
                },
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=SLIDING_WINDOW,
                layer_types=[
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                ],
            )
    groups = usual if family in ("codegen", "falcon") else grouped  # one key a head, one for all
    return AutoConfig.for_model(family, **{**groups, **OTHERS[family]})


# ----------------------------------------------------------------------- float64 all the way


_CASTS = frozenset({torch.Tensor.float, torch.Tensor.to, torch.Tensor.type})


class _KeepFloat64(TorchFunctionMode):
    """Ignore requests to compute a float64 tensor's norm, rotation or softmax in float32.

    transformers and the Bridge hard-code float32 in these places. It is right for bfloat16 models,
    but it would round float64 ones to 1e-7, and a comparison at 1e-10 could not be made.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        casts = func in _CASTS or kwargs.get("dtype") is torch.float32
        # In this order: every operation and every shape comes by here.
        if casts and args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


_inside = threading.local()


@functools.cache
def _class_keeping_float64(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with a forward that runs under `_KeepFloat64`; a subclass, so it survives deepcopy."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "active", False):
            return cls.forward(self, *args, **kwargs)
        _inside.active = True
        try:
            with _KeepFloat64():
                return cls.forward(self, *args, **kwargs)
        finally:
            _inside.active = False

    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)


def _keep_float64(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (HookPoint, nn.ModuleList)) or hasattr(module, "_keeps_float64"):
            continue
        module.__class__ = _class_keeping_float64(type(module))
        object.__setattr__(module, "_keeps_float64", True)


# -------------------------------------------------------------------------------------- models


def _scale(name: str) -> float:
    """Standard deviation of the weights called `name`: logits stay of order one to ten."""
    if "norm" in name or "ln_" in name or name.endswith("bias"):
        return 0.3
    return 0.5 if "emb" in name or "wte" in name or "wpe" in name else 0.35


def tiny_hf(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Random transformers model of a family, frozen, in eval mode, with eager attention."""
    config = tiny_config(family)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # in float64 too
    model = AutoModelForCausalLM.from_config(config, **eager)
    model.config.architectures = [type(model).__name__]  # the Bridge picks its adapter by it
    generator = torch.Generator().manual_seed(seed)
    gemma = family.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * _scale(name)
            if parameter.ndim == 1 and name.endswith("weight") and not gemma:
                noise += 1.0  # norm weights (Gemma adds the one itself)
            parameter.copy_((noise * GRID).round() / GRID)
    model = model.to(dtype).eval().requires_grad_(False)
    model.generation_config.do_sample = False
    if dtype == torch.float64:
        _keep_float64(model)
    return model


def tiny_bridge(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, *, padding_side: str = "right"
) -> Any:
    """The same model as a TransformerBridge (TransformerLens 3.9 and 4)."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = tiny_hf(family, dtype, seed)
    with _quiet():
        bridge = TransformerBridge.boot_transformers(
            f"tiny-{family}",
            hf_model=hf_model,
            tokenizer=tiny_tokenizer(padding_side=padding_side),
            dtype=dtype,
            device="cpu",
        )
    if dtype == torch.float64:
        _keep_float64(bridge)
    return bridge.eval().requires_grad_(False)


def tiny_hooked(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, *, padding_side: str = "right"
) -> Any:
    """The same model as a HookedTransformer without weight processing (TransformerLens 3.9)."""
    if not HAS_HOOKED:
        raise RuntimeError("This TransformerLens has no HookedTransformer; look at HAS_HOOKED.")
    from transformer_lens.pretrained import weight_conversions as conversions

    convert = {
        "gpt2": conversions.convert_gpt2_weights,
        "llama": conversions.convert_llama_weights,
        "gemma": conversions.convert_gemma_weights,
        "neox": conversions.convert_neox_weights,
        "qwen2": conversions.convert_qwen2_weights,
    }[family]
    hf_model = tiny_hf(family, dtype, seed)
    cfg = _hooked_config(family, hf_model.config, dtype)
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    with _quiet():
        hooked = HookedTransformer(cfg, tokenizer, default_padding_side=padding_side)
        hooked.load_and_process_state_dict(
            convert(hf_model, hooked.cfg),
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    _copy_rotary_tables(hf_model, hooked)
    return hooked.eval().requires_grad_(False)


def _hooked_config(family: str, hf: Any, dtype: torch.dtype) -> Any:
    """What TransformerLens' loader derives from such a configuration, by hand."""
    from transformer_lens import HookedTransformerConfig

    d_model, n_heads = hf.hidden_size, hf.num_attention_heads
    d_head = getattr(hf, "head_dim", None) or d_model // n_heads
    cfg: dict[str, Any] = {
        "d_model": d_model,
        "d_head": d_head,
        "n_heads": n_heads,
        "d_mlp": 4 * d_model if family == "gpt2" else hf.intermediate_size,
        "n_layers": hf.num_hidden_layers,
        "n_ctx": N_CTX,
        "d_vocab": VOCABULARY_SIZE,
        "eps": getattr(hf, "rms_norm_eps", None) or getattr(hf, "layer_norm_eps", 1e-5),
        "act_fn": {"gpt2": "gelu_new", "neox": "gelu", "gemma": "gelu_pytorch_tanh"}.get(
            family, "silu"
        ),
        "normalization_type": "LN" if family in ("gpt2", "neox") else "RMS",
        "model_name": f"tiny-{family}",
        "dtype": dtype,
        "device": "cpu",
        "init_weights": False,
        "tokenizer_prepends_bos": True,
    }
    if family != "gpt2":
        rotary_dim = d_head // 4 if family == "neox" else d_head
        cfg |= {"positional_embedding_type": "rotary", "rotary_dim": rotary_dim}
        cfg |= {"rotary_adjacent_pairs": False}
    if family == "neox":
        cfg |= {"parallel_attn_mlp": True}
    if family in ("llama", "qwen2", "gemma"):
        cfg |= {"n_key_value_heads": hf.num_key_value_heads, "gated_mlp": True, "final_rms": True}
    if family == "gemma":
        cfg |= {
            "use_qk_norm": True,
            "use_normalization_before_and_after": True,
            "use_local_attn": True,
            "window_size": SLIDING_WINDOW,
            "attn_types": [
                "local" if kind == "sliding_attention" else "global" for kind in hf.layer_types
            ],
            "rotary_base": 1_000_000,
            "rotary_base_local": 10_000,
        }
    return HookedTransformerConfig(**cfg)


def _copy_rotary_tables(hf_model: PreTrainedModel, hooked: Any) -> None:
    """Give both backends the same sines: transformers rounds its frequencies to float32."""
    base = getattr(hf_model, "gpt_neox", None) or getattr(hf_model, "model", None)
    if base is None:
        return
    dtype = hooked.cfg.dtype
    positions = torch.arange(N_CTX)[None]
    for layer, block in enumerate(hooked.blocks):
        kinds = getattr(hf_model.config, "layer_types", None)
        gemma = hf_model.config.model_type == "gemma3_text"
        extra = (kinds[layer],) if gemma and kinds else ()
        cos, sin = base.rotary_emb(torch.zeros(1, dtype=dtype), positions, *extra)
        block.attn.rotary_cos = cos[0].to(dtype)
        block.attn.rotary_sin = sin[0].to(dtype)


def tiny_model(backend: str, family: str, **options: Any) -> Any:
    """`tiny_hooked` or `tiny_bridge`, by the backend's name ("hooked" or "bridge")."""
    return {"hooked": tiny_hooked, "bridge": tiny_bridge}[backend](family, **options)


@contextlib.contextmanager
def _quiet() -> Any:
    """Swallow the deprecation notices and prints that TransformerLens makes when it loads."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
