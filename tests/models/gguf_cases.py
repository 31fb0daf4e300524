"""GGUF files of some cases, laid out as llama.cpp's converter does it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.spec import ModelSpec, RopeSpec
from tests.models.cases import case_spec, case_tensors
from tests.tiny import GGUF_NAMES, tiny_gguf

_YARN = RopeSpec(
    dim=16,
    scaling="yarn",
    factor=4.0,
    original_context=64,
    beta_fast=4.0,
    beta_slow=0.5,
    attention_factor=1.3 * (1 + 0.1 * math.log(4.0)),
)
GGUF_CASES: dict[str, dict[str, Any]] = {
    "llama1": {},
    "llama_one_kv_head": {},
    "llama_linear": {},
    "llama3": {},
    "llama_yarn_published": {},
    "llama_yarn": {"rope": _YARN},
    "llama_longrope": {},
    "llama_biases": {"activation": "silu"},
    "mistral_no_window": {"activation": "silu"},
    "qwen2": {},
    "qwen2_yarn": {},
    "qwen3": {},
    "phi3": {"windows": (0, 0, 0)},
    "phi3_partial": {},
    "phi3_longrope": {},
    "gemma2": {"attention_scale": 32**-0.5},
    "gemma3": {"attention_scale": 32**-0.5},
    "gemma3_bases": {"attention_scale": 32**-0.5},
    "gpt2": {},
}
"""Cases that GGUF can express, and what of the spec is changed where llama.cpp lacks a feature: it knows one activation
per architecture, always rounds YaRN's ramp, divides Gemma's scores by the root of head_dim, and pays no heed to windows
but Gemma's."""


def gguf_spec(name: str) -> ModelSpec:
    """The spec of a case as its GGUF file has it."""
    return dataclasses.replace(case_spec(name), **GGUF_CASES[name])


def write_case(path: Path, name: str) -> Path:
    """Writes the GGUF file of a case, float32 throughout."""
    spec = gguf_spec(name)
    family = GGUF_NAMES.get(spec.architecture, spec.architecture)
    tensors = case_tensors(name, spec)
    metadata = {**_vocabulary(), **_scaling(spec.rope, family), **_local_layers(spec, family)}
    return tiny_gguf(path, spec, tensors, metadata=metadata, extra=_divisors(spec.rope))


def _local_layers(spec: ModelSpec, family: str) -> dict[str, Any]:
    """Gemma 3's sliding layers where they are not the usual ones: a pattern, and a base of their own."""
    keys: dict[str, Any] = {}
    if spec.local_rope is not None and spec.local_rope.theta != 10000.0:
        keys[f"{family}.rope.freq_base_swa"] = spec.local_rope.theta
        keys[f"{family}.attention.sliding_window_pattern"] = spec.windows.index(0) + 1
    return keys


def _scaling(rope: RopeSpec | None, family: str) -> dict[str, Any]:
    if rope is None or rope.scaling in ("default", "llama3"):
        return {}
    keys: dict[str, Any] = {"type": rope.scaling}
    stated_attention = rope.attention_factor
    if rope.scaling != "longrope":
        keys["factor"] = rope.factor
    if rope.scaling == "yarn":
        stated_attention /= 1 + 0.1 * math.log(rope.factor)
    if rope.scaling != "linear":
        keys["original_context_length"] = rope.original_context
    if stated_attention != 1:
        keys["attn_factor"] = stated_attention
    if (rope.beta_fast, rope.beta_slow) != (32, 1):
        keys |= {"yarn_beta_fast": rope.beta_fast, "yarn_beta_slow": rope.beta_slow}
    return {f"{family}.rope.scaling.{key}": value for key, value in keys.items()}


def _divisors(rope: RopeSpec | None) -> dict[str, NDArray[np.float32]]:
    """Tensors of frequency divisors: llama 3's scaling has no other form in GGUF, and longrope has two."""
    if rope is None:
        return {}
    if rope.scaling == "longrope":
        factors = {"short": rope.short_factors, "long": rope.long_factors}
        return {f"rope_factors_{kind}.weight": np.array(f, np.float32) for kind, f in factors.items()}
    if rope.scaling != "llama3":
        return {}
    plain = dataclasses.replace(rope, scaling="default").inverse_frequencies(0)
    return {"rope_freqs.weight": (plain / rope.inverse_frequencies(0)).astype(np.float32)}


def _vocabulary() -> dict[str, Any]:
    """A byte-level vocabulary of 96 tokens: printable ASCII, space, newline and two merges."""
    tokens = [chr(c) for c in range(33, 125)] + ["Ġ", "Ċ", "Ġa", "in"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": ["Ġ a", "i n"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
