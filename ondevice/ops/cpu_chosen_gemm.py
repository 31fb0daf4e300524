"""Recording products of many tokens with the weights of neurons, or inputs, that any of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import chosen_panels, codes
from cpu_kernels.chosen_sources import Source, bands_of_down, blocks_of_up, inputs_of_down, rows_of_up
from cpu_kernels.compile import Kernel
from cpu_kernels.gemm_chosen import gemm_down, gemm_up, scratch_bytes
from ondevice.ops.cpu_products import PIECES, STREAMED, share
from ondevice.ops.cpu_program import Block
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_inputs import InputMajor, new_outputs
from ondevice.ops.cpu_sparse_rows import NeuronRows
from ondevice.ops.cpu_sparse_tiles import SparseTiles

MODES = {"gated": chosen_panels.GATED, "plain": chosen_panels.PLAIN, "valued": chosen_panels.VALUED}


@dataclass(frozen=True, slots=True)
class Union:
    """Which neurons tokens need, in a program's memory.

    Args:
        table: address of the table of those that any token needs.
        masks: address of a bit for each neuron, uint64 [N, W]; 0 if every token needs all that the table has.
        mask_bytes: bytes between the masks of tokens.
        values: float32 [N, D] that up's results are multiplied by, or None.
    """

    table: int
    masks: int = 0
    mask_bytes: int = 0
    values: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Weights of a product.

    Args:
        source: what unpacks them.
        data: the weights.
        numbers: int64, what the source wants to know of them.
        rows: of the matrix; of up, of the whole layer.
        bias: of down, float32 [padded outputs], or None.
        together: row tiles of down that should be read by one piece of work if tokens are few.
    """

    source: Source
    data: NDArray[np.uint8]
    numbers: NDArray[np.int64]
    rows: int
    bias: NDArray[np.float32] | None = None
    together: int = 1


@dataclass(frozen=True, slots=True)
class ManyTokens:
    """A layer as products with many tokens want it.

    Args:
        mode: "gated", "plain" or "valued".
        up: gate and up.
        down: the rest.
        gate_bias, up_bias: float32 [neurons] or None.
    """

    mode: str
    up: Part
    down: Part
    gate_bias: NDArray[np.float32] | None
    up_bias: NDArray[np.float32] | None

    @property
    def parts(self) -> int:
        """Tiles of gate and up for 32 neurons."""
        return 4 if self.mode == "gated" else 2


def many_of_tiles(ffn: SparseTiles) -> ManyTokens:
    """A layer of blocks whose values are given."""
    up, down = ffn.layouts
    tile_bytes = [np.array([tiles.format.tile_bytes], np.int64) for tiles in (ffn.up, ffn.down)]
    first = Part(blocks_of_up(up, 2), ffn.up.data, tile_bytes[0], ffn.neurons)
    last = Part(bands_of_down(down), ffn.down.data, tile_bytes[1], ffn.down.rows, ffn.down.bias, down.band)
    return ManyTokens(ffn.mode, first, last, None, ffn.up.bias)


def many_of_neurons(rows: NeuronRows, down: InputMajor, valued: bool) -> ManyTokens:
    """A layer of single neurons."""
    up = Part(rows_of_up(rows.layout), rows.data, np.zeros(1, np.int64), rows.neurons)
    mode = "valued" if valued else "gated" if rows.layout.parts == 2 else "plain"
    return ManyTokens(mode, up, _by_inputs(down), rows.gate_bias, rows.up_bias)


def _by_inputs(weight: InputMajor) -> Part:
    together = weight.layout.vectors(True)
    places = np.array(weight.places, np.int64)
    return Part(inputs_of_down(weight.layout), weight.data, places, weight.rows, weight.bias, together)


def many_kernels(ffn: ManyTokens) -> tuple[Kernel, ...]:
    """Every kernel that a layer can need for many tokens."""
    return gemm_up(ffn.up.source, ffn.parts), chosen_panels.activate_chosen, gemm_down(ffn.down.source)


def many_input_kernels(weights: Sequence[InputMajor]) -> tuple[Kernel, ...]:
    """The same for weights by inputs."""
    return chosen_panels.activate_chosen, *(gemm_down(inputs_of_down(weight.layout)) for weight in weights)


