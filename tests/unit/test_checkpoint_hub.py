from __future__ import annotations

import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.errors import CheckpointError, UnsupportedModelError
from ondevice.spec_hub import config_from_spec
from tests.tiny import stored_tensors, tiny_spec, tiny_tensors


def foreign_folder(folder: Path, spec=None, tensors=None, config=None, shards: int = 1) -> Path:
    """A folder written without our writer: config.json by hand, weights by the safetensors package."""
    spec = spec or tiny_spec()
    tensors = tiny_tensors(spec) if tensors is None else tensors
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_from_spec(spec), **(config or {})}))
    stored = {name: np.ascontiguousarray(w) for name, w in stored_tensors(spec, tensors).items()}
    names = list(stored)
    if shards == 1:
        safetensors.numpy.save_file(stored, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file({n: stored[n] for n in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def quantized_parts(tensors, kinds):
    """Tensors with some of them replaced by mlx's three parts, under Hub names."""
    parts = {}
    for name, w in tensors.items():
        if name not in kinds:
            parts[hub_layout("llama").name(name)] = w
            continue
        q = quantize(w, *kinds[name])
        module = hub_layout("llama").name(name).removesuffix(".weight")
        parts |= {f"{module}.weight": q.packed, f"{module}.scales": q.scales, f"{module}.biases": q.biases}
    return parts


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_others_wrote(tmp_path, dtype, shards):
    spec = tiny_spec("qwen2")
    tensors = {name: w.astype(dtype) for name, w in tiny_tensors(spec).items()}
    with open_checkpoint(foreign_folder(tmp_path / "m", spec, tensors, shards=shards)) as checkpoint:
        assert checkpoint.spec == spec and checkpoint.format == "hub"
        for name, w in tensors.items():
            read = checkpoint.tensor(name)
            assert read.dtype == dtype and read.tobytes() == w.tobytes()
        assert checkpoint.nbytes == sum(w.nbytes for w in tensors.values())


def test_mlx_quantized_with_overrides(tmp_path):
    spec = tiny_spec(d_model=128, d_ff=192)
    tensors = tiny_tensors(spec)
    kinds = {name: (4, 64) for name, w in tensors.items() if w.ndim == 2}
    kinds["embed.weight"], kinds["layers.1.down.weight"] = (8, 32), (4, 32)
    settings = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    settings["model.layers.0.mlp.odd"] = False
    folder = foreign_folder(tmp_path / "m", spec, quantized_parts(tensors, kinds), {"quantization": settings})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "mlx" and checkpoint.spec == spec
    for name, w in tensors.items():
        read = checkpoint.tensor(name)
        expected = quantize(w, *kinds[name]) if name in kinds else w
        if name in kinds:
            assert isinstance(read, Quantized) and (read.bits, read.group_size) == kinds[name]
        assert np.array_equal(dequantize(read), dequantize(expected))
    assert set(checkpoint.describe()["types"]) == {
        "F32",
        "affine 4-bit g64",
        "affine 4-bit g32",
        "affine 8-bit g32",
    }


def broken_quantization():
    tensors = tiny_tensors(tiny_spec())
    parts = quantized_parts(tensors, {"layers.0.q.weight": (4, 32)})
    q = "model.layers.0.self_attn.q_proj"
    plain = {"group_size": 32, "bits": 4}
    yield "mode", parts, {**plain, "mode": "mxfp4"}, "mxfp4.*affine"
    yield "override's mode", parts, {**plain, q: {**plain, "mode": "nvfp4"}}, "nvfp4"
    yield "no object", parts, 4, "object"
    yield "unannounced", parts, None, "does not say how"
    yield "contradiction", parts, {**plain, q: {"group_size": 32, "bits": 8}}, "4 bits in groups of 32"
    yield "no biases", {n: w for n, w in parts.items() if n != f"{q}.biases"}, plain, "needs weight, scales"
    yield "uint8 scales", {**parts, f"{q}.scales": np.zeros((64, 2), np.uint8)}, plain, "U8 scales"
    yield "2 bits", {**parts, f"{q}.weight": np.zeros((64, 4), np.uint32)}, plain, "2 bits"
    yield "width", {**parts, f"{q}.weight": np.zeros((64, 9), np.uint32)}, plain, "fit no"
    yield "rows", {**parts, f"{q}.weight": np.zeros((63, 8), np.uint32)}, plain, "fit no"
    yield "no columns", {**parts, f"{q}.weight": np.zeros((64, 0), np.uint32)}, plain, "fit no"
    yield "left over", {**parts, "model.layers.7.scales": np.zeros(1, np.float16)}, plain, "layers.7.scales"


@pytest.mark.parametrize(
    ("case", "parts", "settings", "problem"), list(broken_quantization()), ids=lambda x: str(x)[:20]
)
def test_quantization_that_is_broken_or_unsupported(tmp_path, case, parts, settings, problem):
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(foreign_folder(tmp_path / "m", None, parts, {"quantization": settings}))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes"])
def test_other_quantization_methods_are_refused_by_name(tmp_path, method):
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedModelError, match=method):
        open_checkpoint(foreign_folder(tmp_path / "m", config=config))


def test_tied_head(tmp_path):
    spec = tiny_spec("llama", tied_head=True)
    tensors = tiny_tensors(spec)
    table = tensors["embed.weight"]
    same, other = {**tensors, "lm_head.weight": table}, {**tensors, "lm_head.weight": table + 1}
    assert open_checkpoint(foreign_folder(tmp_path / "absent", spec, tensors)).spec == spec
    assert open_checkpoint(foreign_folder(tmp_path / "same", spec, same)).spec == spec
    untied = open_checkpoint(foreign_folder(tmp_path / "other", spec, other))
    assert not untied.spec.tied_head and np.array_equal(untied.tensor("head.weight"), table + 1)
    said_nothing = foreign_folder(tmp_path / "silent", spec, tensors, {"tie_word_embeddings": None})
    with pytest.raises(CheckpointError, match="lm_head"):
        open_checkpoint(said_nothing)
    config = json.loads((said_nothing / "config.json").read_text())
    del config["tie_word_embeddings"]
    (said_nothing / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(said_nothing).spec == spec


def test_tied_quantized_head_that_is_stored_again(tmp_path):
    spec = tiny_spec("llama", tied_head=True)
    parts = quantized_parts(tiny_tensors(spec), {"embed.weight": (4, 32)})
    parts |= {f"lm_head.{p}": parts[f"model.embed_tokens.{p}"] for p in ("weight", "scales", "biases")}
    config = {"quantization": {"group_size": 32, "bits": 4}}
    assert open_checkpoint(foreign_folder(tmp_path / "m", spec, parts, config)).spec == spec


def test_constants_are_ignored_and_unknown_tensors_are_not(tmp_path):
    tensors = tiny_tensors(tiny_spec())
    constants = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    open_checkpoint(foreign_folder(tmp_path / "a", tensors=constants))
    bias = {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*answers would be wrong"):
        open_checkpoint(foreign_folder(tmp_path / "b", tensors=bias))


def test_missing_misshapen_and_integer_tensors(tmp_path):
    tensors = tiny_tensors(tiny_spec())
    fewer = {n: w for n, w in tensors.items() if n != "layers.0.v.weight"}
    with pytest.raises(CheckpointError, match=r"v_proj\.weight.*missing"):
        open_checkpoint(foreign_folder(tmp_path / "a", tensors=fewer))
    turned = {**tensors, "layers.0.v.weight": tensors["layers.0.v.weight"].T}
    with pytest.raises(CheckpointError, match=r"v_proj\.weight.*\(64, 32\).*\(32, 64\)"):
        open_checkpoint(foreign_folder(tmp_path / "b", tensors=turned))
    whole = {**tensors, "final_norm.weight": np.zeros(64, np.int32)}
    with pytest.raises(UnsupportedModelError, match=r"model\.norm.*I32"):
        open_checkpoint(foreign_folder(tmp_path / "c", tensors=whole))


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "../../secret.safetensors"}, "secret"),
        ({"a": "/etc/passwd"}, "passwd"),
        ({"a": "model.bin"}, "model.bin"),
        ({"a": 1}, "must map"),
        ([], "must map"),
        ({"a": "model-9.safetensors"}, "missing"),
        ({}, "no model"),
    ],
)
def test_index_that_points_elsewhere(tmp_path, weight_map, problem):
    folder = foreign_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(folder)


def test_a_tensor_in_two_files(tmp_path):
    folder = foreign_folder(tmp_path / "m")
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="both in"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"model_type": NaN}', b"\xff", b"[" * 100_000])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_checkpoint(tmp_path)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json.*cannot be read"):
        open_checkpoint(tmp_path)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_hostile_folder_is_executed(tmp_path):
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')\n"
    config = {
        "model_file": "model.py",
        "auto_map": {"AutoModelForCausalLM": "model.Model", "AutoConfig": "model.C"},
    }
    folder = foreign_folder(tmp_path / "m", config={**config, "trust_remote_code": True})
    for name in ("model.py", "configuration.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    assert open_checkpoint(folder).tensor("embed.weight").shape == (96, 64)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"pickled.*pytorch_model\.bin.*safetensors or GGUF"):
        open_checkpoint(folder)
    assert not mark.exists()


def test_generation_config_and_licence(tmp_path):
    folder = foreign_folder(tmp_path / "m", config={"eos_token_id": 5, "bos_token_id": None})
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [5, 6]}')
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: none\n")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config == {"temperature": 0.7, "eos_token_id": [5, 6]}
    assert checkpoint.describe()["licence"] == "apache-2.0"
