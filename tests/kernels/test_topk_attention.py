"""Top-k attention: odd shapes, lengths and scores are right, and a token's bits are its own, whoever is beside it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import load_f32, store_f32
from cpu_kernels.topk_scores import quantiles
from cpu_kernels.topk_values import softplus
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_attention import record_topk_attention
from tests.kernels.cases_attention import TOPK, TopkCase
from tests.kernels.paged import Attend, Paged

CPU = CpuOps(2)


@kernel("softplus")
def softplus_of_each(arguments, tile, thread):  # type: ignore[no-untyped-def]
    x, n = unpack(arguments, "ii")
    for i in range(0, n, 16):
        store_f32(x + 4 * i, softplus(load_f32(x + 4 * i)))


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


def test_softplus() -> None:
    x = np.concatenate([np.linspace(-80, 80, 20_000), np.linspace(-3, 3, 20_000)]).astype(np.float32)
    ends = np.array([0, -0.0, 1e-30, 1e-3, -1e-3, 1e4, -1e4, np.nan, np.inf] + [0] * 7, np.float32)
    got = np.concatenate([x, ends])
    words = np.array([got.ctypes.data, len(got)], np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(softplus_of_each.address)(words.ctypes.data, 0, 0)
    assert np.abs(got[: len(x)] / np.logaddexp(x.astype(np.float64), 0) - 1).max() < 4e-7
    with np.errstate(invalid="ignore"):
        expected = np.logaddexp(ends.astype(np.float64), 0)
    assert np.allclose(got[len(x) :], expected, rtol=4e-7, atol=1e-30, equal_nan=True)


def test_quantiles() -> None:
    """The median leaves half of them; there is none where all may stay."""
    table: NDArray[np.float32] = quantiles(50, 1000)
    assert len(table) == 1001 and not table[:51].any() and table[51] < -2
    assert table[100] == 0
    assert abs(table[1000] - 1.6448536) < 1e-6
