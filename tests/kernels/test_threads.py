"""The thread pool: every tile once, operations in order, whatever happens around it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cpu_kernels.atomics import atomic_add
from cpu_kernels.compile import kernel, unpack
from cpu_kernels.simd import i64_at, set_i64
from cpu_kernels.threads import FIELDS, ThreadPool, shared_pool


@kernel("count")
def count(arguments, tile, thread):
    """Counts visits of a tile."""
    (counts,) = unpack(arguments, "i")
    atomic_add(counts + 8 * tile, 1)


@kernel("sum to the left")
def copy_total(arguments, tile, thread):
    """Sets cell `tile` of out to the sum of all cells of x: right only if the operation before is over."""
    out, x, n = unpack(arguments, "iii")
    total = 0
    for i in range(n):
        total += i64_at(x + 8 * i)
    set_i64(out + 8 * tile, total)


def words(*values: object) -> np.ndarray:
    return np.array([v.ctypes.data if isinstance(v, np.ndarray) else v for v in values], np.int64)


def counting(n_ops: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.zeros(max(tiles, 1), np.int64)
    arguments = words(counts)
    program = np.zeros((n_ops, FIELDS), np.int64)
    program[:, :3] = count.address, arguments.ctypes.data, tiles
    return program, counts, arguments


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tiles", [0, 1, 7, 300])
def test_every_tile_runs_once(threads: int, tiles: int) -> None:
    program, counts, _alive = counting(50, tiles)
    shared_pool(threads).run(program)
    assert counts.tolist() == ([50] * tiles or [0])


def test_operations_wait_for_each_other() -> None:
    n = 33
    a, b = np.ones(n, np.int64), np.zeros(n, np.int64)
    there, back = words(b, a, n), words(a, b, n)
    program = np.zeros((10, FIELDS), np.int64)
    program[:, :3] = [(copy_total.address, args.ctypes.data, n) for args in (there, back) * 5]
    shared_pool(2).run(program)
    assert a.tolist() == [n**10] * n


def test_part_of_a_program() -> None:
    program, counts, _alive = counting(10, 3)
    shared_pool(2).run(program, first=4, count=2)
    assert counts.tolist() == [2, 2, 2]


def test_too_long_a_program_is_refused() -> None:
    program, _counts, _alive = counting(9, 1)
    with pytest.raises(ValueError, match="9 operations"):
        ThreadPool(1, max_ops=8).run(program)


def test_callers_take_turns() -> None:
    program, counts, _alive = counting(20, 40)

    def many() -> None:
        for _ in range(50):
            shared_pool(2).run(program)

    callers = [threading.Thread(target=many) for _ in range(4)]
    for c in callers:
        c.start()
    for c in callers:
        c.join(60)
    assert counts.tolist() == [4 * 50 * 20] * 40


def test_idle_threads_use_no_time() -> None:
    program, _counts, _alive = counting(5, 10)
    shared_pool(2).run(program)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def _in_child(result: object) -> None:
    program, counts, _alive = counting(20, 10)
    shared_pool(2).run(program)
    result.put(counts.tolist())  # type: ignore[attr-defined]


def test_a_forked_child_has_threads_of_its_own() -> None:
    program, _counts, _alive = counting(5, 10)
    shared_pool(2).run(program)
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    child = context.Process(target=_in_child, args=(result,))
    child.start()
    assert result.get(timeout=30) == [20] * 10
    child.join(30)
    assert child.exitcode == 0


def test_a_busy_neighbour_does_not_stop_the_pool() -> None:
    """With every core taken by others, work still ends: slower, but not by the scheduler's whole time slices."""
    program, _counts, _alive = counting(300, 16)
    pool = shared_pool(2)
    pool.run(program)
    spin = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)
        start = time.perf_counter()
        for _ in range(5):
            pool.run(program)
        assert time.perf_counter() - start < 20
    finally:
        for other in others:
            other.kill()
            other.wait()
