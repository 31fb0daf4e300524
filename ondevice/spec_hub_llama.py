"""Llama and its near relatives as Hub configurations: Mistral, Qwen 2 and 3, Phi-3."""

from __future__ import annotations

from typing import Any

from ondevice.spec import ModelSpec, RopeSpec
from ondevice.spec_fields import MAX_CONTEXT, MAX_LAYERS, Fields
from ondevice.spec_hub_common import (
    HUB_ACTIVATIONS,
    layer_types,
    no_windows,
    read_activation,
    read_sizes,
    sizes_for_config,
    types_for_config,
)
from ondevice.spec_hub_rope import read_rope, rope_from_config, rope_keys, rope_parameters

PHI3_ORIGINAL_CONTEXT = 4096
PHI3_ROPE_TYPES = ("default", "longrope")


def _common(fields: Fields, kv_heads: int | None, context: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = read_sizes(fields, kv_heads, head_dim)
    context = fields.integer("max_position_embeddings", context, high=MAX_CONTEXT)
    return {
        **sizes,
        "context_length": context,
        "activation": read_activation(fields, "hidden_act", "silu"),
        "rope": rope_from_config(fields, sizes["head_dim"], context),
        "tied_head": fields.flag("tie_word_embeddings", False),
    }


def read_llama(fields: Fields) -> ModelSpec:
    """Spec of a llama."""
    for key in ("rope_interleaved", "rope_traditional"):
        if fields.flag(key, False):
            raise fields.unsupported(key, "interleaved rotary embedding is not supported for Hub checkpoints")
    bias = fields.flag("attention_bias", False)
    no_windows(fields)
    return ModelSpec(
        **_common(fields, kv_heads=None, context=2048),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=fields.flag("mlp_bias", False),
    )


def read_mistral(fields: Fields) -> ModelSpec:
    """Spec of a Mistral."""
    common = _common(fields, kv_heads=8, context=131072)
    window = 0
    if fields.values.get("sliding_window", 4096) is not None:  # null means none, a missing key 4096
        window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    if not window:
        no_windows(fields)
    elif "full_attention" in layer_types(fields, ["sliding_attention"] * common["n_layers"]):
        raise fields.unsupported("layer_types", "a mistral model mixes full and sliding attention")
    return ModelSpec(**common, windows=(window,) * common["n_layers"] if window else ())


def read_qwen2(fields: Fields) -> ModelSpec:
    """Spec of a Qwen 2 or 2.5."""
    common = _common(fields, kv_heads=32, context=32768)
    return ModelSpec(**common, qkv_bias=True, windows=_qwen_windows(fields, common["n_layers"]))


def read_qwen3(fields: Fields) -> ModelSpec:
    """Spec of a Qwen 3."""
    common = _common(fields, kv_heads=32, context=32768, head_dim=128)
    bias = fields.flag("attention_bias", False)
    windows = _qwen_windows(fields, common["n_layers"])
    return ModelSpec(**common, qk_norm=True, qkv_bias=bias, output_bias=bias, windows=windows)


def _qwen_windows(fields: Fields, n_layers: int) -> tuple[int, ...]:
    """Window of each layer; layers from max_window_layers on slide unless layer_types says otherwise."""
    if not fields.flag("use_sliding_window", False) or fields.values.get("sliding_window", 4096) is None:
        no_windows(fields)
        return ()
    window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    first = fields.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(n_layers)]
    sliding = [kind == "sliding_attention" for kind in layer_types(fields, kinds)]
    return tuple(window if slides else 0 for slides in sliding) if any(sliding) else ()


def read_phi3(fields: Fields) -> ModelSpec:
    """Spec of a Phi-3, 3.5 or 4."""
    sizes = read_sizes(fields.over({"rms_norm_eps": 1e-5}), kv_heads=None)
    context = fields.integer("max_position_embeddings", 4096, high=MAX_CONTEXT)
    window = fields.integer("sliding_window", 0, low=0, high=MAX_CONTEXT)  # missing or null means none
    return ModelSpec(
        **sizes,
        context_length=context,
        activation=read_activation(fields, "hidden_act", "silu"),
        rope=_phi3_rope(fields, sizes["head_dim"], context),
        windows=(window,) * sizes["n_layers"] if window else (),
        tied_head=fields.flag("tie_word_embeddings", False),
    )


def _phi3_rope(fields: Fields, head_dim: int, context: int) -> RopeSpec:
    """Longrope, which older files call "su", or none; of a part of each head where the file says so."""
    params = rope_parameters(fields)
    kind = params.text("rope_type", params.raw("type", "default"))
    params = Fields({**params.values, "rope_type": "longrope" if kind == "su" else kind}, fields.path)
    if params.text("rope_type") not in PHI3_ROPE_TYPES:
        raise params.unsupported(
            "rope_type", f"{kind[:60]!r} is not supported for phi3; {', '.join(PHI3_ROPE_TYPES)} and su are"
        )
    part = params.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0, high=1.0), high=1.0)
    fields = fields.over({"original_max_position_embeddings": PHI3_ORIGINAL_CONTEXT})
    return read_rope(fields, params, int(head_dim * part), context)


def write_llama(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a llama."""
    return {
        **_common_keys(spec),
        "attention_bias": spec.output_bias,
        "mlp_bias": spec.ffn_bias,
    }


def write_mistral(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Mistral."""
    return {**_common_keys(spec), "sliding_window": max(spec.windows) or None}


def write_qwen2(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Qwen 2."""
    window = max(spec.windows)
    keys = {**_common_keys(spec), "use_sliding_window": bool(window)}
    return {**keys, "sliding_window": window, "layer_types": types_for_config(spec.windows)} if window else keys


def write_qwen3(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Qwen 3."""
    return {**write_qwen2(spec), "attention_bias": spec.output_bias}


def write_phi3(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Phi-3."""
    keys = {**_common_keys(spec), "sliding_window": max(spec.windows) or None}
    if spec.rope is not None:
        keys["partial_rotary_factor"] = spec.rope.dim / spec.head_dim
        keys["original_max_position_embeddings"] = spec.rope.original_context or spec.context_length
    return keys


def _common_keys(spec: ModelSpec) -> dict[str, Any]:
    return {**sizes_for_config(spec), "hidden_act": HUB_ACTIVATIONS[spec.activation], **rope_keys(spec.rope)}
