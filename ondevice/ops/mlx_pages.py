"""Keys and values of all layers on MLX's device: a pair of arrays for each layer, which steps change in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from ondevice.ops.mlx_step import MlxStep, Visible


@dataclass(frozen=True, slots=True)
class Pages:
    """Storage of a cache.

    Args:
        keys, values: of each layer [kv heads, pages, page, head dim].
    """

    keys: list[Any]
    values: list[Any]

    @classmethod
    def empty(cls, layers: int, shape: tuple[int, int, int, int], dtype: Any) -> Pages:
        """Zeros: what was never written must not be NaN, since a mask multiplies it by 0."""
        return cls(*([mx.zeros(shape, dtype) for _ in range(layers)] for _ in range(2)))

    def arrays(self) -> list[Any]:
        """All of them, to be evaluated."""
        return [*self.keys, *self.values]

    def layer(self, layer: int) -> tuple[Any, Any]:
        """Keys and values of a layer, whole."""
        return self.keys[layer], self.values[layer]

    def append(self, layer: int, k: Any, v: Any, step: MlxStep) -> None:
        """Writes keys and values [N, kv heads * head dim] to the places of a step."""
        for stores, new in ((self.keys, k), (self.values, v)):
            store = stores[layer]
            # MLX writes in place where nobody else holds the array, so neither the list nor this frame may.
            stores[layer] = None
            heads, _, _, width = shape = store.shape
            rows = new.reshape(-1, heads, width).swapaxes(0, 1).astype(store.dtype)
            flat = store.reshape(heads, -1, width)
            del store
            if step.start is None:
                flat[:, step.flat.device] = rows
            else:
                flat[:, step.start : step.start + len(step.flat)] = rows
            stores[layer] = flat.reshape(shape)
            del flat

    def read(self, layer: int, seen: Visible) -> tuple[Any, Any]:
        """Keys and values [S, kv heads, L, head dim] that a segment sees: without a copy where they lie together."""
        return _read(self.keys[layer], seen), _read(self.values[layer], seen)


def _read(store: Any, seen: Visible) -> Any:
    flat = store.reshape(store.shape[0], -1, store.shape[3])
    if seen.start is not None:
        return flat[None, :, seen.start : seen.start + seen.keys]
    return mx.take(flat, seen.flat, axis=1).swapaxes(0, 1)
