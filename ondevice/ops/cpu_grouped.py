"""Recording layers of experts of which each of many tokens needs its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpu_kernels import codes, expert_lists, grouped_experts
from cpu_kernels.compile import Kernel
from cpu_kernels.grouped_experts import CHUNK, WIDEST, experts_codes, experts_down, experts_norms, experts_up
from ondevice.errors import OptionError
from ondevice.ops.cpu_program import Block
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_sparse_tiles import SparseTiles

TOGETHER = 4
"""Tiles of outputs, at most, that one piece of work adds up together: more would not fit the second-level cache."""


def grouped_kernels(ffn: SparseTiles) -> tuple[Kernel, ...]:
    """Every kernel that a layer can need."""
    up, down = ffn.layouts
    made = experts_up(up, ffn.mode == "gated"), experts_down(down)
    return *made, expert_lists.expert_tokens, experts_norms, experts_codes


@dataclass(frozen=True, slots=True)
class Experts:
    """Which experts each token needs, in a program's memory.

    Args:
        masks: address of a bit for each expert, uint64 [N, W].
        stride: bytes between the masks of tokens; 0 if all have one.
        number: of experts, which are equally large.
    """

    masks: int
    stride: int
    number: int


@dataclass(frozen=True, slots=True)
class _Lists:
    """The tokens of each expert.

    Args:
        block: memory of the lists.
        each: bytes of a list.
        room: tokens that it can hold.
        chunks: pieces of work for an expert.
        groups: of 32 neurons that an expert has.
        together: tiles of outputs of one piece of work.
    """

    block: Block
    each: int
    room: int
    chunks: int
    groups: int
    together: int

    @property
    def all(self) -> tuple[int, int, int, int]:
        """What kernels are told of them."""
        return self.block.address, self.each, self.room, self.chunks


def record_grouped(
    recording: Recording, x: Buffer, ffn: SparseTiles, experts: Experts, activation: int, residual: Buffer | None
) -> Buffer:
    """The layer's results (+ residual).

    Args:
        activation: its number in `cpu_kernels.rows.activate`.

    Raises:
        OptionError: the layer's neurons are not so many experts of 32k neurons.
    """
    if ffn.mode == "valued" or ffn.neurons % (32 * experts.number):
        raise OptionError(
            f"{ffn.neurons} neurons, {ffn.mode}, as {experts.number} experts: only gated or plain layers are grouped,"
            " by experts of a multiple of 32 neurons"
        )
    lists = _record_lists(recording, x.rows, ffn, experts)
    h = _record_up(recording, x, ffn, experts, lists, activation)
    panels, most = _record_codes(recording, h, ffn, experts, lists)
    return _record_down(recording, panels, most, x.rows, ffn, experts, lists, residual)


def _record_lists(recording: Recording, n: int, ffn: SparseTiles, experts: Experts) -> _Lists:
    each, room = expert_lists.list_bytes(n), expert_lists.room(n)
    block = Block(recording.program.memory, experts.number * each)
    arguments = (block.address, each, room, experts.masks, experts.stride, n, WIDEST)
    recording.program.add(expert_lists.expert_tokens, experts.number, arguments)
    together = max(1, min(TOGETHER, ffn.down.row_tiles // (4 * recording.threads)))
    return _Lists(block, each, room, -(-n // (WIDEST * CHUNK)), ffn.neurons // 32 // experts.number, together)


def _record_up(
    recording: Recording, x: Buffer, ffn: SparseTiles, experts: Experts, lists: _Lists, activation: int
) -> Buffer:
    up, _ = ffn.layouts
    rows, row_bytes = recording.rows_of_codes(x)
    h = recording.new(x.rows, ffn.neurons)
    scratch = grouped_experts.up_scratch(up, x.width)
    weight = (ffn.up.data, ffn.up.format.tile_bytes, lists.groups)
    tokens = (rows.address, row_bytes, x.rows, x.width)
    extra = (0 if ffn.up.bias is None else ffn.up.bias, activation, recording.scratch("experts up", scratch), scratch)
    arguments = (h.address, h.stride_bytes, *lists.all, *weight, *tokens, *extra)
    pieces, work = experts.number * lists.chunks, x.rows * x.width * ffn.up.rows
    recording.program.add(experts_up(up, ffn.mode == "gated"), pieces, arguments, work=work)
    return h


def _record_codes(
    recording: Recording, h: Buffer, ffn: SparseTiles, experts: Experts, lists: _Lists
) -> tuple[Block, int]:
    norms = Block(recording.program.memory, 4 * h.rows)
    masks = (experts.masks, experts.stride, experts.number, lists.groups)
    recording.program.add(experts_norms, h.rows, (norms.address, h.address, h.stride_bytes, *masks))
    most = -(-h.rows // WIDEST)
    size = int(codes.panel_bytes(32 * lists.groups, WIDEST))
    panels = Block(recording.program.memory, experts.number * most * size)
    source = (h.address, h.stride_bytes, norms.address)
    arguments = (panels.address, most, *source, *lists.all, lists.groups, lists.together)
    recording.program.add(experts_codes, experts.number * lists.chunks, arguments)
    return panels, most


def _record_down(
    recording: Recording,
    panels: Block,
    most: int,
    n: int,
    ffn: SparseTiles,
    experts: Experts,
    lists: _Lists,
    residual: Buffer | None,
) -> Buffer:
    _, down = ffn.layouts
    tiles = ffn.down
    out = recording.new(n, tiles.rows, span=16 * tiles.row_tiles)
    scratch = grouped_experts.down_scratch(down, 32 * lists.groups, n, lists.together)
    extra = (0 if tiles.bias is None else tiles.bias, 0, 0)
    if residual:
        extra = (extra[0], recording.floats(residual).address, residual.stride_bytes)
    weight = (tiles.data, tiles.format.tile_bytes, tiles.row_tiles, lists.together)
    every = np.arange(ffn.neurons // 32, dtype=np.int32)
    chosen = (panels.address, most, lists.block.address, lists.each, experts.number, lists.groups, every, n)
    memory = (recording.scratch("experts down", scratch), scratch)
    arguments = (out.address, out.stride_bytes, *weight, *chosen, *extra, *memory)
    work = n * ffn.neurons * tiles.rows
    recording.program.add(experts_down(down), -(-tiles.row_tiles // lists.together), arguments, work=work)
    return out
