"""One step on torch's device: index lists, and where each token's keys lie in the pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ondevice.ops.base import Step
from ondevice.ops.paged_step import flat_places, is_single, order_of, parts_of

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Visible:
    """Keys that the tokens of a segment see, from the oldest that any of them sees to the newest.

    Args:
        flat: int64 [S, L], places in the pages laid end to end.
        mask: bool [S, n, L], keys that each token sees.
        counts: int [S, n], how many those are.
    """

    flat: torch.Tensor
    mask: torch.Tensor
    counts: NDArray[np.int64]


@dataclass(slots=True)
class Segment:
    """Tokens of a step that are attended to together: S sequences with n tokens each.

    Args:
        rows: of the step, int [S * n]; None for all in their order.
        slots: int32 [S].
        positions: int32 [S, n].
        device: of the step.
    """

    rows: NDArray[np.int64] | None
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    device: torch.device
    _visible: dict[int, Visible] = field(default_factory=dict)

    def visible(self, cache: KVCache, window: int) -> Visible:
        """What the tokens see of their sequences. window: keys, counting the token's own; 0 for all."""
        if window not in self._visible:
            self._visible[window] = self._look(cache, window)
        return self._visible[window]

    def _look(self, cache: KVCache, window: int) -> Visible:
        at = self.positions.astype(np.int64)
        last = at.max(axis=1)
        first = np.maximum(at.min(axis=1) + 1 - window, 0) if window else np.zeros_like(last)
        key = first[:, None] + np.arange(int((last - first).max()) + 1)
        seen = key[:, None, :] <= at[:, :, None]
        if window:
            seen &= key[:, None, :] > at[:, :, None] - window
        counts = np.minimum(at + 1, window) if window else at + 1
        # Beyond a sequence's newest key stands that key again, never another's: 0 times another's NaN would be NaN.
        flat = flat_places(cache.block_table, self.slots[:, None], np.minimum(key, last[:, None]), cache.page)
        return Visible(torch.from_numpy(flat).to(self.device), torch.from_numpy(seen).to(self.device), counts)


@dataclass(frozen=True, slots=True)
class TorchStep(Step):
    """A step whose lists are int64 tensors.

    Args:
        flat: int64 [N], places of the tokens in the pages laid end to end.
        lengths: int32 [N], keys that each token sees, its own among them.
        table: int32 [N, pages of a slot], of each token's slot.
        single: whether each token is of another sequence, as in decoding.
        segments: that together hold all tokens; none in a recorded step.
        order: int64 [N], which row of the segments' joined results is which token; None where they are in order.
    """

    flat: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    single: bool
    segments: tuple[Segment, ...]
    order: torch.Tensor | None

    @classmethod
    def of(cls, step: Step, cache: KVCache, device: torch.device) -> TorchStep:
        """Puts a step that is given in NumPy's arrays on a device."""

        def put(array: NDArray[Any], kind: Any) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, kind)).to(device)

        parts = list(parts_of(step))
        order = order_of(parts)
        return cls(
            put(step.tokens, np.int64),
            put(step.positions, np.int64),
            put(step.slots, np.int64),
            put(step.outputs, np.int64),
            put(flat_places(cache.block_table, step.slots, step.positions, cache.page), np.int64),
            put(step.positions + 1, np.int32),
            put(cache.block_table[step.slots], np.int32),
            is_single(step),
            tuple(Segment(*part, device) for part in parts),
            None if order is None else put(order, np.int64),
        )
