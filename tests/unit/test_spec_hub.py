from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import RopeSpec
from ondevice.spec_hub import config_from_spec, spec_from_config
from tests.tiny import tiny_spec

PATH = Path("somewhere/config.json")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 96,
}


def read(model_type: str = "llama", **settings):
    return spec_from_config({"model_type": model_type, **SIZES, **settings}, PATH)


@pytest.mark.parametrize("model_type", LLAMAS)
def test_defaults_are_those_of_transformers(model_type):
    settings = {} if model_type == "llama" else {"num_key_value_heads": 4}
    spec = read(model_type, **settings)
    assert spec.norm_eps == 1e-6 and spec.rope.theta == 10000.0 and not spec.tied_head
    assert spec.activation == "silu" and spec.n_kv_heads == 4
    assert spec.context_length == {"llama": 2048, "mistral": 131072}.get(model_type, 32768)
    assert spec.head_dim == (128 if model_type == "qwen3" else 16)
    assert spec.windows == (((4096 if model_type == "mistral" else 0),) * 3)
    assert (spec.qkv_bias, spec.output_bias) == (model_type == "qwen2", False)
    assert spec.qk_norm == (model_type == "qwen3")
    assert spec.attention_scale == spec.head_dim**-0.5


def test_number_of_kv_heads_where_it_is_not_stated():
    sizes = {"num_attention_heads": 32, "hidden_size": 512}
    assert read("llama", **sizes).n_kv_heads == 32
    assert read("mistral", **sizes).n_kv_heads == 8
    assert read("mistral", num_key_value_heads=None, **sizes).n_kv_heads == 32
    assert read("qwen2", **sizes).n_kv_heads == 32


def test_biases():
    spec = read("llama", attention_bias=True, mlp_bias=True)
    assert spec.qkv_bias and spec.output_bias and spec.ffn_bias
    spec = read("qwen3", attention_bias=True, num_key_value_heads=2)
    assert spec.qkv_bias and spec.output_bias and not spec.ffn_bias


def test_windows_of_mistral_and_qwen():
    assert read("mistral", num_key_value_heads=2, sliding_window=7).windows == (7, 7, 7)
    assert read("mistral", num_key_value_heads=2, sliding_window=None).windows == (0, 0, 0)
    kv = {"num_key_value_heads": 2, "use_sliding_window": True}
    assert read("qwen2", **kv, sliding_window=9, max_window_layers=1).windows == (0, 9, 9)
    assert read("qwen2", **kv).windows == (0, 0, 0)  # layers from 28 on slide
    assert read("qwen3", **kv, max_window_layers=0).windows == (4096,) * 3
    assert read("qwen2", num_key_value_heads=2, sliding_window=9, max_window_layers=1).windows == (0, 0, 0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read("qwen2", **kv, sliding_window=9, layer_types=kinds).windows == (9, 0, 9)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
        ("mistral", {"layer_types": ["full_attention"] * 3}),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["linear_attention"] * 3}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"]}),
    ],
)
def test_layer_types_that_contradict_the_rest(model_type, settings):
    with pytest.raises(CheckpointError, match="layer_types"):
        read(model_type, num_key_value_heads=2, **settings)


def test_rope_in_old_and_new_keys():
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = RopeSpec(dim=16, theta=5e5, scaling="llama3", factor=8.0, original_context=64)
    old = read(rope_theta=500000, rope_scaling={"rope_type": "llama3", **llama3})
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    both = read(rope_theta=1.5, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert old.rope == new.rope == both.rope == expected
    assert read(rope_parameters={"rope_theta": 7e4}).rope == RopeSpec(dim=16, theta=7e4)
    assert read(rope_scaling={"type": "linear", "factor": 4}).rope == RopeSpec(dim=16, scaling="linear", factor=4.0)


def test_yarn_and_longrope():
    yarn = read(max_position_embeddings=256, rope_scaling={"type": "yarn", "factor": 4, "beta_fast": 16}).rope
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert (yarn.original_context, yarn.beta_fast, yarn.beta_slow) == (256, 16.0, 1.0)
    pair = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}
    gain = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert read(rope_scaling=pair).rope.attention_factor == pytest.approx(gain)
    factors = {"short_factor": [1] * 8, "long_factor": [2.5] * 8, "original_max_position_embeddings": 32}
    long = read(max_position_embeddings=128, rope_scaling={"type": "longrope", **factors}).rope
    assert long.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    assert np.allclose(long.inverse_frequencies(32) / long.inverse_frequencies(33), 2.5)


