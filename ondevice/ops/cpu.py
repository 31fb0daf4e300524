"""The CPU table: records the decoder's operations as programs of Numba kernels."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import attention, codes, kv_pages, pack, rope, rows
from cpu_kernels.compile import Kernel, compile_all
from cpu_kernels.float_linear import float_linear
from cpu_kernels.float_linear import scratch_bytes as float_scratch
from cpu_kernels.gemm import gemm
from cpu_kernels.gemm import scratch_bytes as gemm_scratch
from cpu_kernels.gemv import gemv
from cpu_kernels.threads import shared_pool
from cpu_kernels.tiles import Layout
from ondevice.checkpoint import tile_files
from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.machine import default_threads
from ondevice.ops.base import Body, Handle, Ops, Step
from ondevice.ops.cpu_memory import WeightMemory
from ondevice.ops.cpu_profile import PartTime, add_times
from ondevice.ops.cpu_program import Block, Program, Weights, aligned
from ondevice.ops.cpu_tile_cache import TileCache
from ondevice.ops.cpu_weights import FLOAT_CODES, Format, Tiles, pack_rows

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
FEW_TOKENS = 16
"""Up to here attention shares positions among threads, beyond it tokens."""
KEPT_PROGRAMS = 4
"""Programs kept per cache: the decode step of the last batch sizes and the prompt chunks of the last lengths."""
WORK_BYTES = 16384
"""Weights that one tile of work reads: enough to outweigh fetching it, few enough to share work evenly."""
PIECES = 8
"""Tiles of work that a thread should have of a large product."""


@dataclass(frozen=True, slots=True)
class Producer:
    """How rows are made; put off until it is known whether floats or int8 codes of them are wanted.

    Args:
        kernel: of `cpu_kernels.rows` or `rope`, whose arguments are where results go, these, and where codes go.
        arguments: the ones in between.
        source: what it reads, so that its memory is not given away before.
    """

    kernel: Kernel
    arguments: tuple[Any, ...]
    source: Buffer


@dataclass(slots=True)
class Buffer:
    """Rows of float32 in a program's memory.

    Args:
        rows, width: its shape.
        stride: of a row, in values.
        block, address: the memory, of which several buffers may be parts; None and 0 while nobody needed the floats.
        producer: what makes them then.
        panels: int8 codes, once made.
        first: what each thread does to make its own single row of codes, once recorded.
    """

    rows: int
    width: int
    stride: int
    block: Block | None = None
    address: int = 0
    producer: Producer | None = None
    panels: Block | None = None
    first: tuple[Kernel, int] | None = None

    @property
    def stride_bytes(self) -> int:
        """Bytes between rows."""
        return self.stride * 4


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


def _unrotated(x: Buffer) -> tuple[Buffer, tuple[Any, int]]:
    """A buffer to rotate while reading it, with the table and half the rotated dimensions; 0 for nothing to do."""
    if x.block is None and x.producer is not None and x.producer.kernel is _rope_kernel:
        table, half = x.producer.arguments[3], x.producer.arguments[-1]
        return x.producer.source, (table, half)
    return x, (0, 0)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    centred: bool
    eps: float


@dataclass(frozen=True, slots=True)
class _Pages:
    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    layer_bytes: int
    page_bytes: int
    kv_heads: int
    head_dim: int
    group: int


class CpuOps(Ops):
    """Numba kernels on a pool of threads. Activations are float32, keys and values float16.

    Args:
        threads: number of threads; by default one per core that this process may use.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or default_threads()
        self.pool = shared_pool(self.threads)
        self._memory = WeightMemory()
        self._tiles: TileCache | None = None
        self._kernels: dict[Kernel, None] = {}
        self._programs: weakref.WeakKeyDictionary[KVCache, dict[Any, Program]] = weakref.WeakKeyDictionary()
        self._recording: Program | None = None
        self._one_step = threading.Lock()
        self._scratch: dict[str, NDArray[np.uint8]] = {}
        self._profile: dict[str, PartTime] | None = None

    # Weights

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tiles]:
        return self._handle("linear", pack_rows(self.pool, self._memory, weights, biases))

    def pack_embedding(self, table: Tensor) -> Tiles:
        return self._handle("embedding", pack_rows(self.pool, self._memory, [table], [None]))

    def pack_tied(self, table: Tensor) -> tuple[Tiles, list[Tiles]]:
        return self._handle("tied", pack_rows(self.pool, self._memory, [table], [None]))

    def _handle(self, use: str, runs: Sequence[Tiles]) -> Any:
        """What the decoder gets for tiles that serve as "linear", as "embedding", or as both ("tied")."""
        for tiles in runs if use != "embedding" else ():
            layout = tiles.format.layout
            needed = (gemv(layout), gemm(layout)) if layout else (float_linear(tiles.format.kind),)
            self._kernels.update(dict.fromkeys(needed))
        if use != "linear":
            self._kernels[_embed_kernel(runs[0].format)] = None
        return {"linear": runs, "embedding": runs[0], "tied": (runs[0], runs)}[use]

    @contextlib.contextmanager
    def keeping(
        self, checkpoint: Checkpoint, progress: Callable[[int, int, str], None] | None = None
    ) -> Iterator[None]:
        if not checkpoint.files or tile_files.switched_off():
            yield
            return
        self._tiles = TileCache(checkpoint, self._memory)
        try:
            yield
            self._tiles.write(progress)
        finally:
            self._tiles.close()
            self._tiles = None

    def kept(self, name: str, shape: tuple[int, ...], pack: Callable[[], Handle]) -> Handle:
        if self._tiles is None:
            return pack()
        found = self._tiles.recall(name, shape)
        if found is not None:
            return self._handle(*found)
        handle = pack()
        self._tiles.remember(name, *_tiles_of(handle))
        return handle

    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> _Norm:
        values = _padded(dequantize(weight) + np.float32(offset))
        return _Norm(values, None if bias is None else _padded(dequantize(bias)), kind == "layer", eps)

    def pack_rope(self, inverse_frequencies: Any, attention_factor: float, context: int) -> Any:
        angle = np.arange(context)[:, None] * inverse_frequencies
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * np.float32(attention_factor)

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles every kernel that a model's steps can need, telling `progress` (done, of how many, what)."""
        shape = (spec.group, spec.head_dim)
        kernels = [*self._kernels, rows.norm, rows.activation, rows.take, rows.quantize, kv_pages.append]
        kernels += [f(*shape) for f in (attention.attention_tokens, attention.attention_chunks)]
        kernels += [rows.add_rows] if spec.post_norms or spec.position_offset is not None else []
        kernels += [rows.softcap] if spec.logit_softcap else []
        compile_all(kernels, progress)

    # Cache and steps

    def new_pages(self, spec: ModelSpec, pages: int, page: int) -> _Pages:
        padded = -(-spec.head_dim // 16) * 16
        page_bytes = page * padded * 2
        # Zeros that the system provides when first touched: a long context costs memory only as it fills.
        layer_bytes = pages * spec.n_kv_heads * page_bytes
        shape = (spec.n_layers, pages, spec.n_kv_heads, page * padded)
        keys, values = (_zeros(spec.n_layers * layer_bytes).view(np.float16).reshape(shape) for _ in range(2))
        return _Pages(keys, values, layer_bytes, page_bytes, spec.n_kv_heads, spec.head_dim, spec.group)

    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        with self._one_step:
            programs = self._programs.setdefault(cache, {})
            key = (name, len(step.tokens), len(step.outputs))
            program = programs.pop(key, None) or self._record(step, body)
            programs[key] = program
            while len(programs) > KEPT_PROGRAMS:
                del programs[next(iter(programs))]
            program.load(step, attention.tile_positions(int(step.positions.max()) + 1))
            if self._profile is None:
                program.run(self.pool)
            else:
                add_times(self._profile, program, self.pool)
            return program.result.copy()

    @contextlib.contextmanager
    def profiled(self) -> Iterator[dict[str, PartTime]]:
        """Measures the steps that run inside: what each part of the model takes, by the names that `part` gave."""
        self._profile = {}
        try:
            yield self._profile
        finally:
            self._profile = None

    def part(self, name: str) -> None:
        self._program.part = name

    def _record(self, step: Step, body: Body) -> Program:
        program = self._recording = Program(step)
        try:
            result: Buffer = self._floats(body(program.step))
        finally:
            self._recording = None
        program.seal()
        if result.block is None:
            raise RuntimeError("a step's result has no memory")
        start = result.address - result.block.address
        floats = result.block.array[start : start + result.rows * result.stride_bytes].view(np.float32)
        program.result = floats.reshape(result.rows, result.stride)[:, : result.width]
        program.keep(result.block)
        return program

    @property
    def _program(self) -> Program:
        if self._recording is None:
            raise RuntimeError("operations of the CPU table are recorded inside run() only")
        return self._recording

    def _new(self, n: int, width: int, span: int = 0) -> Buffer:
        """A buffer of n rows. span: values that may be written to a row, where padding reaches beyond `width`."""
        stride = -(-max(width, span) // 16) * 16
        block = Block(self._program.memory, n * stride * 4)
        return Buffer(n, width, stride, block, block.address)

    def _later(self, n: int, width: int, kernel: Kernel, source: Buffer, arguments: tuple[Any, ...]) -> Buffer:
        """A buffer that is made in the form in which it is wanted first."""
        return Buffer(n, width, -(-width // 16) * 16, producer=Producer(kernel, arguments, source))

    def _floats(self, x: Buffer) -> Buffer:
        """The buffer, with its floats in memory."""
        if x.block is None and x.producer is not None:
            x.block = Block(self._program.memory, x.rows * x.stride_bytes)
            x.address = x.block.address
            arguments = (x.address, x.stride_bytes, 0, *x.producer.arguments, 0, 0, 1, 1, x.rows)
            self._program.add(x.producer.kernel, x.rows, arguments)
        return x

    def _own_floats(self, x: Buffer) -> tuple[Any, int, tuple[Kernel, int] | None]:
        """A single row of floats: its address, the bytes between the copies of threads, and how they make them."""
        if x.block is not None or x.producer is None:
            return x.address, 0, None
        row = self._scratch_memory("row", x.stride_bytes)
        arguments = (row, 0, x.stride_bytes, *x.producer.arguments, 0, 0, 1, 1, 1)
        return row, x.stride_bytes, (x.producer.kernel, self._program.store(arguments))

    def _own_codes(self, x: Buffer) -> tuple[Any, int]:
        """A single row of int8 codes, made by each thread for itself: where, and the bytes between the threads' copies.

        Rounding a row takes less time than waiting for another thread to do it.
        """
        each = codes.panel_bytes(x.width, 1)
        panel, row = self._scratch_memory("panel", each), self._scratch_memory("row", x.stride_bytes)
        if x.first is None:
            producer = self._producer_of_codes(x)
            arguments = (row, 0, x.stride_bytes, *producer.arguments, panel, each, 1, 1, 1)
            x.first = producer.kernel, self._program.store(arguments)
        return panel, each

    def _producer_of_codes(self, x: Buffer) -> Producer:
        if x.block is None and x.producer is not None:
            return x.producer
        return Producer(rows.quantize, (x.address, x.stride_bytes, x.width), x)

    def _panels(self, x: Buffer) -> tuple[int, int]:
        """int8 codes of several rows: their address, and the width of the last panel."""
        widest, *_ = widths = codes.panel_widths()
        rest = x.rows % widest or widest
        last = min(w for w in widths if w >= rest)
        if x.panels is None:
            x.panels = Block(self._program.memory, -(-x.rows // widest) * codes.panel_bytes(x.width, widest))
            each, producer = widest * x.stride_bytes, self._producer_of_codes(x)
            out = self._scratch_memory("rows", each)
            arguments = (out, x.stride_bytes, each, *producer.arguments, x.panels.address, 0, widest, last, x.rows)
            self._program.add(producer.kernel, -(-x.rows // widest), arguments)
        return x.panels.address, last

    def _scratch_memory(self, use: str, each: int) -> NDArray[np.uint8]:
        """Scratch for every thread; programs keep the one that they were recorded with alive."""
        if len(self._scratch.get(use, ())) < each * self.threads:
            self._scratch[use] = aligned(each * self.threads)
        return self._scratch[use]

    # Operations

    def embed(self, table: Tiles, rows: Any, scale: float = 1.0, offset: int = 0) -> Buffer:
        form, layout = table.format, table.format.layout
        out = self._new(len(rows), form.inputs)
        place = (out.address, out.stride_bytes, table.data, form.tile_bytes, rows, offset, form.inputs)
        how: tuple[int, ...] = (FLOAT_CODES.get(form.kind, 0),)
        if layout and layout.kind in ("k16", "k32"):
            how = (layout.bits, layout.symmetric)
        elif layout:
            how = (layout.bits, layout.group_size, layout.scale_bytes, layout.symmetric)
        self._program.add(_embed_kernel(form), len(rows), (*place, *how, float(scale)))
        return out

    def norm(self, x: Buffer, weight: _Norm, heads: int = 1) -> Buffer:
        source, bias = self._floats(x), 0 if weight.bias is None else weight.bias
        settings = (bias, x.width // heads, heads, weight.centred, float(weight.eps))
        arguments = (source.address, source.stride_bytes, weight.weight, *settings)
        out = self._later(x.rows, x.width, rows.norm, source, arguments)
        # Norms of heads never feed a linear.
        return out if heads == 1 else self._floats(out)

    def linear(self, x: Buffer, weight: list[Tiles], residual: Buffer | None = None) -> Buffer:
        starts = np.cumsum([0] + [t.rows for t in weight])
        span = max(int(s) + 16 * t.row_tiles for s, t in zip(starts, weight))
        out = self._new(x.rows, int(starts[-1]), span=span)
        for start, tiles in zip(starts.tolist(), weight):
            self._linear_part(out, start, x, tiles, self._floats(residual) if residual else None)
        return out

    def _linear_part(self, out: Buffer, start: int, x: Buffer, tiles: Tiles, residual: Buffer | None) -> None:
        if not x.rows:
            return
        few = x.rows <= FEW_TOKENS
        each = max(1, WORK_BYTES // tiles.format.tile_bytes) if few else 1
        pieces = -(-tiles.row_tiles // each)
        nbytes = each * tiles.format.tile_bytes
        weights = Weights(tiles.data.ctypes.data, nbytes, pieces) if few else None
        place = _Place(out.address + start * 4, out.stride_bytes, tiles, each, pieces, weights)
        bias = 0 if tiles.bias is None else tiles.bias
        extra = (bias, residual.address + start * 4, residual.stride_bytes) if residual else (bias, 0, 0)
        if not tiles.format.layout:
            self._float_linear(place, x, extra)
        elif x.rows == 1:
            self._gemv(place, tiles.format.layout, x, extra)
        else:
            self._gemm(place, tiles.format.layout, x, extra)

    def _gemv(self, place: _Place, layout: Layout, x: Buffer, extra: tuple[Any, ...]) -> None:
        panel, thread_bytes = self._own_codes(x)
        arguments = (place.out, *place.tile, panel, thread_bytes, x.width, *extra[:2])
        work = x.width * place.tiles.rows
        self._program.add(gemv(layout), place.pieces, arguments, first=x.first, weights=place.weights, work=work)

    def _gemm(self, place: _Place, layout: Layout, x: Buffer, extra: tuple[Any, ...]) -> None:
        address, last = self._panels(x)
        n_panels = -(-x.rows // codes.panel_widths()[0])
        each, scratch = self._share(place.pieces, n_panels), gemm_scratch(layout, x.width)
        shape = (address, x.rows, each, x.width, last)
        arguments = (place.out, place.stride, *place.tile, *shape, *extra, self._scratch_memory("gemm", scratch))
        tiles, work = place.pieces * -(-n_panels // each), x.rows * x.width * place.tiles.rows
        self._program.add(gemm(layout), tiles, (*arguments, scratch), weights=place.weights, work=work)

    def _float_linear(self, place: _Place, x: Buffer, extra: tuple[Any, ...]) -> None:
        n, form = x.rows, place.tiles.format
        address, thread_bytes, first = self._own_floats(x) if n == 1 else (self._floats(x).address, 0, None)
        each, scratch = self._share(place.pieces, n), float_scratch()
        shape = (address, x.stride_bytes, thread_bytes, n, each, form.inputs)
        arguments = (place.out, place.stride, *place.tile, *shape, *extra, self._scratch_memory("float", scratch))
        tiles, work = place.pieces * -(-n // each), n * form.inputs * place.tiles.rows
        kernel = float_linear(form.kind)
        self._program.add(kernel, tiles, (*arguments, scratch), first=first, weights=place.weights, work=4 * work)

    def _share(self, pieces: int, n: int) -> int:
        """How many of n tokens or panels are one piece of work, if there are so many pieces along the rows."""
        parts = min(-(-PIECES * self.threads // pieces), -(-n // 4))
        return -(-n // parts)

    def split(self, x: Buffer, widths: Sequence[int]) -> list[Buffer]:
        starts, source = np.cumsum([0, *widths[:-1]]), self._floats(x)
        return [
            Buffer(x.rows, width, x.stride, source.block, source.address + int(s) * 4)
            for s, width in zip(starts, widths)
        ]

    def rope(self, x: Buffer, heads: int, positions: Any, rope: Any) -> Buffer:
        source = self._floats(x)
        arguments = (source.address, source.stride_bytes, positions, rope, heads, x.width // heads, rope.shape[1] // 2)
        return self._later(x.rows, x.width, _rope_kernel, source, arguments)

    def append(self, cache: KVCache, layer: int, k: Buffer, v: Buffer, step: Step) -> None:
        pages: _Pages = cache.pages
        padded = attention.padded_dim(pages.head_dim)
        k, rotation = _unrotated(k)
        k, v = self._floats(k), self._floats(v)
        source = (k.address, k.stride_bytes, v.address, v.stride_bytes)
        sizes = (pages.page_bytes, pages.kv_heads, pages.head_dim, padded)
        scratch = padded * 4
        place = (*self._where(step, cache), *self._layer(pages, layer), *sizes)
        arguments = (*source, *place, *rotation, self._scratch_memory("append", scratch), scratch)
        self._program.add(kv_pages.append, k.rows, arguments)

    @staticmethod
    def _where(step: Step, cache: KVCache) -> tuple[Any, ...]:
        return step.positions, step.slots, cache.block_table, cache.block_table.shape[1]

    @staticmethod
    def _layer(pages: _Pages, layer: int) -> tuple[int, int]:
        start = layer * pages.layer_bytes
        return pages.keys.ctypes.data + start, pages.values.ctypes.data + start

    def attention(
        self, q: Buffer, cache: KVCache, layer: int, step: Step, scale: float, window: int, softcap: float
    ) -> Buffer:
        pages: _Pages = cache.pages
        shape = (pages.group, pages.head_dim)
        q, rotation = _unrotated(q)
        q = self._floats(q)
        out = self._new(q.rows, q.width)
        scratch = attention.scratch_bytes(*shape)
        source = (q.address, q.stride_bytes, *self._where(step, cache), *self._layer(pages, layer))
        memory = (pages.page_bytes, pages.kv_heads, self._scratch_memory("attention", scratch), scratch)
        common = (*source, *memory, *rotation, window, float(scale), float(softcap))
        # Two products, in float32, which take four times as long as those of int8.
        work = 8 * q.rows * q.width * cache.capacity
        if q.rows > FEW_TOKENS:
            each = attention.tokens_each(pages.group, step.positions, step.slots)
            tiles = -(-q.rows // each) * pages.kv_heads
            place: tuple[Any, ...] = (out.address, out.stride_bytes, q.rows, each)
            self._program.add(attention.attention_tokens(*shape), tiles, (*place, *common), work=work)
            return out
        tiles, most = q.rows * pages.kv_heads, -(-cache.capacity // attention.CHUNK)
        parts = Block(self._program.memory, tiles * most * attention.part_bytes(*shape))
        counters = np.zeros(tiles * 8, np.int64)
        place = (out.address, out.stride_bytes, parts.address, most, self._program.chunks, counters)
        self._program.add(attention.attention_chunks(*shape), tiles, (*place, *common), by_chunks=True, work=work)
        return out

    def activation(self, x: Buffer, kind: str, gated: bool) -> Buffer:
        width, source = x.width // 2 if gated else x.width, self._floats(x)
        arguments = (source.address, source.stride_bytes, width, ACTIVATIONS[kind], gated)
        return self._later(x.rows, width, rows.activation, source, arguments)

    def add(self, a: Buffer, b: Buffer) -> Buffer:
        out = self._new(a.rows, a.width)
        sources = [v for x in (self._floats(a), self._floats(b)) for v in (x.address, x.stride_bytes)]
        self._program.add(rows.add_rows, a.rows, (out.address, out.stride_bytes, *sources, a.width))
        return out

    def take(self, x: Buffer, rows: Any) -> Buffer:
        source = self._floats(x)
        if len(rows) == x.rows == 1:
            return source
        out = self._new(len(rows), x.width)
        arguments = (out.address, out.stride_bytes, source.address, source.stride_bytes, rows, x.width)
        self._program.add(_take_kernel, len(rows), arguments)
        return out

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        out, source = self._new(x.rows, x.width), self._floats(x)
        arguments = (out.address, out.stride_bytes, source.address, source.stride_bytes, x.width, float(cap))
        self._program.add(rows.softcap, x.rows, arguments)
        return out


# The methods `rope` and `take` have parameters named like the modules.
_rope_kernel, _take_kernel = rope.rope, rows.take


def _embed_kernel(form: Format) -> Kernel:
    """What looks rows of a format up."""
    if form.layout and form.layout.kind in ("k16", "k32"):
        return pack.embed_byte_scales
    return pack.embed_quantized if form.layout else pack.embed_floats


def _zeros(nbytes: int) -> NDArray[np.uint8]:
    """Zeros that start on a cache line: vectors that straddle two cost a tenth of attention's speed."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def _tiles_of(handle: Handle) -> tuple[str, Sequence[Tiles]]:
    """Use and tiles of a handle that one of the `pack_` methods gave."""
    if isinstance(handle, Tiles):
        return "embedding", [handle]
    return ("tied", handle[1]) if isinstance(handle, tuple) else ("linear", handle)


def _padded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 with zeros up to a whole vector."""
    out = np.zeros(-(-len(values) // 16) * 16, np.float32)
    out[: len(values)] = values
    return out
