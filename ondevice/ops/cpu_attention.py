"""Recording attention: the pages of the cache, storing to them, and attending over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import attention, kv_pages, rope
from ondevice.ops.base import Step
from ondevice.ops.cpu_program import Block
from ondevice.ops.cpu_recording import Buffer, Recording

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

FEW_TOKENS = 16
"""Up to here attention shares positions among threads, beyond it tokens."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of all layers, in float16. See `cpu_kernels.kv_pages.append` for what a page holds."""

    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    layer_bytes: int
    page_bytes: int
    kv_heads: int
    head_dim: int
    group: int

    @classmethod
    def new(cls, spec: ModelSpec, pages: int, page: int) -> Pages:
        """Storage of `pages` pages of `page` positions for every layer and KV head."""
        padded = attention.padded_dim(spec.head_dim)
        page_bytes = page * padded * 2
        # Zeros that the system provides when first touched: a long context costs memory only as it fills.
        layer_bytes = pages * spec.n_kv_heads * page_bytes
        shape = (spec.n_layers, pages, spec.n_kv_heads, page * padded)
        keys, values = (_zeros(spec.n_layers * layer_bytes).view(np.float16).reshape(shape) for _ in range(2))
        return cls(keys, values, layer_bytes, page_bytes, spec.n_kv_heads, spec.head_dim, spec.group)

    def layer(self, index: int) -> tuple[int, int]:
        """Addresses of a layer's keys and values."""
        start = index * self.layer_bytes
        return self.keys.ctypes.data + start, self.values.ctypes.data + start


@dataclass(frozen=True, slots=True)
class HeadMask:
    """Which heads each token asks for; see `cpu_kernels.selected_heads`.

    Args:
        masks: their memory or array: uint64 [rows][words].
        rows: one for each token, or 1 for all of them.
        units: bits of a row: as many as there are query heads, or KV heads.
    """

    masks: Block | NDArray[np.uint64]
    rows: int
    units: int

    def arguments(self, heads: int) -> tuple[Any, int, int]:
        """What kernels are told: masks, bytes from one token's to the next, and query heads of a bit."""
        where = self.masks.address if isinstance(self.masks, Block) else self.masks
        return where, -(-self.units // 64) * 8 if self.rows > 1 else 0, heads // self.units


def _zeros(nbytes: int) -> NDArray[np.uint8]:
    """Zeros that start on a cache line: vectors that straddle two cost a tenth of attention's speed."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def _unrotated(x: Buffer) -> tuple[Buffer, tuple[Any, int]]:
    """A buffer to rotate while reading it, with the table and half the rotated dimensions; 0 for nothing to do."""
    if x.block is None and x.producer is not None and x.producer.kernel is rope.rope:
        table, half = x.producer.arguments[3], x.producer.arguments[-1]
        return x.producer.source, (table, half)
    return x, (0, 0)


def _where(step: Step, cache: KVCache) -> tuple[Any, ...]:
    return step.positions, step.slots, cache.block_table, cache.block_table.shape[1]


def record_append(recording: Recording, k: Buffer, v: Buffer, cache: KVCache, layer: int, step: Step) -> None:
    """Keys and values to their pages."""
    pages: Pages = cache.pages
    padded = attention.padded_dim(pages.head_dim)
    k, rotation = _unrotated(k)
    k, v = recording.floats(k), recording.floats(v)
    source = (k.address, k.stride_bytes, v.address, v.stride_bytes)
    sizes = (pages.page_bytes, pages.kv_heads, pages.head_dim, padded)
    scratch = padded * 4
    place = (*_where(step, cache), *pages.layer(layer), *sizes)
    arguments = (*source, *place, *rotation, recording.scratch("append", scratch), scratch)
    recording.program.add(kv_pages.append, k.rows, arguments)


def record_attention(
    recording: Recording,
    q: Buffer,
    cache: KVCache,
    layer: int,
    step: Step,
    scale: float,
    window: int,
    softcap: float,
    heads: HeadMask | None = None,
) -> Buffer:
    """Causal attention of each token; zeros for the heads that it did not ask for."""
    pages: Pages = cache.pages
    shape, program = (pages.group, pages.head_dim), recording.program
    q, rotation = _unrotated(q)
    q = recording.floats(q)
    out = recording.new(q.rows, q.width)
    scratch = attention.scratch_bytes(*shape)
    source = (q.address, q.stride_bytes, *_where(step, cache), *pages.layer(layer))
    memory = (pages.page_bytes, pages.kv_heads, recording.scratch("attention", scratch), scratch)
    masks = (0, 0, 1) if heads is None else heads.arguments(pages.kv_heads * pages.group)
    common = (*source, *memory, *rotation, window, float(scale), float(softcap), *masks)
    # Two products, in float32, which take four times as long as those of int8.
    work = 8 * q.rows * q.width * cache.capacity
    if q.rows > FEW_TOKENS:
        each = attention.tokens_each(pages.group, step.positions, step.slots)
        tiles = -(-q.rows // each) * pages.kv_heads
        place: tuple[Any, ...] = (out.address, out.stride_bytes, q.rows, each)
        program.add(attention.attention_tokens(*shape), tiles, (*place, *common), work=work)
        return out
    tiles, most = q.rows * pages.kv_heads, -(-cache.capacity // attention.CHUNK)
    parts = Block(program.memory, tiles * most * attention.part_bytes(*shape))
    counters = np.zeros(tiles * 8, np.int64)
    place = (out.address, out.stride_bytes, parts.address, most, program.chunks, counters)
    program.add(attention.attention_chunks(*shape), tiles, (*place, *common), by_chunks=True, work=work)
    return out
