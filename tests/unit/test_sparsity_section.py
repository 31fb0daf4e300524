"""The section `sparsity` of config.json: written and read back, and refused where it cannot be."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import Quantized, quantize
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.decoder import Decoder
from ondevice.errors import BackendError, CheckpointError
from ondevice.ops.base_skipping import SkippingOps
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.section import METHODS as BY_NAME
from tests.models.running import decode_logits, make_decoder
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.tiny import tiny_checkpoint, tiny_spec, tiny_tensors


@pytest.mark.parametrize("name", METHODS)
def test_round_trip(name: str, tmp_path: Any) -> None:
    spec = sparse_spec(name)
    tensors = sparse_tensors(spec)
    folder = tiny_checkpoint(tmp_path / "model", spec, tensors)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec == spec and checkpoint.describe()["sparsity"]["method"] == spec.sparsity.name
        assert all(np.array_equal(checkpoint.tensor(n), w) for n, w in tensors.items())
        decoder = Decoder(checkpoint, ReferenceOps())
    ids = [5, 3, 9, 1]
    assert np.array_equal(decode_logits(decoder, ids), decode_logits(make_decoder(spec, tensors), ids))


@pytest.mark.parametrize("name", ["lte", "d2dmoe", "teal", "cats"])
def test_densities_go_into_the_file(name: str, tmp_path: Any) -> None:
    spec = sparse_spec(name)
    spec = dataclasses.replace(spec, sparsity=dataclasses.replace(spec.sparsity, densities=(0.25, 0.5, 1.0)))
    with open_checkpoint(tiny_checkpoint(tmp_path / "model", spec)) as checkpoint:
        assert checkpoint.spec == spec and checkpoint.describe()["sparsity"]["density"] == [0.25, 0.5, 1.0]


def test_names_in_the_file(tmp_path: Any) -> None:
    names = set()
    for case in ("lte_bias", "d2dmoe_attention", "polar", "polar_heads"):
        folder = tiny_checkpoint(tmp_path / case, sparse_spec(case))
        with open_checkpoint(folder) as checkpoint:
            names |= {stored for stored in checkpoint._entries if "router" in stored or ".up." in stored}
    assert {
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.router.bias",
        "model.layers.1.mlp.router.0.weight",
        "model.layers.1.self_attn.q_proj.router.1.weight",
        "model.layers.1.self_attn.o_proj.up.weight",
        "model.decoder.layers.2.mlp.router.1.weight",
        "model.layers.1.self_attn.head_router.weight",
        "model.layers.1.self_attn.head_router.bias",
    } <= names


def test_quantized_routers_and_experts(tmp_path: Any) -> None:
    spec = sparse_spec("d2dmoe_attention", d_model=64, head_dim=16)
    tensors = {
        name: quantize(w, 4, 32) if w.ndim == 2 and w.shape[1] % 32 == 0 else w
        for name, w in sparse_tensors(spec).items()
    }
    with open_checkpoint(tiny_checkpoint(tmp_path / "model", spec, tensors)) as checkpoint:
        assert isinstance(checkpoint.tensor("layers.0.q.router.0.weight"), Quantized)
        assert np.isfinite(decode_logits(Decoder(checkpoint, ReferenceOps()), [1, 2])).all()


def test_a_section_that_is_null_or_missing_is_dense(tmp_path: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "model", config_extra={"sparsity": None})
    assert open_checkpoint(folder).spec.sparsity is None


def test_all_methods_have_cases() -> None:
    assert {method.name for _, method in METHODS.values()} == set(BY_NAME)


TABLE = {"1": [4, 4, 4]}
HEADS = {"kept": 2}
BAD: dict[str, tuple[str, Any, str]] = {
    "no object": ("llama", 3, "sparsity: 3 is no object"),
    "no method": ("llama", {}, "sparsity.method: is missing"),
    "unknown method": ("llama", {"method": "magic"}, "sparsity.method: 'magic' is not supported; supported: polar"),
    "method of another type": ("llama", {"method": 3}, "sparsity.method: 3 is no string"),
    "unknown key": ("llama", {"method": "lte", "blok": 32}, "sparsity.blok: is unknown here, where method, block"),
    "groups": ("llama", {"method": "lte", "block": 36}, "sparsity.block: groups of 36 do not divide 96 neurons"),
    "huge groups": ("llama", {"method": "lte", "block": 192}, "sparsity.block: 192 is no integer from 1 to 96"),
    "experts": ("llama", {"method": "d2dmoe", "block": 5}, "sparsity.block: groups of 5 do not divide 96"),
    "threshold 0": ("llama", {"method": "lte", "threshold": 0}, "sparsity.threshold: 0.0 is no sigmoid"),
    "threshold NaN": ("llama", {"method": "lte", "threshold": float("nan")}, "sparsity.threshold: nan is no number"),
    "tau": ("llama", {"method": "d2dmoe", "tau": 1.5}, "sparsity.tau: 1.5 is no number from 0 to 1"),
    "lte's bias": ("llama", {"method": "lte", "bias": 1}, "sparsity.bias: 1 is neither true nor false"),
    "attention's groups": (
        "llama",
        {"method": "d2dmoe", "attention": {"neurons": 10, "block": 4}},
        "sparsity.attention.block: groups of 4 do not divide 10",
    ),
    "attention's activation": (
        "llama",
        {"method": "d2dmoe", "attention": {"neurons": 8, "block": 4, "activation": "tanh"}},
        "sparsity.attention.activation: 'tanh' is not supported",
    ),
    "polar without parts": ("opt", {"method": "polar"}, "sparsity.method: polar needs `ffn` or `heads`"),
    "polar rows on silu": (
        "llama",
        {"method": "polar", "ffn": {"rank": 4, "neurons": TABLE}},
        "sparsity.ffn: polar skips neurons of relu models.*has silu. Leave `ffn` out",
    ),
    "polar table of two layers": (
        "opt",
        {"method": "polar", "ffn": {"rank": 4, "neurons": {"1": [4, 4]}}},
        "sparsity.ffn.neurons.1: must be a list of 3 integers",
    ),
    "polar too many": (
        "opt",
        {"method": "polar", "ffn": {"rank": 4, "neurons": {"8": [4, 97, 4]}}},
        "sparsity.ffn.neurons.8: must hold integers from 1 to 96",
    ),
    "polar batch size": (
        "opt",
        {"method": "polar", "ffn": {"rank": 4, "neurons": {**TABLE, "0": [1, 1, 1]}}},
        "sparsity.ffn.neurons: must map batch sizes",
    ),
    "polar empty table": ("opt", {"method": "polar", "ffn": {"rank": 4, "neurons": {}}}, "must map batch sizes"),
    "polar rank": ("opt", {"method": "polar", "ffn": {"neurons": TABLE}}, "sparsity.ffn.rank: is missing"),
    "too many heads": ("llama", {"method": "polar", "heads": {"kept": 5}}, "sparsity.heads.kept: 5 is no integer"),
    "too many groups": ("llama", {"method": "polar", "heads": {"kept": 3, "unit": "kv_group"}}, "from 1 to 2"),
    "unit": ("llama", {"method": "polar", "heads": {**HEADS, "unit": "row"}}, "'row' is neither of head, kv_group"),
    "dense layers": (
        "llama",
        {"method": "polar", "heads": {**HEADS, "dense_layers": [3]}},
        "sparsity.heads.dense_layers: must list layers from 0 to 2",
    ),
    "spark without parts": ("llama", {"method": "spark"}, "sparsity.method: spark needs"),
    "spark without gate": ("opt", {"method": "spark", "ffn": {"r": 8, "k": 8}}, "sparsity.ffn: spark splits an FFN"),
    "spark of phi3": ("phi3", {"method": "spark", "ffn": {"r": 8, "k": 8}}, "sparsity.ffn: phi3 stores gate and up"),
    "spark reads all": ("llama", {"method": "spark", "ffn": {"r": 64, "k": 8}}, "sparsity.ffn.r: 64 is no integer"),
    "spark keeps all": ("llama", {"method": "spark", "ffn": {"r": 8, "k": 96}}, "sparsity.ffn.k: 96 is no integer"),
    "spark's heads": (
        "llama",
        {"method": "spark", "attention": {"r": 4, "k": 8}},
        "sparsity.attention.r: 4 is not half of a head of 16",
    ),
    "spark with softcap": ("gemma2", {"method": "spark", "attention": {"r": 8, "k": 8}}, "no softcap"),
    "spark with partial rope": ("phi3", {"method": "spark", "attention": {"r": 8, "k": 8}}, "this rope differs"),
    "teal's gate": (
        "opt",
        {"method": "teal", "thresholds": {"gate": [0, 0, 0]}},
        "sparsity.thresholds.gate: is unknown",
    ),
    "teal of nothing": ("llama", {"method": "teal", "thresholds": {}}, "sparsity.thresholds: must give some of q, k"),
    "teal negative": (
        "llama",
        {"method": "teal", "thresholds": {"q": [0, -1, 0]}},
        "sparsity.thresholds.q: must hold positive finite numbers or 0",
    ),
    "density of two layers": (
        "llama",
        {"method": "lte", "density": [0.5, 0.5]},
        "sparsity.density: must be a list of 3 numbers",
    ),
    "density above 1": (
        "llama",
        {"method": "cats", "thresholds": [1, 1, 1], "density": [0.5, 50, 1]},
        "sparsity.density: 50 is no part of a layer",
    ),
    "density 0": ("llama", {"method": "lte", "density": [0.5, 0, 1]}, "sparsity.density: must hold positive"),
    "density of spark": (
        "llama",
        {"method": "spark", "ffn": {"r": 32, "k": 8}, "density": [0.5, 0.5, 0.5]},
        "sparsity.density: spark says elsewhere how much it keeps",
    ),
    "cats without gate": ("opt", {"method": "cats", "thresholds": [0, 0, 0]}, "sparsity.method: cats needs"),
    "cats first of two layers": (
        "llama",
        {"method": "cats", "thresholds": [0, 0, 0], "first": ["up", "up"]},
        "sparsity.first: must say gate or up for each of the 3 layers",
    ),
    "cats first": (
        "llama",
        {"method": "cats", "thresholds": [0, 0, 0], "first": ["up", "up", "down"]},
        "must say gate",
    ),
    "cats of two layers": ("llama", {"method": "cats", "thresholds": [0, 0]}, "must be a list of 3 numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Any) -> None:
    architecture, section, message = BAD[name]
    folder = tiny_checkpoint(tmp_path / "model", tiny_spec(architecture), config_extra={"sparsity": section})
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoint(folder)


def with_section(folder: Any, section: Any) -> Any:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sparsity": section}))
    return folder


def test_a_dense_checkpoint_called_spark(tmp_path: Any) -> None:
    folder = with_section(tiny_checkpoint(tmp_path / "m"), {"method": "spark", "ffn": {"r": 32, "k": 8}})
    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight: has the shape \(96, 64\).*ask for \(96, 32\).*spark"
    ):
        open_checkpoint(folder)


def test_routers_that_are_missing_misshapen_or_left_over(tmp_path: Any) -> None:
    dense, lte = tiny_checkpoint(tmp_path / "dense"), tiny_checkpoint(tmp_path / "lte", sparse_spec("lte"))
    with pytest.raises(CheckpointError, match=r"mlp\.router\.weight: the tensor is missing.*lte"):
        open_checkpoint(with_section(dense, {"method": "lte"}))
    with pytest.raises(CheckpointError, match=r"mlp\.router\.weight: has the shape \(3, 64\).*\(6, 64\)"):
        open_checkpoint(with_section(lte, {"method": "lte", "block": 16}))
    with pytest.raises(CheckpointError, match=r"mlp\.router\.bias: the tensor is missing.*lte"):
        open_checkpoint(with_section(lte, {"method": "lte", "bias": True}))
    with pytest.raises(CheckpointError, match=r"3 tensors that a llama model.*mlp\.router"):
        open_checkpoint(with_section(lte, None))


def test_a_writer_refuses_missing_routers(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn_router\.weight: 3 tensors were not given"):
        write_checkpoint(tmp_path / "m", sparse_spec("lte"), tiny_tensors(tiny_spec()).items())


def test_gemma3_inside_a_vision_model_keeps_its_section(tmp_path: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "m", sparse_spec("spark_attention"))
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("sparsity")
    wrapped = {"model_type": "gemma3", "text_config": config, "sparsity": section}
    (folder / "config.json").write_text(json.dumps(wrapped))
    assert open_checkpoint(folder).spec.sparsity == sparse_spec("spark_attention").sparsity


def test_a_backend_without_the_operations_says_which_and_what_to_do(tmp_path: Any) -> None:
    class Bare(CpuOps):
        pack_ffn = SkippingOps.pack_ffn

    with pytest.raises(BackendError, match=r"cpu backend has no pack_ffn.*dense"):
        make_decoder(sparse_spec("lte"), sparse_tensors(sparse_spec("lte")), Bare(1))
