"""Tiny random models for tests: real structure, no downloads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.names import Layout, gguf_layout, hub_layout
from ondevice.checkpoint.places import Joiner, places
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
_GEMMA: dict[str, Any] = {
    "norm_eps": 1e-6,
    "norm_offset": 1.0,
    "post_norms": True,
    "activation": "gelu_tanh",
    "embedding_scale": 8.0,
    "tied_head": True,
}
_LEARNED: dict[str, Any] = {
    "norm": "layer",
    "rope": None,
    "n_kv_heads": 4,
    "gated": False,
    "qkv_bias": True,
    "output_bias": True,
    "ffn_bias": True,
    "tied_head": True,
}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"windows": (24, 24, 24)},
    "qwen2": {"qkv_bias": True, "tied_head": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "norm_eps": 1e-6},
    "phi3": {"rope": RopeSpec(dim=12)},
    "gemma2": {**_GEMMA, "windows": (24, 0, 24), "attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3_text": {
        **_GEMMA,
        "qk_norm": True,
        "windows": (24, 24, 0),
        "rope": RopeSpec(dim=16, theta=1e6, scaling="linear", factor=8.0),
        "local_rope": RopeSpec(dim=16),
    },
    "gpt2": {**_LEARNED, "position_offset": 0, "activation": "gelu_tanh"},
    "opt": {**_LEARNED, "position_offset": 2, "activation": "relu"},
}
ARCHITECTURES = tuple(FEATURES)
GGUF_NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""What GGUF calls architectures that it calls otherwise."""


def tiny_spec(architecture: str = "llama", **overrides: Any) -> ModelSpec:
    """A spec of a supported architecture: 3 layers, d 64, 4 heads over 2 KV heads, d_ff 96, vocabulary 96."""
    fields: dict[str, Any] = {"architecture": architecture, **SIZES, **FEATURES[architecture], **overrides}
    fields.setdefault("rope", RopeSpec(dim=fields["head_dim"]))
    return ModelSpec(**fields)


def tiny_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors of a spec, such that attention is peaked and logits spread by 1 or more."""
    random = np.random.RandomState(seed)
    return {name: _values(random, name, shape, spec.norm_offset) for name, shape in spec.tensors().items()}


def stored_tensors(spec: ModelSpec, tensors: Mapping[str, Any], layout: Layout | None = None) -> dict[str, Any]:
    """Arrays by the names, and in the fused and transposed forms, that files have; other names stay as they are.

    Args:
        spec: of the model.
        tensors: by canonical name.
        layout: of the files; that of Hub folders if left out.
    """
    joiner = Joiner(places(layout or hub_layout(spec.architecture), spec), Path("stored"))
    stored = {}
    for name, w in tensors.items():
        whole = joiner.add(name, w) if name in joiner.places else w
        if whole is not None:
            stored[joiner.places[name].name if name in joiner.places else name] = whole
    return stored


def _values(
    random: np.random.RandomState, name: str, shape: tuple[int, ...], norm_offset: float
) -> NDArray[np.float32]:
    noise = random.standard_normal(shape)
    module, kind = name.split(".")[-2:]
    if "norm" in module:
        values = 0.2 * noise + (1.0 - norm_offset if kind == "weight" else 0.0)
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


def tiny_gguf(
    path: Path,
    spec: ModelSpec | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    types: Mapping[str, str] | str = "F32",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
) -> Path:
    """Writes a GGUF file with the `gguf` package, as llama.cpp's converter lays it out.

    Args:
        path: file to write.
        spec: tiny llama if left out; of any architecture but OPT. The weights of norms are written with its
            norm_offset added.
        tensors: float32 arrays by canonical name; random ones if left out.
        types: ggml type of the matrices, or of each by canonical name (others stay F32).
        metadata: further keys; str, int, float, bool or list of str.
        extra: further tensors by their name in the file.
    """
    import gguf

    spec = spec or tiny_spec()
    tensors = tensors if tensors is not None else tiny_tensors(spec)
    architecture = GGUF_NAMES.get(spec.architecture, spec.architecture)
    writer = gguf.GGUFWriter(path, architecture)
    _gguf_settings(writer, spec)
    for key, value in (metadata or {}).items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            bool: writer.add_bool,
        }
        add.get(type(value), writer.add_array)(key, value)
    layout = gguf_layout(spec.architecture)
    kinds = {} if isinstance(types, str) else {layout.name(name): kind for name, kind in types.items()}
    shifted = {
        name: w + np.float32(spec.norm_offset) if "norm" in name and name.endswith("weight") else w
        for name, w in tensors.items()
    }
    if architecture == "llama":
        shifted = {name: _interleaved(w, name, spec) for name, w in shifted.items()}
    for name, w in stored_tensors(spec, shifted, layout).items():
        kind = types if isinstance(types, str) else kinds.get(name, "F32")
        kind = gguf.GGMLQuantizationType[kind if w.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
    for name, w in (extra or {}).items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_settings(writer: Any, spec: ModelSpec) -> None:
    writer.add_block_count(spec.n_layers)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.d_model)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.n_heads)
    if spec.rope is None:
        writer.add_layer_norm_eps(spec.norm_eps)
        return
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(spec.rope.dim)
    writer.add_rope_freq_base(spec.rope.theta)
    if any(spec.windows):
        writer.add_sliding_window(max(spec.windows))
    if spec.attention_softcap:
        writer.add_attn_logit_softcapping(spec.attention_softcap)
    if spec.logit_softcap:
        writer.add_final_logit_softcapping(spec.logit_softcap)


def _interleaved(w: NDArray[Any], name: str, spec: ModelSpec) -> NDArray[Any]:
    """Rows of q and k in the order of llama's GGUF files: the two that turn together are neighbours."""
    module = name.split(".")[-2]
    if module not in ("q", "k"):
        return w
    heads = spec.n_heads if module == "q" else spec.n_kv_heads
    return w.reshape(heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(w.shape)
