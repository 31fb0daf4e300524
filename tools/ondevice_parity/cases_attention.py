"""Cases of attention of one new token: `selective_attention` and `topk_attention`.

What no token may use is NaN: keys beyond a length, and those of KV heads that nobody listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice_parity.check import F64, NO_INDEX, Home, Outcome, Table, close, lists, mask_of, numbers, row_list


@dataclass(frozen=True)
class AttentionCase:
    """Sequences with random keys and values.

    Args:
        shape: query heads, KV heads, head dim.
        lengths: of the sequences.
        counts: units of each list, in turn; None for no lists.
        page: positions of a page; 0 for a cache that is one piece for each sequence.
        strided: queries and a cache with other numbers between them.
        repeated: lists that name a unit twice.
        growing: keys that are longer at the end.
        drifting: keys whose mean is another at each position.
    """

    shape: tuple[int, int, int]
    lengths: tuple[int, ...]
    counts: tuple[int, ...] | None = (0, 1, 2, -1, -2)
    unit: str = "head"
    dtype: str = "float32"
    page: int = 64
    window: int = 0
    softcap: float = 0.0
    strided: bool = False
    repeated: bool = False
    growing: bool = False
    drifting: bool = False

    @property
    def units(self) -> int:
        return self.shape[0 if self.unit == "head" else 1]

    def run_heads(self, chosen: list[list[int]] | None) -> NDArray[np.bool_]:
        """Which query heads run: bool [B, H]."""
        if chosen is None:
            return np.ones((len(self.lengths), self.shape[0]), bool)
        return np.repeat(mask_of(chosen, self.units), self.shape[0] // self.units, axis=1)

    def queries(self, rng: np.random.Generator, home: Home) -> tuple[F64, Any]:
        q = numbers(rng, self.dtype, len(self.lengths), self.shape[0], self.shape[2])
        if not self.strided:
            return q.astype(np.float64), home.array(q)
        wide = np.full((len(q), 2 * self.shape[0], self.shape[2] + 8), np.nan, q.dtype)
        wide[:, ::2, 8:] = q
        return q.astype(np.float64), home.array(wide)[:, ::2, 8:]

    def cached(self, rng: np.random.Generator, home: Home, run: NDArray[np.bool_]) -> tuple[list[tuple[F64, F64]], Any]:
        """Keys and values of each sequence [length, KV heads, dh], and the same as the kernels read them."""
        _, kv_heads, dh = self.shape
        n, page = len(self.lengths), self.page or max([1, *self.lengths]) + 5
        pages = max([1, *(-(-length // page) for length in self.lengths)]) + 1 if self.page else 1
        count = n * pages + 2 if self.page else n
        table = rng.permutation(count)[: n * pages].reshape(n, pages)
        stores = [np.full((2, count, page, kv_heads, dh), np.nan, numbers(rng, self.dtype, 1).dtype) for _ in range(2)]
        idle: NDArray[np.bool_] = np.logical_not(run.reshape(n, kv_heads, self.shape[0] // kv_heads).any(axis=2))
        found = []
        for i, length in enumerate(self.lengths):
            both = [numbers(rng, self.dtype, length, kv_heads, dh) for _ in range(2)]
            if self.growing:
                # The largest score is among the last keys, so what came before must shrink.
                both[0][-200:] *= 3
            if self.drifting:
                both[0] = (both[0] + np.linspace(0, 3, length)[:, None, None]).astype(both[0].dtype)
            both = [home.as_cached(part) for part in both]
            found.append((both[0].astype(np.float64), both[1].astype(np.float64)))
            at = np.arange(length)
            for store, part in zip(stores, both):
                part = part.copy()
                part[:, idle[i]] = np.nan
                if self.page:
                    store[1, table[i, at // page], at % page] = part
                else:
                    store[1, i, :length] = part
        for i, length in enumerate(self.lengths):
            table[i, -(-length // page) :] = NO_INDEX
        # As a cache of several layers lies in memory, or as one alone.
        keys, values = (home.array(s)[1] if self.strided else home.array(s[1]) for s in stores)
        lengths = home.array(np.array(self.lengths, np.int32))
        return found, home.view(keys, values, lengths, home.array(table.astype(np.int32)) if self.page else None)

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        n, (heads, kv_heads, dh) = len(self.lengths), self.shape
        chosen = None
        if self.counts is not None:
            chosen = lists(rng, [self.counts[i % len(self.counts)] for i in range(n)], self.units)
            chosen = [mine + mine[:1] for mine in chosen] if self.repeated else chosen
        run = self.run_heads(chosen)
        q, query = self.queries(rng, home)
        cached, view = self.cached(rng, home, run)
        rows = None if chosen is None else row_list(chosen, max([1, *map(len, chosen)]) + 2, home, padding=0)
        got = fn(query, view, rows, dh**-0.5, self.unit, self.window, self.softcap)
        expected = np.zeros((n, heads, dh))
        for i, (k, v) in enumerate(cached):
            first = max(0, self.lengths[i] - self.window) if self.window else 0
            for h in range(heads):
                if run[i, h] and self.lengths[i]:
                    scores = k[first:, h * kv_heads // heads] @ q[i, h] * dh**-0.5
                    scores = self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores
                    weights = np.exp(scores - scores.max())
                    expected[i, h] = weights @ v[first:, h * kv_heads // heads] / weights.sum()
        return close(home.numpy(got), expected, self.dtype)


@dataclass(frozen=True)
class SparkCase(AttentionCase):
    """Attention to about k keys, chosen by the first r dimensions."""

    counts: tuple[int, ...] | None = None
    r: int = 16
    k: int = 20
    equal: bool = False

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        n, (heads, kv_heads, dh) = len(self.lengths), self.shape
        q, query = self.queries(rng, home)
        cached, view = self.cached(rng, home, self.run_heads(None))
        if self.equal:
            # Of products that are exact, lest equal keys get scores that are not.
            q = np.rint(2 * q)
            query = home.array(q.astype(self.dtype))
            key = np.rint(numbers(rng, "float32", dh) * 2).astype(self.dtype)
            view.keys[:] = home.array(key)
            cached = [(np.broadcast_to(key.astype(np.float64), k.shape), v) for k, v in cached]
        got = fn(query, view, dh**-0.5, self.r, self.k, self.window)
        expected, margin = np.zeros((n, heads, dh)), np.full((n, heads), np.inf)
        for i, (k, v) in enumerate(cached):
            first = max(0, self.lengths[i] - self.window) if self.window else 0
            seen = self.lengths[i] - first
            for h in range(heads):
                if not seen:
                    continue
                keys, values = k[first:, h * kv_heads // heads], v[first:, h * kv_heads // heads]
                scores = keys[:, : self.r] @ q[i, h, : self.r] * dh**-0.5
                kept = np.ones(seen, bool)
                if seen > self.k:
                    border = scores.mean() + scores.std() * NormalDist().inv_cdf(1 - self.k / seen)
                    kept = (scores > border) | (scores == scores.max())
                    if not self.equal:
                        margin[i, h] = np.abs(scores - border).min() / scores.std()
                weights = np.exp(scores[kept] - scores.max())
                other = keys[kept, self.r :] @ q[i, h, self.r :] * dh**-0.5
                expected[i, h] = (weights / weights.sum() * np.logaddexp(0, other)) @ values[kept]
        return close(home.numpy(got), expected, self.dtype, ignore=margin < 1e-5)


RAGGED = (1, 33, 65, 0, 130, 64)
DEEP = (513, 256, 257, 0)
CASES: Table = {
    "selective_attention": {
        "dense": AttentionCase((4, 4, 32), RAGGED, None),
        "heads": AttentionCase((5, 5, 32), RAGGED),
        "heads, one piece": AttentionCase((5, 5, 32), RAGGED, page=0),
        "odd shapes, one piece, strided": AttentionCase((3, 3, 40), (33, 7, 0, 1), page=0, strided=True),
        "lists that repeat": AttentionCase((5, 5, 16), RAGGED, repeated=True),
        "more than 64 heads": AttentionCase((66, 66, 16), (33,), (7,)),
        "groups of 3": AttentionCase((9, 3, 32), RAGGED),
        "groups of 3 by KV head": AttentionCase((9, 3, 32), RAGGED, unit="kv_group"),
        "groups of 4, capped, strided": AttentionCase((8, 2, 24), RAGGED, softcap=2.0, strided=True),
        "groups of 20": AttentionCase((20, 1, 16), (33, 0, 65), (7, 1, 20)),
        "a window": AttentionCase((4, 2, 32), (*RAGGED, 300), window=33),
        "a window of several chunks": AttentionCase((2, 2, 32), DEEP, (1,), window=400, softcap=3.0),
        "several chunks": AttentionCase((4, 2, 32), DEEP, (2, 1, -2)),
        "more chunks than are merged at a time": AttentionCase((1, 1, 16), (4400,), None, growing=True),
        "pages of 16": AttentionCase((4, 2, 32), RAGGED, page=16),
        "pages of 128": AttentionCase((4, 2, 32), (300, 5), page=128),
        "float16": AttentionCase((8, 4, 64), (*RAGGED, 600), dtype="float16"),
        "bfloat16": AttentionCase((4, 4, 64), RAGGED, dtype="bfloat16"),
        "heads of 128": AttentionCase((4, 4, 128), (130, 5), dtype="float16", page=0),
        "no sequence": AttentionCase((4, 4, 32), (), None),
    },
    "topk_attention": {
        "first positions": SparkCase((4, 2, 32), (1, 0, 2)),
        "k visible": SparkCase((4, 2, 32), (20, 21, 22, 19)),
        "k of 1": SparkCase((4, 2, 32), RAGGED, k=1),
        "ragged": SparkCase((4, 2, 32), RAGGED),
        "one piece": SparkCase((4, 2, 32), RAGGED, page=0),
        "strided": SparkCase((4, 4, 32), RAGGED, strided=True),
        "several chunks": SparkCase((4, 2, 32), (513, 256, 257, 0), k=60),
        "more chunks than are merged at a time": SparkCase((1, 1, 32), (4400,), k=100),
        "drifting": SparkCase((4, 2, 32), (300, 600, 33), k=30, drifting=True),
        "a window": SparkCase((4, 2, 32), (*RAGGED, 300), window=60),
        "a window of several chunks": SparkCase((2, 2, 32), DEEP, window=400, k=30),
        "a window below k": SparkCase((4, 2, 32), (300, 5), window=19),
        "odd dimensions": SparkCase((3, 1, 40), (65, 9), r=10),
        "many heads of one": SparkCase((20, 1, 32), (65, 200)),
        "float16": SparkCase((4, 2, 64), (300, 65), dtype="float16", r=32, page=16),
        "bfloat16": SparkCase((4, 2, 64), (300, 65), dtype="bfloat16", r=32),
        "equal keys": SparkCase((4, 2, 32), (7, 33, 300), equal=True),
        "no sequence": SparkCase((4, 2, 32), ()),
    },
}