def record_many(
    recording: Recording, x: Buffer, ffn: ManyTokens, union: Union, activation: int, residual: Buffer | None
) -> Buffer:
    """The layer's results (+ residual).

    Args:
        activation: its number in `cpu_kernels.rows.activate`.
    """
    if not x.rows:
        return recording.new(0, ffn.down.rows)
    neurons = ffn.up.rows
    values = recording.floats(union.values) if union.values else None
    made = _Made(recording, x.rows, neurons, union, values, MODES[ffn.mode], activation, ffn.gate_bias, ffn.up_bias)
    made.before = _record_up(recording, x, ffn, union.table)
    out = recording.new(x.rows, ffn.down.rows, span=-(-ffn.down.rows // 16) * 16)
    _record_down(recording, made, ffn.down, out.address, out, residual.address if residual else 0, residual)
    return out


def record_many_inputs(
    recording: Recording, x: Buffer, weights: Sequence[InputMajor], union: Union, residual: Buffer | None
) -> Buffer:
    """W x + bias (+ residual), of each token the inputs that it needs."""
    if not x.rows:
        return new_outputs(recording, weights, 0)
    recording.floats(x)
    made = _Made(recording, x.rows, weights[0].inputs, union, x, chosen_panels.TAKEN)
    out, start = new_outputs(recording, weights, x.rows), 0
    for weight in weights:
        place = residual.address + 4 * start if residual else 0
        _record_down(recording, made, _by_inputs(weight), out.address + 4 * start, out, place, residual)
        start += weight.rows
    return out


@dataclass(slots=True)
class _Made:
    """Activations of chosen neurons, recorded as what is wanted: codes or floats.

    Args:
        before: what `gemm_up` gave.
        found: what has been recorded.
    """

    recording: Recording
    rows: int
    neurons: int
    union: Union
    values: Buffer | None
    mode: int
    activation: int = 0
    gate_bias: NDArray[np.float32] | None = None
    up_bias: NDArray[np.float32] | None = None
    before: Buffer | None = None
    found: dict[bool, tuple[Block, int]] = field(default_factory=dict)

    def tokens(self, coded: bool) -> tuple[int, int]:
        """Where the tokens are, and the width of the last panel, or bytes between tokens."""
        if coded not in self.found:
            self.found[coded] = self._record(coded)
        block, shape = self.found[coded]
        return block.address, shape

    def _record(self, coded: bool) -> tuple[Block, int]:
        recording, groups = self.recording, -(-self.neurons // 32)
        row_bytes, (width, *_) = 128 * groups, codes.panel_widths()
        n_panels, memory = -(-self.rows // width), recording.program.memory
        out: Any
        if coded:
            block, shape = Block(memory, n_panels * codes.panel_bytes(32 * groups, width)), codes.last_width(self.rows)
            out, panels = recording.scratch("activations", width * row_bytes), block.address
        else:
            block, shape, panels = Block(memory, self.rows * row_bytes), row_bytes, 0
            out = block.address
        before = (self.before.address, self.before.stride_bytes) if self.before else (0, 0)
        values = (self.values.address, self.values.stride_bytes) if self.values else (0, 0)
        biases = (0 if bias is None else bias for bias in (self.gate_bias, self.up_bias))
        what = (self.union.table, groups, self.mode, self.activation, *biases, *values)
        own = (self.union.masks, self.union.mask_bytes, panels, width, shape, self.rows, out, width * row_bytes)
        spare = recording.scratch("activations of an entry", 384)
        recording.program.add(chosen_panels.activate_chosen, n_panels, (*before, *what, *own, spare))
        return block, shape


def _record_up(recording: Recording, x: Buffer, ffn: ManyTokens, table: int) -> Buffer:
    part = ffn.up
    groups = -(-part.rows // 32)
    out = recording.new(x.rows, groups * ffn.parts * 16)
    tokens = recording.panels(x) if part.source.layout else (recording.floats(x).address, x.stride_bytes)
    pieces, scratch = min(groups, PIECES * recording.threads), scratch_bytes(part.source, x.width)
    shape = (table, groups, pieces, tokens[0], x.rows, tokens[1], x.width)
    weight: tuple[Any, ...] = (out.address, out.stride_bytes, part.data, part.numbers)
    arguments = (*weight, *shape, recording.scratch("gemm", scratch), scratch)
    work = x.rows * x.width * out.width * (1 if part.source.layout else 4)
    recording.program.add(gemm_up(part.source, ffn.parts), pieces, arguments, work=work)
    return out


def _record_down(
    recording: Recording, made: _Made, part: Part, place: int, out: Buffer, residual: int, extra: Buffer | None
) -> None:
    coded, n = part.source.layout is not None, made.rows
    address, shape = made.tokens(coded)
    tiles, together = -(-part.rows // 16), part.together if n <= STREAMED else 1
    units = -(-n // codes.panel_widths()[0]) if coded else n
    pieces, scratch = -(-tiles // together), scratch_bytes(part.source, made.neurons)
    each = share(recording, pieces, units)
    weight = (part.data, part.numbers, tiles, together, made.union.table, -(-made.neurons // 32))
    rest = (0 if part.bias is None else part.bias, residual, extra.stride_bytes if extra else 0)
    memory = (recording.scratch("gemm", scratch), scratch)
    arguments = (place, out.stride_bytes, *weight, address, n, each, shape, *rest, *memory)
    work = n * made.neurons * part.rows * (1 if coded else 4)
    recording.program.add(gemm_down(part.source), pieces * -(-units // each), arguments, work=work)
