"""Threads that live as long as the process and run programs: lists of kernels, each cut into tiles.

Each thread has a range of an operation's tiles, so that it walks through memory in order, and helps the others when its
own are taken. An operation is over when all its tiles are done, not when all threads have arrived: the calling thread
could finish any program alone, and a thread that the system has put aside delays others only by the one tile that it
holds. Counters carry the number of the run: a thread that comes late finds nothing to take and goes back to sleep.

Threads that wait fetch the weights of operations to come into their caches, then spin briefly, then sleep.
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

from cpu_kernels.atomics import atomic_add, atomic_load, atomic_store, compare_and_swap, fence, pause, plain_store
from cpu_kernels.compile import Kernel, call_kernel
from cpu_kernels.simd import (
    I32,
    I64,
    VOID,
    A,
    call,
    i64_at,
    op,
    prefetch_l2,
    set_i64,
)

# The pool's shared words, each on a cache line of its own (64 bytes).
RUN, N_OPS, SLEEPERS, QUIT, COUNTERS, RECORDS, THREADS, TIMES = (64 * i for i in range(8))
WORDS = 8 * 8
FIELDS = 8
"""Words of an operation: kernel, arguments, tiles; what each thread does before its first tile (kernel, arguments); and
weights that a later operation reads (address, bytes of a tile, tiles)."""
LINE = 64
"""Bytes between counters: of each operation the tiles done, then the next tile of each thread's range."""
RUN_BIT = 28
"""Counters hold the number of the run from this bit on."""
AHEAD = 512 << 10
"""Bytes of later weights that a waiting thread fetches: a part of its second-level cache."""
MAX_OPS = 1 << 12
"""Operations that may run in one call."""
SPINS = 1000
"""Turns of a spin loop before sleeping: some 20 microseconds."""
NAP = 50_000
"""Nanoseconds of one sleep while an operation of a running program is waited for."""
FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine) if sys.platform == "linux" else None
MONOTONIC = 6 if sys.platform == "darwin" else 1
ULOCK = sys.platform == "darwin"
"""macOS has the futex's twin, which its C++ library waits with: `__ulock_wait`, in microseconds, and `__ulock_wake`."""


def _syscall(b, number, *values):
    return call(b, "syscall", I64, [I64(number), *values])


@op(VOID(A, A, A))
def sleep_while(b, address, value, nanoseconds):
    """Sleeps while the low 32 bits at an address equal `value`, at most some nanoseconds (0: without limit)."""
    value = b.and_(value, I64(0xFFFFFFFF))
    if ULOCK:
        microseconds = b.trunc(b.udiv(b.add(nanoseconds, I64(999)), I64(1000)), I32)
        call(b, "__ulock_wait", I32, [I32(1), address, value, microseconds])
        return
    if FUTEX is None:
        # Nobody can wake us: a short nap, and a longer one where the wait has no limit; the caller looks again.
        call(b, "usleep", I32, [b.select(b.icmp_signed("==", nanoseconds, I64(0)), I32(1000), I32(50))])
        return
    spec = b.alloca(ir.ArrayType(I64, 2))
    first = b.bitcast(spec, I64.as_pointer())
    b.store(I64(0), first)
    b.store(nanoseconds, b.gep(first, [I32(1)]))
    limit = b.select(b.icmp_signed("==", nanoseconds, I64(0)), I64(0), b.ptrtoint(first, I64))
    _syscall(b, FUTEX, address, I64(128), value, limit, I64(0), I64(0))


@op(VOID(A))
def wake(b, address):
    """Wakes every thread that sleeps on an address."""
    if ULOCK:
        call(b, "__ulock_wake", I32, [I32(0x101), address, I64(0)])
    elif FUTEX is not None:
        _syscall(b, FUTEX, address, I64(129), I64(2**31 - 1), I64(0), I64(0), I64(0))


@op(A())
def nanoseconds(b):
    """The monotonic clock."""
    spec = b.alloca(ir.ArrayType(I64, 2))
    first = b.bitcast(spec, I64.as_pointer())
    call(b, "clock_gettime", I32, [I32(MONOTONIC), b.ptrtoint(first, I64)])
    whole = b.mul(b.load(first), I64(1_000_000_000))
    return b.add(whole, b.load(b.gep(first, [I32(1)])))


@numba.njit(nogil=True, error_model="numpy")
def _claim(counter, run, n):
    """The next of n tiles that a counter gives out; -1 if there is none, or the run is over."""
    seen = atomic_load(counter)
    while seen >> RUN_BIT == run and seen & ((1 << RUN_BIT) - 1) < n:
        before = compare_and_swap(counter, seen, seen + 1)
        if before == seen:
            return seen & ((1 << RUN_BIT) - 1)
        seen = before
    return -1


@numba.njit(nogil=True, error_model="numpy")
def first_tile(tiles, thread, threads):
    """Where a thread's range of an operation's tiles begins, and that of the thread before ends."""
    return (tiles * thread + threads - 1) // threads


@numba.njit(nogil=True, error_model="numpy")
def _do_tiles(record, counter, run, thread, threads, prepared):
    """Takes tiles of one operation, first of the own range.

    prepared: the arguments of what this thread did last before a first tile. Returns how many tiles, and that again.
    """
    function, arguments, tiles = i64_at(record), i64_at(record + 8), i64_at(record + 16)
    first, its_arguments = i64_at(record + 24), i64_at(record + 32)
    done = 0
    for i in range(threads):
        owner = (thread + i) % threads
        start = first_tile(tiles, owner, threads)
        n = first_tile(tiles, owner + 1, threads) - start
        while n > 0:
            tile = _claim(counter + LINE * (owner + 1), run, n)
            if tile < 0:
                break
            if first != 0 and its_arguments != prepared:
                call_kernel(first, its_arguments, 0, thread)
                prepared = its_arguments
            call_kernel(function, arguments, start + tile, thread)
            done += 1
    return done, prepared


