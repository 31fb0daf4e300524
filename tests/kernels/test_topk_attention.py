"""Top-k attention: odd shapes, lengths and scores are right, and a token's bits are its own, whoever is beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.topk_scores import quantiles
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_attention import record_topk_attention
from tests.kernels.cases_attention import TOPK, TopkCase
from tests.kernels.paged import Attend, Paged

CPU = CpuOps(2)


def attend(case: TopkCase) -> Attend:
    def record(ops: CpuOps, q: Any, cache: KVCache, step: Step) -> Any:
        limits = (case.scale, case.k, case.window, case.softcap, case.rest_scale)
        return record_topk_attention(ops._now, q, cache, 1, step, *limits)

    return record


@pytest.mark.parametrize("name", TOPK)
def test_against_float64(name: str) -> None:
    case = TOPK[name]
    got = Paged(CPU, case).run(attend(case))
    expected, margin = case.expected()
    sure = margin > 1e-5
    assert sure.mean() > 0.98
    assert np.abs(got - expected)[sure].max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    "name", ["7 tokens", "32 tokens", "several spans", "a window", "capped", "a prompt with a window"]
)
def test_neither_company_nor_threads_change_a_bit(name: str) -> None:
    """Few tokens share chunks among threads, many go through a kernel of their own, prompts in blocks."""
    case = TOPK[name]
    paged, n = Paged(CPU, case), len(case.asked)
    together = paged.run(attend(case))
    assert np.array_equal(Paged(CpuOps(1), case).run(attend(case)), together)
    for t in {0, n // 3, n // 2, n - 1}:
        assert np.array_equal(paged.run(attend(case), [t]), together[t : t + 1])
    repeated = np.arange(max(n, 20)) % n
    assert np.array_equal(paged.run(attend(case), repeated.tolist()), together[repeated])
    assert np.array_equal(paged.run(attend(case), range(n)[::-1]), together[::-1])


def test_only_survivors_are_read() -> None:
    """The rest of other keys, and their values, may be gone."""
    case = TopkCase((1, 1, 64), (300,), first_dims=32, k=10)
    paged = Paged(CPU, case)
    before = paged.run(attend(case))
    q, (k, _) = case.queries()[0, 0], case.cached()[0]
    gone = np.argsort(k[:, 0, :32] @ q[:32])[:200]
    pages = paged.cache.block_table[0, gone // 64]
    for array in (paged.cache.pages.rests, paged.cache.pages.values):
        whole = array[1, :, 0].reshape(len(array[1]), 64, -1)
        whole[pages, gone % 64] = np.nan
        array[1, :, 0] = whole.reshape(len(whole), -1)
    assert np.array_equal(paged.run(attend(case)), before)


@pytest.mark.parametrize("part", ["firsts", "rests", "values"])
def test_nan_is_not_lost(part: str) -> None:
    """In the first part it spoils the threshold, and so every head of its KV head; in the rest whoever reads it."""
    case = TopkCase((4, 2, 64), (200,), first_dims=32, k=250)
    paged = Paged(CPU, case)
    page = paged.cache.block_table[0, 1]
    getattr(paged.cache.pages, part)[1, page, 1, :64] = np.nan
    got = paged.run(attend(case))[0]
    assert np.isfinite(got[:2]).all() and np.isnan(got[2:]).any(axis=1).all()
    spoiled = TopkCase((4, 2, 64), (200,), first_dims=32, k=10)
    if part == "firsts":
        assert np.isnan(paged.run(attend(spoiled))[0, 2:]).all()


def test_quantiles() -> None:
    """The median leaves half of them; there is none where all may stay."""
    table: NDArray[np.float32] = quantiles(50, 1000)
    assert len(table) == 1001 and not table[:51].any() and table[51] < -2
    assert table[100] == 0
    assert abs(table[1000] - 1.6448536) < 1e-6
