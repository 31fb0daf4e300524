"""Rows of a program that is being recorded, made in the form in which they are wanted first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import codes, rows
from cpu_kernels.compile import Kernel
from cpu_kernels.fetch_first import fetch_first
from ondevice.ops.cpu_program import Block, Program, aligned


@dataclass(frozen=True, slots=True)
class Producer:
    """How rows are made; put off until it is known whether floats or int8 codes of them are wanted.

    Args:
        kernel: of `cpu_kernels.rows` or `rope`, whose arguments are where results go, these, and where codes go.
        arguments: the ones in between.
        source: what it reads, so that its memory is not given away before.
    """

    kernel: Kernel
    arguments: tuple[Any, ...]
    source: Any


@dataclass(slots=True)
class Buffer:
    """Rows of float32 in a program's memory.

    Args:
        rows, width: its shape.
        stride: of a row, in values.
        block, address: the memory, of which several buffers may be parts; None and 0 while nobody needed the floats.
        producer: what makes them then.
        panels: int8 codes, once made.
        first: what each thread does to make its own single row of codes, once recorded.
    """

    rows: int
    width: int
    stride: int
    block: Block | None = None
    address: int = 0
    producer: Producer | None = None
    panels: Block | None = None
    first: tuple[Kernel, int] | None = None

    @property
    def stride_bytes(self) -> int:
        """Bytes between rows."""
        return self.stride * 4

    def row(self, index: int) -> Buffer:
        """One row of floats that have been made; of a single row, the buffer itself."""
        if self.rows == 1:
            return self
        return Buffer(1, self.width, self.stride, self.block, self.address + index * self.stride_bytes)


class Recording:
    """A program while operations are added to it.

    Args:
        program: receives them.
        threads: that will run it.
        scratch: memory that threads have for each use, shared by a table's programs; grows here.
    """

    def __init__(self, program: Program, threads: int, scratch: dict[str, NDArray[np.uint8]]) -> None:
        self.program, self.threads, self._scratch = program, threads, scratch

    def new(self, n: int, width: int, span: int = 0) -> Buffer:
        """A buffer of n rows. span: values that may be written to a row, where padding reaches beyond `width`."""
        stride = -(-max(width, span) // 16) * 16
        block = Block(self.program.memory, n * stride * 4)
        return Buffer(n, width, stride, block, block.address)

    def later(self, n: int, width: int, kernel: Kernel, source: Any, arguments: tuple[Any, ...]) -> Buffer:
        """A buffer that is made in the form in which it is wanted first."""
        return Buffer(n, width, -(-width // 16) * 16, producer=Producer(kernel, arguments, source))

    def floats(self, x: Buffer) -> Buffer:
        """The buffer, with its floats in memory."""
        if x.block is None and x.producer is not None:
            x.block = Block(self.program.memory, x.rows * x.stride_bytes)
            x.address = x.block.address
            arguments = (x.address, x.stride_bytes, 0, *x.producer.arguments, 0, 0, 1, 1, x.rows)
            self.program.add(x.producer.kernel, x.rows, arguments)
        return x

    def own_floats(self, x: Buffer) -> tuple[Any, int, tuple[Kernel, int] | None]:
        """A single row of floats: its address, the bytes between the copies of threads, and how they make them."""
        if x.block is not None or x.producer is None:
            return x.address, 0, None
        row = self.own_scratch("row", x.stride_bytes)
        arguments = (row, 0, x.stride_bytes, *x.producer.arguments, 0, 0, 1, 1, 1)
        return row, x.stride_bytes, (x.producer.kernel, self.program.store(arguments))

    def own_codes(self, x: Buffer) -> tuple[Any, int]:
        """A single row of int8 codes, made by each thread for itself: where, and the bytes between the threads' copies.

        Rounding a row takes less time than waiting for another thread to do it.
        """
        each = codes.panel_bytes(x.width, 1)
        panel, row = self.own_scratch("panel", each), self.own_scratch("row", x.stride_bytes)
        if x.first is None:
            producer = self.producer_of_codes(x)
            arguments = (row, 0, x.stride_bytes, *producer.arguments, panel, each, 1, 1, 1)
            x.first = producer.kernel, self.program.store(arguments)
        return panel, each

    def producer_of_codes(self, x: Buffer) -> Producer:
        """What makes codes of a buffer without its floats if nobody needed these yet."""
        if x.block is None and x.producer is not None:
            return x.producer
        return Producer(rows.quantize, (x.address, x.stride_bytes, x.width), x)

    def panels(self, x: Buffer) -> tuple[int, int]:
        """int8 codes of several rows: their address, and the width of the last panel."""
        widest, last = codes.panel_widths()[0], codes.last_width(x.rows)
        if x.panels is None:
            x.panels = Block(self.program.memory, -(-x.rows // widest) * codes.panel_bytes(x.width, widest))
            each, producer = widest * x.stride_bytes, self.producer_of_codes(x)
            out = self.scratch("rows", each)
            arguments = (out, x.stride_bytes, each, *producer.arguments, x.panels.address, 0, widest, last, x.rows)
            self.program.add(producer.kernel, -(-x.rows // widest), arguments)
        return x.panels.address, last

    def rows_of_codes(self, x: Buffer) -> tuple[Block, int]:
        """int8 codes of rows, each a panel of width 1: their memory, and the bytes between them."""
        each, producer = codes.panel_bytes(x.width, 1), self.producer_of_codes(x)
        block = Block(self.program.memory, x.rows * each)
        arguments = (self.own_scratch("row", x.stride_bytes), 0, x.stride_bytes, *producer.arguments)
        self.program.add(producer.kernel, x.rows, (*arguments, block.address, 0, 1, 1, x.rows))
        return block, each

    def fetch_first(
        self, fetch: tuple[Kernel, tuple[Any, ...]], maker: tuple[Kernel, tuple[Any, ...]]
    ) -> tuple[Kernel, int]:
        """What threads do before their first tile, when they also ask for its weights: two kernels with arguments."""
        words = (fetch[0].address, maker[0].address, len(fetch[1]))
        return fetch_first, self.program.store((*words, *fetch[1], *maker[1]))

    def scratch(self, use: str, each: int) -> NDArray[np.uint8]:
        """Scratch for every thread; programs keep the one that they were recorded with alive."""
        if len(self._scratch.get(use, ())) < each * self.threads:
            self._scratch[use] = aligned(each * self.threads)
        return self._scratch[use]

    def own_scratch(self, use: str, each: int) -> NDArray[np.uint8]:
        """Scratch whose pieces only their own threads ever write to, so that what they made there stays.

        A thread may need it after operations that others did alone. So pieces of another size are other memory.
        """
        return self.scratch(f"{use} of {each}", each)
