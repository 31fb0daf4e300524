"""What the families of Hub configurations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ondevice.spec import ModelSpec
from ondevice.spec_fields import MAX_HEADS, MAX_LAYERS, MAX_VOCAB, Fields

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
HUB_ACTIVATIONS = {ours: hub for hub, ours in reversed(ACTIVATIONS.items())}


def read_activation(fields: Fields, key: str, default: str) -> str:
    """Our name of the activation that a key states."""
    activation = fields.text(key, default)
    if activation not in ACTIVATIONS:
        raise fields.unsupported(key, f"{activation[:60]!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def divided_head_dim(fields: Fields, d_model: int, n_heads: int) -> int:
    """Width of a head where the heads share the hidden size."""
    if d_model % n_heads:
        raise fields.error("hidden_size", f"{d_model} is no multiple of {n_heads} heads and head_dim is missing")
    return d_model // n_heads


def read_sizes(fields: Fields, kv_heads: int | None, head_dim: int | None = None) -> dict[str, Any]:
    """What all families but the oldest state alike.

    Args:
        fields: the configuration.
        kv_heads: default of num_key_value_heads where the key is missing; None: as many as heads.
        head_dim: default of head_dim; None: hidden size over heads.
    """
    d_model = fields.integer("hidden_size")
    n_heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    if fields.values.get("head_dim") is None and head_dim is None:
        head_dim = divided_head_dim(fields, d_model, n_heads)
    if "num_key_value_heads" in fields.values or kv_heads is None:  # null means as many as heads
        kv_heads = n_heads
    return {
        "architecture": fields.text("model_type"),
        "n_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", kv_heads, high=MAX_HEADS),
        "head_dim": fields.integer("head_dim", head_dim),
        "d_ff": fields.integer("intermediate_size"),
        "vocab_size": fields.integer("vocab_size", high=MAX_VOCAB),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
    }


def sizes_for_config(spec: ModelSpec) -> dict[str, Any]:
    """The keys that `read_sizes` reads, and some that stand beside them in every family."""
    return {
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.d_ff,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
    }


def layer_types(fields: Fields, default: Sequence[str]) -> list[str]:
    """Kind of attention of each layer.

    Args:
        default: where the configuration does not list them.
    """
    kinds = fields.raw("layer_types", list(default))
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise fields.error("layer_types", f"must list {len(default)} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", f"{str(kind)[:60]!r} is not supported")
    return kinds


def no_windows(fields: Fields) -> None:
    """Raises if layers are said to slide although the family, as configured, has no window."""
    kinds = fields.raw("layer_types", [])
    if kinds and set(map(str, kinds)) != {"full_attention"}:
        raise fields.unsupported("layer_types", "sliding layers without a sliding window")


def types_for_config(windows: Sequence[int]) -> list[str]:
    """`layer_types` of a model with these windows."""
    return ["sliding_attention" if window else "full_attention" for window in windows]
