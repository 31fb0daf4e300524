"""GPT-2 and OPT as Hub configurations: learned positions, layer norms with biases, no gate."""

from __future__ import annotations

from typing import Any

from ondevice.spec import ModelSpec
from ondevice.spec_fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, Fields
from ondevice.spec_hub_common import HUB_ACTIVATIONS, divided_head_dim, read_activation

OPT_POSITION_OFFSET = 2  # the first rows once stood for padding
_SHARED: dict[str, Any] = {"norm": "layer", "gated": False}


def read_gpt2(fields: Fields) -> ModelSpec:
    """Spec of a GPT-2. `reorder_and_upcast_attn` asks for float32 scores, which every backend computes anyway."""
    for key, meaning in (
        ("scale_attn_by_inverse_layer_idx", "a scale of attention that differs between layers"),
        ("add_cross_attention", "attention to another model's states"),
    ):
        if fields.flag(key, False):
            raise fields.unsupported(key, f"{meaning} is not supported")
    d_model, n_heads = fields.integer("n_embd"), fields.integer("n_head", high=MAX_HEADS)
    return ModelSpec(
        **_SHARED,
        architecture="gpt2",
        n_layers=fields.integer("n_layer", high=MAX_LAYERS),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=divided_head_dim(fields, d_model, n_heads),
        d_ff=fields.integer("n_inner", 4 * d_model),
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        context_length=fields.integer("n_positions", 1024, high=MAX_CONTEXT),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, high=1.0),
        activation=read_activation(fields, "activation_function", "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        position_offset=0,
        attention_scale=0.0 if fields.flag("scale_attn_weights", True) else 1.0,
        tied_head=fields.flag("tie_word_embeddings", True),
    )


def read_opt(fields: Fields) -> ModelSpec:
    """Spec of an OPT, but for the 350m, which norms after each block and embeds in fewer dimensions."""
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=MAX_HEADS)
    for key, needed, meaning in (
        ("do_layer_norm_before", True, "norms after each block"),
        ("_remove_final_layer_norm", False, "a model without final norm"),
        ("layer_norm_elementwise_affine", True, "norms without weights"),
    ):
        if fields.flag(key, needed) != needed:
            raise fields.unsupported(key, f"{meaning} (as opt-350m has them): not supported")
    if fields.integer("word_embed_proj_dim", d_model) != d_model:
        raise fields.unsupported(
            "word_embed_proj_dim", f"embeddings narrower than hidden_size {d_model} (as in opt-350m): not supported"
        )
    bias = fields.flag("enable_bias", True)
    return ModelSpec(
        **_SHARED,
        architecture="opt",
        n_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=divided_head_dim(fields, d_model, n_heads),
        d_ff=fields.integer("ffn_dim"),
        vocab_size=fields.integer("vocab_size", high=MAX_VOCAB),
        context_length=fields.integer("max_position_embeddings", 2048, high=MAX_CONTEXT),
        norm_eps=1e-5,
        activation=read_activation(fields, "activation_function", "relu"),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        position_offset=OPT_POSITION_OFFSET,
        tied_head=fields.flag("tie_word_embeddings", True),
    )


def write_gpt2(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of a GPT-2."""
    return {
        "n_embd": spec.d_model,
        "n_layer": spec.n_layers,
        "n_head": spec.n_heads,
        "n_inner": spec.d_ff,
        "n_positions": spec.context_length,
        "n_ctx": spec.context_length,
        "vocab_size": spec.vocab_size,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": "gelu_new" if spec.activation == "gelu_tanh" else HUB_ACTIVATIONS[spec.activation],
        "scale_attn_weights": spec.attention_scale != 1.0,
        "tie_word_embeddings": spec.tied_head,
    }


def write_opt(spec: ModelSpec) -> dict[str, Any]:
    """Configuration of an OPT."""
    return {
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "ffn_dim": spec.d_ff,
        "word_embed_proj_dim": spec.d_model,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "activation_function": HUB_ACTIVATIONS[spec.activation],
        "enable_bias": spec.output_bias,
        "do_layer_norm_before": True,
        "tie_word_embeddings": spec.tied_head,
    }
