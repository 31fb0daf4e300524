"""Gate and up of picked neurons on the CPU: weights by neuron, and the recording of their products with one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import codes, pack_neurons
from cpu_kernels.compile import Kernel
from cpu_kernels.fetch_first import fetch_first
from cpu_kernels.float_rows import FloatRows
from cpu_kernels.row_codes import row_codes, row_codes_bytes
from cpu_kernels.row_layout import RowLayout
from cpu_kernels.sparse_rows import fetch_rows, most_neurons, scratch_bytes, sparse_rows
from cpu_kernels.threads import ThreadPool
from cpu_kernels.tiles import Layout
from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize
from ondevice.errors import OptionError
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_weights import FLOAT_KINDS

PIECES = 8
"""Pieces of work for each thread."""


@dataclass(frozen=True, slots=True)
class NeuronRows:
    """Gate and up, or up alone, by neuron.

    Args:
        layout: of quantized weights or of floats.
        neurons: how many.
        data: bytes of all neurons.
        gate_bias, up_bias: float32 [neurons] or None.
    """

    layout: RowLayout | FloatRows
    neurons: int
    data: NDArray[np.uint8]
    gate_bias: NDArray[np.float32] | None
    up_bias: NDArray[np.float32] | None

    @property
    def groups(self) -> int:
        """Groups of 32 neurons."""
        return -(-self.neurons // 32)


def pack_neuron_rows(
    pool: ThreadPool,
    memory: WeightMemory,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> NeuronRows:
    """Bundles the rows of gate and up by neuron.

    Args:
        gate, up: [neurons, inputs], both floats or both quantized with the same bits and group size. Without a gate
            the activation, or a value that was computed before, is applied to up.
        gate_bias, up_bias: [neurons].

    Raises:
        OptionError: a format that rows by neuron do not have, or two that do not go together.
    """
    tensors = [up] if gate is None else [gate, up]
    if any(t.shape != up.shape for t in tensors):
        raise OptionError(f"gate {tensors[0].shape} and up {up.shape}: rows by neuron need both alike")
    quantized = [t for t in tensors if isinstance(t, Quantized)]
    biases = [None if b is None else np.ascontiguousarray(dequantize(b)) for b in (gate_bias, up_bias)]
    if len(quantized) == len(tensors):
        layout = row_layout_of(quantized)
        data = memory.take(up.shape[0] * layout.neuron_bytes)
        _write_quantized(pool, layout, quantized, data)
        return NeuronRows(layout, up.shape[0], data, *biases)
    kinds = {FLOAT_KINDS.get(getattr(t, "dtype", None), "f32") for t in tensors}
    floats = FloatRows(kinds.pop() if len(kinds) == 1 else "f32", up.shape[1], len(tensors))
    data = memory.take(up.shape[0] * floats.neuron_bytes)
    _write_floats(pool, floats, tensors, data)
    return NeuronRows(floats, up.shape[0], data, *biases)


def row_layout_of(tensors: list[Quantized]) -> RowLayout:
    """The layout that holds the rows of one or two tensors exactly.

    Raises:
        OptionError: there is none.
    """
    bits, sizes = {t.bits for t in tensors}, {t.group_size for t in tensors}
    supers = any(t.super_scales is not None for t in tensors)
    if supers or len(bits) > 1 or len(sizes) > 1 or not bits <= {4, 8}:
        kind = f"{sorted(bits)} bits in groups of {sorted(sizes)}{', scales in two steps' * supers}"
        raise OptionError(f"rows by neuron of {kind}: bring gate and up to 4 or 8 bits with float scales, both alike")
    affine = [t.affine() for t in tensors]
    middle = np.float32(2 ** (tensors[0].bits - 1))
    symmetric = all(np.array_equal(scales * -middle, biases) for scales, biases in affine)
    numbers = [a for pair in affine for a in pair[: 1 if symmetric else 2]]
    half = all(np.array_equal(a.astype(np.float16).astype(np.float32), a) for a in numbers)
    layout = Layout(tensors[0].bits, tensors[0].group_size, "f16" if half else "f32", symmetric)
    return RowLayout(layout, tensors[0].shape[1], len(tensors))


def _write_quantized(pool: ThreadPool, layout: RowLayout, tensors: list[Quantized], data: NDArray[np.uint8]) -> None:
    program, tiles = Program(), layout.tiles
    data[:] = 0
    scale_type: Any = np.float16 if tiles.kind == "f16" else np.float32
    for part, tensor in enumerate(tensors):
        packed = np.ascontiguousarray(tensor.packed)
        scales, biases = (np.ascontiguousarray(a.astype(scale_type)) for a in tensor.affine())
        source = (packed, scales, 0 if tiles.symmetric else biases)
        shape = (layout.inputs, tiles.bits, tiles.group_size, tiles.scale_bytes)
        for block, segment, lane, group, count in layout.runs(part):
            start = data.ctypes.data + block.at
            places = [start + at(segment) for at in (block.codes_at, block.scales_at, block.biases_at)]
            run = (layout.neuron_bytes, *places, block.m, lane, group, count)
            program.add(pack_neurons.pack_neuron_groups, len(packed), (*run, *source, *shape))
    program.seal()
    program.run(pool)


def _write_floats(pool: ThreadPool, floats: FloatRows, tensors: list[Tensor], data: NDArray[np.uint8]) -> None:
    program = Program()
    dtype = next(dtype for dtype, kind in FLOAT_KINDS.items() if kind == floats.kind)
    for part, tensor in enumerate(tensors):
        values = np.ascontiguousarray(dequantize(tensor) if isinstance(tensor, Quantized) else tensor.astype(dtype))
        at = data.ctypes.data + part * floats.row_bytes
        arguments = (at, floats.neuron_bytes, values, floats.inputs, values.dtype.itemsize)
        program.add(pack_neurons.pack_neuron_floats, len(values), arguments)
    program.seal()
    program.run(pool)


def row_kernels(rows: NeuronRows) -> tuple[Kernel, ...]:
    """Every kernel that products with these neurons can need."""
    layout = rows.layout
    own = (fetch_rows(layout), row_codes, fetch_first) if isinstance(layout, RowLayout) else ()
    return sparse_rows(layout), *own


def record_rows(
    recording: Recording,
    x: Buffer,
    rows: NeuronRows,
    table: NDArray[Any] | int,
    activation: int,
    values: Buffer | None = None,
) -> Buffer:
    """act(gate x) * up x, act(up x), or value * act(up x), of the neurons in a table.

    Args:
        x: one token [1, inputs].
        rows: the weights.
        table: of neurons, see `cpu_kernels.sparse_rows`: an array or its address.
        activation: a number that `cpu_kernels.rows.activate` knows.
        values: [1, neurons], where the other factor was computed before.

    Returns:
        [1, 32 * groups of neurons], of which 32 for each entry of the table are written.
    """
    if x.rows != 1:
        raise ValueError(f"{x.rows} tokens; rows by neuron are multiplied with one")
    layout = rows.layout
    pieces = min(rows.groups, PIECES * recording.threads)
    fetched = (table, rows.groups, rows.data, pieces, recording.threads)
    token: tuple[Any, int, tuple[Kernel, int] | None]
    if isinstance(layout, RowLayout):
        token = _own_row_codes(recording, x, layout, (fetch_rows(layout), fetched))
    else:
        token = recording.own_floats(x)
    out = recording.new(1, 32 * rows.groups)
    extra = [0 if a is None else a for a in (rows.gate_bias, rows.up_bias)]
    given = recording.floats(values).address if values else 0
    entries = -(-rows.groups // pieces)
    room, scratch_each = most_neurons(layout, entries), scratch_bytes(layout, entries)
    scratch = (recording.scratch("rows of neurons", scratch_each), scratch_each, room, recording.threads)
    arguments = (out.address, table, rows.groups, rows.data, *token[:2], pieces, *extra, given, activation, *scratch)
    work = layout.inputs * rows.neurons * layout.parts
    kernel = sparse_rows(layout)
    recording.program.add(kernel, pieces, arguments, first=token[2], work=work)
    return out


def _own_row_codes(
    recording: Recording, x: Buffer, layout: RowLayout, fetch: tuple[Kernel, tuple[Any, ...]]
) -> tuple[Any, int, tuple[Kernel, int]]:
    """Each thread's own codes by segment: where, bytes between the threads' copies, and how they make them.

    fetch: what asks for weights meanwhile.
    """
    producer = recording.producer_of_codes(x)
    row, panel_bytes, each = x.stride_bytes, codes.panel_bytes(x.width, 1), row_codes_bytes(layout)
    panel, out = recording.own_scratch("panel", panel_bytes), recording.own_scratch("row codes", each)
    middle = 1 << layout.tiles.bits - 1 if layout.tiles.symmetric else 0
    place = (producer.kernel.address, panel, panel_bytes, out, each, x.width, layout.parts, middle)
    made = (recording.own_scratch("row", row), 0, row, *producer.arguments, panel, panel_bytes, 1, 1, 1)
    return out, each, recording.fetch_first(fetch, (row_codes, (*place, *made)))
