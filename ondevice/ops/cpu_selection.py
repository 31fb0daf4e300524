"""Recording selections: masks of units, and the tables of neurons that FFN kernels read.

A selection is one operation: it is put off until it is known whether its mask alone is wanted or a table, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import chosen, select
from cpu_kernels.compile import Kernel
from ondevice.ops.cpu_program import Block
from ondevice.ops.cpu_recording import Buffer, Recording

KERNELS: tuple[Kernel, ...] = (
    select.select_topk,
    select.votes,
    select.select_threshold,
    select.statistical_topk,
    chosen.chosen,
)
"""Every kernel that selections can need."""
VOTES_EACH = 1024
"""Units whose votes are one piece of work."""
FEW_VOTES = 32768
"""Up to so many scores are summed by the operation that selects."""
_POSITIONS = chosen.POSITIONS


@dataclass(slots=True)
class _Maker:
    """How a mask is made, until it is.

    Args:
        kernel, arguments: the selector's own.
        sources: what it reads and writes, so that their memory is not given away before.
        random: states and number of units of a random mask that replaces the selector's.
        made: whether the operation has been recorded.
    """

    kernel: Kernel
    arguments: tuple[Any, ...]
    sources: tuple[Any, ...]
    random: tuple[Any, int] = (0, 0)
    made: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Selected units of each token, or of all.

    Args:
        units: to choose from.
        rows: of the mask: one for each token, or a single one for all.
        mask: uint64 [rows][ceil(units / 64)], a bit for each unit.
        maker: how the mask is made.
        values: what the selector found out about units, 0 for those that are not selected.
        block: neurons of a unit.
        neurons: that units stand for.
    """

    units: int
    rows: int
    mask: Block
    maker: _Maker
    values: Buffer | None = None
    block: int = 1
    neurons: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """A table as in `cpu_kernels.chosen`.

    Args:
        memory: its owner.
        address: of the header.
        neurons, groups: of the FFN.
        mask: of neurons, uint64 [rows][ceil(neurons / 64)]; none if the table was made of blocks of whole groups.
        rows: of the mask.
    """

    memory: Any
    address: int
    neurons: int
    groups: int
    mask: Block | None
    rows: int


