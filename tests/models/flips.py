"""For each field of a spec, other values that must not go unnoticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.spec import ModelSpec, RopeSpec
from tests.tiny import tiny_tensors

Values = Callable[[Any], list[Any]]
"""From a spec (or its RopeSpec) to other values of a field; none where the field means nothing to it."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _original_contexts(rope: RopeSpec) -> list[int]:
    """For longrope the border moves across the test's length, for others it moves at all."""
    if rope.scaling == "longrope":
        return [200 if rope.original_context == 64 else 64]
    return [rope.original_context * 4] if rope.scaling in ("llama3", "yarn") else []


MODEL_FLIPS: dict[str, Values] = {
    "n_layers": lambda s: [s.n_layers - 1],
    "d_model": lambda s: [s.d_model - 32],
    # A head without weights of its own adds nothing, so more heads show only where they change the groups.
    "n_heads": lambda s: [s.n_heads * 2 if s.n_kv_heads == s.n_heads else s.n_heads // 2],
    "n_kv_heads": lambda s: [s.n_kv_heads // 2 or 2],
    "head_dim": lambda s: [s.head_dim + 16],
    "d_ff": lambda s: [s.d_ff - 32],
    "norm": lambda s: ["rms" if s.norm == "layer" else "layer"],
    "norm_eps": lambda s: [eps for eps in (1e-2, 1e-3) if eps != s.norm_eps],
    "norm_offset": lambda s: [1.0 - s.norm_offset],
    "post_norms": lambda s: [not s.post_norms],
    "qk_norm": lambda s: [not s.qk_norm],
    "gated": lambda s: [not s.gated],
    "activation": lambda s: [kind for kind in ACTIVATIONS if kind != s.activation],
    "qkv_bias": lambda s: [not s.qkv_bias],
    "output_bias": lambda s: [not s.output_bias],
    "ffn_bias": lambda s: [not s.ffn_bias],
    "rope": lambda s: [RopeSpec(dim=s.head_dim) if s.rope is None else None],
    "local_rope": lambda s: _local_ropes(s) if any(s.windows) else [],
    "position_offset": lambda s: [0, 2] if s.position_offset is None else [s.position_offset + 1, None],
    "windows": lambda s: _windows(s.windows),
    "attention_scale": lambda s: [s.attention_scale * 1.01],
    "attention_softcap": lambda s: [s.attention_softcap * 1.01, 0.0] if s.attention_softcap else [50.0],
    "logit_softcap": lambda s: [s.logit_softcap * 1.01, 0.0] if s.logit_softcap else [30.0],
    "embedding_scale": lambda s: [s.embedding_scale * 1.01, s.d_model**0.5 if s.embedding_scale == 1 else 1.0],
    "tied_head": lambda s: [not s.tied_head],
}
UNSEEN = {
    "architecture": "a label, which names tensors and messages but not the arithmetic",
    "vocab_size": "the width of the logits: a test of its own",
    "context_length": "a limit: a test of its own",
    "sparsity": "what is left out: tests of its own, test_sparse_formulas and those beside it",
}
"""Fields of ModelSpec that no flip is for, and why."""

ROPE_FLIPS: dict[str, Values] = {
    "dim": lambda r: [r.dim // 2] if r.scaling != "longrope" else [],  # whose factors are as many as dim says
    "theta": lambda r: [r.theta * 1.01],
    "scaling": lambda r: ["default"] if r.scaling != "default" else [],  # the others need numbers of their own
    "factor": lambda r: [r.factor * 1.01] if r.scaling in ("linear", "llama3", "yarn") else [],
    "original_context": _original_contexts,
    "low_freq_factor": lambda r: [1.1] if r.scaling == "llama3" else [],
    "high_freq_factor": lambda r: [3.9] if r.scaling == "llama3" else [],
    # Published values lie beyond these few dimensions and are clipped, so the change must be large.
    "beta_fast": lambda r: [1.0] if r.scaling == "yarn" else [],
    "beta_slow": lambda r: [r.beta_slow / 4] if r.scaling == "yarn" else [],
    "attention_factor": lambda r: [r.attention_factor * 1.01],
    "truncate": lambda r: [not r.truncate] if r.scaling == "yarn" else [],
    "short_factors": lambda r: _factors(r, "short_factors", 200),
    "long_factors": lambda r: _factors(r, "long_factors", 64),
}


def flipped(spec: ModelSpec, field: str, value: Any) -> ModelSpec:
    """The spec with one field changed; `rope.` before a name means a field of its rope."""
    if field.startswith("rope."):
        assert spec.rope is not None
        rope = dataclasses.replace(spec.rope, **{field.removeprefix("rope."): value})
        return dataclasses.replace(spec, rope=rope)
    windows = spec.windows[:value] if field == "n_layers" else spec.windows
    return dataclasses.replace(spec, **{"windows": windows, field: value})


def flips(spec: ModelSpec) -> list[tuple[str, ModelSpec]]:
    """Every changed spec, after its label."""
    tables: list[tuple[str, Any, dict[str, Values]]] = [("", spec, MODEL_FLIPS), ("rope.", spec.rope, ROPE_FLIPS)]
    return [
        (f"{prefix}{field}={value}", flipped(spec, prefix + field, value))
        for prefix, owner, table in tables
        if owner is not None
        for field, values in table.items()
        for value in values(owner)
    ]


def refit(tensors: Mapping[str, NDArray[np.float32]], spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """The tensors that a changed spec asks for.

    Args:
        tensors: of the spec before; cut, or continued with zeros, where sizes changed.
        spec: after the change. Norms that it adds have weights 1 and biases 0, other new tensors are random.
    """
    made = {}
    for name, values in tiny_tensors(spec, 1).items():
        shape = values.shape
        module, kind = name.split(".")[-2:]
        if name in tensors:
            values = np.zeros(shape, np.float32)
            common = tuple(slice(min(a, b)) for a, b in zip(shape, tensors[name].shape))
            values[common] = tensors[name][common]
        elif "norm" in module:
            values = np.full(shape, 1.0 if kind == "weight" else 0.0, np.float32)
        made[name] = values
    return made


def _local_ropes(spec: ModelSpec) -> list[RopeSpec | None]:
    """None and another base for sliding layers that turn otherwise; another base where they do not."""
    if spec.local_rope is None:
        return [RopeSpec(dim=spec.head_dim, theta=100.0)]
    return [None, dataclasses.replace(spec.local_rope, theta=spec.local_rope.theta * 1.01)]


def _windows(windows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Windows one longer, one shorter, none, and the other layers sliding; or some where there were none."""
    if not any(windows):
        return [(24,) * len(windows), (*windows[:-1], 24)]
    changed = [tuple(w and w + step for w in windows) for step in (-1, 1)]
    swapped = tuple(0 if w else 24 for w in windows)
    return [*changed, (0,) * len(windows), *([swapped] if any(swapped) else [])]


def _factors(rope: RopeSpec, name: str, used_at: int) -> list[tuple[float, ...]]:
    """Factors 1 % larger, where this set is the one in use."""
    if rope.scaling != "longrope" or rope.original_context != used_at:
        return []
    return [tuple(1.01 * x for x in getattr(rope, name))]
