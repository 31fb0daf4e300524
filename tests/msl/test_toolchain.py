"""Without clang the emulator fails and says what to do; what it compiled is found again, until something changes."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from tests.msl import compile, toolchain
from tests.msl.emulator import Emulator, emulated
from tests.msl.findings import EmulatorError


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No compiler known yet, and an empty folder of compiled kernels."""
    caches = (toolchain.compiler, toolchain.cache, toolchain.runtime_object, toolchain.prelude, compile.compiled)
    for each in caches:
        each.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    for each in caches:
        each.cache_clear()


def test_without_the_wheel(fresh, monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(EmulatorError, match=r"pip install -e '.\[dev\]'"):
        Emulator()


def test_without_the_program(fresh, monkeypatch):
    class Spec:
        submodule_search_locations = (str(fresh),)

    monkeypatch.setattr(toolchain, "find_spec", lambda name: Spec)
    with pytest.raises(EmulatorError, match="reinstall"):
        Emulator()


def test_on_another_machine(fresh, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(EmulatorError, match="x86-64, not on"):
        Emulator()


def test_the_fixture_fails_and_does_not_skip(tmp_path):
    """A test that takes `metal` fails where there is no clang."""
    (tmp_path / "test_it.py").write_text("from tests.msl.fixture import metal\ndef test_it(metal):\n    pass\n")
    (tmp_path / "conftest.py").write_text(
        "import pytest\nfrom tests.msl import toolchain\ntoolchain.find_spec = lambda name: None\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1, result.stdout
    assert "1 error" in result.stdout
    assert "no clang" in result.stdout


def call(source: str) -> float:
    kernel = mx.fast.metal_kernel("k", [], ["out"], source)
    (out,) = kernel(inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.float32])
    return out.item()


def test_compiled_once(fresh, monkeypatch):
    calls: list[str] = []
    run = toolchain.run
    monkeypatch.setattr(toolchain, "run", lambda tool, *arguments: calls.append(tool) or run(tool, *arguments))
    with emulated():
        assert call("out[0] = 1;") == 1
        first = len(calls)
        assert call("out[0] = 1;") == 1
        compile.compiled.cache_clear()  # another process
        assert call("out[0] = 1;") == 1
        assert len(calls) == first
        assert call("out[0] = 2;") == 2
        assert len(calls) > first
    assert sorted(path.suffix for path in toolchain.cache().iterdir()) == [".o", ".pch", ".pch", ".so", ".so"]


def test_folder_of_another_user(fresh, monkeypatch):
    toolchain.cache()
    toolchain.cache.cache_clear()
    (fresh / f"ondevice-msl-{os.getuid()}").rmdir()
    (fresh / f"ondevice-msl-{os.getuid()}").symlink_to(fresh)
    with pytest.raises(EmulatorError, match="another user's"):
        toolchain.cache()


def test_an_error_outside_of_the_kernel(fresh, monkeypatch):
    """What fails in the emulator's own text is never said to be the kernel's fault."""
    monkeypatch.setitem(compile.ATTRIBUTES, "grid_size", "no_such_thing")
    with emulated(), pytest.raises(EmulatorError, match="no_such_thing"):
        call("out[0] = grid_size.x;")
