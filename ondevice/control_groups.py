"""What Linux control groups (containers, services) grant this process: CPU time and memory, of versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Version 1 gives a number near 2**63 where there is no limit."""


def cpus(root: Path = ROOT) -> float | None:
    """CPU time granted, in CPUs: the smallest quota of this process's group and the groups around it.

    Args:
        root: of the file system.

    Returns:
        Number of CPUs; None without a limit.
    """
    found = [quota for group in _groups(root, "cpu") if (quota := _quota(group)) is not None]
    return min(found, default=None)


def memory(root: Path = ROOT) -> tuple[int, int] | None:
    """The group with the least memory left, among this process's and those around it.

    Args:
        root: of the file system.

    Returns:
        Bytes allowed, bytes left; None without a limit.
    """
    found = []
    for group in _groups(root, "memory"):
        limit = _first(group, "memory.max", "memory.limit_in_bytes")
        used = _first(group, "memory.current", "memory.usage_in_bytes")
        if limit is not None and limit < _UNLIMITED:
            found.append((limit, max(0, limit - (used or 0))))
    return (min(limit for limit, _ in found), min(left for _, left in found)) if found else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of all around it, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree of groups for all controllers, version 1 one tree for each.
        if controllers and controller not in controllers.split(","):
            continue
        top = base / controllers if controllers else base
        if controllers and not top.is_dir():
            top = base / controller
        # Inside a container the path may be the one outside, which does not exist here: then only the top does.
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for depth in range(len(steps), -1, -1):
            yield top.joinpath(*steps[:depth])
    if not lines:
        yield base


def _quota(group: Path) -> float | None:
    text = _read(group / "cpu.max")
    if text is not None:
        first, _, second = text.partition(" ")
        quota, period = _number(first), _number(second)
    else:
        quota, period = _first(group, "cpu.cfs_quota_us"), _first(group, "cpu.cfs_period_us")
    # Version 1 says -1, version 2 "max" where there is no limit.
    return quota / period if quota and period and quota > 0 else None


def _first(group: Path, *names: str) -> int | None:
    """The number in the first of some files that has one."""
    return next((n for name in names if (n := _number(_read(group / name))) is not None), None)


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
