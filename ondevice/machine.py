"""What this machine offers: cores that may be used, instruction sets, memory and its bandwidth."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ondevice import control_groups

BANDWIDTH_BYTES = 1 << 29
"""Memory that a measurement walks through: more than any cache holds."""


def default_threads() -> int:
    """Physical cores that this process may really use: affinity, cgroup quota and hyper-threads considered."""
    allowed = usable_cpus()
    cores = {_core_of(cpu) for cpu in allowed}
    quota = control_groups.cpus()
    count = len(cores)
    return max(1, min(count, int(quota)) if quota else count)


def usable_cpus() -> list[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> str:
    """A name of the physical core of a logical CPU; the CPU itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def threads_reason() -> str:
    """Why `default_threads` is what it is."""
    allowed, quota = usable_cpus(), control_groups.cpus()
    cores = len({_core_of(cpu) for cpu in allowed})
    parts = [f"{os.cpu_count()} logical CPUs", f"{len(allowed)} allowed to this process", f"{cores} cores"]
    if quota is not None:
        parts.append(f"control group grants {quota:g} CPUs")
    return ", ".join(parts)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_bytes() -> tuple[int, int | None]:
    """Bytes of memory in all, and available now (None where the system does not tell), within the control group."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0), None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _meminfo("MemAvailable")
    granted = control_groups.memory()
    if granted is not None:
        total = min(total, granted[0])
        available = None if available is None else min(available, granted[1])
    return total, available


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _sysctl(name: str) -> str | None:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_bandwidth(threads: int) -> float:
    """Bytes per second that threads read from memory together, measured in about a second.

    Args:
        threads: each reads a part of its own.
    """
    import numpy as np

    _, available = memory_bytes()
    nbytes = min(BANDWIDTH_BYTES, (available or BANDWIDTH_BYTES * 4) // 4)
    # Written to, so that every page is memory and not the system's one page of zeros.
    parts = [np.full(nbytes // threads // 4, 1, np.int32) for _ in range(threads)]
    jobs: list[Callable[[], Any]] = [part.max for part in parts]
    return max(sum(part.nbytes for part in parts) / _seconds(jobs) for _ in range(3))


def _seconds(jobs: list[Callable[[], Any]]) -> float:
    """Time from when all threads are ready until the last has done its job."""
    ready = threading.Barrier(len(jobs) + 1)

    def work(job: Callable[[], Any]) -> None:
        ready.wait()
        job()

    workers = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
