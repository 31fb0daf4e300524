"""ModelSpec from a GGUF file's metadata and table of tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ondevice.checkpoint.gguf import GgufFile
from ondevice.checkpoint.quantization import Quantized
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import ModelSpec, RopeSpec
from ondevice.spec_fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Fields, check_spec

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2")
"""Values of general.architecture; Mistral's files say llama. llama.cpp has no OPT."""
NAMES = {"gemma3": "gemma3_text"}
"""Architectures that are called otherwise on the Hub."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose scores are not divided by the square root of head_dim; the files do not say."""
GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""What files of Gemma 2 mean where they do not state it."""


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """Reads the spec of a GGUF file.

    Args:
        file: open file; only its header and rope factors are read.

    Raises:
        UnsupportedModelError: architecture or feature that this version does not have.
        CheckpointError: settings that are missing, out of range or contradict each other.
    """
    architecture = Fields(file.metadata, file.path).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            file.path,
            f"architecture {architecture[:60]!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
            "general.architecture",
        )
    fields = Fields(file.metadata, file.path, architecture + ".")
    sizes = _sizes(file, fields)
    _refuse(fields, architecture)
    if architecture == "gpt2":
        features = _gpt2(fields)
    elif architecture in GEMMA_27B_LAYERS:
        features = _gemma(file, fields, architecture, sizes)
    else:
        features = _llama(file, fields, architecture, sizes)
    spec = ModelSpec(
        **{"architecture": NAMES.get(architecture, architecture), **sizes, **features},
        tied_head="output.weight" not in file.tensors,
    )
    return check_spec(spec, file.path)


def _sizes(file: GgufFile, fields: Fields) -> dict[str, Any]:
    """What all files state alike."""
    n_layers = fields.integer("block_count", high=MAX_LAYERS)
    d_model = fields.integer("embedding_length")
    n_heads = _uniform(fields, "attention.head_count", n_layers, MAX_HEADS)
    head_dim = fields.integer("attention.key_length", d_model // n_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", "keys and values of different length are not supported")
    return {
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": _uniform(fields, "attention.head_count_kv", n_layers, MAX_HEADS, n_heads),
        "head_dim": head_dim,
        "d_ff": _uniform(fields, "feed_forward_length", n_layers, MAX_WIDTH),
        "vocab_size": _vocab_size(file),
        "context_length": fields.integer("context_length", high=MAX_CONTEXT),
        "attention_scale": fields.number("attention.scale", 0.0),
    }


def _llama(file: GgufFile, fields: Fields, architecture: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Qwen and Phi-3."""
    # Qwen's files may state a window that the model was told not to use; Mistral's first models and Phi-3 slide.
    slides = architecture in ("llama", "phi3")
    window = fields.integer("attention.sliding_window", 0, low=0, high=MAX_CONTEXT) if slides else 0
    return {
        "architecture": "mistral" if architecture == "llama" and window else architecture,
        "norm_eps": _norm_eps(fields, "attention.layer_norm_rms_epsilon"),
        "qk_norm": architecture == "qwen3",
        "qkv_bias": architecture == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        "output_bias": "blk.0.attn_output.bias" in file.tensors,
        "ffn_bias": "blk.0.ffn_down.bias" in file.tensors,
        "rope": _rope(file, fields, sizes["head_dim"], sizes["context_length"]),
        "windows": (window,) * sizes["n_layers"] if window else (),
    }


