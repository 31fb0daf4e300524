"""No trust in what lies in the cache of packed weights."""

from __future__ import annotations

import errno
import json
import os
import struct

import numpy as np
import pytest

import ondevice
from ondevice.checkpoint.safetensors import SafetensorsFile, write_safetensors
from ondevice.ops.cpu_tile_header import _digest, understood
from tests.packed import decoder_of, kept, logits, matrices

pytestmark = pytest.mark.usefixtures("folder")


def lie(file, change):
    """Rewrites a file whose handles say something else, with a digest that fits."""
    source = SafetensorsFile(file)
    arrays = {name: source.array(name).copy() for name in source.entries}
    metadata = {key: text for key, text in source.metadata.items() if key != "digest"}
    handles = json.loads(metadata["handles"])
    change(handles, arrays)
    metadata["handles"] = json.dumps(handles)
    kinds = {n: ("U8" if a.dtype == np.uint8 else "F32", a.shape) for n, a in arrays.items()}
    write_safetensors(file, arrays, {**metadata, "digest": _digest(kinds, metadata)})


def is_replaced(model, folder, read, caplog, before):
    """Loads with a damaged file: one notice, no tiles from it that are not to be trusted, and a good one afterwards."""
    caplog.clear()
    read.clear()
    np.testing.assert_array_equal(logits(decoder_of(model)), before)
    assert len(caplog.records) == 1 and "packed again" in caplog.text and matrices(read)
    caplog.clear()
    read.clear()
    np.testing.assert_array_equal(logits(decoder_of(model)), before)
    assert not caplog.records and not matrices(read)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "no header", "huge header", "text"])
def test_a_damaged_file_is_made_anew(model, folder, read, caplog, damage):
    before = logits(decoder_of(model))
    (file,) = kept(folder)
    data = file.read_bytes()
    made = {
        "cut": data[:-1],
        "longer": data + b"x",
        "empty": b"",
        "no header": data[:4],
        "huge header": struct.pack("<Q", 1 << 60) + data[8:],
        "text": b"hello, this is no safetensors file",
    }
    file.write_bytes(made[damage])
    is_replaced(model, folder, read, caplog, before)


def test_any_flipped_bit_of_the_header_is_noticed_or_harmless(model, folder, caplog):
    decoder_of(model)
    (file,) = kept(folder)
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    good = understood(SafetensorsFile(file))
    random, bad = np.random.RandomState(0), file.with_name("bad")
    refused = 0
    for bit in random.randint(0, 8 * (8 + length), 400):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        bad.write_bytes(flipped)
        try:
            assert understood(SafetensorsFile(bad)) == good
        except ondevice.errors.OndeviceError:
            refused += 1
    assert refused > 390


def _wider(handles, arrays):
    handles[0]["runs"][0]["format"]["inputs"] *= 2


def _more_rows(handles, arrays):
    handles[-1]["runs"][0]["rows"] = 10**30


def _no_layout(handles, arrays):
    handles[0]["runs"][0]["format"]["layout"] = {"bits": 4, "group_size": 0, "kind": "f16", "symmetric": True}


def _fewer_rows_and_tiles(handles, arrays):
    handles[1]["runs"][0]["rows"] -= 16
    arrays["000001.000"] = arrays["000001.000"][:-1]


def _no_runs(handles, arrays):
    for handle in handles:
        handle["runs"] = []


def _widths_of_its_own(handles, arrays):
    handles[0]["runs"] += handles[1]["runs"]
    del handles[1]
    arrays["000000.001"] = arrays.pop("000001.000")


def _other_use(handles, arrays):
    handles[0]["use"] = "salad"


def _other_type(handles, arrays):
    handles[0]["runs"] = 7


def _bias_of_another_size(handles, arrays):
    arrays["000000.000.bias"] = np.zeros(3, np.float32)


LIES = (
    _wider,
    _more_rows,
    _no_layout,
    _fewer_rows_and_tiles,
    _no_runs,
    _widths_of_its_own,
    _other_use,
    _other_type,
    _bias_of_another_size,
)


@pytest.mark.parametrize("change", LIES)
def test_a_header_that_contradicts_itself_or_the_model_is_refused(model, folder, read, caplog, change):
    before = logits(decoder_of(model))
    lie(*kept(folder), change)
    is_replaced(model, folder, read, caplog, before)


def test_a_file_that_cannot_be_read_to_its_end_is_refused(model, folder, read, caplog, monkeypatch):
    before = logits(decoder_of(model))
    calls = []

    def fails(*_):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.EIO, "Input/output error")
        return original(*_)

    original = os.preadv
    monkeypatch.setattr(os, "preadv", fails)
    is_replaced(model, folder, read, caplog, before)
