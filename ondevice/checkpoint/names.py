"""Tensor names of GGUF files and of Hub checkpoints, mapped to the canonical names of ModelSpec.tensors()."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ROUTERS = {"ffn_router": "mlp.router", "head_router": "self_attn.head_router"}
_HUB = {
    **_ROUTERS,
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
_GEMMA = {
    **_HUB,
    "post_attn_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    **_HUB,
    **dict.fromkeys("qkv", "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
_GPT2 = {
    "ffn_router": "mlp.router",
    "head_router": "attn.head_router",
    "embed": "transformer.wte",
    "position": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": "ln_1",
    **dict.fromkeys("qkv", "attn.c_attn"),
    "o": "attn.c_proj",
    "ffn_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_OPT = {
    **_ROUTERS,
    "embed": "model.decoder.embed_tokens",
    "position": "model.decoder.embed_positions",
    "final_norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "attn_norm": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}
_GGUF = {
    "embed": "token_embd",
    "position": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "post_ffn_norm": "post_ffw_norm",
}
_GGUF_FUSED = dict.fromkeys("qkv", "attn_qkv")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of file names and arranges a model's tensors.

    Args:
        modules: canonical module -> stored module. Modules that share a stored one lie in it one after the other
            along the outputs, in the order of ModelSpec.tensors().
        layers: what stands before a layer's number.
        transposed: stored modules whose matrices are [in, out].
        aliases: beginnings of names that other files use -> what they stand for here.
        ignored_starts, ignored_ends: of names that hold no weight of the language model.
    """

    modules: Mapping[str, str]
    layers: str = "model.layers"
    transposed: tuple[str, ...] = ()
    aliases: Mapping[str, str] | None = None
    ignored_starts: tuple[str, ...] = ()
    ignored_ends: tuple[str, ...] = ()

    def name(self, canonical: str) -> str:
        """`layers.3.q.weight` -> `model.layers.3.self_attn.q_proj.weight`, as this layout has it."""
        module, *rest = parts = canonical.split(".")
        if module != "layers":
            return ".".join((self.modules[module], *rest))
        _, number, module, *rest = parts
        return ".".join((self.layers, number, self.modules[module], *rest))

    def unalias(self, stored: str) -> str | None:
        """The name that a tensor of a file has here; None if it is one to ignore."""
        if stored.startswith(self.ignored_starts) or stored.endswith(self.ignored_ends):
            return None
        for start, meaning in (self.aliases or {}).items():
            if stored.startswith(start):
                return meaning + stored.removeprefix(start)
        return stored

    def is_transposed(self, stored: str) -> bool:
        """Whether a stored tensor is a matrix [in, out]."""
        module, kind = stored.rsplit(".", 1)
        return kind == "weight" and module.endswith(self.transposed) if self.transposed else False


_PLAIN_HUB = Layout(_HUB, ignored_ends=("rotary_emb.inv_freq",))
_HUB_LAYOUTS = {
    "gemma2": Layout(_GEMMA),
    "gemma3_text": Layout(_GEMMA),
    # The text model inside a vision model, which is otherwise left out.
    "gemma3": Layout(
        _GEMMA,
        aliases={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
        },
        ignored_starts=tuple(m + part for m in ("", "model.") for part in ("vision_tower.", "multi_modal_projector.")),
    ),
    "phi3": Layout(_PHI3, ignored_ends=("rotary_emb.inv_freq",)),
    "gpt2": Layout(
        _GPT2,
        layers="transformer.h",
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        aliases={start: "transformer." + start for start in ("wte.", "wpe.", "h.", "ln_f.")},
        ignored_ends=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    ),
    "opt": Layout(_OPT, layers="model.decoder.layers", aliases={"decoder.": "model.decoder."}),
}
_GGUF_LAYOUTS = {
    "gpt2": Layout({**_GGUF, **_GGUF_FUSED}, layers="blk"),
    "phi3": Layout({**_GGUF, **_GGUF_FUSED, "gate": "ffn_up"}, layers="blk"),
}
_PLAIN_GGUF = Layout(_GGUF, layers="blk")
GGUF_IGNORED = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""GGUF tensors that the spec has taken in."""


def hub_layout(model_type: str) -> Layout:
    """Layout of a Hub folder whose config.json states this model_type."""
    return _HUB_LAYOUTS.get(model_type, _PLAIN_HUB)


def gguf_layout(architecture: str) -> Layout:
    """Layout of the GGUF files of a spec's architecture."""
    return _GGUF_LAYOUTS.get(architecture, _PLAIN_GGUF)
