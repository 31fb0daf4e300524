"""Fused, transposed and differently named tensors of Hub folders and GGUF files."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import safetensors.numpy

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import places
from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec import RopeSpec
from ondevice.spec_hub import as_on_hub, config_from_spec
from tests.tiny import ARCHITECTURES, stored_tensors, tiny_checkpoint, tiny_gguf, tiny_spec, tiny_tensors


def folder_of(path, config, stored):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(w) for name, w in stored.items()}, path / "model.safetensors"
    )
    return path


def parts(module, w, bits=4):
    q = quantize(w, bits, 32)
    return {f"{module}.weight": q.packed, f"{module}.scales": q.scales, f"{module}.biases": q.biases}


def same(checkpoint, tensors):
    return all(np.array_equal(dequantize(checkpoint.tensor(name)), dequantize(w)) for name, w in tensors.items())


def test_fused_and_transposed_tensors_of_gpt2(tmp_path):
    spec = tiny_spec("gpt2")
    tensors = tiny_tensors(spec)
    stored = safetensors.numpy.load_file(tiny_checkpoint(tmp_path / "m", spec, tensors) / "model.safetensors")
    qkv = stored["transformer.h.1.attn.c_attn.weight"]
    assert qkv.shape == (64, 192)
    assert np.array_equal(qkv[:, 64:128], tensors["layers.1.k.weight"].T)
    assert np.array_equal(stored["transformer.h.1.attn.c_attn.bias"][128:], tensors["layers.1.v.bias"])
    for ours, theirs in (("o", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
        assert np.array_equal(stored[f"transformer.h.2.{theirs}.weight"], tensors[f"layers.2.{ours}.weight"].T)
    assert np.array_equal(stored["transformer.wpe.weight"], tensors["position.weight"])


def test_fused_tensors_of_phi3(tmp_path):
    spec = tiny_spec("phi3")
    tensors = tiny_tensors(spec)
    stored = safetensors.numpy.load_file(tiny_checkpoint(tmp_path / "m", spec, tensors) / "model.safetensors")
    qkv, gate_up = (stored[f"model.layers.0.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    assert qkv.shape == (128, 64) and np.array_equal(qkv[64:96], tensors["layers.0.k.weight"])
    assert np.array_equal(gate_up, np.concatenate([tensors[f"layers.0.{x}.weight"] for x in ("gate", "up")]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_are_counted_once(tmp_path, architecture):
    spec = tiny_spec(architecture)
    tensors = tiny_tensors(spec)
    with open_checkpoint(tiny_checkpoint(tmp_path / "m", spec, tensors)) as checkpoint:
        assert checkpoint.nbytes == sum(w.nbytes for w in tensors.values())


def test_tensors_may_come_in_any_order(tmp_path):
    spec = tiny_spec("gpt2")
    tensors = tiny_tensors(spec)
    backwards = dict(reversed(tensors.items()))
    assert same(open_checkpoint(tiny_checkpoint(tmp_path / "m", spec, backwards, max_shard_bytes=40_000)), tensors)


GPT2_MASKS = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.1.attn.masked_bias": np.float32([-1e4])}


def test_names_of_gpt2_with_and_without_prefix(tmp_path):
    spec = tiny_spec("gpt2")
    tensors = tiny_tensors(spec)
    stored = {**stored_tensors(spec, tensors), **{f"transformer.{name}": w for name, w in GPT2_MASKS.items()}}
    bare = {name.removeprefix("transformer."): w for name, w in stored.items()}
    for folder, names in (("full", stored), ("bare", bare)):
        checkpoint = open_checkpoint(folder_of(tmp_path / folder, config_from_spec(spec), names))
        assert checkpoint.spec == spec and same(checkpoint, tensors)
    both = {**stored, "wte.weight": tensors["embed.weight"]}
    with pytest.raises(CheckpointError, match=r"wte\.weight.*both in"):
        open_checkpoint(folder_of(tmp_path / "both", config_from_spec(spec), both))


def test_names_of_opt_with_and_without_prefix(tmp_path):
    spec = tiny_spec("opt")
    tensors = tiny_tensors(spec)
    stored = stored_tensors(spec, tensors)
    assert stored["model.decoder.embed_positions.weight"].shape == (130, 64)
    bare = {name.removeprefix("model."): w for name, w in stored.items()}
    head = {**stored, "lm_head.weight": tensors["embed.weight"]}
    for folder, names in (("full", stored), ("bare", bare), ("head", head)):
        checkpoint = open_checkpoint(folder_of(tmp_path / folder, config_from_spec(spec), names))
        assert checkpoint.spec == spec and same(checkpoint, tensors)


def test_a_position_table_of_another_length(tmp_path):
    spec = tiny_spec("opt")
    stored = stored_tensors(spec, tiny_tensors(spec))
    stored["model.decoder.embed_positions.weight"] = np.zeros((128, 64), np.float32)
    with pytest.raises(CheckpointError, match=r"embed_positions.*\(128, 64\).*\(130, 64\)"):
        open_checkpoint(folder_of(tmp_path / "m", config_from_spec(spec), stored))


VISION = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": np.zeros((2, 3, 2, 2), np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.zeros((2, 2), np.float32),
}


def vision_config(spec):
    text = {**config_from_spec(spec), "bos_token_id": 2, "eos_token_id": 1}
    outer = {"model_type": "gemma3", "tie_word_embeddings": spec.tied_head, "eos_token_id": [1, 106]}
    return {**outer, "text_config": text, "vision_config": {}}


@pytest.mark.parametrize("newer", [False, True])
def test_gemma3_with_vision(tmp_path, newer):
    spec = tiny_spec("gemma3_text", tied_head=False)
    tensors = tiny_tensors(spec)
    stored = {}
    for name, w in stored_tensors(spec, tensors).items():
        inner = name.removeprefix("model.")
        head = name == "lm_head.weight"
        stored[
            "model.language_model." + inner if newer and not head else name if newer else f"language_model.{name}"
        ] = w
    vision = {"model." + name if newer else name: w for name, w in VISION.items()}
    checkpoint = open_checkpoint(folder_of(tmp_path / "m", vision_config(spec), {**stored, **vision}))
    assert checkpoint.spec == spec and same(checkpoint, tensors)
    assert checkpoint.generation_config == {"bos_token_id": 2, "eos_token_id": [1, 106]}
    with pytest.raises(CheckpointError, match="audio_tower"):
        audio = {**stored, "audio_tower.weight": np.zeros(3, np.float32)}
        open_checkpoint(folder_of(tmp_path / "audio", vision_config(spec), audio))
    with pytest.raises(CheckpointError, match="vision_tower"):  # a text model has none
        text = {**stored_tensors(spec, tensors), **VISION}
        open_checkpoint(folder_of(tmp_path / "text", config_from_spec(spec), text))


def test_mlx_quantized_gemma3_with_vision(tmp_path):
    spec = tiny_spec("gemma3_text")
    tensors = tiny_tensors(spec)
    stored = {f"language_model.{name}": w for name, w in stored_tensors(spec, tensors).items()}
    module = "language_model.model.layers.0.mlp.up_proj"
    stored |= parts(module, stored.pop(f"{module}.weight"), bits=8)
    settings = {"group_size": 32, "bits": 4, module: {"group_size": 32, "bits": 8}}
    folder = folder_of(tmp_path / "m", {**vision_config(spec), "quantization": settings}, stored)
    up = open_checkpoint(folder).tensor("layers.0.up.weight")
    assert isinstance(up, Quantized) and up.bits == 8
    settings[module]["bits"] = 4
    with pytest.raises(CheckpointError, match="8 bits"):
        open_checkpoint(folder_of(tmp_path / "n", {**vision_config(spec), "quantization": settings}, stored))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_fused_tensors(tmp_path, bits):
    spec = tiny_spec("phi3")
    tensors = {name: quantize(w, bits, 32) if w.ndim == 2 else w for name, w in tiny_tensors(spec).items()}
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", spec, tensors))
    for name, w in tensors.items():
        if isinstance(w, Quantized):
            read = checkpoint.tensor(name)
            assert all(np.array_equal(getattr(read, p), getattr(w, p)) for p in ("packed", "scales", "biases"))
    assert checkpoint.nbytes == sum(w.nbytes for w in tensors.values())
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert settings == {"group_size": 32, "bits": bits, "mode": "affine"}


def test_parts_of_different_quantization_are_not_fused(tmp_path):
    spec = tiny_spec("phi3")
    tensors = dict(tiny_tensors(spec))
    for name, bits in (("q", 4), ("k", 4), ("v", 8)):
        tensors[f"layers.0.{name}.weight"] = quantize(tensors[f"layers.0.{name}.weight"], bits, 32)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.qkv_proj\.weight.*one kind"):
        tiny_checkpoint(tmp_path / "m", spec, tensors)
    assert not list(tmp_path.iterdir())


def test_transposed_tensors_are_refused_quantized(tmp_path):
    spec = tiny_spec("gpt2")
    tensors = tiny_tensors(spec)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.o\.weight.*dequantize"):
        tiny_checkpoint(tmp_path / "m", spec, {**tensors, "layers.1.o.weight": quantize(tensors["layers.1.o.weight"])})
    stored = stored_tensors(spec, tensors)
    stored |= parts("transformer.h.0.mlp.c_fc", stored["transformer.h.0.mlp.c_fc.weight"])
    config = {**config_from_spec(spec), "quantization": {"group_size": 32, "bits": 4}}
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.mlp\.c_fc.*\[in, out\].*quantized"):
        open_checkpoint(folder_of(tmp_path / "n", config, stored))


def test_a_quantized_embedding_beside_transposed_tensors(tmp_path):
    spec = tiny_spec("gpt2")
    tensors = tiny_tensors(spec)
    tensors = {**tensors, "embed.weight": quantize(tensors["embed.weight"], 8, 32)}
    assert same(open_checkpoint(tiny_checkpoint(tmp_path / "m", spec, tensors)), tensors)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_gemmas_norms_in_gguf_hold_the_one(tmp_path, architecture):
    spec = tiny_spec(architecture, windows=(24, 0, 24) if architecture == "gemma2" else (24, 24, 24))
    tensors = tiny_tensors(spec)
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors, metadata=linear(architecture)))
    assert source.spec.norm_offset == 0.0 and as_on_hub(source.spec) == spec
    write_checkpoint(tmp_path / "m", source.spec, ((name, source.tensor(name)) for name in tensors))
    copy = open_checkpoint(tmp_path / "m")
    assert copy.spec == spec
    for name, w in tensors.items():
        norm = "norm" in name
        assert np.array_equal(source.tensor(name), w + np.float32(norm)), name
        assert np.allclose(copy.tensor(name), w, rtol=0, atol=2e-7 if norm else 0), name


def linear(architecture):
    if architecture == "gemma2":
        return {}
    return {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}


def gemma3_windows(tmp_path, **metadata):
    keys = {f"gemma3.{key}": value for key, value in metadata.items()}
    spec = tiny_spec("gemma3_text", n_layers=7, windows=(9,) * 7)
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, metadata=keys)) as checkpoint:
        return checkpoint.spec.windows


def test_sliding_layers_of_gemma3_in_gguf(tmp_path):
    assert gemma3_windows(tmp_path) == (9, 9, 9, 9, 9, 0, 9)
    key = "attention.sliding_window_pattern"
    assert gemma3_windows(tmp_path, **{key: 2}) == (9, 0, 9, 0, 9, 0, 9)
    assert gemma3_windows(tmp_path, **{key: [True, True, False, True, False, False, True]}) == (9, 9, 0, 9, 0, 0, 9)
    with pytest.raises(CheckpointError, match=r"sliding_window_pattern.*7"):
        gemma3_windows(tmp_path, **{key: [True, False]})


def test_settings_that_gguf_leaves_out_of_gemma(tmp_path):
    def read(spec):
        with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec)) as checkpoint:
            return checkpoint.spec

    bare = read(tiny_spec("gemma2", attention_softcap=0.0, logit_softcap=0.0, windows=()))
    assert (bare.attention_softcap, bare.logit_softcap, bare.windows) == (50.0, 30.0, (4096, 0, 4096))
    sizes = {"n_layers": 46, "d_model": 32, "n_heads": 2, "d_ff": 32}
    assert read(tiny_spec("gemma2", **sizes, windows=(9, 0) * 23)).attention_scale == 16**-0.5
    big = tiny_spec("gemma3_text", **{**sizes, "n_layers": 62, "head_dim": 32}, windows=(9,) * 62)
    assert read(big).attention_scale == 16**-0.5  # 32 / 2, not the head_dim of 32
    plain = read(tiny_spec("gemma3_text", windows=()))
    assert plain.windows == (0, 0, 0) and plain.local_rope is None
    assert plain.embedding_scale == 8.0 and plain.logit_softcap == 0.0


def test_settings_of_phi3_in_gguf(tmp_path):
    spec = tiny_spec("phi3", windows=(9, 9, 9), rope=RopeSpec(dim=12, theta=5e4))
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec)) as checkpoint:
        assert checkpoint.spec == spec
    with open_checkpoint(
        tiny_gguf(tmp_path / "m.gguf", tiny_spec("phi3"), metadata={"phi3.attention.sliding_window": 0})
    ) as checkpoint:
        assert checkpoint.spec.windows == (0, 0, 0)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("gemma3_text", "gemma3.attn_logit_softcapping"),
        ("gpt2", "gpt2.final_logit_softcapping"),
        ("phi3", "phi3.attn_logit_softcapping"),
        ("gemma2", "gemma2.expert_count"),
    ],
)
def test_what_gguf_files_state_and_we_lack(tmp_path, architecture, key):
    value = 8 if "count" in key else 5.0
    with pytest.raises(UnsupportedModelError, match=key):
        open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tiny_spec(architecture), metadata={key: value}))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantized_gguf_of_phi3_becomes_a_folder(tmp_path, kind):
    spec = tiny_spec("phi3")
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, types=kind))
    write_checkpoint(tmp_path / "m", source.spec, ((name, source.tensor(name)) for name in spec.tensors()))
    copy = open_checkpoint(tmp_path / "m")
    assert copy.spec == spec
    assert same(copy, {name: source.tensor(name) for name in spec.tensors()})


def test_fused_tensors_of_gguf(tmp_path):
    tensors = tiny_tensors(tiny_spec("gpt2"))
    tiny_gguf(tmp_path / "m.gguf", tiny_spec("gpt2"), tensors)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(stored["blk.0.attn_qkv.weight"][64:128], tensors["layers.0.k.weight"])  # not permuted
    assert np.array_equal(stored["position_embd.weight"], tensors["position.weight"])
    assert stored["blk.0.ffn_up.weight"].shape == (96, 64)


def test_every_tensor_has_one_place():
    for architecture in ARCHITECTURES:
        spec = tiny_spec(architecture)
        found = places(hub_layout(architecture), spec)
        for name, shape in spec.tensors().items():
            place = found[name]
            assert place.stop - place.start == shape[0]
            assert shape[1:] == (place.shape[:1] if place.transposed else place.shape[1:])
        names = {place.name: place.outputs for place in found.values()}
        assert sum(names.values()) == sum(shape[0] for shape in spec.tensors().values())
