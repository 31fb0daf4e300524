"""The models of this folder: tiny Hub configurations that together use every feature of the supported architectures.

They are worded as published configurations are (transformers 4), with old and new spellings of the rope keys.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.spec import ModelSpec
from ondevice.spec_hub import spec_from_config
from tests.tiny import tiny_tensors

LENGTH = 160
"""Tokens of every test sequence: beyond the windows, the original contexts and two pages of the cache."""
POSITIONS = np.array([0, 1, 22, 23, 24, 47, 63, 64, 65, 127, 158, 159])
"""Positions whose logits are kept: around the window of 24, the page of 64 and both ends."""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}


def _llama(**keys: Any) -> dict[str, Any]:
    return {"model_type": "llama", **_SIZES, "num_key_value_heads": 2, **keys}


def _mistral(**keys: Any) -> dict[str, Any]:
    return {"model_type": "mistral", **_SIZES, "num_key_value_heads": 2, **keys}


def _qwen(generation: int, **keys: Any) -> dict[str, Any]:
    sizes = {**_SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
    return {"model_type": f"qwen{generation}", **sizes, **keys}


def _phi3(**keys: Any) -> dict[str, Any]:
    return {"model_type": "phi3", **_SIZES, "num_key_value_heads": 2, "pad_token_id": 0, **keys}


def _gemma(generation: str, **keys: Any) -> dict[str, Any]:
    sizes = {**_SIZES, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6}
    sizes |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return {"model_type": f"gemma{generation}", **sizes, "sliding_window": 24, "query_pre_attn_scalar": 20, **keys}


def _gpt2(**keys: Any) -> dict[str, Any]:
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_ctx": 256, "vocab_size": 96}
    return {"model_type": "gpt2", **sizes, **keys}


def _opt(**keys: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96, "vocab_size": 96}
    return {"model_type": "opt", **sizes, "max_position_embeddings": 256, "word_embed_proj_dim": 64, **keys}


_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.2, 1.6, 2.2, 3.0, 3.5, 4.0, 4.0],
}
_PHI3_FACTORS = {f"{kind}_factor": _LONGROPE[f"{kind}_factor"] for kind in ("short", "long")}

CASES: dict[str, dict[str, Any]] = {
    # As many KV heads as heads and no key that says so, as llama 1 had it.
    "llama1": {"model_type": "llama", **_SIZES, "rms_norm_eps": 1e-6},
    "llama_one_kv_head": _llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama_linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": _llama(
        rope_theta=500000.0,
        tie_word_embeddings=True,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_yarn": _llama(
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
        }
    ),
    "llama_yarn_published": _llama(rope_scaling=_YARN),
    "llama_longrope": _llama(rope_scaling={**_LONGROPE, "original_max_position_embeddings": 64}),
    "llama_longrope_short": _llama(rope_scaling={**_LONGROPE, "original_max_position_embeddings": 200}),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, head_dim=32, hidden_act="gelu"),
    "llama_relu": _llama(hidden_act="relu"),
    "mistral": _mistral(sliding_window=24, head_dim=32, num_key_value_heads=4),
    "mistral_no_window": _mistral(sliding_window=None, hidden_act="gelu_pytorch_tanh"),
    "qwen2": _qwen(2, tie_word_embeddings=True, sliding_window=24, max_window_layers=1),
    "qwen2_windows": _qwen(2, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen2_yarn": _qwen(2, rope_scaling=_YARN),
    "qwen3": _qwen(3, head_dim=32, tie_word_embeddings=True),
    "qwen3_layer_types": _qwen(
        3,
        head_dim=32,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": _phi3(num_key_value_heads=4, original_max_position_embeddings=256, sliding_window=24),
    "phi3_partial": _phi3(partial_rotary_factor=0.75, tie_word_embeddings=True),
    "phi3_longrope": _phi3(original_max_position_embeddings=64, rope_scaling={**_PHI3_FACTORS, "type": "longrope"}),
    "phi3_longrope_short": _phi3(
        original_max_position_embeddings=200,
        partial_rotary_factor=0.5,
        rope_scaling={kind: factors[:4] for kind, factors in _PHI3_FACTORS.items()} | {"type": "longrope"},
    ),
    "gemma2": _gemma("2"),
    # Caps low enough to bend most scores and logits, a window on other layers than usual.
    "gemma2_low_caps": _gemma(
        "2",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
        attention_bias=True,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
        hidden_activation="silu",
    ),
    "gemma2_no_caps": _gemma("2", attn_logit_softcapping=None, final_logit_softcapping=None),
    # Seven layers, so that the sixth sees everything, under scaling that the others do without.
    "gemma3": _gemma("3_text", num_hidden_layers=7, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3_bases": _gemma(
        "3_text",
        rope_theta=50000.0,
        rope_local_base_freq=500.0,
        sliding_window_pattern=2,
        final_logit_softcapping=6.0,
        num_attention_heads=2,
        hidden_size=96,
    ),
    "gpt2": _gpt2(),
    "gpt2_variations": _gpt2(
        n_inner=96,
        activation_function="relu",
        layer_norm_epsilon=1e-3,
        scale_attn_weights=False,
        tie_word_embeddings=False,
    ),
    "opt": _opt(),
    "opt_no_biases": _opt(enable_bias=False, activation_function="gelu", tie_word_embeddings=False),
}


def case_spec(name: str) -> ModelSpec:
    """The spec that a case's configuration stands for."""
    return spec_from_config(CASES[name], Path(name) / "config.json")


def case_tensors(name: str, spec: ModelSpec | None = None) -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors of a case by canonical name, the same on every machine."""
    return tiny_tensors(spec or case_spec(name), _seed(name))


def case_ids(name: str) -> NDArray[np.int32]:
    """The case's token ids, int32 [LENGTH]."""
    random = np.random.RandomState(_seed(name) + 1)
    return random.randint(0, _SIZES["vocab_size"], LENGTH).astype(np.int32)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode()) % 2**31
