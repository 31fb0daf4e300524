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

from cpu_kernels import attention, kv_pages, pack, rope, rows
from cpu_kernels.code_cache import cache_folder
from cpu_kernels.compile import Kernel, compile_all
from cpu_kernels.threads import shared_pool
from ondevice import __version__
from ondevice.checkpoint import tile_files
from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.machine import default_threads
from ondevice.ops.base import Body, Handle, Ops, Step
from ondevice.ops.cpu_activations import ACTIVATIONS
from ondevice.ops.cpu_attention import Pages, PartedPages, record_append, record_attention, topk_kernels
from ondevice.ops.cpu_memory import WeightMemory, padded
from ondevice.ops.cpu_products import product_kernels, record_linear
from ondevice.ops.cpu_profile import PartTime, add_times
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_selection import KERNELS as SELECTORS
from ondevice.ops.cpu_skipping import CpuSkipping
from ondevice.ops.cpu_tile_cache import TileCache
from ondevice.ops.cpu_weights import FLOAT_CODES, Format, Tiles, pack_rows
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

KEPT_PROGRAMS = 4
"""Programs kept per cache: the decode step of the last batch sizes and the prompt chunks of the last lengths."""


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    centred: bool
    eps: float


class CpuOps(CpuSkipping, Ops):
    """Numba kernels on a pool of threads. Activations are float32, keys and values float16.

    Args:
        threads: number of threads; by default one per core that this process may use.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        self.threads = threads or default_threads()
        self.pool = shared_pool(self.threads)
        self._memory = WeightMemory()
        self._tiles: TileCache | None = None
        self._kernels: dict[Kernel, None] = {}
        self._programs: weakref.WeakKeyDictionary[KVCache, dict[Any, Program]] = weakref.WeakKeyDictionary()
        self._recording: Recording | None = None
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
            self._kernels.update(dict.fromkeys(product_kernels(tiles)))
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
        values = padded(dequantize(weight) + np.float32(offset))
        return _Norm(values, None if bias is None else padded(dequantize(bias)), kind == "layer", eps)

    def pack_rope(self, inverse_frequencies: Any, attention_factor: float, context: int) -> Any:
        angle = np.arange(context)[:, None] * inverse_frequencies
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * np.float32(attention_factor)

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compiles every kernel that a model's steps can need, telling `progress` (done, of how many, what)."""
        shape = (spec.group, spec.head_dim)
        kernels = [*self._kernels, rows.norm, rows.activation, rows.take, rows.quantize, kv_pages.append]
        if spec.rope_parts > 1:
            kernels += topk_kernels(*shape, spec.head_dim // spec.rope_parts)
        else:
            kernels += [f(*shape) for f in (attention.attention_tokens, attention.attention_chunks)]
        kernels += [rows.add_rows] if spec.post_norms or spec.position_offset is not None else []
        kernels += [rows.softcap] if spec.logit_softcap else []
        kernels += [rows.mask, *SELECTORS] if spec.sparsity and "ffn" in spec.sparsity.skips else []
        compile_all(kernels, progress)

    def trial(self) -> CpuOps:
        return CpuOps(self.threads)

    def timing_key(self) -> str:
        # The folder's name stands for the kernels' sources and the instruction set.
        return f"{self.name}, {self.threads} threads, {__version__}, {cache_folder().name}"

    # Cache and steps

    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Pages | PartedPages:
        if spec.rope_parts > 1:
            return PartedPages.new(spec, max(pages), page, spec.head_dim // spec.rope_parts)
        return Pages.new(spec, max(pages), page)

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
            self._count_run(program.each_run)
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
        self._now.program.part = name

    def _record(self, step: Step, body: Body) -> Program:
        program = Program(step)
        self._recording = Recording(program, self.threads, self._scratch)
        try:
            result: Buffer = self._now.floats(body(program.step))
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
    def _now(self) -> Recording:
        if self._recording is None:
            raise RuntimeError("operations of the CPU table are recorded inside run() only")
        return self._recording

    # Operations

    def embed(self, table: Tiles, rows: Any, scale: float = 1.0, offset: int = 0) -> Buffer:
        form, layout = table.format, table.format.layout
        out = self._now.new(len(rows), form.inputs)
        place = (out.address, out.stride_bytes, table.data, form.tile_bytes, rows, offset, form.inputs)
        how: tuple[int, ...] = (FLOAT_CODES.get(form.kind, 0),)
        if layout and layout.kind in ("k16", "k32"):
            how = (layout.bits, layout.symmetric)
        elif layout:
            how = (layout.bits, layout.group_size, layout.scale_bytes, layout.symmetric)
        self._now.program.add(_embed_kernel(form), len(rows), (*place, *how, float(scale)))
        return out

    def norm(self, x: Buffer, weight: _Norm, heads: int = 1) -> Buffer:
        source, bias = self._now.floats(x), 0 if weight.bias is None else weight.bias
        settings = (bias, x.width // heads, heads, weight.centred, float(weight.eps))
        arguments = (source.address, source.stride_bytes, weight.weight, *settings)
        out = self._now.later(x.rows, x.width, rows.norm, source, arguments)
        # Norms of heads never feed a linear.
        return out if heads == 1 else self._now.floats(out)

    def linear(self, x: Buffer, weight: list[Tiles], residual: Buffer | None = None) -> Buffer:
        return record_linear(self._now, x, weight, residual)

    def split(self, x: Buffer, widths: Sequence[int]) -> list[Buffer]:
        starts, source = np.cumsum([0, *widths[:-1]]), self._now.floats(x)
        return [
            Buffer(x.rows, width, x.stride, source.block, source.address + int(s) * 4)
            for s, width in zip(starts, widths)
        ]

    def rope(self, x: Buffer, heads: int, positions: Any, rope: Any) -> Buffer:
        source = self._now.floats(x)
        arguments = (source.address, source.stride_bytes, positions, rope, heads, x.width // heads, rope.shape[1] // 2)
        return self._now.later(x.rows, x.width, _rope_kernel, source, arguments)

    def append(self, cache: KVCache, layer: int, k: Buffer, v: Buffer, step: Step) -> None:
        record_append(self._now, k, v, cache, layer, step)

    def attention(
        self,
        q: Buffer,
        cache: KVCache,
        layer: int,
        step: Step,
        scale: float,
        window: int,
        softcap: float,
        heads: HeadSelection | None = None,
    ) -> Buffer:
        if heads is None:
            self._now.program.count("heads", None, 0)
        chosen = None if heads is None else self._head_mask(heads)
        return record_attention(self._now, q, cache, layer, step, scale, window, softcap, chosen)

    def activation(self, x: Buffer, kind: str, gated: bool) -> Buffer:
        width, source = x.width // 2 if gated else x.width, self._now.floats(x)
        arguments = (source.address, source.stride_bytes, width, ACTIVATIONS[kind], gated)
        return self._now.later(x.rows, width, rows.activation, source, arguments)

    def add(self, a: Buffer, b: Buffer) -> Buffer:
        out = self._now.new(a.rows, a.width)
        sources = [v for x in (self._now.floats(a), self._now.floats(b)) for v in (x.address, x.stride_bytes)]
        self._now.program.add(rows.add_rows, a.rows, (out.address, out.stride_bytes, *sources, a.width))
        return out

    def take(self, x: Buffer, rows: Any) -> Buffer:
        source = self._now.floats(x)
        if len(rows) == x.rows == 1:
            return source
        out = self._now.new(len(rows), x.width)
        arguments = (out.address, out.stride_bytes, source.address, source.stride_bytes, rows, x.width)
        self._now.program.add(_take_kernel, len(rows), arguments)
        return out

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        out, source = self._now.new(x.rows, x.width), self._now.floats(x)
        arguments = (out.address, out.stride_bytes, source.address, source.stride_bytes, x.width, float(cap))
        self._now.program.add(rows.softcap, x.rows, arguments)
        return out


# The methods `rope` and `take` have parameters named like the modules.
_rope_kernel, _take_kernel = rope.rope, rows.take


def _embed_kernel(form: Format) -> Kernel:
    """What looks rows of a format up."""
    if form.layout and form.layout.kind in ("k16", "k32"):
        return pack.embed_byte_scales
    return pack.embed_quantized if form.layout else pack.embed_floats


def _tiles_of(handle: Handle) -> tuple[str, Sequence[Tiles]]:
    """Use and tiles of a handle that one of the `pack_` methods gave."""
    if isinstance(handle, Tiles):
        return "embedding", [handle]
    return ("tied", handle[1]) if isinstance(handle, tuple) else ("linear", handle)
