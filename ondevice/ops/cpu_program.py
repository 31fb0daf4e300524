"""Recording what the decoder asks for, as a flat program of kernels, and replaying it.

The decoder runs once per shape over the CPU table, which only records; after that a step is one call: new tokens and
positions are copied in, and the threads walk through the program. Recording happens in the order of execution, so
memory whose Python owner is gone by then can be given to later operations of the same program.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compile import Kernel
from cpu_kernels.threads import FIELDS, MAX_OPS, RUN_BIT, ThreadPool
from ondevice.ops.base import Step
from ondevice.ops.base_skipping import Tally

SLICE = 4e9
"""Multiplications between two looks at Python's signals: some 20 ms on two cores, and not a second on a slow one."""


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that start on a cache line, with a line to spare behind them."""
    raw = np.empty(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes + 64]


class _Memory:
    """Blocks that operations of one program may use one after the other."""

    def __init__(self) -> None:
        self.blocks: list[NDArray[np.uint8]] = []
        self.free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        size = 1 << max(nbytes - 1, 1023).bit_length()
        waiting = self.free.setdefault(size, [])
        if waiting:
            return waiting.pop()
        block = aligned(size)
        self.blocks.append(block)
        return block


class Block:
    """Memory that returns to its program's stock when nothing refers to it any more."""

    __slots__ = ("_memory", "address", "array")

    def __init__(self, memory: _Memory, nbytes: int) -> None:
        self._memory = memory
        self.array = memory.take(nbytes)
        self.address: int = self.array.ctypes.data

    def __del__(self) -> None:
        self._memory.free[1 << (len(self.array) - 65).bit_length()].append(self.array)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that an operation reads, for those that wait before it to fetch.

    Args:
        address: of the first byte.
        each: bytes that one piece of work reads.
        pieces: of work.
    """

    address: int
    each: int
    pieces: int


class Program:
    """Kernels with their arguments, in order.

    Args:
        step: shapes and first values of the inputs, which are copied to arrays of the program's own.
    """

    def __init__(self, step: Step | None = None) -> None:
        self._records: list[tuple[int, int, int, int, int]] = []
        self._weights: list[Weights | None] = []
        self._arguments: list[int] = []
        self._alive: list[Any] = []
        self._by_chunks: list[int] = []
        self._work: list[float] = []
        self.parts: list[str] = []
        self.each_run: dict[str, Tally] = {}
        self.part = ""
        self.memory = _Memory()
        if step is not None:
            self.step = Step(*(np.array(a, np.int32) for a in (step.tokens, step.positions, step.slots, step.outputs)))
            self.chunks = np.ones(1, np.int32)
        self.result: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def add(
        self,
        kernel: Kernel,
        tiles: int,
        arguments: Sequence[Any],
        by_chunks: bool = False,
        first: tuple[Kernel, int] | None = None,
        weights: Weights | None = None,
        work: float = 0,
    ) -> None:
        """Appends an operation.

        Args:
            kernel: what runs on each tile.
            tiles: pieces of work; with by_chunks, times the number of attention chunks at run time.
            arguments: integers, floats, and arrays, which are passed by address and kept alive.
            first: what each thread does before its first tile: a kernel and where `store` put its arguments.
            weights: what the operation reads, where fetching it ahead may pay.
            work: multiplications, at most.
        """
        if tiles >= 1 << RUN_BIT:
            raise ValueError(f"an operation of {tiles} tiles; at most {(1 << RUN_BIT) - 1} can be counted")
        if by_chunks:
            self._by_chunks.append(len(self._records))
        before = (first[0].address, first[1]) if first else (0, -1)
        self._records.append((kernel.address, self.store(arguments), tiles, *before))
        self._weights.append(weights)
        self._work.append(work)
        self.parts.append(self.part)

    def store(self, arguments: Sequence[Any]) -> int:
        """Keeps a kernel's arguments. Returns their place."""
        place = len(self._arguments)
        for value in arguments:
            if isinstance(value, np.ndarray):
                self._alive.append(value)
                self._arguments.append(value.ctypes.data)
            elif isinstance(value, float):
                self._arguments.append(int(np.float64(value).view(np.int64)))
            else:
                self._arguments.append(int(value))
        return place

    def keep(self, owner: object) -> None:
        """Holds something until the program is gone."""
        self._alive.append(owner)

    def seal(self) -> None:
        """Turns what was recorded into the arrays that the threads read."""
        self._words = np.array(self._arguments or [0], np.int64)
        table = np.zeros((len(self._records), FIELDS), np.int64)
        if self._records:
            table[:, :5] = self._records
            for column in (1, 4):
                places = table[:, column]
                table[:, column] = np.where(places < 0, 0, self._words.ctypes.data + 8 * places)
        following: Weights | None = None
        for row, weights in zip(table[::-1], self._weights[::-1]):
            if following:
                row[5:] = following.address, following.each, following.pieces
            following = weights or following
        self._table = table
        self._slices, done = [0], 0.0
        for i, work in enumerate(self._work, 1):
            done += work
            if done > SLICE or i == len(self._work) or i - self._slices[-1] == MAX_OPS:
                self._slices.append(i)
                done = 0
        self._base_tiles = table[self._by_chunks, 2].copy()

    def load(self, step: Step, chunk: int) -> None:
        """Puts in the values of a step of the recorded shape. chunk: positions of one attention chunk."""
        for mine, new in zip(
            (self.step.tokens, self.step.positions, self.step.slots, self.step.outputs),
            (step.tokens, step.positions, step.slots, step.outputs),
        ):
            mine[:] = new
        chunks = max(int(step.positions.max()), 0) // chunk + 1
        self.chunks[0] = chunks
        self._table[self._by_chunks, 2] = self._base_tiles * chunks

    def count(self, kind: str, kept: int | None, units: int) -> None:
        """Notes an operation that can skip, of which every run keeps so many units; None for a dense one."""
        tally = self.each_run.setdefault(kind, Tally())
        tally.calls += 1
        if kept is not None:
            tally.sparse, tally.kept, tally.units = tally.sparse + 1, tally.kept + kept, tally.units + units

    def run(self, pool: ThreadPool) -> None:
        """Runs all operations; a long program returns to Python now and then, so that Ctrl+C is heard."""
        for first, end in itertools.pairwise(self._slices):
            pool.run(self._table, first, end - first)

    def measure(self, pool: ThreadPool) -> NDArray[np.int64]:
        """Runs all operations. Returns nanoseconds [operations, threads, 2]: worked, and waited for others."""
        times = np.zeros((len(self._table), pool.threads, 2), np.int64)
        pool.run(self._table, times=times)
        return times

    def bytes_of_parts(self) -> dict[str, int]:
        """Bytes of weights that each part of the model reads."""
        sums: dict[str, int] = {}
        for part, weights in zip(self.parts, self._weights):
            sums[part] = sums.get(part, 0) + (weights.each * weights.pieces if weights else 0)
        return sums
