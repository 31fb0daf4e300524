from __future__ import annotations

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.gguf import GgufFile
from ondevice.checkpoint.quantization import Quantized, dequantize
from ondevice.errors import CheckpointError, ModelNotFoundError, OndeviceError, UnsupportedModelError
from tests.tiny import tiny_gguf, tiny_spec, tiny_tensors


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_round_trip_in_float32(tmp_path, architecture):
    spec = tiny_spec(architecture)
    tensors = tiny_tensors(spec)
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors)) as checkpoint:
        assert checkpoint.spec == spec and checkpoint.format == "gguf"
        for name, w in tensors.items():
            assert np.array_equal(checkpoint.tensor(name), w), name
        assert checkpoint.nbytes == sum(w.nbytes for w in tensors.values())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_every_type_has_the_values_of_the_gguf_package(tmp_path, kind, architecture):
    spec = tiny_spec(architecture)
    tensors = tiny_tensors(spec)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors, kind))
    ggml = gguf.GGMLQuantizationType[kind]
    for name, w in tensors.items():
        stored = checkpoint.tensor(name)
        expected = w
        if w.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(w, ggml), ggml)
            assert isinstance(stored, Quantized) == kind.startswith("Q")
        assert np.array_equal(dequantize(stored), expected), name
    if kind.startswith("Q"):
        assert stored_kinds(checkpoint) == {"F32", kind}


def stored_kinds(checkpoint):
    types = checkpoint.describe()["types"]
    assert sum(t["parameters"] for t in types.values()) == checkpoint.describe()["parameters"]
    return set(types)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_bias_beyond_float16_is_kept_in_float32(tmp_path, kind):
    spec = tiny_spec(tied_head=True)
    tensors = tiny_tensors(spec)
    tensors["embed.weight"] = tensors["embed.weight"] * np.float32(1e5 if kind == "Q4_0" else 6e4)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, tensors, {"embed.weight": kind}))
    w = checkpoint.tensor("embed.weight")
    ggml = gguf.GGMLQuantizationType[kind]
    assert w.scales.dtype == w.biases.dtype == np.float32
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors["embed.weight"], ggml), ggml)
    assert np.array_equal(dequantize(w), expected)


def test_metadata_types(tmp_path):
    extra = {"x.text": "wörd", "x.flag": True, "x.list": ["a", "", "ü"], "x.numbers": [3, 4]}
    metadata = GgufFile(tiny_gguf(tmp_path / "m.gguf", metadata=extra)).metadata
    assert metadata["x.text"] == "wörd" and metadata["x.flag"] is True
    assert metadata["x.list"] == ["a", "", "ü"] and metadata["x.numbers"].tolist() == [3, 4]


def test_describe_and_generation_config(tmp_path):
    extra = {
        "general.license": "apache-2.0",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 7,
    }
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", metadata=extra))
    assert checkpoint.generation_config == {"eos_token_id": [2, 7]}
    summary = checkpoint.describe()
    assert summary["licence"] == "apache-2.0" and summary["bits_per_weight"] == 32.0


def test_arrays_outlive_the_checkpoint(tmp_path):
    with open_checkpoint(tiny_gguf(tmp_path / "m.gguf")) as checkpoint:
        w = checkpoint.tensor("final_norm.weight")
    assert np.isfinite(w).all()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.tensor("final_norm.weight")


def test_data_that_is_not_aligned_is_copied(tmp_path):
    alignment = entry("general.alignment", U32, struct.pack("<I", 1))
    header = container([alignment], [tensor("t", [2])])[:-256]
    assert len(header) % 4
    (tmp_path / "m.gguf").write_bytes(header + np.float32([1, 2]).tobytes())
    w = GgufFile(tmp_path / "m.gguf").tensor("t")
    assert w.flags.aligned and w.tolist() == [1, 2]


