"""Runs the cases of `cases_attention` on the CPU table: fills a cache, then attends with some of the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_attention import PartedPages
from tests.kernels.cases_attention import Case, TopkCase
from tests.tiny import tiny_spec

Attend = Callable[[CpuOps, Any, KVCache, Step], Any]
"""Records attention of the queries."""


class Paged:
    """A case's keys and values in the pages of a cache, whose unwritten rest is NaN."""

    def __init__(self, ops: CpuOps, case: Case) -> None:
        heads, kv_heads, dh = case.shape
        spec = tiny_spec(n_layers=2, n_heads=heads, n_kv_heads=kv_heads, head_dim=dh, context_length=1 << 14)
        self.ops, self.case, self.runs = ops, case, itertools.count()
        self.cache = KVCache(ops, spec, len(case.lengths), max(*case.lengths, 1))
        if isinstance(case, TopkCase):
            self.cache.pages = PartedPages.new(spec, self.cache.block_table.size, self.cache.page, case.first_dims)
        for name in ("keys", "values", "firsts", "rests"):
            if hasattr(self.cache.pages, name):
                getattr(self.cache.pages, name)[:] = np.nan
        # Pages of sequences alternate, as they do when sequences grow together.
        for length in range(0, max(case.lengths), self.cache.page):
            for slot, n in enumerate(case.lengths):
                if length < n:
                    self.cache.reserve(slot, min(n, length + self.cache.page))
        self._fill()

    def _fill(self) -> None:
        tables = [self.ops.pack_embedding(np.concatenate(x).reshape(-1, self.case.shape[1] * self.case.shape[2]))
                  for x in zip(*self.case.cached())]  # fmt: skip
        slots = np.repeat(np.arange(len(self.case.lengths)), self.case.lengths).astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in self.case.lengths]).astype(np.int32)

        def body(step: Step) -> Any:
            k, v = (self.ops.embed(table, step.tokens) for table in tables)
            self.ops.append(self.cache, 1, k, v, step)
            return k

        if len(slots):
            self.ops.run(Step(np.arange(len(slots)), positions, slots, np.arange(len(slots))), self.cache, body, "fill")

    def run(self, attend: Attend, tokens: Sequence[int] | None = None) -> NDArray[np.float32]:
        """[tokens, heads, head dim]. tokens: some of the case's, in any order; all by default."""
        case, some = self.case, np.arange(len(self.case.asked)) if tokens is None else np.array(tokens)
        table = self.ops.pack_embedding(case.queries().reshape(len(case.asked), -1))
        slots, positions = np.array(case.asked, np.int32)[some].T

        def body(step: Step) -> Any:
            return attend(self.ops, self.ops.embed(table, step.tokens), self.cache, step)

        # No run may be served by the program of another one.
        name = f"run {next(self.runs)}"
        out = self.ops.run(Step(some, positions, slots, np.arange(len(some))), self.cache, body, name)
        return out.reshape(len(some), case.shape[0], case.shape[2])
