"""Weights by inputs, and recording products with the inputs that a table lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import chosen_inputs, codes, pack_inputs
from cpu_kernels.compile import Kernel
from cpu_kernels.fetch_first import fetch_first
from cpu_kernels.input_layout import InputLayout, Places
from cpu_kernels.sparse_inputs import COLUMN, PARTS, fetch_inputs, sparse_input_gemv
from cpu_kernels.threads import ThreadPool
from ondevice.checkpoint.quantization import GROUP_SIZES, Quantized, Tensor, dequantize
from ondevice.errors import OptionError
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_program import Block, Program
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_weights import FLOAT_KINDS


@dataclass(frozen=True, slots=True)
class InputMajor:
    """A matrix by inputs.

    Args:
        layout: of the data.
        rows, inputs: of the matrix.
        data: bytes.
        bias: float32 [rows up to a whole vector] or None.
    """

    layout: InputLayout
    rows: int
    inputs: int
    data: NDArray[np.uint8]
    bias: NDArray[np.float32] | None = None

    @property
    def places(self) -> Places:
        """Where in a group of inputs its parts are."""
        return self.layout.places(self.rows)

    @property
    def groups(self) -> int:
        """Groups of 32 inputs, which tables count in."""
        return -(-self.inputs // 32)


def input_layout_of(tensor: Tensor) -> InputLayout:
    """The layout that holds a tensor exactly; codes of 5 and 6 bits take 8.

    Raises:
        OptionError: groups that it does not have.
    """
    if not isinstance(tensor, Quantized):
        return InputLayout(0, 32, FLOAT_KINDS.get(tensor.dtype, "f32"), True)
    if tensor.group_size not in GROUP_SIZES:
        raise OptionError(
            f"weights with a scale for {tensor.group_size} inputs cannot be stored by inputs: "
            f"dequantize them, or requantize to groups of one of {GROUP_SIZES}"
        )
    scales, biases = tensor.affine()
    symmetric = bool(np.array_equal(scales * np.float32(-(2 ** (tensor.bits - 1))), biases))
    floats = [a for a in (tensor.scales, tensor.biases) if a is not None]
    half = tensor.super_scales is None and all(a.dtype == np.float16 for a in floats)
    return InputLayout(4 if tensor.bits == 4 else 8, tensor.group_size, "f16" if half else "f32", symmetric)


def pack_input_major(pool: ThreadPool, memory: WeightMemory, tensor: Tensor, bias: Tensor | None) -> InputMajor:
    """Brings a matrix [out, in] and its bias [out] into the layout by inputs.

    Raises:
        OptionError: quantized in groups that it does not have.
    """
    layout, (rows, inputs) = input_layout_of(tensor), tensor.shape
    data = memory.take(layout.nbytes(rows, inputs))
    data[:] = 0
    values = None
    if bias is not None:
        values = np.zeros(-(-rows // 16) * 16, np.float32)
        values[:rows] = dequantize(bias)
    packed = InputMajor(layout, rows, inputs, data, values)
    program = Program()
    if isinstance(tensor, Quantized):
        arguments = (*packed.places, *_integers(tensor, layout), layout.group_size, layout.number_bytes)
        program.add(pack_inputs.pack_quantized, inputs // layout.group_size, (data, *arguments))
    else:
        floats = np.ascontiguousarray(tensor if tensor.dtype in FLOAT_KINDS else tensor.astype(np.float32))
        wide, narrow, _, *places = packed.places
        arguments = (data, wide, narrow, *places, floats, rows, inputs, floats.dtype.itemsize)
        program.add(pack_inputs.pack_floats, packed.groups, arguments)
    program.seal()
    program.run(pool)
    return packed


def _integers(tensor: Quantized, layout: InputLayout) -> tuple[Any, ...]:
    """What the packing kernel is told of a matrix. Symmetric codes keep their distance from the middle."""
    scale_type: Any = np.float16 if layout.kind == "f16" else np.float32
    scales, biases = (np.ascontiguousarray(a.astype(scale_type)) for a in tensor.affine())
    lift = 2 ** (layout.bits - 1) - 2 ** (tensor.bits - 1) if layout.symmetric else 0
    sizes = (*tensor.shape, tensor.bits, layout.bits, lift)
    return np.ascontiguousarray(tensor.packed), scales, 0 if layout.symmetric else biases, *sizes


def input_kernels(weight: Sequence[InputMajor]) -> tuple[Kernel, ...]:
    """Every kernel that products with these weights can need."""
    return (
        *(kernel(part.layout) for part in weight for kernel in (sparse_input_gemv, fetch_inputs)),
        chosen_inputs.quantize_chosen,
        chosen_inputs.gather_chosen,
        fetch_first,
    )


def new_outputs(recording: Recording, weight: Sequence[InputMajor], rows: int) -> Buffer:
    """Memory for results of several tokens."""
    starts = np.cumsum([0] + [part.rows for part in weight]).tolist()
    span = max(start + -(-part.rows // 16) * 16 for start, part in zip(starts, weight))
    return recording.new(rows, starts[-1], span=span)


def record_inputs(
    recording: Recording,
    h: Buffer,
    table: int,
    weight: Sequence[InputMajor],
    residual: Buffer | None = None,
    compact: bool = True,
    out: Buffer | None = None,
) -> Buffer:
    """W h + bias (+ residual) for one token, over the inputs of a table.

    Args:
        h: [1, inputs]; compact: an entry's values in the table's order and zeros behind, 32 for each entry.
        table: its address.
        weight: matrices whose outputs follow each other.
        residual: [1, outputs].
        out: where the result goes, as `new_outputs` makes it; a new buffer if not given.
    """
    starts = np.cumsum([0] + [part.rows for part in weight]).tolist()
    out = out or new_outputs(recording, weight, 1)
    extra = recording.floats(residual) if residual else None
    source = recording.floats(h)
    for start, part in zip(starts, weight):
        address = extra.address + 4 * start if extra else 0
        _record_part(recording, out.address + 4 * start, source, table, part, address, compact)
    return out


def _record_part(
    recording: Recording, out: int, h: Buffer, table: int, weight: InputMajor, residual: int, compact: bool
) -> None:
    wide, narrow, *_ = weight.places
    columns = max(1, -(-wide // COLUMN))
    each = -(-wide // columns)
    part_bytes = 4 * (each * weight.layout.outputs(True) + narrow * weight.layout.outputs(False))
    parts = Block(recording.program.memory, columns * PARTS * part_bytes)
    whole = (columns, recording.threads)
    fetched = (weight.data, *weight.places, each, table, weight.groups, *whole)
    x, x_each, first = _inputs(recording, h, table, weight, compact, fetched)
    place = (out, -(-weight.rows // 16), weight.data, *weight.places, each, table, weight.groups, x, x_each)
    counters, bias = np.zeros(columns * 8, np.int64), 0 if weight.bias is None else weight.bias
    arguments = (*place, part_bytes, parts.address, counters, bias, residual, *whole)
    work = weight.inputs * weight.rows * (1 if weight.layout.bits else 4)
    recording.program.add(sparse_input_gemv(weight.layout), columns * PARTS, arguments, first=first, work=work)


def _inputs(
    recording: Recording, h: Buffer, table: int, weight: InputMajor, compact: bool, fetched: tuple[Any, ...]
) -> tuple[Any, int, tuple[Kernel, int]]:
    """What the kernel multiplies: its address, the bytes between the copies of threads, and how they make them.

    fetched: arguments of what asks for weights meanwhile.
    """
    groups, row_bytes = weight.groups, 128 * weight.groups
    row = recording.own_scratch("row", row_bytes) if not compact else 0
    fetch = fetch_inputs(weight.layout), fetched
    if weight.layout.bits:
        each = codes.panel_bytes(32 * groups, 1)
        panel = recording.own_scratch("panel", each)
        arguments = (panel, each, h.address, table, groups, row, row_bytes)
        return panel, each, recording.fetch_first(fetch, (chosen_inputs.quantize_chosen, arguments))
    if compact:
        return h.address, 0, (fetch[0], recording.program.store(fetched))
    gathered = (row, row_bytes, h.address, table, groups)
    return row, row_bytes, recording.fetch_first(fetch, (chosen_inputs.gather_chosen, gathered))
