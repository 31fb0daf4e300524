"""Selections on the CPU: masks and tables against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.threads import shared_pool
from ondevice.ops import cpu_selection as recorded
from ondevice.ops.cpu_memory import padded
from ondevice.ops.cpu_program import Program
from ondevice.ops.cpu_recording import Buffer, Recording
from ondevice.ops.cpu_selection import Selection, Table
from tests.kernels import cases_selection as cases
from tests.kernels.cases_selection import BATCHES, SCORES, SIZES, Mask, Rows

GARBAGE = 0xA5


class Bench:
    """A program with scores as its input."""

    def __init__(self, x: Rows, threads: int = 2) -> None:
        self.program, self.threads = Program(), threads
        self.recording = Recording(self.program, threads, {})
        take = self.program.memory.take

        def dirty(nbytes: int) -> NDArray[np.uint8]:
            """What is not written must not be read."""
            block = take(nbytes)
            block[:] = GARBAGE
            return block

        self.program.memory.take = dirty  # type: ignore[method-assign]
        self.input = self.recording.new(*x.shape)
        # Behind the scores there may be anything.
        self.view(self.input, whole=True)[:] = np.inf
        self.view(self.input)[:] = x

    def view(self, buffer: Buffer, whole: bool = False) -> Rows:
        assert buffer.block is not None
        floats = buffer.block.array[: buffer.rows * buffer.stride_bytes].view(np.float32)
        return floats.reshape(buffer.rows, -1)[:, : buffer.stride if whole else buffer.width]

    def run(self, times: int = 1) -> None:
        self.program.seal()
        for _ in range(times):
            self.program.run(shared_pool(self.threads))


def bits(block: Any, rows: int, units: int) -> Mask:
    """A mask's rows; what is beyond the last unit must be 0."""
    each = recorded.mask_bytes(units)
    found = np.unpackbits(block.array[: rows * each].reshape(rows, each), axis=1, bitorder="little").astype(bool)
    assert not found[:, units:].any()
    return found[:, :units]


def mask_of(x: Rows, record: Callable[[Recording, Buffer], Selection], threads: int = 2) -> Mask:
    bench = Bench(x, threads)
    selection = record(bench.recording, bench.input)
    mask = recorded.record_mask(bench.recording, selection)
    bench.run()
    return bits(mask, selection.rows, selection.units)


