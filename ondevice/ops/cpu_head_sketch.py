"""Recording the vocabulary head by its sketch: scores of all words, a border for each token, exact logits beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compile import Kernel
from cpu_kernels.head_sketch import border, border_scratch, peaks, settle
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.cpu_products import PIECES, record_linear
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_weights import Tiles
from ondevice.sparsity.head_sketch import FINE, MARGIN, SketchTensors

if TYPE_CHECKING:
    from ondevice.ops.base import Ops


@dataclass(frozen=True, slots=True)
class Sketch:
    """Packed tensors of a sketch, beside the head that it is of.

    Args:
        counted: by its kernels: steps, words of exact logits, and tokens.
    """

    head: Tiles
    rotation: list[Tiles]
    fine: list[Tiles]
    coarse: list[Tiles]
    errors: Tiles
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))

    def tally(self) -> Tally:
        """What was skipped; of bytes at least, since tokens of a step may have needed the same words."""
        steps, kept, tokens = (int(n) for n in self.counted)
        own = sum(t.data.nbytes for t in (*self.rotation, *self.fine, *self.coarse, self.errors))
        read = own * steps + kept * self.head.data.nbytes // (16 * self.head.row_tiles)
        return Tally(tokens, tokens, kept, tokens * self.head.rows, max(self.head.data.nbytes * steps - read, 0))


def pack_sketch(
    ops: SkippingOps, head: list[Tiles], tensors: Callable[[], SketchTensors], shape: tuple[int, int]
) -> Sketch:
    """As `Ops.pack_sketch`, from where the table keeps packed weights if it has the sketch there."""
    (words, width), made, table = shape, cache(tensors), cast("Ops", ops)
    return Sketch(
        head[0],
        table.kept("sketch.rotation", (width + 1, width), lambda: table.pack_linear([made().rotation], [None])),
        table.kept("sketch.fine", (words, FINE), lambda: table.pack_linear([made().fine], [made().bias])),
        table.kept("sketch.coarse", (words, width - FINE), lambda: table.pack_linear([made().coarse], [None])),
        table.kept("sketch.errors", (words, 1), lambda: table.pack_embedding(made().errors)),
    )


def sketch_kernels(head: list[Tiles]) -> tuple[Kernel, ...]:
    """What a sketched head needs beside the products with its sketch."""
    form = head[0].format
    return peaks, border(form.layout, form.kind), settle(form.layout, form.kind)


def record_head(recording: Recording, x: Buffer, head: list[Tiles], sketch: Sketch, top: int) -> Buffer:
    """As `Ops.head`."""
    [tiles] = head
    turned = record_linear(recording, x, sketch.rotation, None)
    fine, coarse = sketch.fine[0].format.inputs, sketch.coarse[0].format.inputs
    first = Buffer(x.rows, fine, turned.stride, turned.block, turned.address)
    rest = Buffer(x.rows, coarse, turned.stride, turned.block, turned.address + 4 * fine)
    out = record_linear(recording, rest, sketch.coarse, record_linear(recording, first, sketch.fine, None))
    _settle(recording, x, tiles, sketch, turned, out, min(top, tiles.row_tiles))
    return out


def _settle(
    recording: Recording, x: Buffer, tiles: Tiles, sketch: Sketch, turned: Buffer, out: Buffer, top: int
) -> None:
    """Puts exact logits in the place of scores where it matters."""
    program, n, form = recording.program, x.rows, tiles.format
    per_token = -(-PIECES * recording.threads // n)
    each = -(-tiles.row_tiles // per_token)
    cut = (tiles.row_tiles, each, per_token)
    scores, common = (out.address, out.stride_bytes), turned.address + 4 * form.inputs
    tops = recording.new(n, tiles.row_tiles)
    place = (tops.address, tops.stride_bytes)
    program.add(peaks, n * per_token, (*scores, common, turned.stride_bytes, *place, tiles.rows, *cut))
    inputs, x_stride = recording.rows_of_codes(x) if form.layout else (recording.floats(x), x.stride_bytes)
    bias = 0 if tiles.bias is None else tiles.bias
    exact = (tiles.data, form.tile_bytes, inputs.address, x_stride, form.inputs, bias)
    borders, scratch = recording.new(1, n), border_scratch(tiles.row_tiles, top)
    quantiles = (_quantile(top, tiles.row_tiles), _quantile(top, 16 * top))
    memory = (recording.scratch("border", scratch), scratch)
    search = (borders.address, *place, tiles.rows, tiles.row_tiles, top, *quantiles, *exact, *memory)
    program.add(border(form.layout, form.kind), n, search)
    reach = (sketch.errors.data, MARGIN, turned.address, turned.stride_bytes, form.inputs)
    arguments = (*scores, *reach, borders.address, sketch.counted, *cut, *exact)
    program.add(settle(form.layout, form.kind), n * per_token, arguments, work=n * form.inputs * tiles.rows)


def _quantile(k: int, n: int) -> float:
    """Standard deviations above the mean at which a normal distribution has its k-th largest of n."""
    return NormalDist().inv_cdf(1 - (k - 0.5) / n) if k < n else 0.0
