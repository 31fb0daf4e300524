"""A sketched head: exact logits are those of the whole product to the bit, and they are where they have to be."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import Quantized, dequantize, pack
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Ops, Step
from ondevice.ops.cpu import CpuOps
from ondevice.sparsity.head_sketch import SketchTensors, sketch_tensors
from tests.kernels.cases_head import CASES, HeadCase, expected
from tests.kernels.rounding import rounded
from tests.kernels.tables import run_rows
from tests.tiny import tiny_spec


@pytest.fixture(scope="module", params=[1, 2], ids=["one-thread", "two-threads"])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(request.param)


@functools.cache
def tensors_of(case: HeadCase) -> SketchTensors:
    return sketch_tensors(*case.head(), case.states(300, seed=2))


def run(ops: Ops, case: HeadCase, x: np.ndarray, top: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the sketched head, and of the whole one."""
    head, bias = case.head()
    packed = ops.pack_linear([head], [bias])
    sketch = ops.pack_sketch(packed, lambda: tensors_of(case), (case.words, case.width))
    asked = case.top if top is None else top
    got = run_rows(ops, x, lambda table, y, step: table.head(y, packed, sketch, asked))
    return got, run_rows(ops, x, lambda table, y, step: table.linear(y, packed))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_logits(ops: CpuOps, case: HeadCase, tokens: int) -> None:
    x = case.states(tokens)
    got, whole = run(ops, case, x)
    want = expected(*case.head(), tensors_of(case), x, case.top, rounded)
    exact = got == whole
    assert exact[want.must].all()
    # A score could equal a logit only by chance.
    assert not exact[~want.may].any()
    size = np.abs(want.exact).max()
    assert np.abs(got - want.exact)[exact].max(initial=0) < 3e-6 * size
    assert np.abs(got - want.scores)[~exact].max(initial=0) < 2e-5 * size
    assert (np.abs(want.scores - want.exact) < 6 * want.deviations + 1e-2 * size).all()
    for token, order in enumerate(np.argsort(-whole, axis=1)):
        assert exact[token, order[: case.top]].all()
    assert case.words < 500 or (exact.mean() < 0.9)


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_a_row_depends_on_itself_alone(ops: CpuOps, case: HeadCase) -> None:
    x = case.states(33)
    together, _ = run(ops, case, x)
    for row in (0, 11, 32):
        np.testing.assert_array_equal(together[row], run(ops, case, x[row : row + 1])[0][0])
    np.testing.assert_array_equal(together, run(CpuOps(3 - ops.threads), case, x)[0])


def test_every_word_may_be_asked_for(ops: CpuOps) -> None:
    case = CASES[0]
    got, whole = run(ops, case, case.states(3), top=10_000)
    np.testing.assert_array_equal(np.sort(got)[:, -63:], np.sort(whole)[:, -63:])


def test_tokens_and_words_are_counted() -> None:
    ops, case = CpuOps(1), CASES[0]
    x = case.states(5)
    got, whole = run(ops, case, x)
    tally = ops.counts()["words"]
    assert (tally.calls, tally.sparse, tally.units) == (5, 5, 5 * case.words)
    tiles = np.logical_or.reduceat(got == whole, np.arange(0, case.words, 16), axis=1)
    assert tally.kept == 16 * tiles.sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_not_lost(ops: CpuOps, bad: float) -> None:
    case = CASES[0]
    x = case.states(3)
    x[1, 40] = bad
    got, _ = run(ops, case, x)
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("group", [32, 64, 512])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_linear_with_2_bits(ops: CpuOps, group: int, n: int) -> None:
    random = np.random.RandomState(3)
    codes = random.randint(0, 4, (41, 512)).astype(np.uint8)
    scales, biases = (random.standard_normal((41, 512 // group)).astype(np.float16) for _ in range(2))
    w = Quantized(pack(codes, 2), scales, biases, 2, group)
    x = random.standard_normal((n, 512)).astype(np.float32)
    x[:, 5] *= 20

    def body(table: Ops, y: Any, step: Step) -> Any:
        return table.linear(y, table.pack_linear([w], [None]))

    want = rounded(x) @ dequantize(w, np.float64).T
    assert np.abs(run_rows(ops, x, body) - want).max() < 3e-6 * np.abs(want).max()
    handle, index = ops.pack_embedding(w), np.array([0, 40, 16], np.int32)
    step = Step(index, index, index * 0, index[:0])
    rows = ops.run(step, KVCache(ops, tiny_spec(), 1, 64), lambda s: ops.embed(handle, s.tokens))
    np.testing.assert_allclose(rows, dequantize(w)[index], rtol=1e-6, atol=1e-6)
