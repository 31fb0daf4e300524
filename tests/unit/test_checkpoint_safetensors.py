from __future__ import annotations

import errno
import json
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ondevice.checkpoint import safetensors as ours
from ondevice.checkpoint.safetensors import SafetensorsFile, write_safetensors
from ondevice.errors import CheckpointError, OndeviceError


def arrays() -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    return {
        "f32": random.standard_normal((3, 5)).astype(np.float32),
        "f16": random.standard_normal((7,)).astype(np.float16),
        "bf16": random.standard_normal((2, 3, 2)).astype(ml_dtypes.bfloat16),
        "u32": random.randint(0, 2**31, (4, 2)).astype(np.uint32),
        "i32": random.randint(-9, 9, (2, 2)).astype(np.int32),
        "u8": random.randint(0, 255, (5,)).astype(np.uint8),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_round_trip_and_the_reference_reader_agree(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, arrays(), {"format": "pt", "who": "ü"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "who": "ü"}
    reference = safetensors.numpy.load_file(path)
    for name, w in arrays().items():
        for read in (file.array(name), reference[name]):
            assert read.dtype == w.dtype and read.shape == w.shape
            assert read.tobytes() == w.tobytes(), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_reads_what_the_reference_writer_wrote(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(arrays(), path)
    file = SafetensorsFile(path)
    assert all(file.array(name).tobytes() == w.tobytes() for name, w in arrays().items())


def test_writes_views_in_their_own_order(tmp_path):
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "m", {"t": w.T, "s": w[:, ::2]}, {})
    file = SafetensorsFile(tmp_path / "m")
    assert np.array_equal(file.array("t"), w.T) and np.array_equal(file.array("s"), w[:, ::2])


def test_a_header_that_is_not_padded_gives_aligned_arrays(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert len(header) % 4
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes())
    w = SafetensorsFile(tmp_path / "m").array("a")
    assert w.flags.aligned and w.tolist() == [1, 2]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OndeviceError, match=r"No space left.*free"):
        write_safetensors(tmp_path / "m", arrays(), {})
    assert not list(tmp_path.iterdir())


def damaged(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


LIES = {
    "empty": (b"", "empty"),
    "seven bytes": (bytes(7), "does not fit"),
    "header length 2**63": (damaged({}, length=2**63), "does not fit"),
    "header beyond the file": (damaged({}, length=3), "does not fit"),
    "header cut": (damaged(one(), bytes(8), length=10), "JSON"),
    "no JSON": (damaged(b"\x80\x02}q"), "JSON"),
    "a list": (damaged([]), "no JSON object"),
    "nested deeply": (damaged(b"[" * 200_000), "JSON"),
    "not UTF-8": (damaged(b'{"\xff": 1}'), "JSON"),
    "name twice": (damaged(b'{"a": 1, "a": 2}'), "twice"),
    "number of 10000 digits": (damaged(b'{"a": ' + b"9" * 10000 + b"}"), "JSON"),
    "metadata a list": (damaged({"__metadata__": []}), "texts"),
    "entry a number": (damaged({"a": 1}), "must have"),
    "unknown dtype": (damaged(one(dtype="F7"), bytes(8)), "F7"),
    "dtype a list": (damaged(one(dtype=[]), bytes(8)), "dtype"),
    "negative dimension": (damaged(one(shape=[-2]), bytes(8)), "from 0 up"),
    "fraction": (damaged(one(shape=[2.0]), bytes(8)), "from 0 up"),
    "true": (damaged(one(shape=[True, 2]), bytes(8)), "from 0 up"),
    "huge shape": (damaged(one(shape=[2**40, 2**40]), bytes(8)), "elements"),
    "shape and offsets differ": (damaged(one(shape=[3]), bytes(8)), "takes 12 bytes"),
    "offsets backwards": (damaged(one(data_offsets=[8, 0]), bytes(8)), "takes"),
    "three offsets": (damaged(one(data_offsets=[0, 8, 8]), bytes(8)), "from 0 up"),
    "offset past the end": (damaged(one(data_offsets=[2**50, 2**50 + 8]), bytes(8)), "gap"),
    "data missing": (damaged(one()), "cut off"),
    "data left over": (damaged(one(), bytes(9)), "cut off"),
    "overlap": (
        damaged({**one(), "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}, bytes(12)),
        "overlaps",
    ),
    "same place": (damaged({**one(), "b": one()["a"]}, bytes(8)), "overlaps"),
    "gap": (damaged(one(data_offsets=[4, 12]), bytes(12)), "gap"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_cheaply(tmp_path, name):
    data, problem = LIES[name]
    (tmp_path / "m").write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=problem):
        SafetensorsFile(tmp_path / "m")
    assert time.perf_counter() - start < 1.0 and tracemalloc.get_traced_memory()[1] < 32e6
    tracemalloc.stop()


def test_a_header_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "MAX_HEADER", 20)
    (tmp_path / "m").write_bytes(damaged(one(), bytes(8)))
    with pytest.raises(CheckpointError, match="limit 20"):
        SafetensorsFile(tmp_path / "m")


def test_truncation_anywhere_is_refused(tmp_path):
    write_safetensors(tmp_path / "m", arrays(), {})
    data = (tmp_path / "m").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "cut")


def test_flipped_bytes_give_an_error_or_whole_arrays(tmp_path):
    write_safetensors(tmp_path / "m", arrays(), {})
    data, random, refused = (tmp_path / "m").read_bytes(), np.random.RandomState(0), 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[random.randint(len(data))] ^= 1 << random.randint(8)
        (tmp_path / "f").write_bytes(flipped)
        try:
            file = SafetensorsFile(tmp_path / "f")
            for name, entry in file.entries.items():
                assert file.array(name).nbytes == entry.nbytes
        except OndeviceError:
            refused += 1
    assert refused > 50
