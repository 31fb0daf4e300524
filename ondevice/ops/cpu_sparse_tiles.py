"""Feed-forward layers that skip blocks of 32k neurons: packing their tiles, and recording their kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from cpu_kernels import chosen_inputs, codes
from cpu_kernels.compile import Kernel
from cpu_kernels.sparse_tiles import blocks_down, blocks_up
from cpu_kernels.threads import ThreadPool
from cpu_kernels.tiles import Layout
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.errors import OptionError
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_products import PIECES
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_weights import Format, Tiles, pack_rows

NARROWEST, WIDEST = 8, 18
"""Tiles of a band of down: enough that what is read of it for 32 neurons is worth a jump in memory, few enough that
their sums stay in registers."""


@dataclass(frozen=True, slots=True)
class SparseTiles:
    """A feed-forward layer in tiles.

    Args:
        mode: "gated", "plain" (no gate) or "valued" (the gate is computed elsewhere).
        up: tiles of gate and up, those of 32 neurons together.
        down: tiles in bands.
    """

    mode: str
    up: Tiles
    down: Tiles

    @property
    def neurons(self) -> int:
        """Of the whole layer."""
        return self.down.format.inputs

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of up's tiles and of down's."""
        up, down = self.up.format.layout, self.down.format.layout
        assert up is not None and down is not None
        return up, down

    @property
    def group_bytes(self) -> int:
        """Bytes that 32 neurons have on average: what a chosen group costs to read."""
        whole = self.up.data.nbytes + self.down.data.nbytes
        return whole // (self.neurons // 32)


def pack_tiles(
    pool: ThreadPool,
    memory: WeightMemory,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    valued: bool = False,
) -> SparseTiles:
    """Packs a layer.

    Args:
        gate: [D, d], or None for a layer without one or whose gate is computed elsewhere.
        up: [D, d].
        down: [d, D].
        biases: of gate [D], up [D] and down [d].
        valued: up's results are multiplied by values that are given, not activated.

    Raises:
        OptionError: weights of other formats than tiles of blocks are made for.
    """
    _check(gate, up, down, valued)
    scratch = WeightMemory()
    parts = [pack_rows(pool, scratch, [w], [v])[0] for w, v in zip((gate, up), biases) if w is not None]
    (packed,) = pack_rows(pool, scratch, [down], [biases[2]])
    mode = "valued" if valued else "plain" if gate is None else "gated"
    return SparseTiles(mode, _interleaved(memory, parts), _in_bands(memory, packed))


def _check(gate: Tensor | None, up: Tensor, down: Tensor, valued: bool) -> None:
    for name, w in (("gate", gate), ("up", up), ("down", down)):
        if w is not None and not isinstance(w, Quantized):
            raise OptionError(f"{name} of {w.dtype}: skipping blocks needs quantized weights; convert with --bits 4")
    if valued and gate is not None:
        raise OptionError("a gate, though its values are given: leave one of them out")
    if up.shape[0] != down.shape[1] or up.shape[0] % 32 or (gate is not None and gate.shape != up.shape):
        shapes = [None if w is None else w.shape for w in (gate, up, down)]
        raise OptionError(f"gate, up and down of {shapes}: a layer of blocks has 32k neurons, alike in all three")


def _interleaved(memory: WeightMemory, parts: list[Tiles]) -> Tiles:
    """Gate and up, or up alone, with those tiles together that belong to the same 32 neurons."""
    if parts[0].format != parts[-1].format:
        first, last = parts[0].format.layout, parts[-1].format.layout
        assert first is not None and last is not None
        raise OptionError(f"gate is {first.label}, up is {last.label}: skipping blocks needs both in one format")
    rows = sum(part.rows for part in parts)
    data = memory.take(sum(part.data.nbytes for part in parts))
    groups = parts[0].rows // 32
    np.concatenate([part.data.reshape(groups, -1) for part in parts], axis=1, out=data.reshape(groups, -1))
    bias = None
    if any(part.bias is not None for part in parts):
        columns = [np.zeros(part.rows, np.float32) if part.bias is None else part.bias for part in parts]
        bias = np.concatenate([column.reshape(groups, 32) for column in columns], axis=1).reshape(-1)
    return Tiles(parts[0].format, rows, data, bias)


