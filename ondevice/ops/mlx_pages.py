"""Keys and values of all layers on MLX's device, as floats or in affine groups; steps change them in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ondevice.ops.mlx_bytes import kv_group

if TYPE_CHECKING:
    from ondevice.ops.mlx_step import Places, Visible


@dataclass(frozen=True, slots=True)
class Pages:
    """Storage of a cache.

    Args:
        keys, values: of each layer [kv heads, its pages, page, head dim]; of quantized ones the codes, scales and
            biases, whose last axes are shorter.
        dtype: of keys and values, or of their scales.
        bits, group: of quantized ones; else 0.
    """

    keys: list[list[Any]]
    values: list[list[Any]]
    dtype: Any
    bits: int = 0
    group: int = 0

    @classmethod
    def empty(cls, kv_heads: int, pages: Sequence[int], page: int, head_dim: int, dtype: Any, bits: int = 0) -> Pages:
        """Zeros: what was never written must not be NaN, since a mask multiplies it by 0.

        Args:
            pages: of each layer.
            bits: of quantized ones; 0 for floats.

        Raises:
            OptionError: heads that make no whole groups.
        """
        group = kv_group(head_dim, bits) if bits else 0
        columns = [(head_dim, dtype)]
        if bits:
            columns = [(head_dim * bits // 32, mx.uint32), *[(head_dim // group, dtype)] * 2]

        def stores() -> list[list[Any]]:
            return [[mx.zeros((kv_heads, own, page, width), kind) for width, kind in columns] for own in pages]

        return cls(stores(), stores(), dtype, bits, group)

    def arrays(self) -> list[Any]:
        """All of them, to be evaluated."""
        return [array for stores in (self.keys, self.values) for parts in stores for array in parts]

    def snapshot(self) -> list[list[Any]]:
        """The arrays as they are. While somebody holds it, steps copy what they would write in place."""
        return [list(parts) for parts in (*self.keys, *self.values)]

    def restore(self, snapshot: list[list[Any]]) -> None:
        """Puts arrays in the place of those that are there."""
        for parts, before in zip((*self.keys, *self.values), snapshot):
            parts[:] = before

    def layer(self, layer: int) -> tuple[Any, Any]:
        """Keys and values of a layer, whole, of floats."""
        return self.keys[layer][0], self.values[layer][0]

    def append(self, layer: int, k: Any, v: Any, places: Places) -> None:
        """Writes keys and values [N, kv heads * head dim] to the places of a step's tokens."""
        for stores, new in ((self.keys, k), (self.values, v)):
            parts = stores[layer]
            rows = new.reshape(len(new), parts[0].shape[0], -1).swapaxes(0, 1).astype(self.dtype)
            written = mx.quantize(rows, self.group, self.bits) if self.bits else (rows,)
            for i, part in enumerate(written):
                _write(parts, i, part, places)

    def read(self, layer: int, seen: Visible) -> tuple[Any, Any]:
        """Keys and values [S, kv heads, L, head dim] that a segment sees: without a copy where they lie together."""
        return self._read(self.keys[layer], seen), self._read(self.values[layer], seen)

    def _read(self, parts: list[Any], seen: Visible) -> Any:
        if not self.bits:
            return _take(parts[0], seen)
        codes, scales, biases = (_take(part, seen) for part in parts)
        return mx.dequantize(codes, scales, biases, self.group, self.bits)


def _write(parts: list[Any], i: int, rows: Any, places: Places) -> None:
    """Puts rows [kv heads, N, width] into a store.

    MLX writes in place if nobody else holds the array when the step is evaluated, so no other reference may be kept.
    """
    shape = parts[i].shape
    flat = parts[i].reshape(shape[0], -1, shape[3])
    if places.start is None:
        flat[:, places.index.device] = rows
    else:
        flat[:, places.start : places.start + len(places.index)] = rows
    parts[i] = flat.reshape(shape)


def _take(store: Any, seen: Visible) -> Any:
    flat = store.reshape(store.shape[0], -1, store.shape[3])
    if seen.start is not None:
        return flat[None, :, seen.start : seen.start + seen.keys]
    return mx.take(flat, seen.flat, axis=1).swapaxes(0, 1)