def test_unknown_tensor_name(tmp_path):
    with pytest.raises(CheckpointError, match="no such tensor"):
        open_checkpoint(tiny_gguf(tmp_path / "m.gguf")).tensor("layers.9.q.weight")


def test_unsupported_type_is_refused_by_name(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", types={"layers.1.up.weight": "MXFP4"})
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_up\.weight.*MXFP4.*Q8_0"):
        open_checkpoint(path)


def test_missing_unexpected_and_misshapen_tensors(tmp_path):
    spec, tensors = tiny_spec(), tiny_tensors(tiny_spec())
    fewer = {name: w for name, w in tensors.items() if name != "layers.2.down.weight"}
    with pytest.raises(CheckpointError, match=r"blk\.2\.ffn_down\.weight.*missing.*\(64, 96\)"):
        open_checkpoint(tiny_gguf(tmp_path / "a.gguf", spec, fewer))
    with pytest.raises(CheckpointError, match=r"blk\.1\.odd\.weight"):
        open_checkpoint(tiny_gguf(tmp_path / "b.gguf", extra={"blk.1.odd.weight": np.zeros(4, np.float32)}))
    wrong = {**tensors, "final_norm.weight": np.zeros(63, np.float32)}
    with pytest.raises(CheckpointError, match=r"output_norm\.weight.*\(63,\).*\(64,\)"):
        open_checkpoint(tiny_gguf(tmp_path / "c.gguf", spec, wrong))


def test_infinite_scale(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", types={"layers.0.q.weight": "Q8_0"})
    info = GgufFile(path).tensors["blk.0.attn_q.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = b"\x00\x7c"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"attn_q.*scale"):
        open_checkpoint(path).tensor("layers.0.q.weight")


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"none.gguf"):
        open_checkpoint(tmp_path / "none.gguf")
    for content, problem in ((b"", "empty"), (b"GGUF", "ends"), (b"PK\3\4" * 9, "no GGUF file")):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=problem):
            open_checkpoint(tmp_path / "m.gguf")
    (tmp_path / "m.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="neither"):
        open_checkpoint(tmp_path / "m.pt")


# Files that lie. Each is written by hand; none may cost time or memory.


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    head = text(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def container(entries: list[bytes], tensors: list[bytes], n_keys=None, n_tensors=None, version=3) -> bytes:
    n_keys = len(entries) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys) + b"".join(entries + tensors) + bytes(256)


ARRAY, STRING, U32 = 9, 8, 4
LIES = {
    "keys": (container([], [], n_keys=2**40), "metadata keys"),
    "tensors": (container([], [], n_tensors=2**63), "tensors"),
    "more keys than bytes": (container([], [], n_keys=60000), "ends|longer|unknown|twice"),
    "version": (container([], [], version=1), "version 1"),
    "big endian": (container([], [], version=3 << 24), "big-endian"),
    "key length": (container([struct.pack("<Q", 2**60)], []), "longer"),
    "key length near 2**64": (container([struct.pack("<Q", 2**64 - 1)], []), "longer"),
    "key not UTF-8": (container([entry("a", U32, bytes(4)), text(b"\xff\xfe")], []), "UTF-8"),
    "string length": (container([entry("a", STRING, struct.pack("<Q", 2**60))], []), "longer"),
    "string past the end": (container([entry("a", STRING, struct.pack("<Q", 5000))], []), "ends inside"),
    "array count": (container([entry("a", ARRAY, struct.pack("<IQ", U32, 2**40))], []), "ends inside"),
    "array of strings count": (
        container([entry("a", ARRAY, struct.pack("<IQ", STRING, 2**40))], []),
        "limit",
    ),
    "array count overflow": (
        container([entry("a", ARRAY, struct.pack("<IQ", 10, 2**61))], []),
        "ends inside",
    ),
    "string in array": (
        container([entry("a", ARRAY, struct.pack("<IQQ", STRING, 1, 2**64 - 8))], []),
        "past the end",
    ),
    "nested array": (container([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "nested"),
    "value type": (container([entry("a", 77, bytes(8))], []), "type 77"),
    "array element type": (container([entry("a", ARRAY, struct.pack("<IQ", 99, 1))], []), "type 99"),
    "key twice": (container([entry("a", U32, bytes(4))] * 2, []), "twice"),
    "alignment 0": (container([entry("general.alignment", U32, bytes(4))], []), "power of two"),
    "alignment 24": (container([entry("general.alignment", U32, struct.pack("<I", 24))], []), "power of two"),
    "alignment a text": (container([entry("general.alignment", STRING, text("32"))], []), "power of two"),
    "five dimensions": (container([], [tensor("t", [1] * 5)]), "dimensions"),
    "2**32 dimensions": (container([], [tensor("t", [1], n_dims=2**32 - 1)]), "dimensions"),
    "dims 2**63": (container([], [tensor("t", [2**63, 2])]), "beyond"),
    "product 2**64": (container([], [tensor("t", [2**32, 2**32])]), "beyond"),
    "empty dimension": (container([], [tensor("t", [4, 0])]), "empty"),
    "tensor type": (container([], [tensor("t", [4], kind=99)]), "type 99"),
    "partial block": (container([], [tensor("t", [33, 2], kind=2)]), "blocks"),
    "offset not aligned": (container([], [tensor("t", [4], offset=4)]), "aligned"),
    "offset past the end": (container([], [tensor("t", [4], offset=2**50)]), "the file at"),
    "offset near 2**64": (container([], [tensor("t", [4], offset=2**64 - 32)]), "the file at"),
    "overlap": (container([], [tensor("t", [16]), tensor("u", [4], offset=32)]), "shares"),
    "tensor twice": (container([], [tensor("t", [4]), tensor("t", [4], offset=32)]), "twice"),
    "architecture": (container([entry("general.architecture", STRING, text("mamba"))], []), "mamba.*llama"),
    "architecture a number": (container([entry("general.architecture", U32, bytes(4))], []), "no string"),
    "no architecture": (container([], []), "architecture.*missing"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_cheaply(tmp_path, name):
    data, problem = LIES[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with cheap(), pytest.raises(CheckpointError, match=problem):
        open_checkpoint(tmp_path / "m.gguf")


class cheap:
    """Asserts that a block takes below a second and 32 MB."""

    def __enter__(self):
        tracemalloc.start()
        self.start = time.perf_counter()

    def __exit__(self, *_):
        seconds = time.perf_counter() - self.start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seconds < 1.0 and peak < 32e6


def read_all(path):
    """Opens and reads everything; a checkpoint that opens has what its spec says."""
    with open_checkpoint(path) as checkpoint:
        for name, shape in checkpoint.spec.tensors().items():
            assert checkpoint.tensor(name).shape == shape


def test_truncated_files_are_refused(tmp_path):
    data = tiny_gguf(tmp_path / "m.gguf", types="Q4_1", metadata={"tokenizer.ggml.tokens": ["a", "b"]}).read_bytes()
    for length in [*range(0, 2000, 37), *range(2000, len(data), 4001), len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with cheap(), pytest.raises(CheckpointError):
            read_all(tmp_path / "cut.gguf")


def test_flipped_bytes_give_an_error_or_a_whole_model(tmp_path):
    spec = tiny_spec(n_layers=1)
    path = tiny_gguf(tmp_path / "m.gguf", spec, types="Q8_0", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    data, random, refused = path.read_bytes(), np.random.RandomState(0), 0
    header = min(info.offset for info in GgufFile(path).tensors.values())
    for i in range(200):
        damaged = bytearray(data)
        for _ in range(1 + i % 3):
            damaged[random.randint(header if i % 4 else len(data))] = random.randint(256)
        path.write_bytes(damaged)
        with cheap():
            try:
                read_all(path)
            except OndeviceError:
                refused += 1
    assert refused > 50