@pytest.mark.parametrize("kind", ["dynamic", "mrope", "proportional", "su"])
def test_other_rope_types_are_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*llama3"):
        read(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_unknown_model_types_are_refused_and_the_supported_named():
    with pytest.raises(UnsupportedModelError, match=r"mamba2.*llama, mistral, qwen2, qwen3"):
        read("mamba2")
    for value in (None, 3, ["llama"], {}):
        with pytest.raises(CheckpointError, match="model_type"):
            read(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "swiglu_oai"),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
    ],
)
def test_unsupported_features_are_refused_by_name(key, value):
    with pytest.raises(UnsupportedModelError, match=key):
        read(**{key: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, 2**40, [64], float("nan"), 10**400])
@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_absurd_sizes_are_refused(key, value):
    with pytest.raises(CheckpointError, match=key):
        read(**{key: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"rms_norm_eps": "1e-6"},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": -1e-6},
        {"rope_theta": 0},
        {"rope_theta": 1},
        {"rope_theta": 10**400},
        {"tie_word_embeddings": "yes"},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 7}},
        {"rope_scaling": {"type": "longrope", "short_factor": [0] * 8, "long_factor": [1] * 8}},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 7},
        {"head_dim": 15},
        {"hidden_act": 3},
        {"num_hidden_layers": 1024, "hidden_size": 2**20, "intermediate_size": 2**20, "head_dim": 2**20},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(CheckpointError, match=r"somewhere/config\.json"):
        read(**settings)


def test_missing_sizes_are_named():
    for key in SIZES:
        with pytest.raises(CheckpointError, match=f"{key}.*missing"):
            read(**{key: None})


FULL = tuple(1.0 + i / 7 for i in range(8))


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(dim=16, theta=1e6),
        RopeSpec(dim=16, scaling="linear", factor=2.5),
        RopeSpec(dim=16, theta=5e5, scaling="llama3", factor=8.0, original_context=64, high_freq_factor=4.5),
        RopeSpec(dim=16, scaling="yarn", factor=4.0, original_context=32, attention_factor=1.25, truncate=False),
        RopeSpec(dim=16, scaling="longrope", original_context=128, short_factors=FULL, long_factors=FULL),
    ],
    ids=lambda rope: rope.scaling,
)
@pytest.mark.parametrize("architecture", [*LLAMAS, "gemma2"])
def test_config_from_spec_gives_the_same_spec_back(architecture, rope):
    spec = tiny_spec(architecture, rope=rope, head_dim=16)
    assert spec_from_config(config_from_spec(spec), PATH) == spec


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"qkv_bias": True, "output_bias": True, "ffn_bias": True, "activation": "relu"}),
        ("mistral", {"windows": ()}),
        ("qwen2", {"windows": (0, 9, 0)}),
        ("qwen3", {"windows": (8, 8, 0), "qkv_bias": True, "output_bias": True}),
    ],
)
def test_features_survive_the_way_through_a_config(architecture, changes):
    spec = tiny_spec(architecture, **changes)
    assert spec_from_config(config_from_spec(spec), PATH) == spec


def test_what_a_config_cannot_say_is_refused():
    with pytest.raises(UnsupportedModelError, match="attention_scale"):
        config_from_spec(tiny_spec("llama", attention_scale=1.0))
