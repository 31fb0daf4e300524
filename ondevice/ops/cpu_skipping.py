"""The CPU table's operations that skip work: selections as masks and tables, FFNs by blocks or by neurons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import rows
from cpu_kernels.compile import Kernel
from cpu_kernels.threads import ThreadPool
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.errors import OptionError
from ondevice.ops import cpu_selection
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.cpu_activations import ACTIVATIONS
from ondevice.ops.cpu_attention import HeadMask, record_topk_attention
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_inputs import InputMajor, input_kernels, pack_input_major, record_inputs
from ondevice.ops.cpu_sparse_rows import NeuronRows, pack_neuron_rows, record_rows, row_kernels
from ondevice.ops.cpu_sparse_tiles import Chosen, SparseTiles, pack_tiles, record_tiles, tiles_kernels
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step

BLOCK = 32
"""Neurons from which on blocks are whole tiles, which are faster than single neurons."""


@dataclass(slots=True)
class _Counted:
    """What a kernel counts of one layer's tables: entries, neurons, tables.

    Args:
        kind: of the tally that it belongs to.
        units: neurons or inputs that there are.
        unit_bytes: of weights that each of them has.
    """

    kind: str
    units: int
    unit_bytes: float
    numbers: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))


@dataclass(frozen=True, slots=True)
class _ByNeuron:
    """An FFN whose neurons lie each by itself."""

    up: NeuronRows
    down: InputMajor
    valued: bool


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of which each token may run a part."""

    weights: SparseTiles | _ByNeuron
    neurons: int
    counted: _Counted


@dataclass(frozen=True, slots=True)
class Inputs:
    """Linears with a common input, of which each token may take a part."""

    weights: list[InputMajor]
    counted: _Counted


class CpuSkipping(SkippingOps):
    """Selections are put off until it is known whether their masks or tables are wanted (`cpu_selection`)."""

    pool: ThreadPool
    _memory: WeightMemory
    _kernels: dict[Kernel, None]
    _now: Recording

    def __init__(self) -> None:
        self._counted: list[_Counted] = []
        self._seeds = itertools.count()

    def counts(self) -> dict[str, Tally]:
        tallies = {kind: Tally() for kind in ("ffn", "inputs")}
        for counted in self._counted:
            tally, (_, kept, tables) = tallies[counted.kind], (int(n) for n in counted.numbers)
            units = counted.units * tables
            tally.calls += tables
            tally.sparse += tables
            tally.kept += kept
            tally.units += units
            tally.bytes_skipped += round((units - kept) * counted.unit_bytes)
        return tallies

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
            kernels, nbytes = tiles_kernels(weights), weights.up.data.nbytes + weights.down.data.nbytes
        else:
            first = pack_neuron_rows(self.pool, self._memory, gate, up, gate_bias, up_bias)
            inputs = pack_input_major(self.pool, self._memory, down, down_bias)
            weights = _ByNeuron(first, inputs, valued)
            kernels, nbytes = (*row_kernels(first), *input_kernels([inputs])), first.data.nbytes + inputs.data.nbytes
        self._kernels.update(dict.fromkeys((*kernels, *cpu_selection.KERNELS)))
        return Ffn(weights, up.shape[0], self._count("ffn", up.shape[0], nbytes))

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Inputs:
        parts = [pack_input_major(self.pool, self._memory, w, b) for w, b in zip(weights, biases)]
        self._kernels.update(dict.fromkeys((*input_kernels(parts), *cpu_selection.KERNELS)))
        inputs = parts[0].inputs
        return Inputs(parts, self._count("inputs", inputs, sum(p.data.nbytes for p in parts)))

    # Selections

    def _selection(self, made: cpu_selection.Selection, shared: bool = False) -> Selection:
        return Selection(made, made.neurons, shared, made.values)

    def select_topk(self, scores: Buffer, k: int, shared: bool) -> Selection:
        return self._selection(cpu_selection.record_topk(self._now, scores, k, shared), shared)

    def select_threshold(self, scores: Buffer, threshold: float, relative: bool = False) -> Selection:
        return self._selection(cpu_selection.record_threshold(self._now, scores, threshold, relative))

    def select_magnitude(self, x: Buffer, threshold: float) -> Selection:
        return self._selection(cpu_selection.record_threshold(self._now, x, threshold, sizes=True))

    def statistical_topk(self, scores: Buffer, c: float) -> tuple[Buffer, Selection]:
        made = cpu_selection.record_statistical_topk(self._now, scores, c)
        # The values are an operation's input before the selection is.
        cpu_selection.record_mask(self._now, made)
        assert made.values is not None
        return made.values, self._selection(made)

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
        values = None
        if selection is None:
            table = cpu_selection.table_of_everything(ffn.neurons)
        else:
            values, own = selection.values, x.rows > 1 and not selection.shared
            table = cpu_selection.record_table(self._now, selection.mask, own, ffn.counted.numbers)
        weights, kind = ffn.weights, ACTIVATIONS[activation]
        if x.rows > 1:
            raise OptionError("batches of sparse FFNs")
        if isinstance(weights, SparseTiles):
            return record_tiles(self._now, x, weights, Chosen(table.address, values), kind, residual)
        h = record_rows(self._now, x, weights.up, table.address, kind, values)
        return record_inputs(self._now, h, table.address, [weights.down], residual)

    def sparse_linear(
        self, x: Buffer, weight: Inputs, selection: Selection, residual: Buffer | None = None
    ) -> Buffer:
        table = cpu_selection.record_table(self._now, selection.mask, False, weight.counted.numbers)
        if x.rows > 1:
            raise OptionError("batches of sparse linears")
        return record_inputs(self._now, x, table.address, weight.weights, residual, compact=False)

    def topk_attention(
        self, q: Buffer, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Buffer:
        return record_topk_attention(self._now, q, cache, layer, step, scale, k, window, 0.0, scale)