@numba.njit(nogil=True, error_model="numpy")
def _wait(record, counter, goal, thread, threads, fetched):
    """Until an operation's tiles are done. Returns how many bytes of the weights ahead have been fetched."""
    address, each, tiles = i64_at(record + 40), i64_at(record + 48), i64_at(record + 56)
    start = first_tile(tiles, thread, threads) * each
    limit = min(first_tile(tiles, thread + 1, threads) * each - start, AHEAD)
    spins = 0
    while True:
        seen = atomic_load(counter)
        if seen >= goal:
            return fetched
        if fetched < limit:
            for line in range(0, 512, 64):
                prefetch_l2(address + start + fetched + line)
            fetched += 512
            continue
        spins += 1
        if spins < SPINS:
            pause()
        else:
            # Nobody wakes us: the low word only changes by tiles being done, so a nap is all we need.
            sleep_while(counter, seen, NAP)


@numba.njit(nogil=True, error_model="numpy")
def _work(pool, thread, run):
    """Takes part in a run until it is over."""
    n_ops, counters, records = i64_at(pool + N_OPS), i64_at(pool + COUNTERS), i64_at(pool + RECORDS)
    threads, times = i64_at(pool + THREADS), i64_at(pool + TIMES)
    ahead = fetched = prepared = 0
    for i in range(n_ops):
        record, counter = records + i * FIELDS * 8, counters + i * (threads + 1) * LINE
        goal = (run << RUN_BIT) + i64_at(record + 16)
        start = nanoseconds() if times != 0 else 0
        done, prepared = _do_tiles(record, counter, run, thread, threads, prepared)
        if done > 0:
            atomic_add(counter, done)
        if i64_at(record + 40) != ahead:
            ahead, fetched = i64_at(record + 40), 0
        end = nanoseconds() if times != 0 else 0
        fetched = _wait(record, counter, goal, thread, threads, fetched)
        if times != 0:
            here = times + (i * threads + thread) * 16
            set_i64(here, end - start)
            set_i64(here + 8, nanoseconds() - end)


def _worker(pool, thread):
    # As in fresh memory: a thread that starts late must not miss the end of the pool.
    seen = 0
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
        _work(pool, thread, seen)


def _run(pool, program, n_ops, times):
    counters, records = i64_at(pool + COUNTERS), i64_at(pool + RECORDS)
    run = atomic_load(pool + RUN) + 1
    # First the counters, so that no thread of an earlier run can take a tile of what is written next.
    for i in range(n_ops * (i64_at(pool + THREADS) + 1)):
        plain_store(counters + i * LINE, run << RUN_BIT)
    fence()
    for i in range(n_ops * FIELDS):
        set_i64(records + 8 * i, i64_at(program + 8 * i))
    set_i64(pool + N_OPS, n_ops)
    set_i64(pool + TIMES, times)
    atomic_store(pool + RUN, run)
    if atomic_load(pool + SLEEPERS) > 0:
        wake(pool + RUN)
    _work(pool, 0, run)


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

    def __init__(self, threads: int, max_ops: int = MAX_OPS) -> None:
        self.threads = threads
        self.max_ops = max_ops
        self._start()
        os.register_at_fork(after_in_child=self._start)
        atexit.register(self._close)

    def _start(self) -> None:
        """Fresh shared words and workers: a forked child has none of its parent's threads."""
        self._lock = threading.Lock()
        counters, records = self.max_ops * (self.threads + 1) * LINE // 8, self.max_ops * FIELDS
        self._memory = np.zeros(8 + WORDS + counters + records, np.int64)
        self._times = np.zeros(self.max_ops * self.threads * 2, np.int64)
        start = self._memory.ctypes.data
        self._pool = start + (-start) % 64
        first = self._pool + WORDS * 8
        for word, value in ((COUNTERS, first), (RECORDS, first + counters * 8), (THREADS, self.threads)):
            ctypes.c_int64.from_address(self._pool + word).value = value
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

    def run(
        self, program: np.ndarray, first: int = 0, count: int | None = None, times: np.ndarray | None = None
    ) -> None:
        """Runs operations of a program, in order, all tiles of one before the next.

        Args:
            program: int64 [ops, FIELDS], C-contiguous; see FIELDS.
            first, count: the part to run; all of it by default.
            times: int64 [count, threads, 2], receives the nanoseconds that each thread worked and waited.
        """
        count = len(program) - first if count is None else count
        if count > self.max_ops:
            raise ValueError(f"a program of {count} operations exceeds the pool's {self.max_ops}")
        if count:
            start = program.ctypes.data + first * FIELDS * 8
            with self._lock:
                if times is None:
                    self._run(self._pool, start, count, 0)
                else:
                    # Memory of our own: a thread may still write to it when the run is over.
                    own = self._times[: times.size]
                    own[:] = 0
                    self._run(self._pool, start, count, own.ctypes.data)
                    times[:] = own.reshape(times.shape)


@functools.cache
def shared_pool(threads: int) -> ThreadPool:
    """The process's pool of so many threads: models share it, and it outlives them."""
    return ThreadPool(threads)
