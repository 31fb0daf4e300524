"""Programs of the CPU home recorded by hand, for tests of kernels that no op calls alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.threads import shared_pool
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Buffer, Recording


def recorded(threads: int, body: Callable[[Recording], Buffer]) -> NDArray[np.float32]:
    """Records what `body` does and runs it. Returns the rows of its result."""
    recording = Recording(Program(), threads, {})
    result = recording.floats(body(recording))
    recording.program.seal()
    recording.program.run(shared_pool(threads))
    return _floats(result)[:, : result.width].copy()


def put(recording: Recording, x: NDArray[Any]) -> Buffer:
    """Rows [N, n] in the program's memory. What lies behind them is NaN, which no result may contain."""
    buffer = recording.new(*x.shape)
    _floats(buffer)[:] = np.nan
    _floats(buffer)[:, : x.shape[1]] = x
    recording.program.keep(buffer)
    return buffer


def _floats(buffer: Buffer) -> NDArray[np.float32]:
    assert buffer.block is not None
    start = buffer.address - buffer.block.address
    values = buffer.block.array[start : start + buffer.rows * buffer.stride_bytes].view(np.float32)
    return values.reshape(buffer.rows, buffer.stride)


def chosen_table(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The table of the neurons that any row of a mask [N, D] has, in the CPU home's format."""
    union = mask.any(axis=0)
    groups = -(-len(union) // 32)
    table = np.full(16 + 34 * groups, -(2**30), np.int32)
    entry = 0
    for group in range(groups):
        chosen = np.flatnonzero(union[32 * group : 32 * group + 32]) + 32 * group
        if len(chosen):
            filled = np.concatenate([chosen, np.repeat(chosen[-1:], -len(chosen) % 4)])
            table[16 + entry], table[16 + groups + entry] = group, len(chosen)
            table[16 + 2 * groups + 32 * entry :][: len(filled)] = filled
            entry += 1
    table[:2] = entry, union.sum()
    return table


def mask_words(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """A mask [N, units] as bits, [N, ceil(units / 64)]."""
    padded = np.zeros((len(mask), -(-mask.shape[1] // 64) * 64), bool)
    padded[:, : mask.shape[1]] = mask
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)
