"""Memory of packed weights, and of what they are packed from: cut from few chunks, and given back."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

import ondevice
from ondevice.checkpoint import open_checkpoint
from ondevice.ops import cpu_memory
from tests.packed import decoder_of
from tests.tiny import tiny_checkpoint, tiny_spec

pytestmark = pytest.mark.usefixtures("folder")


def area_of(array):
    """The mapping that an array is a part of."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


@pytest.mark.parametrize("cached", [False, True])
def test_memory_goes_back_with_the_model(model, folder, cached):
    if cached:
        decoder_of(model)
    loaded = ondevice.load(model, backend="cpu", threads=1)
    loaded.generate("Hi", max_tokens=2)
    area = weakref.ref(area_of(loaded.decoder.layers[0].ffn.up.weight[0].data))
    assert area() is not None
    del loaded
    gc.collect()
    assert area() is None


def test_pieces_are_aligned_apart_and_in_few_chunks():
    memory = cpu_memory.WeightMemory()
    sizes = [1, 63, 64, 100_000, 3 << 20, 5, 2 << 20, 40 << 20, 7]
    pieces = [memory.take(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    places = sorted((piece.ctypes.data, len(piece)) for piece in pieces)
    assert all(start % 64 == 0 for start, _ in places)
    assert all(a + n + cpu_memory.SPARE <= b for (a, n), (b, _) in itertools.pairwise(places))
    for piece in pieces:
        piece[:] = 1
    areas = {id(area_of(piece)) for piece in pieces}
    assert 2 <= len(areas) <= 5


def test_memory_that_is_not_there_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes for weights"):
        cpu_memory.WeightMemory().take(1 << 60)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="Linux only")
def test_pages_of_a_packed_tensor_are_given_back(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", tiny_spec(d_model=256, d_ff=1024))

    def resident():
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        return sum(int(next(x for x in lines if x.startswith("Rss:")).split()[1]) for y in lines if str(path) in y)

    with open_checkpoint(path) as checkpoint:
        before = resident()
        tensor = checkpoint.tensor("layers.0.up.weight")
        first = tensor.copy()
        around = 2 * 64  # KiB that Linux reads before and behind what is asked for
        assert resident() >= before + tensor.nbytes // 1024 - around > before + 2 * around
        checkpoint.release("layers.0.up.weight")
        assert resident() <= before + around
        np.testing.assert_array_equal(tensor, first)
