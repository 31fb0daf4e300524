"""Runs one op of any table on given rows: the rows go in as an embedding table and the result comes out like logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Ops, Step
from tests.tiny import tiny_spec


def step_of(n: int, outputs: int | None = None) -> Step:
    """Tokens 0..n-1 of slot 0 at positions 0..n-1."""
    index = np.arange(n, dtype=np.int32)
    return Step(index, index, np.zeros(n, np.int32), index[: n if outputs is None else outputs])


def run_rows(ops: Ops, x: NDArray[np.float32], body: Callable[[Ops, Any, Step], Any]) -> NDArray[np.float32]:
    """`body(ops, rows, step)` on the rows of x [N, d]."""
    table = ops.pack_embedding(x)
    cache = KVCache(ops, tiny_spec("llama", context_length=4096), 1, 64)
    return ops.run(step_of(len(x)), cache, lambda s: body(ops, ops.embed(table, s.tokens), s))
