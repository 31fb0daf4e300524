"""Rotary embeddings as a Hub `config.json` words them, old and new."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ondevice.spec import RopeSpec
from ondevice.spec_fields import MAX_CONTEXT, Fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_from_config(fields: Fields, head_dim: int, context: int) -> RopeSpec:
    """Rotary embedding from `rope_scaling` or `rope_parameters`, where transformers 5 also keeps the base."""
    params = rope_parameters(fields)
    for where in (fields, params):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise where.unsupported("partial_rotary_factor", "rotating a part of each head is not supported")
    return read_rope(fields, params, head_dim, context)


def rope_parameters(fields: Fields) -> Fields:
    """What a configuration says of its one rotary embedding."""
    params = fields.sub("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, Mapping) for value in params.values.values()):
        raise fields.unsupported("rope_parameters", "a rotary embedding for each kind of layer is not supported")
    return params


def read_rope(fields: Fields, params: Fields, dim: int, context: int, theta: float = 10000.0) -> RopeSpec:
    """One rotary embedding.

    Args:
        fields: the configuration, where older files keep the base and the original context.
        params: scaling and, in newer files, base.
        dim: rotated dimensions of each head.
        context: that of the model, from which missing settings are worked out.
        theta: base where none is stated.
    """
    kind = params.text("rope_type", params.raw("type", "default"))
    if kind not in ROPE_TYPES:
        raise params.unsupported("rope_type", f"{kind[:60]!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = params.number("rope_theta", fields.number("rope_theta", theta, low=1.01), low=1.01)
    base: dict[str, Any] = {"dim": dim, "theta": theta, "scaling": kind}
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
        short_factors=params.numbers("short_factor", dim // 2),
        long_factors=params.numbers("long_factor", dim // 2),
    )


def _yarn_attention(params: Fields, factor: float) -> float:
    """What multiplies cos and sin under YaRN: stated, from the mscale pair, or 1 + log(factor) / 10."""

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = params.number("mscale", 0.0), params.number("mscale_all_dim", 0.0)
    default = gain(mscale) / gain(all_dim) if mscale and all_dim else gain(1.0)
    return params.number("attention_factor", default, low=1e-3)


def rope_keys(rope: RopeSpec | None) -> dict[str, Any]:
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