def record_topk(recording: Recording, scores: Buffer, k: int, shared: bool = False) -> Selection:
    """The k largest scores of each token; equal ones by index.

    Args:
        scores: [N, M].
        shared: one selection for all, of the k largest sums over tokens of the scores above 0.
    """
    recording.floats(scores)
    source, work, tokens = (scores.address, scores.stride_bytes), None, 0
    if shared:
        work = recording.new(1, scores.width)
        if scores.rows * scores.width <= FEW_VOTES:
            tokens = scores.rows
        else:
            pieces = -(-scores.width // VOTES_EACH)
            arguments = (work.address, *source, scores.rows, VOTES_EACH, scores.width)
            recording.program.add(select.votes, pieces, arguments)
            source = work.address, 0
    return _topk(recording, source, scores.width, 1, k, 1 if shared else scores.rows, tokens, work, scores)


def record_heads(recording: Recording, scores: Buffer, k: int, group: int = 1) -> Selection:
    """The k heads of each token with the largest scores, or the k KV groups by the best of their heads.

    Args:
        scores: [N, H].
        group: heads of a KV group; units of the selection are groups.
    """
    recording.floats(scores)
    units = scores.width // group
    work = recording.new(scores.rows, units) if group > 1 else None
    return _topk(recording, (scores.address, scores.stride_bytes), units, group, k, scores.rows, 0, work, scores)


def _topk(
    recording: Recording,
    source: tuple[int, int],
    units: int,
    group: int,
    k: int,
    rows: int,
    tokens: int,
    work: Buffer | None,
    scores: Buffer,
) -> Selection:
    quantile = NormalDist().inv_cdf(1 - (k - 0.5) / units) if 0 < k < units else 0.0
    place = (work.address, work.stride_bytes) if work else (0, 0)
    arguments = (*source, units, group, k, quantile, tokens, *place)
    return _selection(recording, units, rows, select.select_topk, arguments, (scores, work))


def record_threshold(
    recording: Recording,
    scores: Buffer,
    threshold: float,
    relative: bool = False,
    sizes: bool = False,
    factors: NDArray[np.float32] | None = None,
) -> Selection:
    """Scores above a threshold; NaN never.

    Args:
        scores: [N, M].
        relative: instead scores of at least the threshold times the token's largest, and that one in any case.
        sizes: whether scores count without their sign.
        factors: of each unit's score, filled up to whole vectors; not with `relative`.
    """
    recording.floats(scores)
    own = 0 if factors is None else factors
    arguments = (scores.address, scores.stride_bytes, scores.width, float(threshold), relative, sizes, own)
    return _selection(recording, scores.width, scores.rows, select.select_threshold, arguments, (scores,))


def record_statistical_topk(recording: Recording, scores: Buffer, factor: float, kind: int = -1) -> Selection:
    """Scores above mean + factor * deviation of their token's; the selection's values are what exceeds that.

    Args:
        scores: [N, M].
        kind: of an activation function of the values (`cpu_kernels.rows.activate`), which must be 0 at 0; -1 for none.
    """
    recording.floats(scores)
    values = recording.new(scores.rows, scores.width)
    places = (scores.address, scores.stride_bytes, scores.width, float(factor), values.address, values.stride_bytes)
    kernel = select.statistical_topk
    made = _selection(recording, scores.width, scores.rows, kernel, (*places, kind), (scores, values))
    return replace(made, values=values)


def _selection(
    recording: Recording, units: int, rows: int, kernel: Kernel, arguments: tuple[Any, ...], sources: tuple[Any, ...]
) -> Selection:
    mask = Block(recording.program.memory, rows * mask_bytes(units))
    return Selection(units, rows, mask, _Maker(kernel, arguments, sources), neurons=units)


def mask_bytes(units: int) -> int:
    """Bytes of a mask's row."""
    return -(-units // 64) * 8


def forced(selection: Selection, kept: int, seed: int) -> Selection:
    """The selection with its mask replaced by a random one of `kept` units a row, a new one at each step.

    Args:
        seed: another for each selection of a program, or they are all the same.
    """
    states = (np.int64(seed) << 40) + (np.arange(selection.rows, dtype=np.int64) << 28)
    selection.maker.random = states, min(kept, selection.units)
    return selection


def record_random(recording: Recording, units: int, rows: int, kept: int, seed: int) -> Selection:
    """A random mask of `kept` units a row, a new one at each step."""
    return forced(_selection(recording, units, rows, chosen.chosen, (), ()), kept, seed)


def expanded(selection: Selection, block: int, neurons: int) -> Selection:
    """The selection with each unit standing for `block` neurons (the last one for what remains)."""
    return replace(selection, block=block, neurons=neurons)


def record_mask(recording: Recording, selection: Selection) -> Block:
    """The mask of units, recorded if it has not been."""
    if not selection.maker.made:
        _finish(recording, selection, None, None, 0)
    return selection.mask


def record_table(
    recording: Recording, selection: Selection, own: bool = False, statistics: NDArray[np.int64] | None = None
) -> Table:
    """The table of the neurons that any token selected.

    Args:
        own: whether a mask of neurons is wanted with it. There is one in any case if units are blocks that are not
            whole groups, or neurons.
        statistics: int64 [chosen.STATISTICS], to which each step adds.
    """
    neurons, program = selection.neurons, recording.program
    memory = Block(program.memory, chosen.table_bytes(neurons))
    wide = None
    if selection.block > 1 and (own or selection.block % 32):
        wide = Block(program.memory, selection.rows * mask_bytes(neurons))
    _finish(recording, selection, wide, memory, _counters(statistics))
    mask = selection.mask if selection.block == 1 else wide
    return Table(memory, memory.address, neurons, chosen.groups_of(neurons), mask, selection.rows)


def record_token_table(
    recording: Recording, selection: Selection, token: int, statistics: NDArray[np.int64] | None = None
) -> Table:
    """The table of the neurons that one token of several selected; where they share a selection, that of all."""
    mask, neurons = record_mask(recording, selection), selection.neurons
    memory = Block(recording.program.memory, chosen.table_bytes(neurons))
    wide = (
        Block(recording.program.memory, mask_bytes(neurons)) if selection.block % 32 and selection.block > 1 else None
    )
    row = mask.address + (token * mask_bytes(selection.units) if selection.rows > 1 else 0)
    units = (row, selection.units, 1, 0, 0, wide.address if wide else 0, selection.block, neurons)
    rest = (memory.address, np.zeros(8, np.int64), _POSITIONS, _counters(statistics))
    recording.program.add(chosen.chosen, 1, (*units, *rest))
    return Table(memory, memory.address, neurons, chosen.groups_of(neurons), mask if selection.block == 1 else wide, 1)


def _counters(statistics: NDArray[np.int64] | None) -> Any:
    """As an argument of a kernel, which would write past the end of a shorter array."""
    if statistics is None:
        return 0
    if statistics.shape != (chosen.STATISTICS,):
        raise ValueError(f"statistics has shape {statistics.shape}, not ({chosen.STATISTICS},)")
    return statistics


def _finish(recording: Recording, selection: Selection, wide: Block | None, table: Block | None, counts: Any) -> None:
    """Records what makes the mask, if nothing did yet, and what is made of it."""
    maker = selection.maker
    kernel, own, random = chosen.chosen, (), (0, 0)
    if not maker.made:
        kernel, own, random = maker.kernel, maker.arguments, maker.random
    masks = (selection.mask.address, selection.units, selection.rows)
    neurons = (wide.address if wide else 0, selection.block, selection.neurons)
    rest = (table.address if table else 0, np.zeros(8, np.int64), _POSITIONS, counts)
    recording.program.add(kernel, selection.rows, (*own, *masks, *random, *neurons, *rest))
    maker.made, maker.sources = True, ()


def table_of_everything(neurons: int) -> Table:
    """The table that selects every neuron."""
    table = chosen.everything(neurons)
    return Table(table, table.ctypes.data, neurons, chosen.groups_of(neurons), None, 1)
