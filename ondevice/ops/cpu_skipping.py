"""The CPU table's operations that skip work: selections as masks and tables, FFNs by blocks or by neurons."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import rows
from cpu_kernels.chosen import STATISTICS
from cpu_kernels.compile import Kernel
from cpu_kernels.threads import ThreadPool
from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize
from ondevice.ops import cpu_selection, cpu_sparse_inputs, cpu_sparse_tiles
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.cpu_activations import ACTIVATIONS
from ondevice.ops.cpu_attention import HeadMask, record_topk_attention
from ondevice.ops.cpu_chosen_gemm import (
    ManyTokens,
    Union,
    many_input_kernels,
    many_kernels,
    many_of_neurons,
    many_of_tiles,
    record_many,
    record_many_inputs,
)
from ondevice.ops.cpu_grouped import Experts, grouped_kernels, record_grouped
from ondevice.ops.cpu_head_sketch import Sketch, pack_sketch, record_head, sketch_kernels
from ondevice.ops.cpu_memory import WeightMemory, padded
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_inputs import InputMajor, input_kernels, pack_input_major, record_inputs
from ondevice.ops.cpu_sparse_rows import NeuronRows, pack_neuron_rows, record_rows, row_kernels
from ondevice.ops.cpu_sparse_tiles import Chosen, SparseTiles, pack_tiles, record_tiles, tiles_kernels
from ondevice.ops.cpu_weights import Tiles
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step
    from ondevice.sparsity.head_sketch import SketchTensors

ONE_BY_ONE = 16
"""Tokens of a step up to which layers run token by token: so few do not pay for unpacking weights into tiles."""
BLOCK = 32
"""Neurons from which on blocks are whole tiles, which are faster than single neurons."""


@dataclass(slots=True)
class _Counted:
    """What a kernel counts of one layer's tables (see `STATISTICS`).

    Args:
        kind: of the tally that it belongs to.
        units: neurons or inputs that there are.
        unit_bytes: of weights that each of them has.
    """

    kind: str
    units: int
    unit_bytes: float
    numbers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(STATISTICS, np.int64))


@dataclass(frozen=True, slots=True)
class _ByNeuron:
    """An FFN whose neurons lie each by itself."""

    up: NeuronRows
    down: InputMajor


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of which each token may run a part.

    Args:
        many: what several tokens run; None where they run experts.
    """

    weights: SparseTiles | _ByNeuron
    many: ManyTokens | None
    neurons: int
    counted: _Counted


@dataclass(frozen=True, slots=True)
class Inputs:
    """Linears with a common input, of which each token may take a part."""

    weights: list[InputMajor]
    counted: _Counted


