"""Keys and values of all layers on torch's device, which steps change in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ondevice.ops.torch_step import TorchStep, Visible


@dataclass(slots=True)
class Pages:
    """Storage of a cache.

    Args:
        keys, values: of each layer [pages, page, kv heads, head dim].
        recorded: steps that were recorded for this storage, by what tells them apart.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    recorded: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Pages:
        """Zeros: what was never written must not be NaN, since a mask multiplies it by 0."""
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2))
        return cls(keys, values)

    def forget_gradients(self) -> None:
        """Cuts what is stored from the steps that made it, which a new step must not differentiate again."""
        for store in (*self.keys, *self.values):
            store.detach_()

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, step: TorchStep) -> None:
        """Writes keys and values [N, kv heads * head dim] to the places of a step."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            flat = store.view(-1, *store.shape[2:])
            flat.index_copy_(0, step.flat, new.view(-1, *store.shape[2:]).to(store.dtype))

    def read(self, layer: int, seen: Visible) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, L, kv heads, head dim] that a segment sees."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.view(-1, *keys.shape[2:])[seen.flat], values.view(-1, *values.shape[2:])[seen.flat]
