"""Threads that live as long as the process and run programs: lists of kernels, each cut into tiles.

The calling thread works too, and could finish any program alone: a tile is taken from a counter by whoever comes first,
and an operation is over when all its tiles are done, not when all threads have arrived. So a thread that the system has
put aside delays others only by the one tile that it holds. Threads that wait spin briefly, then sleep.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir

from cpu_kernels.compile import Kernel, call_kernel
from cpu_kernels.simd import (
    I32,
    I64,
    VOID,
    A,
    atomic_add,
    atomic_load,
    atomic_store,
    call,
    i64_at,
    op,
    pause,
)

# The pool's shared words, each on a cache line of its own (64 bytes).
RUN, PROGRAM, N_OPS, OPEN, INSIDE, SLEEPERS, QUIT, COUNTERS = (64 * i for i in range(8))
WORDS = 8 * 8
RECORD = 24
"""Bytes of one operation of a program: kernel, arguments, tiles."""
LINE = 128
"""Bytes between counters of neighbouring operations: the next tile at 0, the tiles done at 64."""
SPINS = 1000
"""Turns of a spin loop before sleeping: some 20 microseconds."""
NAP = 50_000
"""Nanoseconds of one sleep while an operation of a running program is waited for."""
FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine) if sys.platform == "linux" else None


def _syscall(b, number, *values):
    return call(b, "syscall", I64, [I64(number), *values])


@op(VOID(A, A, A))
def sleep_while(b, address, value, nanoseconds):
    """Sleeps while the low 32 bits at an address equal `value`, at most some nanoseconds (0: without limit)."""
    if FUTEX is None:
        # No futex: a short nap; the caller looks again.
        call(b, "usleep", I32, [I32(50)])
        return
    spec = b.alloca(ir.ArrayType(I64, 2))
    first = b.bitcast(spec, I64.as_pointer())
    b.store(I64(0), first)
    b.store(nanoseconds, b.gep(first, [I32(1)]))
    limit = b.select(b.icmp_signed("==", nanoseconds, I64(0)), I64(0), b.ptrtoint(first, I64))
    _syscall(b, FUTEX, address, I64(128), b.and_(value, I64(0xFFFFFFFF)), limit, I64(0), I64(0))


@op(VOID(A))
def wake(b, address):
    """Wakes every thread that sleeps on an address."""
    if FUTEX is not None:
        _syscall(b, FUTEX, address, I64(129), I64(2**31 - 1), I64(0), I64(0), I64(0))


@numba.njit(nogil=True, error_model="numpy")
def _work(pool, thread):
    """Takes tiles of the open program until it is done."""
    program, n_ops, counters = i64_at(pool + PROGRAM), i64_at(pool + N_OPS), i64_at(pool + COUNTERS)
    for i in range(n_ops):
        record, counter = program + i * RECORD, counters + i * LINE
        function, arguments, tiles = i64_at(record), i64_at(record + 8), i64_at(record + 16)
        while True:
            tile = atomic_add(counter, 1)
            if tile >= tiles:
                break
            call_kernel(function, arguments, tile, thread)
            atomic_add(counter + 64, 1)
        spins = 0
        while atomic_load(counter + 64) < tiles:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                # Nobody wakes us: the low word only changes by tiles being done, so a nap is all we need.
                sleep_while(counter + 64, atomic_load(counter + 64), NAP)


def _worker(pool, thread):
    seen = atomic_load(pool + RUN)
    while True:
        spins = 0
        while atomic_load(pool + RUN) == seen:
            spins += 1
            if spins < SPINS:
                pause()
            else:
                atomic_add(pool + SLEEPERS, 1)
                sleep_while(pool + RUN, seen, 0)
                atomic_add(pool + SLEEPERS, -1)
        seen = atomic_load(pool + RUN)
        if atomic_load(pool + QUIT):
            return
        atomic_add(pool + INSIDE, 1)
        if atomic_load(pool + OPEN):
            _work(pool, thread)
        atomic_add(pool + INSIDE, -1)


def _run(pool, program, first, n_ops):
    counters = i64_at(pool + COUNTERS)
    for i in range(n_ops):
        atomic_store(counters + i * LINE, 0)
        atomic_store(counters + i * LINE + 64, 0)
    atomic_store(pool + PROGRAM, program + first * RECORD)
    atomic_store(pool + N_OPS, n_ops)
    atomic_store(pool + OPEN, 1)
    atomic_add(pool + RUN, 1)
    if atomic_load(pool + SLEEPERS) > 0:
        wake(pool + RUN)
    _work(pool, 0)
    atomic_store(pool + OPEN, 0)
    # The program's memory may be changed or freed once nobody can be inside.
    spins = 0
    while atomic_load(pool + INSIDE) > 0:
        spins += 1
        if spins < SPINS:
            pause()
        else:
            sleep_while(pool + INSIDE, atomic_load(pool + INSIDE), NAP)


def _stop(pool):
    atomic_store(pool + QUIT, 1)
    atomic_add(pool + RUN, 1)
    wake(pool + RUN)


RUNNING = Kernel(_run, "pool, run", VOID(A, A, A, A))
WORKING = Kernel(_worker, "pool, worker", VOID(A, A))
STOPPING = Kernel(_stop, "pool, stop", VOID(A))
POOL = (RUNNING, WORKING, STOPPING)
"""The pool's own functions, compiled on first use: importing this module must not take seconds."""


def _callable(item: Kernel) -> Callable[..., None]:
    """A pool's function as one of Python's, which runs without Python's lock."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(item.signature.args))(item.address)


class ThreadPool:
    """Runs programs on a fixed number of threads, the calling one included. Use `shared_pool`.

    Args:
        threads: at least 1.
        max_ops: operations that may run in one call.
    """

    def __init__(self, threads: int, max_ops: int = 1 << 14) -> None:
        self.threads = threads
        self.max_ops = max_ops
        self._start()
        os.register_at_fork(after_in_child=self._start)
        atexit.register(self._close)

    def _start(self) -> None:
        """Fresh shared words and workers: a forked child has none of its parent's threads."""
        self._lock = threading.Lock()
        self._memory = np.zeros(WORDS + 8 + self.max_ops * LINE // 8, np.int64)
        start = self._memory.ctypes.data
        self._pool = start + (-start) % 64
        ctypes.c_int64.from_address(self._pool + COUNTERS).value = self._pool + WORDS * 8
        self._run, self._stop, worker = _callable(RUNNING), _callable(STOPPING), _callable(WORKING)
        self._workers = [
            threading.Thread(target=worker, args=(self._pool, i), name=f"ondevice-{i}", daemon=True)
            for i in range(1, self.threads)
        ]
        for thread in self._workers:
            thread.start()

    def _close(self) -> None:
        """Ends the workers before the interpreter frees what they look at."""
        with self._lock:
            self._stop(self._pool)
            for thread in self._workers:
                thread.join()

    def run(self, program: np.ndarray, first: int = 0, count: int | None = None) -> None:
        """Runs operations of a program, in order, all tiles of one before the next.

        Args:
            program: int64 [ops, 3], C-contiguous: kernel address, address of its arguments, number of tiles.
            first, count: the part to run; all of it by default.
        """
        count = len(program) - first if count is None else count
        if count > self.max_ops:
            raise ValueError(f"a program of {count} operations exceeds the pool's {self.max_ops}")
        if count:
            with self._lock:
                self._run(self._pool, program.ctypes.data, first, count)


@functools.cache
def shared_pool(threads: int) -> ThreadPool:
    """The process's pool of so many threads: models share it, and it outlives them."""
    return ThreadPool(threads)
