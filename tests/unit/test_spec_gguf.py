from __future__ import annotations

import math

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.gguf import GgufFile
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import RopeSpec
from ondevice.spec_gguf import spec_from_gguf
from ondevice.spec_hub import config_from_spec
from tests.tiny import tiny_gguf, tiny_spec, tiny_tensors


@pytest.fixture
def read(tmp_path):
    def read(spec=None, **options):
        return spec_from_gguf(GgufFile(tiny_gguf(tmp_path / "m.gguf", spec, **options)))

    return read


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture(read, architecture):
    spec = tiny_spec(architecture)
    assert read(spec) == spec
    assert config_from_spec(spec)["model_type"] == architecture


def test_frequency_divisors_of_llama3(read):
    plain = tiny_spec().rope
    scaled = RopeSpec(dim=16, scaling="llama3", factor=8.0, original_context=64)
    divisors = plain.inverse_frequencies(128) / scaled.inverse_frequencies(128)
    rope = read(extra={"rope_freqs.weight": divisors.astype(np.float32)}).rope
    assert rope.scaling == "longrope" and rope.short_factors == rope.long_factors
    assert np.allclose(rope.inverse_frequencies(128), scaled.inverse_frequencies(128), rtol=1e-6)
    config_from_spec(tiny_spec(rope=rope))


def test_scaling_keys(read):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert read(metadata=keys).rope == RopeSpec(dim=16, scaling="linear", factor=4.0)
    assert read(metadata={"llama.rope.scale_linear": 2.0}).rope.factor == 2.0
    keys = {**keys, "llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32}
    rope = read(metadata=keys).rope
    assert (rope.scaling, rope.factor, rope.original_context) == ("yarn", 4.0, 32)
    assert rope.attention_factor == pytest.approx(1 + 0.1 * math.log(4))
    assert read(metadata={"llama.rope.scaling.type": "none"}).rope == RopeSpec(dim=16)


def test_short_and_long_factors(read):
    extra = {f"rope_factors_{kind}.weight": np.full(8, x, np.float32) for kind, x in (("short", 1.5), ("long", 2.0))}
    rope = read(extra=extra, metadata={"llama.rope.scaling.original_context_length": 64}).rope
    assert (rope.short_factors[0], rope.long_factors[0], rope.original_context) == (1.5, 2.0, 64)
    with pytest.raises(CheckpointError, match="pair"):
        read(extra={"rope_factors_long.weight": np.ones(8, np.float32)})


@pytest.mark.parametrize("factors", [np.ones(7), np.zeros(8), -np.ones(8), np.full(8, np.nan), np.ones((8, 1))])
def test_damaged_factors(read, factors):
    with pytest.raises(CheckpointError, match="rope_freqs"):
        read(extra={"rope_freqs.weight": factors.astype(np.float32)})


def test_biases_of_llama_files_are_found_and_reordered(tmp_path):
    spec = tiny_spec("llama", qkv_bias=True, output_bias=True, ffn_bias=True)
    tensors = tiny_tensors(spec)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors))
    assert checkpoint.spec == spec
    assert all(np.array_equal(checkpoint.tensor(name), w) for name, w in tensors.items())


def test_partial_rotation_reorders_only_what_turns(tmp_path):
    spec = tiny_spec("llama", rope=RopeSpec(dim=8))
    tensors = tiny_tensors(spec)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors))
    file = checkpoint.file.tensor("blk.0.attn_q.weight")[:16]
    read = checkpoint.tensor("layers.0.q.weight")[:16]
    assert np.array_equal(read[:8], file[[0, 2, 4, 6, 1, 3, 5, 7]]) and np.array_equal(read[8:], file[8:])


def test_sizes_given_per_layer(read):
    assert read(metadata={"llama.feed_forward_length": [96] * 3, "llama.attention.head_count": [4] * 3}) == tiny_spec()
    for sizes in ([96, 96, 64], [96, 96]):
        with pytest.raises(UnsupportedModelError, match="differ between layers"):
            read(metadata={"llama.feed_forward_length": sizes})


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.rope.scaling.type": "dynamic"}, "dynamic"),
        ({"tokenizer.ggml.tokens": ["x"] * 97}, "97 tokens for 96 rows"),
        ({"llama.attention.scale": "big"}, "attention.scale"),
        ({"split.count": 2}, "llama-gguf-split"),
    ],
)
def test_what_is_refused(tmp_path, metadata, problem):
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(tiny_gguf(tmp_path / "m.gguf", metadata=metadata))


def test_unknown_architecture_is_named(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"rwkv7"))
    with pytest.raises(UnsupportedModelError, match=r"rwkv7.*llama, qwen2, qwen3"):
        open_checkpoint(path)
