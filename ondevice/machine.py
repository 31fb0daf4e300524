"""What this machine offers: cores that may be used, instruction sets, memory and its bandwidth."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """Physical cores that this process may really use: affinity, cgroup quota and hyper-threads considered."""
    allowed = usable_cpus()
    cores = {_core_of(cpu) for cpu in allowed}
    quota = cgroup_cpus()
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


def cgroup_cpus() -> float | None:
    """CPU time that the control group grants, in CPUs; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
