"""The reference table: NumPy in float64, written to be obviously right. The judge of every other table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.ops.base import Body, Step
from ondevice.ops.reference_activation import activate
from ondevice.ops.reference_skipping import ReferenceSkipping
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: F64
    bias: F64 | None
    kind: str
    eps: float


class ReferenceOps(ReferenceSkipping):
    """float64 weights, activations and cache.

    Args:
        dtype: arithmetic type; float32 halves memory where a long run matters more than the last digits.
    """

    name = "reference"

    def __init__(self, dtype: Any = np.float64) -> None:
        super().__init__(dtype)

    def _float(self, tensor: Tensor) -> NDArray[Any]:
        return dequantize(tensor, self.dtype)

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
        joined = np.concatenate([self._float(w) for w in weights])
        parts = [np.zeros(w.shape[0], self.dtype) if b is None else self._float(b) for w, b in zip(weights, biases)]
        return joined, np.concatenate(parts)

    def pack_embedding(self, table: Tensor) -> Any:
        return self._float(table)

    def pack_tied(self, table: Tensor) -> tuple[Any, Any]:
        values = self._float(table)
        return values, (values, np.zeros(len(values), self.dtype))

    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> Any:
        return _Norm(self._float(weight) + offset, None if bias is None else self._float(bias), kind, eps)

    def pack_rope(self, inverse_frequencies: F64, attention_factor: float, context: int) -> Any:
        return inverse_frequencies, attention_factor

    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Any:
        shape = (spec.n_layers, max(pages), page, spec.n_kv_heads, spec.head_dim)
        return np.zeros(shape, self.dtype), np.zeros(shape, self.dtype)

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Nothing to compile."""

    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        return np.asarray(body(step), np.float32)

    def embed(self, table: Any, rows: Any, scale: float = 1.0, offset: int = 0) -> Any:
        return table[rows + offset] * scale

    def norm(self, x: Any, weight: _Norm, heads: int = 1) -> Any:
        y = x.reshape(len(x), heads, x.shape[1] // heads)
        if weight.kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + weight.eps) * weight.weight
        if weight.bias is not None:
            y = y + weight.bias
        return y.reshape(x.shape)

    def linear(self, x: Any, weight: Any, residual: Any = None) -> Any:
        matrix, bias = weight
        y = x @ matrix.T + bias
        return y if residual is None else y + residual

    def split(self, x: Any, widths: Sequence[int]) -> list[Any]:
        return np.split(x, np.cumsum(widths)[:-1], axis=1)

    def rope(self, x: Any, heads: int, positions: Any, rope: Any) -> Any:
        frequencies, factor = rope
        half = len(frequencies)
        angle = positions[:, None, None] * frequencies
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        y = x.reshape(len(x), heads, -1).copy()
        a, b = y[..., :half].copy(), y[..., half : 2 * half].copy()
        y[..., :half] = a * cos - b * sin
        y[..., half : 2 * half] = a * sin + b * cos
        return y.reshape(x.shape)

    def append(self, cache: KVCache, layer: int, k: Any, v: Any, step: Step) -> None:
        pages = cache.block_table[step.slots, step.positions // cache.page]
        inside = step.positions % cache.page
        for store, values in zip(cache.pages, (k, v)):
            store[layer, pages, inside] = values.reshape(len(values), *store.shape[3:])

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
        out = np.empty_like(q)
        for slot in np.unique(step.slots):
            rows = np.flatnonzero(step.slots == slot)
            positions = step.positions[rows]
            length = int(positions.max()) + 1
            pages = cache.block_table[slot, : -(-length // cache.page)]
            k, v = (s[layer, pages].reshape(-1, *s.shape[3:])[:length] for s in cache.pages)
            key = np.arange(length)
            seen = key <= positions[:, None]
            if window:
                seen &= key > positions[:, None] - window
            dh = k.shape[-1]
            queries = q[rows].reshape(len(rows), -1, dh)
            group = queries.shape[1] // k.shape[1]
            for head in range(queries.shape[1]):
                scores = queries[:, head] @ k[:, head // group].T * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                scores = np.where(seen, scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                weights /= weights.sum(axis=-1, keepdims=True)
                out[rows, head * dh : (head + 1) * dh] = weights @ v[:, head // group]
        return self.only_heads(out, heads, cache, layer, step, window)

    def activation(self, x: Any, kind: str, gated: bool) -> Any:
        if gated:
            half = x.shape[1] // 2
            return activate(x[:, :half], kind) * x[:, half:]
        return activate(x, kind)

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def take(self, x: Any, rows: Any) -> Any:
        return x[rows]

    def softcap(self, x: Any, cap: float) -> Any:
        return cap * np.tanh(x / cap)
