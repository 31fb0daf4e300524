"""Gemma, Phi-3, GPT-2 and OPT: settings that published configurations state, leave out, or word in two ways."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import RopeSpec
from ondevice.spec_hub import FAMILIES, as_on_hub, config_from_spec, spec_from_config
from tests.tiny import ARCHITECTURES, tiny_spec

PATH = Path("somewhere/config.json")
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 256,
    "hidden_act": "relu",  # which transformers does not read
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "vocab_size": 256000,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "vocab_size": 262144,
}
GEMMA3_VISION = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "sliding_window": 2047,
    "vocab_size": 32064,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
OPT = {
    "model_type": "opt",
    "ffn_dim": 3072,
    "hidden_size": 768,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}


def read(config, **settings):
    return spec_from_config({**config, **settings}, PATH)


def test_gemma2():
    spec = read(GEMMA2)
    assert spec.attention_scale == 144**-0.5 and spec.embedding_scale == math.sqrt(4608)
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)
    assert spec.activation == "gelu_tanh" and spec.norm_eps == 1e-6 and spec.norm_offset == 1.0
    assert spec.post_norms and spec.tied_head and not spec.qk_norm
    assert spec.windows == (4096, 0) * 23
    assert spec.rope == RopeSpec(dim=256) and spec.local_rope is None
    assert read(GEMMA2, query_pre_attn_scalar=None).attention_scale == 1 / 16
    bare = read(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (bare.attention_softcap, bare.logit_softcap) == (0.0, 0.0)
    biased = read(GEMMA2, attention_bias=True)
    assert biased.qkv_bias and biased.output_bias and not biased.ffn_bias


def test_gemma3():
    spec = read(GEMMA3)
    assert spec.windows == ((512,) * 5 + (0,)) * 4 + (512, 512)
    assert (spec.rope, spec.local_rope) == (RopeSpec(dim=256, theta=1e6), RopeSpec(dim=256))
    assert spec.qk_norm and spec.post_norms and spec.tied_head and spec.norm_offset == 1.0
    assert (spec.attention_softcap, spec.logit_softcap, spec.attention_scale) == (0.0, 0.0, 1 / 16)
    assert read(GEMMA3, sliding_window_pattern=3).windows[:4] == (512, 512, 0, 512)
    everything = read(GEMMA3, sliding_window_pattern=1, sliding_window=None)
    assert everything.windows == (0,) * 26 and everything.local_rope is None


def test_gemma3_with_vision_is_read_as_its_text_model():
    spec = read(GEMMA3_VISION)
    assert (spec.architecture, spec.d_model, spec.n_heads, spec.n_kv_heads) == ("gemma3_text", 2560, 8, 4)
    assert (spec.head_dim, spec.vocab_size, spec.context_length) == (256, 262208, 131072)
    assert spec.rope == RopeSpec(dim=256, theta=1e6, scaling="linear", factor=8.0)
    assert spec.local_rope == RopeSpec(dim=256) and spec.tied_head
    assert not read(GEMMA3_VISION, tie_word_embeddings=False).tied_head
    assert config_from_spec(spec)["model_type"] == "gemma3_text"


def test_gemma3_ropes_in_old_and_new_keys():
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read(GEMMA3, rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling)
    nested = {"full_attention": {"rope_theta": 5e5, **scaling}, "sliding_attention": {"rope_theta": 2e4}}
    both = read(GEMMA3, rope_theta=7.0, rope_local_base_freq=7.0, rope_parameters=nested)
    assert old == read(GEMMA3, rope_parameters=nested) == both
    assert old.local_rope == RopeSpec(dim=256, theta=2e4)  # the scaling is the others' alone
    assert old.rope == RopeSpec(dim=256, theta=5e5, scaling="linear", factor=8.0)
    half = {"full_attention": None, "sliding_attention": {"rope_theta": 2e4}}
    assert read(GEMMA3, rope_parameters=half).rope.theta == 1e6


def test_layer_types_of_gemma():
    kinds = ["full_attention"] * 20 + ["sliding_attention"] * 6
    assert read(GEMMA3, layer_types=kinds).windows == (0,) * 20 + (512,) * 6
    with pytest.raises(CheckpointError, match=r"sliding_window.*null"):
        read(GEMMA3, sliding_window=None)


def test_phi3():
    spec = read(PHI3)
    assert spec.rope == RopeSpec(dim=96) and spec.windows == (2047,) * 32
    assert not spec.tied_head and spec.activation == "silu" and not spec.qkv_bias
    assert read(PHI3, sliding_window=None).windows == (0,) * 32
    part = read(PHI3, partial_rotary_factor=0.75)
    assert part.rope.dim == 72
    new = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.75}
    assert read(PHI3, rope_parameters=new) == part


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_phi3_long_context(kind):
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0 + i for i in range(48)]}
    rope = read(PHI3, max_position_embeddings=131072, rope_scaling={"type": kind, **factors}).rope
    assert (rope.scaling, rope.original_context) == ("longrope", 4096)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope.long_factors == tuple(factors["long_factor"])
    silent = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
    config = {**silent, "max_position_embeddings": 131072, "rope_scaling": {"type": kind, **factors}}
    assert spec_from_config(config, PATH).rope == rope
    same = read(PHI3, rope_scaling={"type": kind, **factors}).rope
    assert same.attention_factor == 1.0


def test_gpt2():
    spec = read(GPT2)
    assert (spec.d_ff, spec.head_dim, spec.n_kv_heads, spec.context_length) == (3072, 64, 12, 1024)
    assert (spec.norm, spec.norm_eps, spec.activation) == ("layer", 1e-5, "gelu_tanh")
    assert spec.qkv_bias and spec.output_bias and spec.ffn_bias and spec.tied_head and not spec.gated
    assert spec.rope is None and spec.position_offset == 0
    assert read(GPT2, n_inner=100).d_ff == 100 and read(GPT2, n_inner=None).d_ff == 3072
    assert read(GPT2, layer_norm_epsilon=1e-6).norm_eps == 1e-6
    assert read(GPT2, scale_attn_weights=False).attention_scale == 1.0


def test_opt():
    spec = read(OPT)
    assert (spec.d_ff, spec.activation, spec.norm_eps, spec.position_offset) == (3072, "relu", 1e-5, 2)
    assert spec.tensors()["position.weight"] == (2050, 768)
    assert spec.qkv_bias and spec.output_bias and spec.ffn_bias and spec.tied_head
    plain = read(OPT, enable_bias=False, activation_function="gelu")
    assert (plain.qkv_bias, plain.output_bias, plain.ffn_bias, plain.activation) == (False, False, False, "gelu")
    assert read(OPT, word_embed_proj_dim=None) == spec


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (GEMMA2, "use_bidirectional_attention", True),
        (GEMMA2, "hidden_activation", "swish2"),
        (GEMMA3, "attn_logit_softcapping", 50.0),
        (GEMMA3, "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        (PHI3, "rope_scaling", {"type": "yarn", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}),
        (PHI3, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "add_cross_attention", True),
        (GPT2, "activation_function", "tanh"),
        (OPT, "do_layer_norm_before", False),
        (OPT, "_remove_final_layer_norm", True),
        (OPT, "layer_norm_elementwise_affine", False),
        (OPT, "word_embed_proj_dim", 512),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, key, value):
    with pytest.raises(UnsupportedModelError, match="rope_type" if key == "rope_scaling" else key):
        read(config, **{key: value})


def test_opt_350m_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="opt-350m"):
        read(OPT, hidden_size=1024, word_embed_proj_dim=512, do_layer_norm_before=False)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (GEMMA3, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        (GEMMA3, {"rope_parameters": {"full_attention": 3}}),
        (GEMMA3, {"rope_local_base_freq": 0}),
        (GEMMA3, {"sliding_window_pattern": 0}),
        (GEMMA3_VISION, {"text_config": 3}),
        (GEMMA2, {"query_pre_attn_scalar": 0}),
        (GEMMA2, {"attn_logit_softcapping": "50"}),
        (PHI3, {"partial_rotary_factor": 1.5}),
        (PHI3, {"partial_rotary_factor": 0.001}),
        (PHI3, {"rope_scaling": {"type": "su", "short_factor": [1.0] * 47, "long_factor": [1.0] * 48}}),
        (GPT2, {"n_head": 7}),
        (GPT2, {"n_embd": None}),
        (GPT2, {"n_inner": 0}),
        (OPT, {"ffn_dim": None}),
        (OPT, {"enable_bias": "no"}),
        (OPT, {"num_attention_heads": 5}),
    ],
)
def test_settings_that_cannot_be(config, settings):
    with pytest.raises(CheckpointError, match=r"somewhere/config\.json"):
        read(config, **settings)


@pytest.mark.parametrize("config", [GEMMA2, GEMMA3, GEMMA3_VISION, PHI3, GPT2, OPT], ids=lambda c: c["model_type"])
def test_published_configurations_survive(config):
    spec = read(config)
    assert spec_from_config(config_from_spec(spec), PATH) == spec


LONG = RopeSpec(
    dim=12,
    scaling="longrope",
    original_context=32,
    attention_factor=1.2,
    short_factors=(1.5,) * 6,
    long_factors=(3.0,) * 6,
)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((architecture, {}) for architecture in ARCHITECTURES),
        ("phi3", {"rope": LONG, "windows": (9, 9, 9), "tied_head": True, "context_length": 128}),
        ("gemma2", {"attention_softcap": 0.0, "logit_softcap": 0.0, "windows": (), "attention_scale": 0.25}),
        ("gemma2", {"attention_scale": 168**-0.5, "qkv_bias": True, "output_bias": True, "tied_head": False}),
        ("gemma3_text", {"windows": (0, 8, 0), "local_rope": RopeSpec(dim=16, theta=77.0), "logit_softcap": 5.0}),
        ("gemma3_text", {"windows": (), "local_rope": None}),
        ("gpt2", {"attention_scale": 1.0, "norm_eps": 1e-6, "activation": "relu", "d_ff": 64, "tied_head": False}),
        ("opt", {"qkv_bias": False, "output_bias": False, "ffn_bias": False, "activation": "gelu_tanh"}),
    ],
)
def test_features_survive_the_way_through_a_config(architecture, changes):
    spec = tiny_spec(architecture, **changes)
    config = config_from_spec(spec)
    assert spec_from_config(config, PATH) == spec
    assert config["architectures"] == [FAMILIES[architecture].model_class]


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("gemma2", {"norm_offset": 0.0}, "norm_offset"),
        ("gemma3_text", {"local_rope": RopeSpec(dim=16, scaling="linear", factor=2.0)}, "local_rope"),
        ("phi3", {"rope": RopeSpec(dim=16, scaling="linear", factor=2.0)}, "rope_type"),
        ("gpt2", {"attention_scale": 0.3}, "attention_scale"),
        ("opt", {"norm_eps": 1e-6}, "norm_eps"),
        ("opt", {"output_bias": False}, "qkv_bias"),
    ],
)
def test_what_a_config_cannot_say_is_refused(architecture, changes, problem):
    with pytest.raises(UnsupportedModelError, match=problem):
        config_from_spec(tiny_spec(architecture, **changes))


def test_as_on_hub_gives_gemmas_norms_their_offset():
    spec = tiny_spec("gemma2")
    assert as_on_hub(tiny_spec("gemma2", norm_offset=0.0)) == spec == as_on_hub(spec)
    assert as_on_hub(tiny_spec()) == tiny_spec()


def test_mlx_finds_the_pattern_of_gemma3():
    config = config_from_spec(tiny_spec("gemma3_text", windows=(24, 24, 0)))
    assert config["sliding_window_pattern"] == 3
    assert config_from_spec(tiny_spec("gemma3_text", windows=(24,) * 3))["sliding_window_pattern"] > 3
    assert "sliding_window_pattern" not in config_from_spec(tiny_spec("gemma3_text", windows=(0, 24, 24)))
