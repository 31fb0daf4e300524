"""Gemma 2 and 3 as Hub configurations.

The token embedding is multiplied by the exact square root of its width, as transformers does with float32 weights
and llama.cpp always; transformers rounds the factor to the weights' type where that is bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ondevice.spec import ModelSpec, RopeSpec
from ondevice.spec_fields import MAX_CONTEXT, MAX_LAYERS, Fields
from ondevice.spec_hub_common import (
    HUB_ACTIVATIONS,
    layer_types,
    read_activation,
    read_sizes,
    sizes_for_config,
    types_for_config,
)
from ondevice.spec_hub_rope import read_rope, rope_from_config, rope_keys

_GEMMA2_DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# The text part of a published vision model leaves out whatever has these values.
_GEMMA3_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "vocab_size": 262208,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def _common(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    if fields.flag("use_bidirectional_attention", False):
        raise fields.unsupported("use_bidirectional_attention", "attention to later tokens is not supported")
    sizes = read_sizes(fields, kv_heads=4)
    bias = fields.flag("attention_bias", False)
    return {
        **sizes,
        "context_length": fields.integer("max_position_embeddings", high=MAX_CONTEXT),
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_scale": fields.number("query_pre_attn_scalar", 256, low=1e-3) ** -0.5,
        "logit_softcap": fields.number("final_logit_softcapping", 0.0),
        "embedding_scale": math.sqrt(sizes["d_model"]),
        "tied_head": fields.flag("tie_word_embeddings", True),
    }


def read_gemma2(fields: Fields) -> ModelSpec:
    """Spec of a Gemma 2."""
    fields = fields.over(_GEMMA2_DEFAULTS)
    common = _common(fields)
    return ModelSpec(
        **common,
        attention_softcap=fields.number("attn_logit_softcapping", 0.0),
        rope=rope_from_config(fields, common["head_dim"], common["context_length"]),
        windows=_windows(fields, common["n_layers"], 2),
    )


def read_gemma3_text(fields: Fields) -> ModelSpec:
    """Spec of a Gemma 3 for text."""
    fields = fields.over(_GEMMA3_DEFAULTS)
    if fields.number("attn_logit_softcapping", 0.0):
        raise fields.unsupported("attn_logit_softcapping", "Gemma 3 does not cap attention scores; remove the key")
    common = _common(fields)
    pattern = fields.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    windows = _windows(fields, common["n_layers"], pattern)
    full, local = _gemma3_ropes(fields, common["head_dim"], common["context_length"])
    return ModelSpec(**common, qk_norm=True, windows=windows, rope=full, local_rope=local if windows else None)


def read_gemma3(fields: Fields) -> ModelSpec:
    """Spec of the text model inside a Gemma 3 with vision."""
    text = dict(fields.sub("text_config").values)
    if "tie_word_embeddings" in fields.values:
        text["tie_word_embeddings"] = fields.values["tie_word_embeddings"]
    return read_gemma3_text(Fields({**text, "model_type": "gemma3_text"}, fields.path))


def _windows(fields: Fields, n_layers: int, pattern: int) -> tuple[int, ...]:
    """Window of each layer; the last of every `pattern` layers sees everything unless layer_types says otherwise."""
    types = ["sliding_attention" if layer % pattern < pattern - 1 else "full_attention" for layer in range(n_layers)]
    sliding = [kind == "sliding_attention" for kind in layer_types(fields, types)]
    if not any(sliding):
        return ()
    if fields.values.get("sliding_window", 4096) is None:
        raise fields.error("sliding_window", "is null, but layers slide")
    window = fields.integer("sliding_window", 4096, high=MAX_CONTEXT)
    return tuple(window if slides else 0 for slides in sliding)


def _gemma3_ropes(fields: Fields, head_dim: int, context: int) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embeddings of layers that see everything and of sliding ones; scaling concerns the former only."""
    new = fields.sub("rope_parameters")
    for key, value in new.values.items():
        if key not in ("full_attention", "sliding_attention") or not isinstance(value, Mapping | None):
            raise new.error(key, "rope_parameters must hold an object each for full_attention and sliding_attention")
    full = {**new.sub("full_attention").values, **fields.sub("rope_scaling").values}
    local_theta = fields.number("rope_local_base_freq", 10000.0, low=1.01)
    path = fields.path
    return (
        read_rope(fields, Fields(full, path), head_dim, context, theta=1e6),
        read_rope(Fields({}, path), new.sub("sliding_attention"), head_dim, context, local_theta),
    )


def write_gemma2(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Gemma 2."""
    return {**_keys(spec), **rope_keys(spec.rope), "attn_logit_softcapping": spec.attention_softcap or None}


def write_gemma3_text(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a Gemma 3 for text."""
    keys = {**_keys(spec), **rope_keys(spec.rope)}
    if spec.local_rope is not None:
        keys["rope_local_base_freq"] = spec.local_rope.theta
    sliding = [bool(window) for window in spec.windows]
    pattern = sliding.index(False) + 1 if False in sliding else spec.n_layers + 1
    if sliding == [layer % pattern < pattern - 1 for layer in range(spec.n_layers)]:
        keys["sliding_window_pattern"] = pattern  # which mlx-lm reads, as it does not read layer_types
    return keys


def _keys(spec: ModelSpec) -> dict[str, Any]:
    scalar = spec.attention_scale**-2
    return {
        **sizes_for_config(spec),
        "hidden_activation": HUB_ACTIVATIONS[spec.activation],
        "attention_bias": spec.output_bias,
        "query_pre_attn_scalar": round(scalar) if round(scalar) ** -0.5 == spec.attention_scale else scalar,
        "final_logit_softcapping": spec.logit_softcap or None,
        "sliding_window": max(spec.windows) or None,
        "layer_types": types_for_config(spec.windows),
    }