def band_of(tiles: int) -> int:
    """How many of so many tiles make a band: a divisor."""
    divisors = [r for r in range(1, WIDEST + 1) if tiles % r == 0]
    return next((r for r in divisors if r >= NARROWEST), divisors[-1])


def _in_bands(memory: WeightMemory, tiles: Tiles) -> Tiles:
    layout, inputs = tiles.format.layout, tiles.format.inputs
    assert layout is not None
    banded = dataclasses.replace(layout, band=band_of(tiles.row_tiles))
    data = memory.take(tiles.data.nbytes)
    shape = (tiles.row_tiles // banded.band, banded.band, inputs // layout.group_size, layout.group_bytes)
    turned = tiles.data.reshape(shape).swapaxes(1, 2)
    data.reshape(turned.shape)[:] = turned
    return Tiles(Format(inputs, banded), tiles.rows, data, tiles.bias)


def tiles_kernels(ffn: SparseTiles) -> tuple[Kernel, ...]:
    """Every kernel that a layer can need."""
    up, down = ffn.layouts
    return blocks_up(up, ffn.mode), blocks_down(down), chosen_inputs.quantize_chosen


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which neurons tokens need, in a program's memory.

    Args:
        table: address of the table of those that any token needs.
        values: float32 [N, D] that up's results are multiplied by, or None.
    """

    table: int
    values: Buffer | None = None


def record_tiles(
    recording: Recording,
    x: Buffer,
    ffn: SparseTiles,
    chosen: Chosen,
    activation: int,
    residual: Buffer | None,
    out: Buffer | None = None,
) -> Buffer:
    """The layer's result for one token, which needs all that the table has (+ residual).

    Args:
        activation: its number in `cpu_kernels.rows.activate`.
        out: where the result goes, as `new_outputs` makes it; a new buffer if not given.
    """
    h = _record_up(recording, x, ffn, chosen, activation)
    out = out or new_outputs(recording, ffn, 1)
    _record_down(recording, h, ffn, chosen, residual, out)
    return out


def new_outputs(recording: Recording, ffn: SparseTiles, rows: int) -> Buffer:
    """Memory for results of several tokens."""
    return recording.new(rows, ffn.down.rows, span=16 * ffn.down.row_tiles)


def _record_up(recording: Recording, x: Buffer, ffn: SparseTiles, chosen: Chosen, activation: int) -> Buffer:
    up, _ = ffn.layouts
    h = recording.new(1, ffn.neurons)
    values = recording.floats(chosen.values).address if chosen.values else 0
    panel, each = recording.own_codes(x)
    pieces = min(ffn.neurons // 32, PIECES * recording.threads)
    weight = (ffn.up.data, ffn.up.format.tile_bytes, pieces, panel, each, x.width)
    bias = 0 if ffn.up.bias is None else ffn.up.bias
    arguments = (h.address, chosen.table, *weight, bias, activation, values)
    work = x.width * ffn.up.rows
    recording.program.add(blocks_up(up, ffn.mode), pieces, arguments, first=x.first, work=work)
    return h


def _record_down(
    recording: Recording, h: Buffer, ffn: SparseTiles, chosen: Chosen, residual: Buffer | None, out: Buffer
) -> None:
    _, down = ffn.layouts
    tiles = ffn.down
    each = codes.panel_bytes(ffn.neurons, 1)
    panel = recording.own_scratch("panel", each)
    made = recording.program.store((panel, each, h.address, chosen.table, ffn.neurons // 32, 0, 0))
    extra = (0 if tiles.bias is None else tiles.bias, recording.floats(residual).address if residual else 0)
    bands = tiles.row_tiles // down.band
    arguments = (out.address, chosen.table, tiles.data, tiles.data.nbytes // bands, panel, each, *extra)
    work = ffn.neurons * tiles.rows
    first = (chosen_inputs.quantize_chosen, made)
    recording.program.add(blocks_down(down), bands, arguments, first=first, work=work)
