"""Known models' sizes, as their published configurations state them: shapes to run with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ondevice.errors import OptionError
from ondevice.spec import ModelSpec
from ondevice.spec_hub import spec_from_config


def _llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, context: int, **more: Any) -> Any:
    """Configuration of a Llama or of a model that shares its keys."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": 500000, "rope_scaling": {**scaling, "original_max_position_embeddings": 8192}}


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


def _gemma2_2b(ffn: int, **more: Any) -> dict[str, Any]:
    norms = {"model_type": "gemma2", "rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
    return _llama(2304, 26, 8, 4, ffn, 256000, 8192, **norms, **caps, **more)


_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=100000, tie_word_embeddings=True),
    "qwen2.5-0.5b": _llama(896, 24, 14, 2, 4864, 151936, 32768, **_QWEN, model_type="qwen2"),
    "qwen3-0.6b": _llama(1024, 28, 16, 8, 3072, 151936, 40960, **_QWEN, model_type="qwen3", head_dim=128),
    "gemma-3-1b": _llama(
        *(1152, 26, 4, 1, 6912, 262144, 32768),
        model_type="gemma3_text",
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        rope_local_base_freq=10000,
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
    "gemma-2-2b": _gemma2_2b(9216),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, 131072, **_llama3_rope(32.0), tie_word_embeddings=True),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, 131072, **_llama3_rope(8.0), tie_word_embeddings=False),
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096, rope_theta=10000, tie_word_embeddings=False),
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
}
ALIASES = {"smollm2": "smollm2-135m"}


def shape_spec(name: str, **overrides: Any) -> ModelSpec:
    """Spec of a known model.

    Args:
        name: a key of SHAPES or ALIASES.
        overrides: keys of its configuration with other values.

    Raises:
        OptionError: no such shape.
    """
    name = ALIASES.get(name, name)
    if name not in SHAPES:
        raise OptionError(f"shape {name!r} is not known; known are {', '.join(SHAPES)}")
    return spec_from_config({**SHAPES[name], **overrides}, Path(name))