class CpuSkipping(SkippingOps, ABC):
    """Selections are put off until it is known whether their masks or tables are wanted (`cpu_selection`)."""

    has_sketches = True
    pool: ThreadPool
    _memory: WeightMemory
    _kernels: dict[Kernel, None]

    @property
    @abstractmethod
    def _now(self) -> Recording:
        """The program that is being recorded."""

    def __init__(self) -> None:
        self._counted: list[_Counted] = []
        self._seeds = itertools.count()
        self._of_runs: dict[str, Tally] = {}
        self._sketches: list[Sketch] = []

    def counts(self) -> dict[str, Tally]:
        kinds = ("ffn", "inputs", "heads", "keys", "words")
        tallies = {kind: replace(self._of_runs.get(kind, Tally())) for kind in kinds}
        for counted in self._counted:
            tally, (_, read, tables, kept, tokens) = tallies[counted.kind], (int(n) for n in counted.numbers)
            tally.calls += tables
            tally.sparse += tables
            tally.kept += kept
            tally.units += counted.units * tokens
            tally.bytes_skipped += round((counted.units * tables - read) * counted.unit_bytes)
        for sketch in self._sketches:
            tally, more = tallies["words"], sketch.tally()
            for name in Tally.__slots__:
                setattr(tally, name, getattr(tally, name) + getattr(more, name))
        return tallies

    def _count_run(self, each: dict[str, Tally]) -> None:
        """Adds what one run of a program does, where that is known from its recording."""
        for kind, tally in each.items():
            sums = self._of_runs.setdefault(kind, Tally())
            sums.calls, sums.sparse = sums.calls + tally.calls, sums.sparse + tally.sparse
            sums.kept, sums.units = sums.kept + tally.kept, sums.units + tally.units

    def _count(self, kind: str, units: int, nbytes: int) -> _Counted:
        self._counted.append(_Counted(kind, units, nbytes / units))
        return self._counted[-1]

    # Weights

    def pack_ffn(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        block: int,
        valued: bool,
    ) -> Ffn:
        tensors = [t for t in (gate, up, down) if t is not None]
        weights: SparseTiles | _ByNeuron
        if block % BLOCK == 0 and all(isinstance(t, Quantized) for t in tensors):
            biases = (gate_bias, up_bias, down_bias)
            weights = pack_tiles(self.pool, self._memory, gate, up, down, biases, valued)
            many = many_of_tiles(weights) if valued else None
            kernels = (*tiles_kernels(weights), *(many_kernels(many) if many else grouped_kernels(weights)))
            nbytes = weights.up.data.nbytes + weights.down.data.nbytes
        else:
            first = pack_neuron_rows(self.pool, self._memory, gate, up, gate_bias, up_bias)
            inputs = pack_input_major(self.pool, self._memory, down, down_bias)
            weights, many = _ByNeuron(first, inputs), many_of_neurons(first, inputs, valued)
            kernels = (*row_kernels(first), *input_kernels([inputs]), *many_kernels(many))
            nbytes = first.data.nbytes + inputs.data.nbytes
        self._kernels.update(dict.fromkeys((*kernels, *cpu_selection.KERNELS)))
        return Ffn(weights, many, up.shape[0], self._count("ffn", up.shape[0], nbytes))

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Inputs:
        parts = [pack_input_major(self.pool, self._memory, w, b) for w, b in zip(weights, biases)]
        kernels = (*input_kernels(parts), *many_input_kernels(parts), *cpu_selection.KERNELS)
        self._kernels.update(dict.fromkeys(kernels))
        inputs = parts[0].inputs
        return Inputs(parts, self._count("inputs", inputs, sum(p.data.nbytes for p in parts)))

    def pack_sketch(self, head: list[Tiles], tensors: Callable[[], SketchTensors], shape: tuple[int, int]) -> Sketch:
        sketch = pack_sketch(self, head, tensors, shape)
        self._sketches.append(sketch)
        self._kernels.update(dict.fromkeys(sketch_kernels(head)))
        return sketch

    def head(self, x: Buffer, head: list[Tiles], sketch: Sketch, top: int) -> Buffer:
        return record_head(self._now, x, head, sketch, top)

    # Selections

    def _selection(self, made: cpu_selection.Selection, shared: bool = False) -> Selection:
        if self.forced_density is not None:
            cpu_selection.forced(made, round(self.forced_density * made.units), next(self._seeds))
        return Selection(made, made.neurons, shared, made.values)

    def select_topk(self, scores: Buffer, k: int, shared: bool) -> Selection:
        return self._selection(cpu_selection.record_topk(self._now, scores, k, shared), shared)

    def select_threshold(self, scores: Buffer, threshold: float, relative: bool = False) -> Selection:
        return self._selection(cpu_selection.record_threshold(self._now, scores, threshold, relative))

    def pack_factors(self, values: Tensor) -> NDArray[np.float32]:
        return padded(dequantize(values))

    def select_magnitude(self, x: Buffer, threshold: float, factors: NDArray[np.float32] | None = None) -> Selection:
        return self._selection(cpu_selection.record_threshold(self._now, x, threshold, sizes=True, factors=factors))

    def statistical_topk(self, scores: Buffer, c: float) -> tuple[Buffer, Selection]:
        made = cpu_selection.record_statistical_topk(self._now, scores, c)
        selection = self._selection(made)
        # The values are an operation's input before the selection is.
        cpu_selection.record_mask(self._now, made)
        assert made.values is not None
        return made.values, selection

    def select_heads(self, scores: Buffer, k: int, group: int) -> HeadSelection:
        return HeadSelection(cpu_selection.record_heads(self._now, scores, k, group), k, group)

    def expand(self, selection: Selection, block: int) -> Selection:
        units = selection.units * block
        return replace(selection, mask=cpu_selection.expanded(selection.mask, block, units), units=units)

    def forced(self, selection: Any, density: float) -> Any:
        made = selection.index if isinstance(selection, HeadSelection) else selection.mask
        cpu_selection.forced(made, round(density * made.units), next(self._seeds))
        return selection

    def random_selection(self, x: Buffer, units: int, density: float) -> Selection:
        return self._selection(
            cpu_selection.record_random(self._now, units, x.rows, round(density * units), next(self._seeds))
        )

    def _head_mask(self, heads: HeadSelection) -> HeadMask:
        made: cpu_selection.Selection = heads.index
        self._now.program.count("heads", made.rows * heads.kept, made.rows * made.units)
        return HeadMask(cpu_selection.record_mask(self._now, made), made.rows, made.units)

    # Products

    def join(self, parts: Sequence[Buffer]) -> Buffer:
        starts = np.cumsum([0] + [part.width for part in parts]).tolist()
        span = max(start + -(-part.width // 16) * 16 for start, part in zip(starts, parts))
        out = self._now.new(parts[0].rows, starts[-1], span=span)
        everyone = np.arange(out.rows, dtype=np.int32)
        for start, part in zip(starts, parts):
            source = self._now.floats(part)
            place = (out.address + 4 * start, out.stride_bytes, source.address, source.stride_bytes)
            self._now.program.add(rows.take, out.rows, (*place, everyone, part.width))
        return out

    def sparse_ffn(
        self, x: Buffer, ffn: Ffn, selection: Selection | None, activation: str, residual: Buffer | None = None
    ) -> Buffer:
        weights, kind, now = ffn.weights, ACTIVATIONS[activation], self._now
        if selection is None:
            now.program.count("ffn", None, 0)
        values = None if selection is None or selection.values is None else now.floats(selection.values)
        if x.rows > 1 and ffn.many is None and isinstance(weights, SparseTiles):
            return record_grouped(now, x, weights, self._experts(selection, ffn), kind, residual)
        x, residual = self._read_by_all(x, residual)
        if x.rows > ONE_BY_ONE and ffn.many is not None:
            return record_many(now, x, ffn.many, _union(self._table(selection, ffn.counted), values), kind, residual)
        if isinstance(weights, SparseTiles):
            out = cpu_sparse_tiles.new_outputs(now, weights, x.rows)
        else:
            out = cpu_sparse_inputs.new_outputs(now, [weights.down], x.rows)
        for token, table in enumerate(self._tables(selection, x.rows, ffn.counted)):
            mine, own = x.row(token), None if values is None else values.row(token)
            rest, place = None if residual is None else residual.row(token), out.row(token)
            if isinstance(weights, SparseTiles):
                record_tiles(now, mine, weights, Chosen(table.address, own), kind, rest, place)
            else:
                h = record_rows(now, mine, weights.up, table.address, kind, own)
                record_inputs(now, h, table.address, [weights.down], rest, out=place)
        return out

    def sparse_linear(self, x: Buffer, weight: Inputs, selection: Selection, residual: Buffer | None = None) -> Buffer:
        x, residual = self._read_by_all(x, residual)
        if x.rows > ONE_BY_ONE:
            return record_many_inputs(
                self._now, x, weight.weights, _union(self._table(selection, weight.counted)), residual
            )
        out = cpu_sparse_inputs.new_outputs(self._now, weight.weights, x.rows)
        for token, table in enumerate(self._tables(selection, x.rows, weight.counted)):
            rest, place = None if residual is None else residual.row(token), out.row(token)
            record_inputs(self._now, x.row(token), table.address, weight.weights, rest, compact=False, out=place)
        return out

    def mask(self, h: Buffer, selection: Selection) -> Buffer:
        self.ran_dense("ffn")
        now, made = self._now, selection.mask
        bits, each = cpu_selection.record_mask(now, made), cpu_selection.mask_bytes(made.units)
        source, values = now.floats(h), None if selection.values is None else now.floats(selection.values)
        factors = (0, 0) if values is None else (values.address, values.stride_bytes)
        masks = (bits.address, each if made.rows > 1 else 0, made.block)
        arguments = (source.address, source.stride_bytes, h.width, *masks, *factors)
        return now.later(h.rows, h.width, rows.mask, (source, bits, values), arguments)

    def ran_dense(self, kind: str) -> None:
        self._now.program.count(kind, None, 0)

    def _experts(self, selection: Selection | None, ffn: Ffn) -> Experts:
        """Each token's blocks; the whole layer is one block."""
        if selection is None:
            everything = np.ones(1, np.uint64)
            self._now.program.keep(everything)
            return Experts(everything.ctypes.data, 0, 1)
        made: cpu_selection.Selection = selection.mask
        cpu_selection.record_table(self._now, made, False, ffn.counted.numbers)
        return Experts(made.mask.address, cpu_selection.mask_bytes(made.units) if made.rows > 1 else 0, made.units)

    def _read_by_all(self, x: Buffer, residual: Buffer | None) -> tuple[Buffer, Buffer | None]:
        """The floats of several tokens, of which each is then a row. A single token can stay what it is."""
        if x.rows > 1:
            self._now.floats(x)
        return x, None if residual is None else self._now.floats(residual)

    def _table(self, selection: Selection | None, counted: _Counted) -> cpu_selection.Table:
        """The table of what any token needs."""
        if selection is None:
            everything = cpu_selection.table_of_everything(counted.units)
            self._now.program.keep(everything)
            return everything
        return cpu_selection.record_table(self._now, selection.mask, selection.mask.rows > 1, counted.numbers)

    def _tables(self, selection: Selection | None, tokens: int, counted: _Counted) -> Iterator[cpu_selection.Table]:
        """Each token's table, recorded when it is asked for: tokens run one after the other."""
        for token in range(tokens):
            if selection is None or tokens == 1:
                yield self._table(selection, counted)
            else:
                yield cpu_selection.record_token_table(self._now, selection.mask, token, counted.numbers)

    def topk_attention(
        self, q: Buffer, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Buffer:
        self._now.program.count("keys", 0, 0)
        return record_topk_attention(self._now, q, cache, layer, step, scale, k, window, 0.0, scale)


def _union(table: cpu_selection.Table, values: Buffer | None = None) -> Union:
    """The table for many tokens, with their own masks if they have any."""
    if table.mask is None or table.rows == 1:
        return Union(table.address, values=values)
    return Union(table.address, table.mask.address, cpu_selection.mask_bytes(table.neurons), values)
