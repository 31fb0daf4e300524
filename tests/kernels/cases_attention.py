"""Cases of attention with skipped heads and with top-k keys, and what they must give in float64.

Keys and values are what float16 holds, so that a cache of that type loses nothing. A token is a query of a sequence
at a position, which sees the keys up to there; at -1 it sees nothing and must get zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
RAGGED = (1, 7, 33, 65, 129, 200, 0, 128, 64, 16)
Tokens = tuple[tuple[int, int], ...]
"""(sequence, position) of each."""


def ragged(n: int) -> tuple[int, ...]:
    """Lengths of n sequences."""
    return tuple(RAGGED[i % len(RAGGED)] for i in range(n))


@dataclass(frozen=True)
class Case:
    """Random queries, keys and values.

    Args:
        shape: query heads, KV heads, head dim.
        lengths: of the sequences.
        tokens: the last of every sequence by default.
        keys: "random", "equal" for all the same, "two" for one vector and its opposite in turn.
    """

    shape: tuple[int, int, int]
    lengths: tuple[int, ...]
    window: int = 0
    softcap: float = 0.0
    tokens: Tokens = ()
    keys: str = "random"

    @property
    def scale(self) -> float:
        return float(self.shape[2] ** -0.5)

    @property
    def asked(self) -> Tokens:
        return self.tokens or tuple((i, n - 1) for i, n in enumerate(self.lengths))

    def queries(self) -> F32:
        """[tokens, heads, head dim]"""
        return _random(1, len(self.asked), self.shape[0], self.shape[2]) * np.float32(1.5)

    def cached(self) -> list[tuple[F32, F32]]:
        """Keys and values of each sequence, [length, KV heads, head dim]."""
        both = []
        for i, n in enumerate(self.lengths):
            k, v = (_random(seed + 2 * i, n, *self.shape[1:]).astype(np.float16).astype(np.float32) for seed in (2, 3))
            if n and self.keys != "random":
                k[:] = k[:1] * (1 if self.keys == "equal" else np.where(np.arange(n) % 2, -1, 1)[:, None, None])
            both.append((k, v))
        return both

    def seen(self) -> list[tuple[F64, F64, F64]]:
        """Of each token and query head: query, visible keys and visible values."""
        found, group = [], self.shape[0] // self.shape[1]
        cached = self.cached()
        for (sequence, position), q in zip(self.asked, self.queries().astype(np.float64)):
            first = max(0, position + 1 - self.window) if self.window else 0
            k, v = (x[first : position + 1].astype(np.float64) for x in cached[sequence])
            found += [(q[h], k[:, h // group], v[:, h // group]) for h in range(self.shape[0])]
        return found

    def capped(self, scores: F64) -> F64:
        return self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores


def _random(seed: int, *shape: int) -> F32:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class HeadCase(Case):
    """Attention of selected heads.

    Args:
        unit: "head" or "kv_group".
        chosen: units of each token, or one list for all of them; in any order, perhaps repeated.
    """

    unit: str = "head"
    chosen: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def units(self) -> int:
        return self.shape[0] if self.unit == "head" else self.shape[1]

    def kept(self) -> NDArray[np.bool_]:
        """[tokens, heads]"""
        kept = np.zeros((len(self.asked), self.units), bool)
        for t in range(len(kept)):
            kept[t, list(self.chosen[t % len(self.chosen)])] = True
        return np.repeat(kept, self.shape[0] // self.units, axis=1)

    def expected(self) -> F64:
        """[tokens, heads, head dim]"""
        out = np.zeros(self.queries().shape)
        for where, (q, k, v) in zip(np.ndindex(out.shape[:2]), self.seen()):
            if len(k):
                scores = self.capped((k * q).sum(axis=1) * self.scale)
                weights = np.exp(scores - scores.max())
                out[where] = weights @ v / weights.sum()
        return out * self.kept()[..., None]


@dataclass(frozen=True)
class TopkCase(Case):
    """Attention to about k keys, chosen by the first dimensions."""

    first_dims: int = 16
    k: int = 20
    rest_scale: float = 1.0

    def expected(self) -> tuple[F64, F64]:
        """[tokens, heads, head dim]; and [tokens, heads]: how far the closest score is from the threshold, in standard
        deviations, since rounding may take one across."""
        out = np.zeros(self.queries().shape)
        margin = np.full(out.shape[:2], np.inf)
        for where, (q, k, v) in zip(np.ndindex(out.shape[:2]), self.seen()):
            n, r = len(k), self.first_dims
            if n == 0:
                continue
            scores = self.capped((k[:, :r] * q[:r]).sum(axis=1) * self.scale)
            survivors = np.ones(n, bool)
            if n > self.k:
                threshold = scores.mean() + scores.std() * NormalDist().inv_cdf(1 - self.k / n)
                survivors = (scores > threshold) | (scores == scores.max())
                if self.keys == "random":
                    margin[where] = np.abs(scores - threshold).min() / scores.std()
            p = np.exp(scores[survivors] - scores.max())
            rest = (k[survivors, r:] * q[r:]).sum(axis=1) * self.rest_scale
            out[where] = (p / p.sum() * np.logaddexp(rest, 0)) @ v[survivors]
        return out, margin


def _lists(n: int, units: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Of n tokens: 0, 1, 7, 8 or all units, or the last, in no order, one of them twice."""
    random = np.random.RandomState(seed)
    lists = []
    for i in range(n):
        count = (0, 1, 7, 8, units, -1)[i % 6]
        some = [units - 1] if count < 0 else random.permutation(units)[:count].tolist()
        lists.append(tuple(some + some[:1]))
    return tuple(lists)


