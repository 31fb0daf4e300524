"""Tensor names of GGUF files and of Hub checkpoints, mapped to the canonical names of ModelSpec.tensors()."""

from __future__ import annotations

import numpy as np

from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.spec import ModelSpec

GGUF = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
HUB = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
HUB_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of Hub names that hold constants, not weights."""
GGUF_IGNORED = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""GGUF tensors that the spec has taken in."""


def gguf_name(canonical: str) -> str:
    """`layers.3.q.weight` -> `blk.3.attn_q.weight`."""
    return _rename(canonical, GGUF, "blk")


def hub_name(canonical: str) -> str:
    """`layers.3.q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    return _rename(canonical, HUB, "model.layers")


def _rename(canonical: str, table: dict[str, str], layers: str) -> str:
    *layer, module, kind = canonical.split(".")
    place = f"{layers}.{layer[1]}." if layer else ""
    return f"{place}{table[module]}.{kind}"


def undo_interleaving(tensor: Tensor, canonical: str, spec: ModelSpec) -> Tensor:
    """Rows of q and k as the half-split rotary embedding wants them.

    GGUF files of architecture llama (which is Mistral's too) hold the two rows that turn together side by
    side; the Hub's order, and ours, has them dim/2 rows apart. Other tensors come back as they are.

    Args:
        tensor: weight [heads * head_dim, in] or bias [heads * head_dim].
        canonical: name of the tensor.
        spec: of the model.
    """
    module = canonical.split(".")[-2]
    if spec.architecture not in ("llama", "mistral") or spec.rope is None or module not in ("q", "k"):
        return tensor
    heads = spec.n_heads if module == "q" else spec.n_kv_heads
    rows = np.arange(heads * spec.head_dim).reshape(heads, spec.head_dim)
    dim = spec.rope.dim
    rows[:, :dim] = np.concatenate([rows[:, 0:dim:2], rows[:, 1:dim:2]], axis=1)
    index = rows.reshape(-1)
    return tensor.rows(index) if isinstance(tensor, Quantized) else tensor[index]
