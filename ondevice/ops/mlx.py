"""The MLX table: Apple silicon's GPU through Metal; elsewhere MLX's build for CPUs, which is slow and for tests.

Weights stay in their affine groups. The hidden state between layers is float32; normed inputs, weights, keys and
values are bfloat16 on a GPU and float32 on a CPU. MLX chooses kernels by the number of tokens, so a row of a batch
equals its single run up to rounding only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Quantized, Tensor, dequantize
from ondevice.errors import OptionError
from ondevice.ops.base import Body, Ops, Step
from ondevice.ops.mlx_activation import activate, activate_gated, fused, soft_cap
from ondevice.ops.mlx_ahead import Aheads
from ondevice.ops.mlx_attention import by_segments, full_attention
from ondevice.ops.mlx_bytes import KV_BITS
from ondevice.ops.mlx_counts import Counts
from ondevice.ops.mlx_device import find_device
from ondevice.ops.mlx_memory import MemoryGuard
from ondevice.ops.mlx_pages import Pages
from ondevice.ops.mlx_skipping import MlxSkipping
from ondevice.ops.mlx_step import Index, MlxStep, Segment
from ondevice.ops.mlx_weights import Joined, Matrix, expressible, pack_joined, pack_matrix, to_device
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

_LOG = logging.getLogger("ondevice")


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over d: weight and bias in float32."""

    weight: Any
    bias: Any
    kind: str
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Radians per position of each rotated pair, and a factor on cosine and sine; on the host."""

    frequencies: NDArray[np.float64]
    factor: float


class MlxOps(MlxSkipping, Ops):
    """One model's operations on MLX's default device.

    Args:
        kv_bits: 4 or 8 keep keys and values in so many bits; 0 in the table's type.

    Attributes:
        device: where they run.

    Raises:
        OptionError: other bits.
    """

    name = "mlx"
    rotates = True

    def __init__(self, kv_bits: int = 0) -> None:
        super().__init__()
        if kv_bits not in (0, *KV_BITS):
            raise OptionError(f"kv_bits is {kv_bits}; the mlx backend keeps keys and values in 4 or 8 bits, or floats")
        self.kv_bits = kv_bits
        self.device = find_device()
        self.memory = MemoryGuard.of(self.device)
        self._floats: list[Quantized] = []
        self._aheads = Aheads()

    @property
    def where(self) -> str:
        return self.device.name

    # Weights

    def admit(self, checkpoint: Checkpoint) -> None:
        self.memory.admit_weights(checkpoint)

    def _matrix(self, tensor: Tensor) -> Matrix:
        self._note(tensor)
        with mx.stream(self.device.stream):
            return pack_matrix(tensor, self.device.dtype)

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Joined:
        for tensor in weights:
            self._note(tensor)
        with mx.stream(self.device.stream):
            return pack_joined(weights, biases, self.device.dtype)

    def _note(self, tensor: Tensor) -> None:
        if isinstance(tensor, Quantized) and not expressible(tensor):
            self._floats.append(tensor)

    def pack_embedding(self, table: Tensor) -> Matrix:
        return self._matrix(table)

    def pack_tied(self, table: Tensor) -> tuple[Matrix, Joined]:
        matrix = self._matrix(table)
        return matrix, Joined((matrix,), None)

    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> Norm:
        with mx.stream(self.device.stream):
            parts = [to_device(dequantize(weight) + np.float32(offset), mx.float32)]
            parts += [] if bias is None else [to_device(dequantize(bias), mx.float32)]
            mx.eval(parts)
        return Norm(parts[0], None if bias is None else parts[1], kind, eps)

    def pack_rope(self, inverse_frequencies: NDArray[np.float64], attention_factor: float, context: int) -> Rope:
        return Rope(inverse_frequencies, attention_factor)

    # Cache

    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Pages:
        self.memory.admit_cache(spec, max(pages) * page, sum(pages) * page, self.kv_bits)
        with mx.stream(self.device.stream):
            made = Pages.empty(spec.n_kv_heads, pages, page, spec.head_dim, self.device.dtype, self.kv_bits)
            mx.eval(made.arrays())
        return made

    # One step

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Says what had to be made floats. (Metal compiles at the first step; MLX's own kernels are compiled.)"""
        if self._floats:
            more = sum(w.shape[0] * w.shape[1] * self.device.dtype.size - w.nbytes for w in self._floats)
            formats = sorted({f"{w.bits} bits in groups of {w.group_size}" for w in self._floats})
            _LOG.warning(
                "MLX has no kernels for %s: %d matrices run as floats, which takes %.2f GB more; "
                "`ondevice convert --bits 6` makes a model without them",
                *(" and ".join(formats), len(self._floats), more / 1e9),
            )
            self._floats.clear()

    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        with mx.stream(self.device.stream):
            try:
                ahead = self._aheads.take(step, cache, name)
                if ahead is None:
                    result = body(MlxStep.of(step)).astype(mx.float32)
                else:
                    result = ahead.result
                    self.counted.absorb(ahead.counts)
                # What nobody asked for must not be among them: MLX would compute all that it is made of.
                wanted = [result] if len(result) else []
                waiting = [*wanted, *cache.pages.arrays(), *self.counted.end_step()]
                mx.async_eval(waiting)
                self._aheads.lay_out(step, cache, name, lambda s, tokens: self._laid_out(s, tokens, body))
                mx.eval(waiting)
            except BaseException:
                # What is not evaluated can only be by this thread, and the next step may come from another.
                self.counted.drop_step()
                with suppress(RuntimeError):
                    mx.eval(cache.pages.arrays())
                raise
            self.counted.step_ended()
            return np.array(result) if wanted else np.zeros(result.shape, np.float32)

    def _laid_out(self, step: Step, tokens: mx.array, body: Body) -> tuple[mx.array, Counts]:
        """The result of a step that is not to be evaluated yet, and what it counts."""
        mine, self.counted = self.counted, Counts()
        try:
            planned = replace(MlxStep.of(step), tokens=Index(step.tokens, tokens))
            return body(planned).astype(mx.float32), self.counted
        finally:
            self.counted = mine

    def embed(self, table: Matrix, rows: Index, scale: float = 1.0, offset: int = 0) -> Any:
        index = rows.device + offset if offset else rows.device
        values = table.rows(index).astype(mx.float32)
        return values if scale == 1.0 else values * scale

    def norm(self, x: Any, weight: Norm, heads: int = 1) -> Any:
        y = x.reshape(len(x), heads, x.shape[1] // heads).astype(mx.float32)
        if weight.kind == "rms":
            y = mx.fast.rms_norm(y, weight.weight, weight.eps)
            y = y if weight.bias is None else y + weight.bias
        else:
            y = mx.fast.layer_norm(y, weight.weight, weight.bias, weight.eps)
        return y.reshape(x.shape).astype(self.device.dtype)

    def linear(self, x: Any, weight: Joined, residual: Any = None) -> Any:
        return weight.product(x, residual)

    def split(self, x: Any, widths: Sequence[int]) -> list[Any]:
        return list(mx.split(x, np.cumsum(widths)[:-1].tolist(), axis=1))

    def rope(self, x: Any, heads: int, positions: Index, rope: Rope) -> Any:
        cos, sin = self._rotation(positions, rope)
        half = len(rope.frequencies)
        y = x.reshape(len(x), heads, x.shape[1] // heads).astype(mx.float32)
        a, b, rest = mx.split(y, [half, 2 * half], axis=2)
        turned = [a * cos - b * sin, a * sin + b * cos, *([rest] if rest.shape[2] else [])]
        return mx.concatenate(turned, axis=2).reshape(x.shape).astype(x.dtype)

    def _rotation(self, positions: Index, rope: Rope) -> tuple[Any, Any]:
        """Cosines and sines [N, 1, dim / 2], from angles in float64: float32 has no digits left at late positions."""
        if id(rope) not in positions.rotations:
            angle = positions.host[:, None, None] * rope.frequencies
            both = ((f(angle) * rope.factor).astype(np.float32) for f in (np.cos, np.sin))
            cos, sin = (mx.array(values) for values in both)
            positions.rotations[id(rope)] = cos, sin
        return positions.rotations[id(rope)]

    def append(self, cache: KVCache, layer: int, k: Any, v: Any, step: Step) -> None:
        assert isinstance(step, MlxStep)
        cache.pages.append(layer, k, v, step.places(cache, layer))

    def attention(
        self,
        q: Any,
        cache: KVCache,
        layer: int,
        step: Step,
        scale: float,
        window: int,
        softcap: float,
        heads: HeadSelection | None = None,
    ) -> Any:
        assert isinstance(step, MlxStep)

        def attend(queries: Any, segment: Segment) -> Any:
            seen = segment.visible(cache, layer, window)
            keys, values = cache.pages.read(layer, seen)
            return full_attention(queries, keys, values, seen, scale, softcap)

        return self.only_heads(by_segments(q, step, attend), heads)

    def activation(self, x: Any, kind: str, gated: bool) -> Any:
        arrays: list[Any] = list(mx.split(x, 2, axis=1)) if gated else [x]
        function: Callable[..., Any] = activate_gated if gated else activate
        # On a CPU, MLX would start a compiler for it.
        return fused(function, kind)(*arrays) if self.device.gpu else function(*arrays, kind)

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def take(self, x: Any, rows: Index) -> Any:
        if len(rows) == len(x) and (rows.host == np.arange(len(x))).all():
            return x
        return x[rows.device] if len(rows) else x[:0]

    def softcap(self, x: Any, cap: float) -> Any:
        return soft_cap(x, cap)
