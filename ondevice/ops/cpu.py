"""The CPU table: records the decoder's operations as programs of Numba kernels."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels import attention, kv_pages, linear, pack, rope, rows
from cpu_kernels.compile import Kernel, compile_all
from cpu_kernels.threads import shared_pool
from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.machine import default_threads
from ondevice.ops.base import Body, Ops, Step
from ondevice.ops.cpu_program import Block, Program
from ondevice.ops.cpu_weights import FLOAT_CODES, Format, Tiles, pack_rows

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
FEW_TOKENS = 16
"""Up to here attention shares positions among threads, beyond it tokens."""
KEPT_PROGRAMS = 4
"""Programs kept per cache: the decode step of the last batch sizes and the prompt chunks of the last lengths."""
PLANES = 2
"""Planes of int8 activations. One plane (as llama.cpp rounds) changes 3 % of SmolLM2's most likely tokens, two none to
speak of; decoding waits for weights either way, and prompts take a fifth longer."""
WORK_BYTES = 32768
"""Weights that one tile of work reads: enough to outweigh fetching it, few enough to share work evenly."""


@dataclass(slots=True)
class Buffer:
    """Rows of float32 in a program's memory.

    Args:
        block: the memory; several buffers may be parts of one.
        address: of the first value.
        width, stride: of a row, in values.
        quantized: int8 planes and their numbers, where a producer made them.
    """

    block: Block
    address: int
    rows: int
    width: int
    stride: int
    quantized: tuple[Block, Block] | None = None

    @property
    def stride_bytes(self) -> int:
        """Bytes between rows."""
        return self.stride * 4

    def codes(self) -> tuple[int, int]:
        """Addresses of the int8 planes and of their numbers, 0 where there are none."""
        return (self.quantized[0].address, self.quantized[1].address) if self.quantized else (0, 0)


class Rotated:
    """A buffer times a rotary embedding, which whoever reads the buffer may apply in passing.

    Args:
        source: the buffer before.
        table: cosines and sines [positions, dimensions].
        record: records the rotation as an operation of its own, for readers that know only buffers.
    """

    def __init__(self, source: Buffer, table: NDArray[np.float32], record: Callable[[], Buffer]) -> None:
        self.source, self.table, self._record = source, table, record

    @functools.cached_property
    def _buffer(self) -> Buffer:
        return self._record()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)


def _unrotated(x: Buffer | Rotated) -> tuple[Buffer, tuple[Any, int]]:
    """A buffer to rotate while reading it, with the table and half the rotated dimensions; 0 for nothing to do."""
    if isinstance(x, Rotated):
        return x.source, (x.table, x.table.shape[1] // 2)
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
        self._quantized = False
        self._kernels: dict[Kernel, None] = {}
        self._programs: weakref.WeakKeyDictionary[KVCache, dict[Any, Program]] = weakref.WeakKeyDictionary()
        self._recording: Program | None = None
        self._one_step = threading.Lock()
        self._scratch: NDArray[np.uint8] = np.empty(0, np.uint8)

    # Weights

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tiles]:
        made = pack_rows(self.pool, weights, biases, PLANES)
        self._quantized |= any(t.format.bits for t in made)
        self._kernels.update(dict.fromkeys(self._linear_kernel(t) for t in made))
        return made

    def pack_embedding(self, table: Tensor) -> Tiles:
        tiles = pack_rows(self.pool, [table], [None], PLANES)[0]
        self._kernels[_embed_kernel(tiles.format)] = None
        return tiles

    def pack_tied(self, table: Tensor) -> tuple[Tiles, list[Tiles]]:
        head = self.pack_linear([table], [None])
        self._kernels[_embed_kernel(head[0].format)] = None
        return head[0], head

    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> _Norm:
        values = _padded(dequantize(weight) + np.float32(offset))
        return _Norm(values, None if bias is None else _padded(dequantize(bias)), kind == "layer", eps)

    def pack_rope(self, inverse_frequencies: Any, attention_factor: float, context: int) -> Any:
        angle = np.arange(context)[:, None] * inverse_frequencies
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * np.float32(attention_factor)

    @staticmethod
    def _linear_kernel(tiles: Tiles) -> Kernel:
        form = tiles.format
        if not form.bits:
            return linear.float_linear(form.kind)
        return linear.quantized_linear(form.bits, tiles.planes, form.kind, form.symmetric)

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
            program.run(self.pool, at_once=len(step.tokens) <= FEW_TOKENS)
            return program.result.copy()

    def _record(self, step: Step, body: Body) -> Program:
        program = self._recording = Program(step)
        try:
            result: Buffer = body(program.step)
            start = result.address - result.block.address
        finally:
            self._recording = None
        program.seal()
        floats = result.block.array[start : start + result.rows * result.stride_bytes].view(np.float32)
        program.result = floats.reshape(result.rows, result.stride)[:, : result.width]
        program.keep(result.block)
        return program

    @property
    def _program(self) -> Program:
        if self._recording is None:
            raise RuntimeError("operations of the CPU table are recorded inside run() only")
        return self._recording

    def _new(self, n: int, width: int, quantized: bool = False, span: int = 0) -> Buffer:
        """A buffer of n rows.

        Args:
            quantized: asks for int8 planes too, if this model has a use for them.
            span: values that may be written to a row, where padding reaches beyond `width`.
        """
        stride = -(-max(width, span) // 16) * 16
        memory = self._program.memory
        block = Block(memory, n * stride * 4)
        buffer = Buffer(block, block.address, n, width, stride)
        if quantized and self._quantized and width % 32 == 0:
            buffer.quantized = (Block(memory, n * width * 2), Block(memory, n * width))
        return buffer

    # Operations

    def embed(self, table: Tiles, rows: Any, scale: float = 1.0, offset: int = 0) -> Buffer:
        form = table.format
        out = self._new(len(rows), form.inputs)
        place = (out.address, out.stride_bytes, table.data, form.tile_bytes, rows, offset, form.inputs)
        layout: tuple[int, ...] = (FLOAT_CODES.get(form.kind, 0),)
        if form.byte_scales:
            layout = (form.bits, form.symmetric)
        elif form.bits:
            layout = (form.bits, form.group_size, form.size, form.symmetric)
        self._program.add(_embed_kernel(form), len(rows), (*place, *layout, float(scale)))
        return out

    def norm(self, x: Buffer, weight: _Norm, heads: int = 1) -> Buffer:
        out = self._new(x.rows, x.width, quantized=heads == 1)
        source = (out.address, out.stride_bytes, x.address, x.stride_bytes, weight.weight)
        bias = 0 if weight.bias is None else weight.bias
        settings = (bias, x.width // heads, heads, weight.centred, float(weight.eps))
        self._program.add(rows.norm, x.rows, (*source, *settings, *out.codes()))
        return out

    def linear(self, x: Buffer, weight: list[Tiles], residual: Buffer | None = None) -> Buffer:
        starts = np.cumsum([0] + [t.rows for t in weight])
        span = max(int(s) + 16 * t.row_tiles for s, t in zip(starts, weight))
        out = self._new(x.rows, int(starts[-1]), span=span)
        start = 0
        for tiles in weight:
            self._linear_part(out, start, x, tiles, residual)
            start += tiles.rows
        return out

    def _linear_part(self, out: Buffer, start: int, x: Buffer, tiles: Tiles, residual: Buffer | None) -> None:
        form, n = tiles.format, x.rows
        rows_each = max(1, WORK_BYTES // form.tile_bytes)
        tokens_each = 64 if n > FEW_TOKENS else n
        work = -(-tiles.row_tiles // rows_each) * -(-n // max(tokens_each, 1))
        place = (
            out.address + start * 4,
            out.stride_bytes,
            tiles.data,
            form.tile_bytes,
            tiles.row_tiles,
            rows_each,
        )
        bias = 0 if tiles.bias is None else tiles.bias
        extra = (bias, residual.address + start * 4, residual.stride_bytes) if residual else (bias, 0, 0)
        if form.bits:
            q, meta = self._codes(x)
            groups = (form.inputs // form.group_size, form.group_size // 32)
            operands: tuple[Any, ...] = (q, form.inputs, meta, n, tokens_each, *groups)
        else:
            operands = (x.address, x.stride_bytes, n, tokens_each, form.inputs)
        self._program.add(self._linear_kernel(tiles), work if n else 0, (*place, *operands, *extra))

    def _codes(self, x: Buffer) -> tuple[int, int]:
        """The int8 planes of a buffer, made now if no producer did."""
        if x.quantized is None:
            memory = self._program.memory
            x.quantized = (Block(memory, x.rows * x.width * 2), Block(memory, x.rows * x.width))
            self._program.add(rows.quantize, x.rows, (x.address, x.stride_bytes, *x.codes(), x.width))
        return x.codes()

    def split(self, x: Buffer, widths: Sequence[int]) -> list[Buffer]:
        starts = np.cumsum([0, *widths[:-1]])
        return [Buffer(x.block, x.address + int(s) * 4, x.rows, width, x.stride) for s, width in zip(starts, widths)]

    def rope(self, x: Buffer, heads: int, positions: Any, rope: Any) -> Rotated:
        def record() -> Buffer:
            out = self._new(x.rows, x.width)
            place = (out.address, out.stride_bytes, x.address, x.stride_bytes, positions, rope)
            self._program.add(_rope_kernel, x.rows, (*place, heads, x.width // heads, rope.shape[1] // 2))
            return out

        return Rotated(x, rope, record)

    def append(self, cache: KVCache, layer: int, k: Buffer | Rotated, v: Buffer, step: Step) -> None:
        pages: _Pages = cache.pages
        padded = attention.padded_dim(pages.head_dim)
        k, rotation = _unrotated(k)
        source = (k.address, k.stride_bytes, v.address, v.stride_bytes)
        sizes = (pages.page_bytes, pages.kv_heads, pages.head_dim, padded)
        scratch = padded * 4
        place = (*self._where(step, cache), *self._layer(pages, layer), *sizes)
        arguments = (*source, *place, *rotation, self._scratch_memory(scratch), scratch)
        self._program.add(kv_pages.append, k.rows, arguments)

    @staticmethod
    def _where(step: Step, cache: KVCache) -> tuple[Any, ...]:
        return step.positions, step.slots, cache.block_table, cache.block_table.shape[1]

    @staticmethod
    def _layer(pages: _Pages, layer: int) -> tuple[int, int]:
        start = layer * pages.layer_bytes
        return pages.keys.ctypes.data + start, pages.values.ctypes.data + start

    def attention(
        self, q: Buffer | Rotated, cache: KVCache, layer: int, step: Step, scale: float, window: int, softcap: float
    ) -> Buffer:
        pages: _Pages = cache.pages
        shape = (pages.group, pages.head_dim)
        q, rotation = _unrotated(q)
        out = self._new(q.rows, q.width)
        scratch = attention.scratch_bytes(*shape)
        source = (q.address, q.stride_bytes, *self._where(step, cache), *self._layer(pages, layer))
        memory = (pages.page_bytes, pages.kv_heads, self._scratch_memory(scratch), scratch)
        common = (*source, *memory, *rotation, window, float(scale), float(softcap))
        if q.rows > FEW_TOKENS:
            each = attention.tokens_each(pages.group, step.positions, step.slots)
            tiles = -(-q.rows // each) * pages.kv_heads
            place: tuple[Any, ...] = (out.address, out.stride_bytes, q.rows, each)
            self._program.add(attention.attention_tokens(*shape), tiles, (*place, *common))
            return out
        tiles, most = q.rows * pages.kv_heads, -(-cache.capacity // attention.CHUNK)
        parts = Block(self._program.memory, tiles * most * attention.part_bytes(*shape))
        counters = np.zeros(tiles * 8, np.int64)
        place = (out.address, out.stride_bytes, parts.address, most, self._program.chunks, counters)
        self._program.add(attention.attention_chunks(*shape), tiles, (*place, *common), by_chunks=True)
        return out

    def _scratch_memory(self, each: int) -> NDArray[np.uint8]:
        """Scratch for every thread; programs keep the one that they were recorded with alive."""
        if len(self._scratch) < each * self.threads:
            self._scratch = np.empty(each * self.threads, np.uint8)
        return self._scratch

    def activation(self, x: Buffer, kind: str, gated: bool) -> Buffer:
        width = x.width // 2 if gated else x.width
        out = self._new(x.rows, width, quantized=True)
        place = (out.address, out.stride_bytes, x.address, x.stride_bytes)
        self._program.add(rows.activation, x.rows, (*place, width, ACTIVATIONS[kind], gated, *out.codes()))
        return out

    def add(self, a: Buffer, b: Buffer) -> Buffer:
        out = self._new(a.rows, a.width)
        sources = (a.address, a.stride_bytes, b.address, b.stride_bytes, a.width)
        self._program.add(rows.add_rows, a.rows, (out.address, out.stride_bytes, *sources))
        return out

    def take(self, x: Buffer, rows: Any) -> Buffer:
        out = self._new(len(rows), x.width)
        arguments = (out.address, out.stride_bytes, x.address, x.stride_bytes, rows, x.width)
        self._program.add(_take_kernel, len(rows), arguments)
        return out

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        out = self._new(x.rows, x.width)
        arguments = (out.address, out.stride_bytes, x.address, x.stride_bytes, x.width, float(cap))
        self._program.add(rows.softcap, x.rows, arguments)
        return out


# The methods `rope` and `take` have parameters named like the modules.
_rope_kernel, _take_kernel = rope.rope, rows.take


def _embed_kernel(form: Format) -> Kernel:
    """What looks rows of a format up."""
    if form.byte_scales:
        return pack.embed_byte_scales
    return pack.embed_quantized if form.bits else pack.embed_floats


def _zeros(nbytes: int) -> NDArray[np.uint8]:
    """Zeros that start on a cache line: vectors that straddle two cost a tenth of attention's speed."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def _padded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 with zeros up to a whole vector."""
    out = np.zeros(-(-len(values) // 16) * 16, np.float32)
    out[: len(values)] = values
    return out