def entries_of(table: Table) -> list[tuple[int, list[int]]]:
    """A table's groups with their neurons, after looking at all that a kernel may rely on."""
    memory = table.memory if isinstance(table.memory, np.ndarray) else table.memory.array.view(np.int32)
    n, total = int(memory[0]), int(memory[1])
    groups, counts, neurons = np.split(memory[16:][: 34 * table.groups], [table.groups, 2 * table.groups])
    lists = neurons.reshape(-1, 32)
    found = []
    for i in range(n):
        count = int(counts[i])
        assert 1 <= count <= 32
        row = lists[i][: -(-count // 4) * 4]
        assert (row[count:] == row[count - 1]).all()
        found.append((int(groups[i]), row[:count].tolist()))
    assert total == sum(len(units) for _, units in found)
    return found


@pytest.mark.parametrize("units", SIZES)
@pytest.mark.parametrize("kind", SCORES)
def test_top_k(kind: str, units: int) -> None:
    x = cases.scores(kind, 3, units)
    for k in sorted({0, 1, 2, units // 12, units // 2, units - 1, units, units + 5} - {-1}):
        got = mask_of(x, lambda r, b, k=k: recorded.record_topk(r, b, k))
        assert np.array_equal(got, cases.top_k(x, k)), k
        assert (got.sum(axis=1) == min(k, units)).all()


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("kind", ["normal", "ties", "all negative", "NaN"])
def test_top_k_of_a_batch_and_shared(kind: str, tokens: int) -> None:
    for units in (65, 1536):
        x = cases.scores(kind, tokens, units)
        for k in (1, units // 3, units):
            assert np.array_equal(mask_of(x, lambda r, b, k=k: recorded.record_topk(r, b, k)), cases.top_k(x, k))
            got = mask_of(x, lambda r, b, k=k: recorded.record_topk(r, b, k, shared=True))
            assert np.array_equal(got, cases.shared_top_k(x, k)), (units, k)


@pytest.mark.parametrize("seed", range(4))
def test_top_k_of_long_rows_of_any_distribution(seed: int) -> None:
    r = np.random.RandomState(seed)
    for x in (r.standard_cauchy((1, 65536)), r.exponential(size=(1, 11008)) ** 9, r.rand(1, 50257) * 1e-3 + 1e3):
        x = x.astype(np.float32)
        k = int(r.randint(1, x.shape[1]))
        assert np.array_equal(mask_of(x, lambda rec, b, k=k: recorded.record_topk(rec, b, k)), cases.top_k(x, k))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("n_heads", "group"), [(9, 1), (32, 1), (9, 3), (32, 4), (70, 1)])
def test_heads(kind: str, n_heads: int, group: int) -> None:
    x = cases.scores(kind, 7, n_heads)
    for k in range(1, n_heads // group + 1):
        got = mask_of(x, lambda r, b, k=k: recorded.record_heads(r, b, k, group))
        assert np.array_equal(got, cases.heads(x, k, group)), k


@pytest.mark.parametrize("units", SIZES)
@pytest.mark.parametrize("kind", SCORES)
def test_thresholds(kind: str, units: int) -> None:
    x = cases.scores(kind, 3, units)
    for limit in (-1.0, 0.0, 0.25, 0.3):
        got = mask_of(x, lambda r, b, t=limit: recorded.record_threshold(r, b, t))
        assert np.array_equal(got, cases.threshold(x, limit))
        got = mask_of(x, lambda r, b, t=limit: recorded.record_threshold(r, b, t, sizes=True))
        assert np.array_equal(got, cases.magnitude(x, limit))
        factors = padded(np.linspace(0, 2, units, dtype=np.float32))
        got = mask_of(x, lambda r, b, t=limit, f=factors: recorded.record_threshold(r, b, t, sizes=True, factors=f))
        assert np.array_equal(got, cases.magnitude(x * factors[:units], limit))
    for share in (0.0, 0.5, 1.0, 1.5):
        got = mask_of(x, lambda r, b, t=share: recorded.record_threshold(r, b, t, relative=True))
        assert np.array_equal(got, cases.relative_threshold(x, share)), share
        assert np.array_equal(got.any(axis=1), ~np.isnan(x).all(axis=1)), "at least the largest"


@pytest.mark.parametrize("units", SIZES[1:])
@pytest.mark.parametrize("kind", ["normal", "ties", "all equal", "all negative", "minus infinity", "NaN"])
def test_statistical_top_k(kind: str, units: int) -> None:
    x = cases.scores(kind, 7, units) * np.float32(3) + np.float32(5)
    for factor in (-0.5, 0.0, 1.405):
        bench = Bench(x)
        selection = recorded.record_statistical_topk(bench.recording, bench.input, factor)
        mask = recorded.record_mask(bench.recording, selection)
        bench.run()
        assert selection.values is not None
        values, expected = bench.view(selection.values, whole=True), cases.statistical_top_k(x, factor)
        assert (values[:, units:] == 0).all()
        assert np.abs(values[:, :units] - expected).max() < 5e-6
        assert np.array_equal(bits(mask, 7, units), values[:, :units] > 0)


def test_statistical_top_k_of_long_rows_with_a_large_mean() -> None:
    x = (np.random.RandomState(1).randn(2, 16384) + 100).astype(np.float32)
    bench = Bench(x)
    selection = recorded.record_statistical_topk(bench.recording, bench.input, 1.405)
    recorded.record_mask(bench.recording, selection)
    bench.run()
    assert selection.values is not None
    assert np.abs(bench.view(selection.values) - cases.statistical_top_k(x, 1.405)).max() < 1e-5


@pytest.mark.parametrize("kind", range(4))
def test_statistical_top_k_with_an_activation(kind: int) -> None:
    functions = [
        lambda v: v / (1 + np.exp(-v)),
        lambda v: v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
        None,
        lambda v: v,
    ]
    x = cases.scores("normal", 2, 333)
    bench = Bench(x)
    selection = recorded.record_statistical_topk(bench.recording, bench.input, 1.0, kind)
    recorded.record_mask(bench.recording, selection)
    bench.run()
    assert selection.values is not None
    plain, function = cases.statistical_top_k(x, 1.0), functions[kind]
    got = bench.view(selection.values)
    assert np.array_equal(got > 0, plain > 0)
    if function is not None:
        assert np.abs(got - function(plain)).max() < 2e-6


@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("units", SIZES[1:])
def test_tables_of_neurons(units: int, tokens: int) -> None:
    x = cases.scores("normal", tokens, units)
    for limit in (9.0, 2.5, 1.5, 0.0, -9.0):
        bench, statistics = Bench(x), np.array([10, 20, 30, 40, 50])
        selection = recorded.record_threshold(bench.recording, bench.input, limit)
        table = recorded.record_table(bench.recording, selection, statistics=statistics)
        bench.run(times=2)
        expected = cases.entries(cases.threshold(x, limit))
        assert entries_of(table) == expected
        neurons = sum(len(units) for _, units in expected)
        own = int(cases.threshold(x, limit).sum())
        assert statistics.tolist() == [10 + 2 * len(expected), 20 + 2 * neurons, 32, 40 + 2 * own, 50 + 2 * tokens]
        assert table.mask is not None
        assert np.array_equal(bits(table.mask, tokens, units), cases.threshold(x, limit))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block", [1, 4, 6, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("neurons", [1, 33, 96, 1000, 1536])
def test_tables_of_blocks(neurons: int, block: int, own: bool) -> None:
    x = cases.scores("normal", 2, -(-neurons // block))
    for k in {0, 1, x.shape[1] // 3, x.shape[1]}:
        bench = Bench(x)
        selection = recorded.expanded(recorded.record_topk(bench.recording, bench.input, k), block, neurons)
        table = recorded.record_table(bench.recording, selection, own)
        bench.run()
        expected = cases.expanded(cases.top_k(x, k), block, neurons)
        assert entries_of(table) == cases.entries(expected)
        assert (table.mask is not None) == (own or block % 32 != 0)
        if table.mask is not None:
            assert np.array_equal(bits(table.mask, 2, neurons), expected)


@pytest.mark.parametrize("neurons", [1, 7, 32, 33, 96, 1536])
def test_table_of_everything(neurons: int) -> None:
    table = recorded.table_of_everything(neurons)
    assert entries_of(table) == cases.entries(np.ones((1, neurons), bool))
    assert np.asarray(table.memory)[0] == table.groups == -(-neurons // 32)


def test_a_table_after_the_mask() -> None:
    """What is asked for later is made of the mask that there is."""
    x = cases.scores("normal", 5, 200)
    bench = Bench(x)
    selection = recorded.record_topk(bench.recording, bench.input, 20)
    mask = recorded.record_mask(bench.recording, selection)
    tables = [recorded.record_table(bench.recording, selection) for _ in range(2)]
    assert recorded.record_mask(bench.recording, selection) is mask
    bench.run()
    assert np.array_equal(bits(mask, 5, 200), cases.top_k(x, 20))
    assert [entries_of(table) for table in tables] == [cases.entries(cases.top_k(x, 20))] * 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    x = cases.scores("normal", 32, 1536)
    bench = Bench(x, threads)
    selection = recorded.record_topk(bench.recording, bench.input, 50)
    table = recorded.record_table(bench.recording, selection)
    bench.run(times=50)
    assert entries_of(table) == cases.entries(cases.top_k(x, 50))


@pytest.mark.parametrize("units", [1, 9, 64, 65, 1536, 11008])
def test_random_masks(units: int) -> None:
    for kept in sorted({0, 1, units // 50, units // 3, units // 2, units * 9 // 10, units}):
        bench = Bench(cases.scores("normal", 2, units))
        selection = recorded.forced(recorded.record_topk(bench.recording, bench.input, units // 4), kept, seed=3)
        table = recorded.record_table(bench.recording, selection)
        bench.program.seal()
        seen = np.zeros((2, units))
        for _ in range(20):
            bench.program.run(shared_pool(2))
            mask = bits(selection.mask, 2, units)
            assert (mask.sum(axis=1) == kept).all()
            assert entries_of(table) == cases.entries(mask)
            seen += mask
        assert units < 64 or kept in (0, units) or not np.array_equal(seen[0], seen[1])
        # Of 20 fair choices nobody is always or never chosen, where so many are.
        if units > 64 and kept == units // 2:
            assert seen.min() > 0 and seen.max() < 20
            assert abs(seen[:, ::2].sum() / seen.sum() - 0.5) < 0.02


def test_random_masks_are_fair() -> None:
    bench = Bench(cases.scores("normal", 1, 70))
    selection = recorded.forced(recorded.record_topk(bench.recording, bench.input, 1), 20, seed=1)
    recorded.record_mask(bench.recording, selection)
    bench.program.seal()
    seen = np.zeros(70)
    for _ in range(2000):
        bench.program.run(shared_pool(1))
        seen += bits(selection.mask, 1, 70)[0]
    expected = 2000 * 20 / 70
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected * 50 / 70)


def test_counters_of_another_length_are_refused() -> None:
    """The kernel would write behind them."""
    bench = Bench(cases.scores("normal", 1, 64))
    selection = recorded.record_threshold(bench.recording, bench.input, 0.0)
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(5,\)"):
        recorded.record_table(bench.recording, selection, statistics=np.zeros(3, np.int64))