def _head_case(shape: tuple[int, int, int], n: int, unit: str = "head", **options: float) -> HeadCase:
    units = shape[0] if unit == "head" else shape[1]
    return HeadCase(shape, ragged(n), unit=unit, chosen=_lists(n, units, n), **options)  # type: ignore[arg-type]


PROMPT = tuple((0, i) for i in range(140))
HEADS = {
    "one token, no head": HeadCase((8, 8, 64), (65,), chosen=((),)),
    "one token, the last head": HeadCase((8, 8, 64), (200,), chosen=((7,),)),
    "one token at its first position": HeadCase((8, 8, 64), (1,), chosen=((0, 5),)),
    "nothing visible": HeadCase((8, 8, 64), (0,), chosen=((0, 5),)),
    "two tokens": _head_case((8, 8, 64), 2),
    "7 tokens": _head_case((8, 8, 64), 7),
    "32 tokens": _head_case((8, 8, 64), 32),
    "one list for all": HeadCase((8, 8, 64), ragged(7), chosen=((3, 1, 3),)),
    "one list for all of many": HeadCase((8, 8, 64), ragged(20), chosen=((3, 1, 3),)),
    "more than 64 heads": _head_case((66, 66, 16), 7),
    "groups of 3": _head_case((9, 3, 64), 7),
    "groups of 3 by KV head": _head_case((9, 3, 64), 7, "kv_group"),
    "groups of 4": _head_case((8, 2, 24), 32, softcap=2.0),
    "groups of 4 by KV head": _head_case((8, 2, 24), 32, "kv_group", window=40),
    "a window": _head_case((8, 8, 64), 7, window=33, softcap=3.0),
    "deep": HeadCase((9, 3, 64), (2100, 5), chosen=((0, 4), (8,))),
    "a prompt": HeadCase((9, 3, 64), (140,), tokens=PROMPT, chosen=_lists(140, 9, 5)),
    "a prompt by KV head": HeadCase((8, 8, 64), (140,), 50, tokens=PROMPT, unit="kv_group", chosen=_lists(140, 8, 6)),
}
DEEP = (1500, 513, 200, 512, 1)
TOPK = {
    "one token": TopkCase((4, 2, 64), (200,), first_dims=32),
    "one token at its first position": TopkCase((4, 2, 64), (1,), first_dims=32),
    "nothing visible": TopkCase((4, 2, 64), (0,), first_dims=32),
    "k visible": TopkCase((4, 2, 64), (20, 21, 22, 19), first_dims=32),
    "k of 1": TopkCase((4, 2, 64), ragged(7), first_dims=32, k=1),
    "two tokens": TopkCase((4, 2, 64), ragged(2), first_dims=32),
    "7 tokens": TopkCase((4, 2, 64), ragged(7), first_dims=32, rest_scale=0.125),
    "32 tokens": TopkCase((4, 2, 64), ragged(32), first_dims=32),
    "most survive": TopkCase((4, 2, 64), (200, 129), first_dims=32, k=120),
    "several spans": TopkCase((4, 2, 64), DEEP, first_dims=32, k=100),
    "a window": TopkCase((4, 2, 64), (*ragged(7), 700), 60, 2.0, first_dims=32),
    "a window of several spans": TopkCase((4, 2, 64), DEEP, 600, first_dims=32, k=64),
    "a window below k": TopkCase((4, 2, 64), DEEP, 19, first_dims=32),
    "capped": TopkCase((4, 2, 64), DEEP, softcap=1.5, first_dims=32),
    "large products": TopkCase((4, 2, 64), ragged(7), first_dims=32, rest_scale=40.0),
    "odd dimensions": TopkCase((3, 1, 40), (*ragged(7), 600), first_dims=10),
    "many heads of one": TopkCase((8, 1, 32), (*ragged(3), 600), first_dims=16),
    "wide": TopkCase((2, 2, 256), (300, 17), first_dims=128),
    "equal keys": TopkCase((4, 2, 64), (7, 33, 200, 1000), first_dims=32, keys="equal"),
    "nothing above the threshold": TopkCase((4, 2, 64), (129, 200), first_dims=32, keys="two"),
    "a prompt": TopkCase((4, 2, 64), (140,), tokens=PROMPT, first_dims=32),
    "a prompt with a window": TopkCase((4, 2, 64), (140,), 50, tokens=PROMPT, first_dims=32),
    "the end of a deep prompt": TopkCase(
        (4, 2, 64), (1090,), tokens=tuple((0, i) for i in range(1000, 1090)), first_dims=32, k=100
    ),
}
