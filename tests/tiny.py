"""Tiny random models for tests: real structure, no downloads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.spec import ModelSpec, RopeSpec

SIZES: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 64,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "d_ff": 96,
    "vocab_size": 96,
    "context_length": 128,
}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"windows": (24, 24, 24)},
    "qwen2": {"qkv_bias": True, "tied_head": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "norm_eps": 1e-6},
}


def tiny_spec(architecture: str = "llama", **overrides: Any) -> ModelSpec:
    """A spec of a supported architecture: 3 layers, d 64, 4 heads over 2 KV heads, d_ff 96, vocabulary 96."""
    fields: dict[str, Any] = {"architecture": architecture, **SIZES, **FEATURES[architecture], **overrides}
    fields.setdefault("attention_scale", fields["head_dim"] ** -0.5)
    fields.setdefault("rope", RopeSpec(dim=fields["head_dim"]))
    return ModelSpec(**fields)


def tiny_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors of a spec, such that attention is peaked and logits spread by 1 or more."""
    random = np.random.RandomState(seed)
    return {name: _values(random, name, shape) for name, shape in spec.tensors().items()}


def _values(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    noise = random.standard_normal(shape)
    module, kind = name.split(".")[-2:]
    if "norm" in module:
        values = 0.2 * noise + (1.0 if kind == "weight" else 0.0)
    elif kind == "bias":
        values = 0.3 * noise
    elif module in ("embed", "position"):
        values = 0.5 * noise
    else:
        values = (2.0 if module in ("q", "k", "head") else 1.0) * noise / np.sqrt(shape[-1])
    return values.astype(np.float32)


def tiny_checkpoint(
    folder: Path,
    spec: ModelSpec | None = None,
    tensors: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
    **options: Any,
) -> Path:
    """Writes a folder in our format.

    Args:
        folder: must not exist.
        spec: tiny llama if left out.
        tensors: arrays or Quantized by canonical name; random ones if left out.
        dtype: that float tensors are stored in.
        options: of `write_checkpoint` (tokenizer, config_extra, max_shard_bytes).

    Returns:
        The folder.
    """
    from ondevice.checkpoint.writer import write_checkpoint

    spec = spec or tiny_spec()
    tensors = tensors or tiny_tensors(spec)
    items = ((name, w.astype(dtype) if isinstance(w, np.ndarray) else w) for name, w in tensors.items())
    write_checkpoint(folder, spec, items, **options)
    return folder
