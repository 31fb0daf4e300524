"""Attention of selected heads: those are the dense ones to the bit, the others are zeros and cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_attention import HeadMask, record_attention
from tests.kernels.cases_attention import HEADS, HeadCase
from tests.kernels.paged import Attend, Paged

CPU = CpuOps(2)


def mask_of(case: HeadCase, tokens: list[int] | None = None) -> HeadMask:
    """Lists of units as bits: a row for each of some tokens, or one for all."""
    lists = [case.chosen[t] for t in tokens] if tokens is not None and len(case.chosen) > 1 else case.chosen
    bits = np.zeros((len(lists), -(-case.units // 64)), np.uint64)
    for row, units in zip(bits, lists):
        for unit in units:
            row[unit // 64] |= np.uint64(1 << unit % 64)
    return HeadMask(bits, len(lists), case.units)


def attend(case: HeadCase, heads: HeadMask | None) -> Attend:
    def record(ops: CpuOps, q: Any, cache: KVCache, step: Step) -> Any:
        return record_attention(ops._now, q, cache, 1, step, case.scale, case.window, case.softcap, heads)

    return record


@pytest.mark.parametrize("name", HEADS)
def test_against_float64_and_the_dense_kernel(name: str) -> None:
    case = HEADS[name]
    paged, kept = Paged(CPU, case), case.kept()
    got = paged.run(attend(case, mask_of(case)))
    assert np.abs(got - case.expected()).max() < 1e-5
    assert not got[~kept].any()
    assert np.array_equal(got[kept], paged.run(attend(case, None))[kept])


@pytest.mark.parametrize("name", ["7 tokens", "32 tokens", "groups of 3", "deep"])
def test_neither_company_nor_threads_change_a_bit(name: str) -> None:
    case = HEADS[name]
    paged, n = Paged(CPU, case), len(case.asked)
    together = paged.run(attend(case, mask_of(case)))
    assert np.array_equal(Paged(CpuOps(1), case).run(attend(case, mask_of(case))), together)
    for t in {0, n // 2, n - 1}:
        assert np.array_equal(paged.run(attend(case, mask_of(case, [t])), [t]), together[t : t + 1])


@pytest.mark.parametrize("many", [False, True])
def test_keys_of_skipped_heads_are_not_read(many: bool) -> None:
    """In a prompt a block of tokens shares keys; here nobody asks for KV head 1, whose keys and values are gone."""
    tokens = tuple((0, i) for i in range(40)) if many else ((0, 129),)
    case = HeadCase((6, 3, 64), (130,), tokens=tokens, chosen=((0, 1, 5),))
    paged = Paged(CPU, case)
    before = paged.run(attend(case, mask_of(case)))

    def read(gone: int) -> NDArray[np.float32]:
        for array in (paged.cache.pages.keys, paged.cache.pages.values):
            array[:, :, gone] = np.nan
        return paged.run(attend(case, mask_of(case)))

    assert np.array_equal(read(1), before)
    after = read(2)
    assert np.isnan(after[:, 5]).all() and np.array_equal(after[:, :5], before[:, :5])


def test_other_positions_of_a_recorded_program() -> None:
    """Counters are left as they were, and the same masks serve a step whose tokens share more chunks."""
    case = HeadCase((8, 8, 64), (900, 900), chosen=((0, 3), (7,)))
    paged, mask = Paged(CPU, case), mask_of(case)
    table = CPU.pack_embedding(case.queries().reshape(2, -1))

    def body(step: Step) -> Any:
        return attend(case, mask)(CPU, CPU.embed(table, step.tokens), paged.cache, step)

    def at(*positions: int) -> NDArray[np.float32]:
        index = np.arange(2)
        return CPU.run(Step(index, np.array(positions), index, index), paged.cache, body, "again")

    first = at(899, 899)
    for positions in ((3, 899), (899, 100), (0, 0), (500, 700)):
        at(*positions)
    assert np.array_equal(at(899, 899), first)
