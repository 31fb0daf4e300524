"""One step on MLX's device: index lists that stay known on the host, and where each token's keys lie in the pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ondevice.ops.base import Step
from ondevice.ops.paged_step import flat_places, order_of, parts_of

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache


class Index:
    """int32 [N], on the host and on the device.

    Attributes:
        host: NumPy's.
        rotations: cosines and sines of these positions, by the id of a rope's handle: all layers share them.
    """

    __slots__ = ("_device", "host", "rotations")

    def __init__(self, host: NDArray[np.int32], device: Any = None) -> None:
        self.host = host
        self.rotations: dict[int, tuple[Any, Any]] = {}
        self._device = device

    @property
    def device(self) -> Any:
        """MLX's, made when first asked for."""
        if self._device is None:
            self._device = mx.array(self.host.astype(np.int32))
        return self._device

    def __len__(self) -> int:
        return len(self.host)


class Visible:
    """Keys that the tokens of a segment see, of the oldest that any of them sees to the newest.

    Args:
        table: int32 [slots, pages], where they lie.
        page: positions of a page.
        slots: int32 [S].
        at: int64 [S, n], positions of the tokens.
        window: keys that a token sees, counting its own; 0 for all.

    Attributes:
        keys: most keys of a sequence, L.
        counts: int64 [S, n], keys that each token sees.
        start: of the keys in the flat pages, where they lie side by side, so that nothing has to be gathered.
        causal: whether the mask is what "causal" means to MLX: each token of one sequence sees one key more.
    """

    __slots__ = (
        *("_at", "_first", "_flat", "_last", "_mask", "_page", "_slots", "_table", "_window"),
        *("causal", "counts", "keys", "start"),
    )

    def __init__(
        self, table: NDArray[np.int32], page: int, slots: NDArray[np.int32], at: NDArray[np.int64], window: int
    ) -> None:
        self._table, self._page, self._slots, self._at, self._window = table, page, slots, at, window
        self._last = at.max(axis=1)
        self._first = np.maximum(at.min(axis=1) + 1 - window, 0) if window else np.zeros_like(self._last)
        self.keys = int((self._last - self._first).max()) + 1
        self.counts = np.minimum(at + 1, window) if window else at + 1
        self.causal = len(at) == 1 and not window and bool((np.diff(at[0]) == 1).all())
        self.start = self._side_by_side()
        self._flat: Any = None
        self._mask: Any = None

    @property
    def hides(self) -> bool:
        """Whether there is a key that not all tokens of its sequence see."""
        return int(self.counts.min()) < self.keys

    @property
    def mask(self) -> Any:
        """bool [S, 1, n, L] of keys that are seen; None for all of them. It can be large: made when asked for."""
        if self._mask is None and self.hides:
            key, at = self._positions()[:, None, :], self._at[:, :, None]
            seen = key <= at
            if self._window:
                seen &= key > at - self._window
            self._mask = mx.array(seen[:, None])
        return self._mask

    @property
    def flat(self) -> Any:
        """int32 [S, L] of the keys' places in the flat pages."""
        if self._flat is None:
            # What is beyond a sequence's newest key is never another's: 0 times another's NaN would be NaN.
            inside = np.minimum(self._positions(), self._last[:, None])
            self._flat = mx.array(_flat(self._table, self._slots[:, None], inside, self._page))
        return self._flat

    def _positions(self) -> NDArray[np.int64]:
        return self._first[:, None] + np.arange(self.keys)

    def _side_by_side(self) -> int | None:
        if len(self._slots) > 1:
            return None
        page, first = self._page, int(self._first[0])
        pages = self._table[self._slots[0], first // page : int(self._last[0]) // page + 1]
        return None if (np.diff(pages) != 1).any() else int(pages[0]) * page + first % page


@dataclass(slots=True)
class Segment:
    """Tokens of a step that are attended to together: S sequences with n tokens each.

    Args:
        rows: of the step, int [S * n]; None for all in their order.
        slots: int32 [S].
        positions: int32 [S, n].
    """

    rows: NDArray[np.int64] | None
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    _visible: dict[tuple[int, int], Visible] = field(default_factory=dict)
    _paged: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def paged(self, cache: KVCache, layer: int) -> tuple[Any, Any]:
        """Keys of the last token of each sequence and before, int32 [S], and where their pages lie, int32 [S, pages].

        In a ring only the last of them are still there.
        """
        ring = cache.rings[layer]
        if ring not in self._paged:
            lengths = self.positions.max(axis=1).astype(np.int32) + 1
            pages = -(-int(lengths.max()) // cache.page)
            self._paged[ring] = mx.array(lengths), mx.array(cache.table(layer)[self.slots, :pages])
        return self._paged[ring]

    def visible(self, cache: KVCache, layer: int, window: int) -> Visible:
        """What the tokens see of their sequences. window: keys, counting the token's own; 0 for all."""
        key = (window, cache.rings[layer])
        if key not in self._visible:
            at = self.positions.astype(np.int64)
            self._visible[key] = Visible(cache.table(layer), cache.page, self.slots, at, window)
        return self._visible[key]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a step lie in a layer's flat pages.

    Args:
        index: int32 [N].
        start: the first of them if they lie side by side, else None.
    """

    index: Index
    start: int | None


@dataclass(frozen=True, slots=True)
class MlxStep(Step):
    """A step whose index lists are of class Index.

    Args:
        segments: that together hold all tokens.
        order: which row of the segments' joined results is which token; None where they are in order.
    """

    segments: tuple[Segment, ...]
    order: Any
    _places: dict[int, Places] = field(default_factory=dict)

    @property
    def decoding(self) -> bool:
        """Whether it has one token of each of its sequences."""
        return len(self.segments) == 1 and self.segments[0].positions.shape[1] == 1

    @classmethod
    def of(cls, step: Step) -> MlxStep:
        """Plans a step that is given in NumPy's arrays."""
        parts = list(parts_of(step))
        segments, rows = tuple(Segment(*part) for part in parts), order_of(parts)
        lists = (Index(step.tokens), Index(step.positions), Index(step.slots), Index(step.outputs))
        return cls(*lists, segments, None if rows is None else mx.array(rows))

    def places(self, cache: KVCache, layer: int) -> Places:
        """Where a layer's keys and values of the tokens go."""
        ring = cache.rings[layer]
        if ring not in self._places:
            flat = _flat(cache.table(layer), self.slots.host, self.positions.host, cache.page)
            beside = len(flat) > 0 and bool((np.diff(flat) == 1).all())
            self._places[ring] = Places(Index(flat), int(flat[0]) if beside else None)
        return self._places[ring]


def _flat(table: NDArray[np.int32], slots: NDArray[np.int32], positions: NDArray[Any], page: int) -> NDArray[np.int32]:
    """`flat_places` as MLX indexes with. (A layer of 2**31 positions fits no machine.)"""
    return flat_places(table, slots, positions, page).astype(np.int32)
