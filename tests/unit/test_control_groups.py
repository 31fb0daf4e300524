"""Limits of control groups, read from a made-up file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from ondevice import machine
from ondevice.control_groups import cpus, memory

V1_NONE = str(2**63 - 4096)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v2(path: str, **groups: str) -> dict[str, str]:
    """Files of version 2: the group of the process, and contents of files by name with __ for /, _ for a dot."""
    files = {f"sys/fs/cgroup/{name.replace('__', '/').replace('_', '.')}": text for name, text in groups.items()}
    return {"proc/self/cgroup": f"0::{path}", **files}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        (v2("/", cpu_max="max 100000"), None),
        (v2("/", cpu_max="50000 100000"), 0.5),
        (v2("/a/b", a__cpu_max="100000 100000", a__b__cpu_max="max 100000"), 1.0),
        (v2("/a/b", a__cpu_max="400000 100000", a__b__cpu_max="300000 100000"), 3.0),
        (v2("/a/b", cpu_max="200000 100000", a__b__cpu_max="300000 100000"), 2.0),
        (v2("/not/here", cpu_max="200000 100000"), 2.0),
        (v2("/../outside", cpu_max="200000 100000"), 2.0),
        (v2("/", cpu_max="rubbish"), None),
        (v2("/", cpu_max="100000 0"), None),
        (v2("/", cpu_max=""), None),
    ],
)
def test_cpus_of_version_2(tmp_path, files, expected):
    assert cpus(tree(tmp_path, files)) == expected


V1 = {"proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a/b\n1:name=systemd:/x\n0::/"}


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
@pytest.mark.parametrize(
    ("outer", "inner", "expected"), [("-1", "-1", None), ("250000", "-1", 2.5), ("250000", "50000", 0.5)]
)
def test_cpus_of_version_1(tmp_path, folder, outer, inner, expected):
    base = f"sys/fs/cgroup/{folder}/a"
    files = {f"{base}/cpu.cfs_quota_us": outer, f"{base}/b/cpu.cfs_quota_us": inner}
    files |= {f"{base}/cpu.cfs_period_us": "100000", f"{base}/b/cpu.cfs_period_us": "100000"}
    assert cpus(tree(tmp_path, V1 | files)) == expected


def test_memory(tmp_path):
    nested = v2("/a/b", a__memory_max="1000", a__memory_current="900", a__b__memory_max="800", a__b__memory_current="1")
    assert memory(tree(tmp_path / "2", nested)) == (800, 100)
    assert memory(tree(tmp_path / "none", v2("/a", a__memory_max="max", a__memory_current="5"))) is None
    first = "sys/fs/cgroup/memory"
    limits = {f"{first}/memory.limit_in_bytes": V1_NONE, f"{first}/m/memory.limit_in_bytes": "700"}
    used = {f"{first}/memory.usage_in_bytes": "5000", f"{first}/m/memory.usage_in_bytes": "750"}
    assert memory(tree(tmp_path / "1", V1 | limits | used)) == (700, 0)
    assert memory(tmp_path / "nothing") is None


def test_the_machine_keeps_to_them(monkeypatch):
    monkeypatch.setattr("ondevice.control_groups.cpus", lambda: 1.9)
    monkeypatch.setattr("ondevice.control_groups.memory", lambda: (1 << 20, 1 << 10))
    assert machine.default_threads() == 1
    assert "control group grants 1.9 CPUs" in machine.threads_reason()
    assert machine.memory_bytes() == (1 << 20, 1 << 10)
