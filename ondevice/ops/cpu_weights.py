"""Weights as the CPU kernels want them: tiles of 16 rows, made once at load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cpu_kernels import pack
from cpu_kernels.threads import ThreadPool
from cpu_kernels.tiles import Layout
from ondevice.checkpoint.quantization import SUPER_BLOCK, Quantized, Tensor, dequantize
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_program import Program

FLOAT_KINDS = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
FLOAT_CODES = {"f32": 0, "f16": 1, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Format:
    """How the tiles of a matrix are written.

    Args:
        inputs: width of a row.
        layout: of quantized tiles; None for floats.
        kind: of the floats: "f32", "f16", "bf16".
    """

    inputs: int
    layout: Layout | None = None
    kind: str = "f32"

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 rows."""
        if self.layout:
            return self.layout.tile_bytes(self.inputs)
        return 16 * self.inputs * (4 if self.kind == "f32" else 2)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of one format, and their biases.

    Args:
        format: of every tile.
        rows: without the padding to whole tiles.
        data: bytes of all tiles.
        bias: float32 [padded rows] or None.
    """

    format: Format
    rows: int
    data: NDArray[np.uint8]
    bias: NDArray[np.float32] | None = None

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // 16)


def format_of(tensor: Tensor) -> Format:
    """The tile format that holds a tensor exactly."""
    inputs = tensor.shape[1]
    if not isinstance(tensor, Quantized):
        return Format(inputs, kind=FLOAT_KINDS.get(tensor.dtype, "f32"))
    if tensor.super_scales is not None:
        symmetric = tensor.biases is None
        return Format(inputs, Layout(tensor.bits, SUPER_BLOCK, "k16" if symmetric else "k32", symmetric))
    scales, biases = tensor.affine()
    symmetric = bool(np.array_equal(scales * np.float32(-(2 ** (tensor.bits - 1))), biases))
    half = all(a is None or a.dtype == np.float16 for a in (tensor.scales, tensor.biases))
    return Format(inputs, Layout(tensor.bits, tensor.group_size, "f16" if half else "f32", symmetric))


def pack_rows(
    pool: ThreadPool, memory: WeightMemory, tensors: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tiles]:
    """Joins linears along their outputs into as few runs of tiles as their formats allow.

    A run ends where the format changes or where rows do not fill their last tile.
    """
    runs: list[tuple[Format, list[int]]] = []
    for i, tensor in enumerate(tensors):
        form = format_of(tensor)
        if runs and runs[-1][0] == form and tensors[i - 1].shape[0] % 16 == 0:
            runs[-1][1].append(i)
        else:
            runs.append((form, [i]))
    return [_pack_run(pool, memory, f, [tensors[i] for i in run], [biases[i] for i in run]) for f, run in runs]


def _pack_run(
    pool: ThreadPool, memory: WeightMemory, form: Format, tensors: list[Tensor], biases: list[Tensor | None]
) -> Tiles:
    rows = sum(t.shape[0] for t in tensors)
    data = memory.take(-(-rows // 16) * form.tile_bytes)
    start = 0
    for tensor in tensors:
        _pack_tensor(pool, form, tensor, data.ctypes.data + start // 16 * form.tile_bytes)
        start += tensor.shape[0]
    bias = None
    if any(b is not None for b in biases):
        bias = np.zeros(-(-rows // 16) * 16, np.float32)
        parts = [np.zeros(t.shape[0], np.float32) if b is None else dequantize(b) for t, b in zip(tensors, biases)]
        bias[:rows] = np.concatenate(parts)
    return Tiles(form, rows, data, bias)


def _pack_tensor(pool: ThreadPool, form: Format, tensor: Tensor, address: int) -> None:
    program = Program()
    rows, inputs = tensor.shape
    tiles = -(-rows // 16)
    layout = form.layout
    if isinstance(tensor, Quantized) and layout and layout.kind in ("k16", "k32"):
        parts = (tensor.packed, tensor.scales, tensor.biases, tensor.super_scales, tensor.super_biases)
        arrays = [0 if a is None else np.ascontiguousarray(a) for a in parts]
        program.add(pack.pack_byte_scales, tiles, (address, form.tile_bytes, *arrays, rows, inputs, layout.bits))
    elif isinstance(tensor, Quantized) and layout:
        scale_type: Any = np.float16 if layout.kind == "f16" else np.float32
        arrays = [np.ascontiguousarray(tensor.packed), np.ascontiguousarray(tensor.scales.astype(scale_type))]
        arrays.append(0 if layout.symmetric else np.ascontiguousarray(tensor.affine()[1].astype(scale_type)))
        settings = (rows, inputs, layout.bits, layout.group_size, layout.scale_bytes, layout.symmetric)
        program.add(pack.pack_quantized, tiles, (address, form.tile_bytes, *arrays, *settings))
    elif not isinstance(tensor, Quantized):
        known = tensor.dtype in FLOAT_KINDS
        floats = np.ascontiguousarray(tensor if known else tensor.astype(np.float32))
        program.add(pack.pack_floats, tiles, (address, floats, rows, inputs, floats.dtype.itemsize))
    program.seal()
    program.run(pool)
