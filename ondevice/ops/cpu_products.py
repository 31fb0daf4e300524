"""Recording products with weights: which kernel, and how its work is cut into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpu_kernels import codes
from cpu_kernels.compile import Kernel
from cpu_kernels.float_linear import float_linear
from cpu_kernels.float_linear import scratch_bytes as float_scratch
from cpu_kernels.gemm import gemm
from cpu_kernels.gemm import scratch_bytes as gemm_scratch
from cpu_kernels.gemv import gemv
from cpu_kernels.tiles import Layout
from ondevice.ops.cpu_program import Weights
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_weights import Tiles

STREAMED = 16
"""Up to so many tokens a product waits for its weights, which are then worth fetching ahead."""
WORK_BYTES = 16384
"""Weights that one tile of work reads: enough to outweigh fetching it, few enough to share work evenly."""
PIECES = 8
"""Tiles of work that a thread should have of a large product."""


def product_kernels(tiles: Tiles) -> tuple[Kernel, ...]:
    """Every kernel that products with these weights can need."""
    layout = tiles.format.layout
    return (gemv(layout), gemm(layout)) if layout else (float_linear(tiles.format.kind),)


def record_linear(recording: Recording, x: Buffer, weight: list[Tiles], residual: Buffer | None) -> Buffer:
    """x W^T + bias (+ residual), the weights in runs of tiles that follow each other along the outputs."""
    starts = np.cumsum([0] + [t.rows for t in weight])
    span = max(int(s) + 16 * t.row_tiles for s, t in zip(starts, weight))
    out = recording.new(x.rows, int(starts[-1]), span=span)
    for start, tiles in zip(starts.tolist(), weight):
        _part(recording, out, start, x, tiles, recording.floats(residual) if residual else None)
    return out


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a product's results go, and its weights.

    Args:
        out, stride: address of the results, and bytes between their rows.
        tiles: of weights.
        each: tiles of one piece of work.
        pieces: of work along the rows of weights.
        weights: to be fetched ahead.
    """

    out: int
    stride: int
    tiles: Tiles
    each: int
    pieces: int
    weights: Weights | None

    @property
    def tile(self) -> tuple[Any, ...]:
        """What kernels are told of the weights."""
        return self.tiles.data, self.tiles.format.tile_bytes, self.tiles.row_tiles, self.each


def _part(recording: Recording, out: Buffer, start: int, x: Buffer, tiles: Tiles, residual: Buffer | None) -> None:
    if not x.rows:
        return
    few = x.rows <= STREAMED
    each = max(1, WORK_BYTES // tiles.format.tile_bytes) if few else 1
    pieces = -(-tiles.row_tiles // each)
    nbytes = each * tiles.format.tile_bytes
    weights = Weights(tiles.data.ctypes.data, nbytes, pieces) if few else None
    place = _Place(out.address + start * 4, out.stride_bytes, tiles, each, pieces, weights)
    bias = 0 if tiles.bias is None else tiles.bias
    extra = (bias, residual.address + start * 4, residual.stride_bytes) if residual else (bias, 0, 0)
    if not tiles.format.layout:
        _float_linear(recording, place, x, extra)
    elif x.rows == 1:
        _gemv(recording, place, tiles.format.layout, x, extra)
    else:
        _gemm(recording, place, tiles.format.layout, x, extra)


def _gemv(recording: Recording, place: _Place, layout: Layout, x: Buffer, extra: tuple[Any, ...]) -> None:
    panel, thread_bytes = recording.own_codes(x)
    arguments = (place.out, *place.tile, panel, thread_bytes, x.width, *extra[:2])
    work = x.width * place.tiles.rows
    recording.program.add(gemv(layout), place.pieces, arguments, first=x.first, weights=place.weights, work=work)


def _gemm(recording: Recording, place: _Place, layout: Layout, x: Buffer, extra: tuple[Any, ...]) -> None:
    address, last = recording.panels(x)
    n_panels = -(-x.rows // codes.panel_widths()[0])
    each, scratch = share(recording, place.pieces, n_panels), gemm_scratch(layout, x.width)
    shape = (address, x.rows, each, x.width, last)
    arguments = (place.out, place.stride, *place.tile, *shape, *extra, recording.scratch("gemm", scratch))
    tiles, work = place.pieces * -(-n_panels // each), x.rows * x.width * place.tiles.rows
    recording.program.add(gemm(layout), tiles, (*arguments, scratch), weights=place.weights, work=work)


def _float_linear(recording: Recording, place: _Place, x: Buffer, extra: tuple[Any, ...]) -> None:
    n, form = x.rows, place.tiles.format
    address, thread_bytes, first = recording.own_floats(x) if n == 1 else (recording.floats(x).address, 0, None)
    each, scratch = share(recording, place.pieces, n), float_scratch()
    shape = (address, x.stride_bytes, thread_bytes, n, each, form.inputs)
    arguments = (place.out, place.stride, *place.tile, *shape, *extra, recording.scratch("float", scratch))
    tiles, work = place.pieces * -(-n // each), n * form.inputs * place.tiles.rows
    kernel = float_linear(form.kind)
    recording.program.add(kernel, tiles, (*arguments, scratch), first=first, weights=place.weights, work=4 * work)


def share(recording: Recording, pieces: int, n: int) -> int:
    """How many of n tokens or panels are one piece of work, if there are so many pieces along the rows."""
    parts = min(-(-PIECES * recording.threads // pieces), -(-n // 4))
    return -(-n // parts)
