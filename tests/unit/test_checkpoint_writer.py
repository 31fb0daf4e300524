from __future__ import annotations

import errno
import json
import math
import tracemalloc
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.errors import CheckpointError, OndeviceError, UnsupportedModelError
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_gguf, tiny_spec, tiny_tensors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, architecture, dtype):
    spec = tiny_spec(architecture)
    tensors = tiny_tensors(spec)
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", spec, tensors, dtype))
    assert checkpoint.spec == spec
    for name, w in tensors.items():
        assert checkpoint.tensor(name).tobytes() == w.astype(dtype).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_shards_are_small_and_indexed(tmp_path):
    spec = tiny_spec()
    folder = tiny_checkpoint(tmp_path / "m", spec, max_shard_bytes=40_000)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 45_000 for file in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == len(spec.tensors())
    assert open_checkpoint(folder).spec == spec


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_gguf_round_trips_bit_for_bit(tmp_path, kind):
    spec = tiny_spec(tied_head=True)
    types = {name: kind for name, shape in spec.tensors().items() if len(shape) == 2}
    types["embed.weight"] = "Q8_0"
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, types=types))
    tensors = ((name, source.tensor(name)) for name in spec.tensors())
    write_checkpoint(tmp_path / "m", source.spec, tensors, generation_config={"eos_token_id": np.uint32(2)})
    copy = open_checkpoint(tmp_path / "m")
    assert copy.spec == source.spec and copy.format == "mlx" and copy.generation_config == {"eos_token_id": 2}
    for name in spec.tensors():
        ours, theirs = copy.tensor(name), source.tensor(name)
        if isinstance(theirs, Quantized):
            assert ours.scales.dtype == np.float16
            for part in ("packed", "scales", "biases"):
                assert getattr(ours, part).tobytes() == getattr(theirs, part).tobytes()
        assert np.array_equal(dequantize(ours), dequantize(theirs))


def test_mixed_quantization_is_written_as_overrides(tmp_path):
    spec = tiny_spec()
    tensors = dict(tiny_tensors(spec))
    for name, w in tensors.items():
        if w.ndim == 2:
            tensors[name] = quantize(w, 8 if "down" in name or "embed" in name else 4, 32)
    folder = tiny_checkpoint(tmp_path / "m", spec, tensors)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    assert (settings["bits"], settings["group_size"], settings["mode"]) == (4, 32, "affine")
    eight = {"group_size": 32, "bits": 8}
    assert settings["model.embed_tokens"] == settings["model.layers.2.mlp.down_proj"] == eight
    assert len(settings) == 3 + 4
    checkpoint = open_checkpoint(folder)
    assert all(np.array_equal(dequantize(checkpoint.tensor(n)), dequantize(w)) for n, w in tensors.items())


def test_config_extra_and_tokenizer(tmp_path):
    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    extra = {"made_by": {"tool": "a"}, "eos_token_id": 3}
    folder = tiny_checkpoint(tmp_path / "m", tokenizer=Tokenizer(), config_extra=extra)
    config = json.loads((folder / "config.json").read_text())
    assert config["made_by"] == {"tool": "a"} and config["torch_dtype"] == "float32"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.generation_config == {"eos_token_id": 3}
    assert checkpoint.describe()["tokenizer"] == "tokenizer.json"


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    with pytest.raises(OndeviceError, match="exists already"):
        tiny_checkpoint(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]


def failures():
    spec = tiny_spec()
    tensors = tiny_tensors(spec)
    yield "missing", {n: w for n, w in tensors.items() if n != "layers.2.k.weight"}, r"layers\.2\.k\.weight"
    yield "unknown", {**tensors, "layers.0.q.bias": np.zeros(64, np.float32)}, r"layers\.0\.q\.bias"
    yield "shape", {**tensors, "head.weight": np.zeros((96, 63), np.float32)}, r"head\.weight.*63"


@pytest.mark.parametrize(("case", "tensors", "problem"), list(failures()), ids=lambda x: str(x)[:10])
def test_wrong_tensors_leave_nothing_behind(tmp_path, case, tensors, problem):
    with pytest.raises(CheckpointError, match=problem):
        tiny_checkpoint(tmp_path / "m", tiny_spec(), tensors, max_shard_bytes=20_000)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_an_interrupt_leave_nothing_behind(tmp_path, monkeypatch):
    def interrupted():
        yield from list(tiny_tensors(tiny_spec()).items())[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "m", tiny_spec(), interrupted(), max_shard_bytes=20_000)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OndeviceError, match="No space left"):
        tiny_checkpoint(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_memory_holds_one_file_and_what_is_made(tmp_path):
    spec = tiny_spec(n_layers=6, d_model=256, d_ff=768, vocab_size=512)
    sizes = {name: 4 * math.prod(shape) for name, shape in spec.tensors().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    limit, made = 1 << 20, []

    def make(name):
        made.append(name)
        return np.ones(spec.tensors()[name], np.float32)

    released = []
    tracemalloc.start()
    write_checkpoint(
        tmp_path / "m",
        spec,
        ((name, partial(make, name)) for name in spec.tensors()),
        max_shard_bytes=limit,
        job="a",
        release=released.append,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made == released == list(spec.tensors()) and sum(sizes.values()) > 4 * (limit + layer)
    assert peak < limit + layer


def test_a_spec_that_no_config_expresses(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"qwen2.*output_bias"):
        tiny_checkpoint(tmp_path / "m", tiny_spec("qwen2", output_bias=True))


def test_progress_counts_tensors(tmp_path):
    calls = []
    spec = tiny_spec()
    tiny_checkpoint(tmp_path / "m", spec, progress=lambda *call: calls.append(call))
    total = len(spec.tensors())
    assert [call[0] for call in calls] == list(range(1, total + 1)) and {call[1] for call in calls} == {total}
