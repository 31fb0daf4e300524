"""ModelSpec from a Hub `config.json`, and back.

Each family is one function in FAMILIES. Keys that are left out take the defaults of the `transformers`
library, since that is what the authors of such files relied on. Nothing in a configuration is ever executed:
`auto_map`, `model_file` and other keys that name code are not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ondevice.errors import UnsupportedModelError
from ondevice.spec import ModelSpec, RopeSpec
from ondevice.spec_fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, Fields, check_spec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ARCHITECTURE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def spec_from_config(config: Mapping[str, Any], path: Path) -> ModelSpec:
    """Reads the spec of a Hub configuration.

    Args:
        config: contents of a config.json.
        path: that file, for messages.

    Raises:
        UnsupportedModelError: model type or feature that this version does not have.
        CheckpointError: settings that are missing, out of range or contradict each other.
    """
    fields = Fields(config, path)
    model_type = fields.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        raise fields.unsupported(
            "model_type", f"{model_type[:60]!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return check_spec(family(fields), path)


def _llama(fields: Fields) -> ModelSpec:
    for key in ("rope_interleaved", "rope_traditional"):
        if fields.flag(key, False):
            raise fields.unsupported(key, "interleaved rotary embedding is not supported for Hub checkpoints")
    bias = fields.flag("attention_bias", False)
    _no_windows(fields)
    return ModelSpec(
        **_common(fields, kv_heads=None, context=2048),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=fields.flag("mlp_bias", False),
    )


def _mistral(fields: Fields) -> ModelSpec:
    common = _common(fields, kv_heads=8, context=131072)
    window = 0
    if fields.values.get("sliding_window", 4096) is not None:  # null means none, a missing key 4096
        window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    if not window:
        _no_windows(fields)
    elif "full_attention" in _layer_types(fields, common["n_layers"], "sliding_attention"):
        raise fields.unsupported("layer_types", "a mistral model mixes full and sliding attention")
    return ModelSpec(**common, windows=(window,) * common["n_layers"] if window else ())


def _qwen2(fields: Fields) -> ModelSpec:
    common = _common(fields, kv_heads=32, context=32768)
    return ModelSpec(**common, qkv_bias=True, windows=_qwen_windows(fields, common["n_layers"]))


def _qwen3(fields: Fields) -> ModelSpec:
    common = _common(fields, kv_heads=32, context=32768, head_dim=128)
    bias = fields.flag("attention_bias", False)
    windows = _qwen_windows(fields, common["n_layers"])
    return ModelSpec(**common, qk_norm=True, qkv_bias=bias, output_bias=bias, windows=windows)


FAMILIES: dict[str, Callable[[Fields], ModelSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _common(fields: Fields, kv_heads: int | None, context: int, head_dim: int | None = None) -> dict[str, Any]:
    """What all families state alike.

    Args:
        fields: the configuration.
        kv_heads: default of num_key_value_heads where the key is missing; None: as many as heads.
        context: default of max_position_embeddings.
        head_dim: default of head_dim; None: hidden size over heads.
    """
    d_model = fields.integer("hidden_size")
    n_heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    if fields.values.get("head_dim") is None and head_dim is None:
        if d_model % n_heads:
            raise fields.error("hidden_size", f"{d_model} is no multiple of {n_heads} heads and head_dim is missing")
        head_dim = d_model // n_heads
    head_dim = fields.integer("head_dim", head_dim)
    if "num_key_value_heads" in fields.values or kv_heads is None:  # null means as many as heads
        kv_heads = n_heads
    context = fields.integer("max_position_embeddings", context, high=MAX_CONTEXT)
    activation = fields.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise fields.unsupported(
            "hidden_act", f"{activation[:60]!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return {
        "architecture": fields.text("model_type"),
        "n_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", kv_heads, high=MAX_HEADS),
        "head_dim": head_dim,
        "d_ff": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCAB),
        "context_length": context,
        "norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
        "activation": ACTIVATIONS[activation],
        "rope": _rope(fields, head_dim, context),
        "tied_head": fields.flag("tie_word_embeddings", False),
    }


def _layer_types(fields: Fields, n_layers: int, default: str) -> list[str]:
    """Kind of attention of each layer."""
    kinds = fields.raw("layer_types", [default] * n_layers)
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise fields.error("layer_types", f"must list {n_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", f"{str(kind)[:60]!r} is not supported")
    return kinds


def _no_windows(fields: Fields) -> None:
    """Raises if layers are said to slide although the family, as configured, has no window."""
    kinds = fields.raw("layer_types", [])
    if kinds and set(map(str, kinds)) != {"full_attention"}:
        raise fields.unsupported("layer_types", "sliding layers without a sliding window")


def _qwen_windows(fields: Fields, n_layers: int) -> tuple[int, ...]:
    """Window of each layer; layers from max_window_layers on slide unless layer_types says otherwise."""
    if not fields.flag("use_sliding_window", False):
        _no_windows(fields)
        return ()
    if fields.values.get("sliding_window", 4096) is None:
        _no_windows(fields)
        return ()
    window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    if fields.values.get("layer_types") is not None:
        sliding = [kind == "sliding_attention" for kind in _layer_types(fields, n_layers, "")]
    else:
        first = fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
        sliding = [layer >= first for layer in range(n_layers)]
    return tuple(window if slides else 0 for slides in sliding) if any(sliding) else ()


def _rope(fields: Fields, head_dim: int, context: int) -> RopeSpec:
    """Rotary embedding from `rope_scaling` or `rope_parameters`, where transformers 5 also keeps the base."""
    params = fields.sub("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, Mapping) for value in params.values.values()):
        raise fields.unsupported("rope_parameters", "a rotary embedding for each kind of layer is not supported")
    for where in (fields, params):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise where.unsupported("partial_rotary_factor", "rotating a part of each head is not supported")
    kind = params.text("rope_type", params.raw("type", "default"))
    if kind not in ROPE_TYPES:
        raise params.unsupported("rope_type", f"{kind[:60]!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = params.number("rope_theta", fields.number("rope_theta", 10000.0, low=1.01), low=1.01)
    base: dict[str, Any] = {"dim": head_dim, "theta": theta, "scaling": kind}
    if kind == "default":
        return RopeSpec(**base)
    if kind == "linear":
        return RopeSpec(**base, factor=params.number("factor", low=1e-3))
    key = "original_max_position_embeddings"
    original = fields.integer(key, params.raw(key, context), low=2, high=MAX_CONTEXT)
    base["original_context"] = original
    if kind == "llama3":
        return RopeSpec(
            **base,
            factor=params.number("factor", low=1e-3),
            low_freq_factor=params.number("low_freq_factor"),
            high_freq_factor=params.number("high_freq_factor"),
        )
    factor = params.number("factor", context / original, low=1e-3)
    if kind == "yarn":
        return RopeSpec(
            **base,
            factor=factor,
            beta_fast=params.number("beta_fast", 32.0, low=1e-3),
            beta_slow=params.number("beta_slow", 1.0, low=1e-3),
            attention_factor=_yarn_attention(params, factor),
            truncate=params.flag("truncate", True),
        )
    stretch = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    return RopeSpec(
        **base,
        attention_factor=params.number("attention_factor", stretch, low=1e-3),
        short_factors=params.numbers("short_factor", head_dim // 2),
        long_factors=params.numbers("long_factor", head_dim // 2),
    )


def _yarn_attention(params: Fields, factor: float) -> float:
    """What multiplies cos and sin under YaRN: stated, from the mscale pair, or 1 + log(factor) / 10."""

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = params.number("mscale", 0.0), params.number("mscale_all_dim", 0.0)
    default = gain(mscale) / gain(all_dim) if mscale and all_dim else gain(1.0)
    return params.number("attention_factor", default, low=1e-3)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """Hub configuration that stands for a spec.

    Args:
        spec: of a supported architecture.

    Returns:
        Keys and values for a config.json; `spec_from_config` of them gives the same spec.

    Raises:
        UnsupportedModelError: the architecture's configuration has no words for a feature of this spec.
    """
    activations = {ours: hub for hub, ours in reversed(ACTIVATIONS.items())}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE_CLASSES[spec.architecture]],
        "model_type": spec.architecture,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.d_ff,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": activations[spec.activation],
        "tie_word_embeddings": spec.tied_head,
        **_rope_keys(spec.rope),
    }
    window = max(spec.windows)
    if spec.architecture in ("llama", "qwen3"):
        config["attention_bias"] = spec.output_bias
    if spec.architecture == "llama":
        config["mlp_bias"] = spec.ffn_bias
    if spec.architecture == "mistral":
        config["sliding_window"] = window or None
    if spec.architecture in ("qwen2", "qwen3"):
        config["use_sliding_window"] = bool(window)
        if window:
            config["sliding_window"] = window
            config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in spec.windows]
    _check_same(spec, spec_from_config(config, Path("config.json")))
    return config


def _rope_keys(rope: RopeSpec | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as transformers 4 and 5, mlx-lm and this package read them."""
    if rope is None:
        return {}
    if rope.scaling == "default":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "longrope":
        scaling["factor"] = rope.factor
    if rope.scaling != "linear":
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.attention_factor
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _check_same(spec: ModelSpec, read_back: ModelSpec) -> None:
    names = [f.name for f in dataclasses.fields(spec)]
    lost = [name for name in names if getattr(spec, name) != getattr(read_back, name)]
    if lost:
        raise UnsupportedModelError(
            Path("config.json"), f"a {spec.architecture} configuration cannot express its {', '.join(lost)}"
        )