def _gemma(file: GgufFile, fields: Fields, architecture: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Gemma 2 and 3. Their norms come with the 1 added that Hub checkpoints leave out."""
    n_layers, head_dim = sizes["n_layers"], sizes["head_dim"]
    windows = _gemma_windows(fields, n_layers, *((4096, 2) if architecture == "gemma2" else (0, 6)))
    width = sizes["d_model"] // sizes["n_heads"] if n_layers == GEMMA_27B_LAYERS[architecture] else head_dim
    caps = GEMMA2_CAPS if architecture == "gemma2" else {}
    features = {
        "norm_eps": _norm_eps(fields, "attention.layer_norm_rms_epsilon"),
        "post_norms": True,
        "activation": "gelu_tanh",
        "attention_scale": sizes["attention_scale"] or width**-0.5,
        "attention_softcap": fields.number("attn_logit_softcapping", caps.get("attn_logit_softcapping", 0.0)),
        "logit_softcap": fields.number("final_logit_softcapping", caps.get("final_logit_softcapping", 0.0)),
        "embedding_scale": math.sqrt(sizes["d_model"]),
        "rope": _rope(file, fields, head_dim, sizes["context_length"]),
        "windows": windows,
    }
    if architecture == "gemma3":
        local = RopeSpec(dim=head_dim, theta=fields.number("rope.freq_base_swa", 10000.0, low=1.0))
        features |= {"qk_norm": True, "local_rope": local if any(windows) else None}
    return features


def _gemma_windows(fields: Fields, n_layers: int, window: int, pattern: int) -> tuple[int, ...]:
    """Window of each layer: the last of every `pattern` layers sees everything, or as a list of flags says.

    Args:
        window, pattern: where the file states none.
    """
    window = fields.integer("attention.sliding_window", window, low=0, high=MAX_CONTEXT)
    key = "attention.sliding_window_pattern"
    stated = fields.raw(key, pattern)
    if isinstance(stated, np.ndarray | list):
        if len(stated) != n_layers:
            raise fields.error(key, f"must have {n_layers} entries")
        return tuple(window if slides else 0 for slides in stated)
    pattern = fields.integer(key, pattern, high=MAX_LAYERS)
    return tuple(window if layer % pattern < pattern - 1 else 0 for layer in range(n_layers))


def _gpt2(fields: Fields) -> dict[str, Any]:
    """GPT-2: learned positions, layer norms with biases, no gate."""
    return {
        "norm": "layer",
        "norm_eps": _norm_eps(fields, "attention.layer_norm_epsilon"),
        "gated": False,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "output_bias": True,
        "ffn_bias": True,
        "position_offset": 0,
    }


def _refuse(fields: Fields, architecture: str) -> None:
    """Raises on settings that change the arithmetic in ways that the decoder does not have."""
    caps = {"gemma2": (), "gemma3": ("attn_logit_softcapping",)}.get(architecture, tuple(GEMMA2_CAPS))
    for key, neutral in (
        ("expert_count", 0),
        ("logit_scale", 1.0),
        ("residual_scale", 1.0),
        ("embedding_scale", 1.0),
        *((cap, 0.0) for cap in caps),
    ):
        value = fields.raw(key, neutral)
        if value not in (neutral, 0):
            raise fields.unsupported(key, f"{value!r} is not supported for this architecture")


def _uniform(fields: Fields, key: str, n_layers: int, high: int, default: Any = None) -> int:
    """A size that may be given once or per layer; sizes that differ between layers are not supported."""
    value = fields.raw(key) if default is None else fields.raw(key, default)
    if isinstance(value, np.ndarray):
        if len(value) != n_layers or (value != value[0]).any():
            raise fields.unsupported(key, "sizes that differ between layers are not supported")
        value = value[0].item()
    return Fields({key: value}, fields.path).integer(key, high=high)


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding table, which the list of tokens must not exceed."""
    info = file.tensors.get("token_embd.weight")
    if info is None:
        raise CheckpointError(file.path, "the tensor is missing: this file holds no whole model", "token_embd.weight")
    rows = info.shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    if rows > MAX_VOCAB or len(tokens) > rows:
        raise CheckpointError(
            file.path, f"{len(tokens)} tokens for {rows} rows of token_embd.weight", "tokenizer.ggml.tokens"
        )
    return rows


def _rope(file: GgufFile, fields: Fields, head_dim: int, context: int) -> RopeSpec:
    """Rotary embedding from `rope.*` keys and the tensors of frequency divisors."""
    dim = fields.integer("rope.dimension_count", head_dim)
    theta = fields.number("rope.freq_base", 10000.0, low=1.0)
    factor = fields.number("rope.scaling.factor", 0.0) or fields.number("rope.scale_linear", 0.0) or 1.0
    scaling = fields.text("rope.scaling.type", "linear" if factor != 1 else "none")
    original = fields.integer("rope.scaling.original_context_length", context, high=MAX_CONTEXT)
    attention = fields.number("rope.scaling.attn_factor", 1.0) or 1.0
    names = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
    shared, short, long = (_divisors(file, name, dim) for name in names)
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise fields.unsupported("rope.scaling.type", f"{scaling!r} is not supported; none, linear, yarn, longrope are")
    if scaling == "yarn":
        if shared or short or long:
            raise fields.unsupported("rope.scaling.type", "yarn together with frequency factors is not supported")
        return RopeSpec(
            dim=dim,
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_context=original,
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=attention * (1 + 0.1 * math.log(max(factor, 1.0))),
        )
    short, long = short or shared, long or shared
    if bool(short) != bool(long):
        raise CheckpointError(file.path, "one of the pair of tensors is missing", "rope_factors_long/short.weight")
    if short:
        stretch = factor if scaling == "linear" else 1.0
        return RopeSpec(
            dim=dim,
            theta=theta,
            scaling="longrope",
            original_context=original,
            attention_factor=attention,
            short_factors=tuple(x * stretch for x in short),
            long_factors=tuple(x * stretch for x in long),
        )
    if scaling == "linear" and factor != 1:
        return RopeSpec(dim=dim, theta=theta, scaling="linear", factor=factor, attention_factor=attention)
    return RopeSpec(dim=dim, theta=theta, attention_factor=attention)


def _divisors(file: GgufFile, name: str, dim: int) -> tuple[float, ...]:
    """Frequency divisors that a tensor holds, () if there is none."""
    if name not in file.tensors:
        return ()
    factors = file.tensor(name)
    if isinstance(factors, Quantized) or factors.shape != (dim // 2,):
        raise CheckpointError(file.path, f"must hold {dim // 2} floats", name)
    values = factors.astype(np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointError(file.path, "must hold positive finite numbers only", name)
    return tuple(values.tolist())


def _norm_eps(fields: Fields, key: str) -> float:
    """The shortest decimal that the stored float32 stands for: 1e-5 rather than 9.99999974e-6."""
    return float(str(np.float32(fields.number(key, high=1.0))))
