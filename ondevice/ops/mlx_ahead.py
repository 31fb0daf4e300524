"""The next step of decoding, laid out while the device runs this one.

Laying a step out is work of Python for each operation, for which a device would wait. All of a step but its tokens is
known before: so it is laid out over a place for the tokens, which are put there when they have been chosen. Nothing of
it runs before that. (Were it to run ahead, pages of the cache would be in use twice, and MLX would copy them instead of
writing in place.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ondevice.ops.base import Step
from ondevice.ops.mlx_counts import Counts
from ondevice.ops.paged_step import is_single

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step that nobody has asked for yet.

    Args:
        key: what a step must be to be this one, but for its tokens.
        thread: that laid it out, and alone can run it: streams are a thread's own.
        tokens: int32 [N], to be overwritten.
        result: of the step, not computed.
        counts: of what it skips.
        pages: the cache's arrays after the step, not computed.
    """

    key: Any
    thread: object
    tokens: mx.array
    result: mx.array
    counts: Counts
    pages: list[list[mx.array]]


class Aheads:
    """At most one step ahead for each cache."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[KVCache, Ahead] = WeakKeyDictionary()
        self._threads = threading.local()

    def _thread(self) -> object:
        """Stands for the running thread. (Its number is given to another one when it has ended.)"""
        if not hasattr(self._threads, "itself"):
            self._threads.itself = object()
        return self._threads.itself

    def take(self, step: Step, cache: KVCache, name: str) -> Ahead | None:
        """What was laid out for a step, now with its tokens and part of the cache; None if that was another.

        Args:
            step: in NumPy's arrays.
            name: of what is run.
        """
        ahead = self._of.pop(cache, None)
        if ahead is None or ahead.thread is not self._thread() or ahead.key != _key(step, cache, name):
            return None
        cache.pages.restore(ahead.pages)
        np.array(ahead.tokens, copy=False)[:] = step.tokens
        return ahead

    def lay_out(
        self,
        step: Step,
        cache: KVCache,
        name: str,
        work: Callable[[Step, mx.array], tuple[mx.array, Counts]],
    ) -> None:
        """Lays out what will follow a step, if it is one of decoding and the cache has room.

        Args:
            step: in NumPy's arrays.
            work: given the step that follows and a place for its tokens, its result and what it counts; it changes the
                cache's arrays.
        """
        after = _following(step, cache)
        if after is None:
            return
        tokens, now = mx.array(after.tokens), cache.pages.snapshot()
        try:
            result, counts = work(after, tokens)
            key, pages = _key(after, cache, name), cache.pages.snapshot()
            self._of[cache] = Ahead(key, self._thread(), tokens, result, counts, pages)
        finally:
            cache.pages.restore(now)


def _following(step: Step, cache: KVCache) -> Step | None:
    n = len(step.tokens)
    if not n or len(step.outputs) != n or not is_single(step) or int(step.positions.max()) + 1 >= cache.capacity:
        return None
    for slot, position in zip(step.slots, step.positions):
        cache.reserve(int(slot), int(position) + 2 - int(cache.lengths[slot]))
    after = replace(step, tokens=np.zeros(n, np.int32), positions=step.positions + 1)
    cache.touch(after.slots, after.positions)
    return after


def _key(step: Step, cache: KVCache, name: str) -> Any:
    arrays = (step.slots, step.positions, step.outputs, cache.block_table[step.slots])
    return name, *(array.tobytes() for array in arrays)
