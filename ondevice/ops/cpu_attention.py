"""Recording attention: the pages of the cache, storing to them, and attending over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import attention, kv_pages, rope, topk_attention
from cpu_kernels.compile import Kernel
from cpu_kernels.topk_scores import quantiles
from cpu_kernels.topk_values import SPAN
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
class PartedPages:
    """Keys in two parts, and values. See `cpu_kernels.kv_pages.append_parts` for what a page holds."""

    firsts: NDArray[np.float16]
    rests: NDArray[np.float16]
    values: NDArray[np.float16]
    kv_heads: int
    head_dim: int
    group: int
    first_dims: int

    @classmethod
    def new(cls, spec: ModelSpec, pages: int, page: int, first_dims: int) -> PartedPages:
        """Storage of `pages` pages of `page` positions. first_dims: of a key, that all queries read."""

        def part(dims: int) -> NDArray[np.float16]:
            shape = (spec.n_layers, pages, spec.n_kv_heads, page * attention.padded_dim(dims))
            return _zeros(math.prod(shape) * 2).view(np.float16).reshape(shape)

        parts = part(first_dims), part(spec.head_dim - first_dims), part(spec.head_dim)
        return cls(*parts, spec.n_kv_heads, spec.head_dim, spec.group, first_dims)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What kernels are made for."""
        return self.group, self.head_dim, self.first_dims

    def layer(self, index: int) -> tuple[NDArray[np.float16], ...]:
        """A layer's three parts."""
        return self.firsts[index], self.rests[index], self.values[index]


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
    """Keys and values to their pages. Keys of pages in parts come rotated, each part like a head."""
    pages: Pages | PartedPages = cache.pages
    if isinstance(pages, PartedPages):
        k, v = recording.floats(k), recording.floats(v)
        given = (k.address, k.stride_bytes, v.address, v.stride_bytes, *_where(step, cache), *pages.layer(layer))
        dims = (pages.kv_heads, pages.head_dim, pages.first_dims)
        recording.program.add(kv_pages.append_parts, k.rows, (*given, *dims))
        return
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


def topk_kernels(group: int, head_dim: int, first_dims: int) -> list[Kernel]:
    """Every kernel that top-k attention of a shape can need."""
    makers = (topk_attention.topk_scores, topk_attention.topk_values, topk_attention.topk_tokens)
    return [kv_pages.append_parts, *(maker(group, head_dim, first_dims) for maker in makers)]


def record_topk_attention(
    recording: Recording,
    q: Buffer,
    cache: KVCache,
    layer: int,
    step: Step,
    scale: float,
    k: int,
    window: int,
    softcap: float,
    rest_scale: float = 1.0,
) -> Buffer:
    """Causal attention of each query head to about k keys; see `cpu_kernels.topk_attention`.

    Args:
        q: [N, H * dh], rotated, each part like a head.
        cache: whose pages are `PartedPages`.
        scale, softcap: of the scores.
        k: keys that a head sees about, of which those of `window` are visible.
        rest_scale: of the product that softplus sees.
    """
    pages: PartedPages = cache.pages
    q = recording.floats(q)
    out, chunks = recording.new(q.rows, q.width), -(-cache.capacity // attention.CHUNK)
    each = topk_attention.scratch_bytes(*pages.shape, chunks)
    source = (q.address, q.stride_bytes, *_where(step, cache))
    memory = (pages.kv_heads, recording.scratch("top-k attention", each), each)
    threshold = (k, quantiles(k, cache.capacity), window, float(scale), float(softcap))
    # As in `record_attention`, though most of it for the first part only.
    work = 4 * q.rows * q.width * cache.capacity
    if q.rows <= FEW_TOKENS:
        _few_topk(recording, out, pages, layer, chunks, source, memory, threshold, window, rest_scale, work)
        return out
    block = attention.tokens_each(pages.group, step.positions, step.slots)
    place = (out.address, out.stride_bytes, q.rows, block, *source, *pages.layer(layer), *memory, *threshold)
    tiles = -(-q.rows // block) * pages.kv_heads
    recording.program.add(topk_attention.topk_tokens(*pages.shape), tiles, (*place, float(rest_scale)), work=work)
    return out


def _few_topk(
    recording: Recording,
    out: Buffer,
    pages: PartedPages,
    layer: int,
    chunks: int,
    source: tuple[Any, ...],
    memory: tuple[Any, ...],
    threshold: tuple[Any, ...],
    window: int,
    rest_scale: float,
    work: float,
) -> None:
    """Two operations, whose tiles are pieces of the tokens' positions. chunks: that a slot may hold."""
    program, pairs = recording.program, out.rows * pages.kv_heads
    firsts, rests, values = pages.layer(layer)
    spans = -(-chunks * attention.CHUNK // SPAN)
    scores, described, limits, parts = (
        Block(program.memory, pairs * nbytes)
        for nbytes in (
            chunks * topk_attention.score_bytes(pages.group),
            chunks * topk_attention.description_bytes(pages.group),
            topk_attention.limit_bytes(pages.group),
            spans * topk_attention.part_bytes(pages.group, pages.head_dim),
        )
    )
    shared = (chunks, program.chunks, np.zeros(pairs * 8, np.int64), *source)
    arguments = (scores.address, described.address, limits.address, *shared, firsts, *memory, *threshold)
    program.add(topk_attention.topk_scores(*pages.shape), pairs, arguments, by_chunks=True, work=work)
    place = (out.address, out.stride_bytes, scores.address, limits.address, parts.address)
    arguments = (*place, *shared, rests, values, *memory, window, float(rest_scale))
    program.add(topk_attention.topk_values(*pages.shape), pairs, arguments, by_chunks=True)
