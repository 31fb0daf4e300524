"""The cache of machine code: whatever is wrong with it, kernels run, and one line on stderr says why it is slow."""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numba.core.registry import cpu_target

from cpu_kernels import code_cache, compile
from cpu_kernels.compile import Kernel, compile_all, unpack
from cpu_kernels.simd import set_i64
from tests.kernels.test_compile import ADD_TWO


def sum_of_two(arguments, tile, thread):
    out, x, y = unpack(arguments, "iii")
    set_i64(out, x + y)


def difference(arguments, tile, thread):
    out, x, y = unpack(arguments, "iii")
    set_i64(out, x - y)


def run(item: Kernel, x: int, y: int) -> int:
    out = np.zeros(1, np.int64)
    words = np.array([out.ctypes.data, x, y], np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(item.address)(words.ctypes.data, 0, 0)
    return int(out[0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setattr(code_cache.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(code_cache, "_warned", set())
    return code_cache.cache_folder()


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled, though it is in the cache")

    return lambda: monkeypatch.setattr(compile, "_machine_code", refuse)


def test_a_second_start_compiles_nothing(folder, no_compiler):
    assert run(Kernel(sum_of_two, "sum"), 5, 8) == 13
    assert len(list(folder.iterdir())) == 1
    no_compiler()
    again, reports = Kernel(sum_of_two, "sum"), []
    assert not again.ready
    compile_all([again], lambda *report: reports.append(report))
    assert again.ready and run(again, 7, 8) == 15 and reports == []


def test_labels_tell_kernels_apart(folder):
    made = [Kernel(sum_of_two, "a b"), Kernel(difference, "a_b"), Kernel(difference, "a B")]
    assert [run(item, 5, 3) for item in made] == [8, 2, 2]
    kept = [Kernel(sum_of_two, "a b"), Kernel(difference, "a_b")]
    assert all(item.load() for item in kept) and [run(item, 5, 3) for item in kept] == [8, 2]
    assert len(list(folder.iterdir())) == 3


def test_an_edited_kernel_of_another_package_is_compiled_anew(folder, tmp_path):
    file = tmp_path / "theirs.py"

    def made(last_line: str) -> Kernel:
        file.write_text(f"def f(arguments, tile, thread):\n    o, x, y = unpack(arguments, 'iii')\n    {last_line}\n")
        code_cache._digest_of_file.cache_clear()
        scope = {"unpack": unpack, "set_i64": set_i64}
        exec(builtins.compile(file.read_text(), str(file), "exec"), scope)
        return Kernel(scope["f"], "theirs")

    assert run(made("set_i64(o, x + y)"), 5, 3) == 8
    assert run(made("set_i64(o, x * y)"), 5, 3) == 15


def test_a_kernel_without_a_file_is_not_kept(folder):
    scope = {"unpack": unpack, "set_i64": set_i64}
    exec("def f(arguments, tile, thread):\n    o, x, y = unpack(arguments, 'iii')\n    set_i64(o, x + y)\n", scope)
    assert run(Kernel(scope["f"], "from nowhere"), 1, 2) == 3
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda data: b"",
        "truncated": lambda data: data[:-100],
        "one bit": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        "no code": lambda data: code_cache.hashlib.sha256(b"junk").digest() + b"junk",
        "code of nothing": lambda data: code_cache.hashlib.sha256(b"").digest(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_file_is_compiled_again(folder, caplog, no_compiler, damage):
    run(Kernel(sum_of_two, "sum"), 5, 8)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage[1](whole))
    assert run(Kernel(sum_of_two, "sum"), 5, 8) == 13
    assert len(caplog.messages) == 1 and str(path) in caplog.text and "compiled again" in caplog.text
    no_compiler()
    assert run(Kernel(sum_of_two, "sum"), 5, 8) == 13, "the good file is back"


def refusing(number: int):
    def refuse(*args, **extra):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("where", "name", "number"),
    [
        (os, "replace", errno.ENOSPC),
        (tempfile, "mkstemp", errno.EROFS),
        (tempfile, "mkstemp", errno.EACCES),
        (Path, "mkdir", errno.EACCES),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_once(folder, caplog, monkeypatch, where, name, number):
    monkeypatch.setattr(where, name, refusing(number))
    assert run(Kernel(sum_of_two, "sum"), 5, 8) == 13
    assert run(Kernel(difference, "difference"), 5, 8) == -3
    (message,) = caplog.messages
    assert str(folder) in message and os.strerror(number) in message and "XDG_CACHE_HOME" in message
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_named_once(folder, caplog, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", refusing(errno.EACCES))
    monkeypatch.setattr(code_cache, "_digest_of_file", lambda name: b"")
    assert run(Kernel(sum_of_two, "sum"), 5, 8) == 13
    assert run(Kernel(difference, "difference"), 5, 8) == -3
    assert len(caplog.messages) == 1 and "cannot be read" in caplog.text


def python(code: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_warning_reaches_stderr_of_a_plain_script(tmp_path):
    (tmp_path / "a file").write_text("no folder")
    out, err = python(ADD_TWO, tmp_path / "a file").communicate(timeout=100)
    assert out == "10.0\n" and len(err.splitlines()) == 1 and "Not a directory" in err


def test_two_processes_fill_one_empty_cache(tmp_path):
    both = [python(ADD_TWO, tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=100) for process in both] == [("10.0\n", "")] * 2
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [code_cache.ENDING]


def test_another_processor_has_another_folder(tmp_path):
    code = "from cpu_kernels.code_cache import cache_folder; print(cache_folder().name)"
    settings = [{}, {"NUMBA_CPU_FEATURES": "+sse2"}, {"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}, {}]
    names = [python(code, tmp_path, **s).communicate(timeout=100)[0] for s in settings]
    assert names[0] == names[-1] and len(set(names)) >= 3


def test_the_folder_is_of_what_numba_compiles_for():
    codegen = cpu_target.target_context.codegen()
    triple, cpu, features = code_cache.target()
    assert (triple, features) == (codegen._llvm_module.triple, codegen._tm_features)
    assert cpu == codegen._get_host_cpu_name()
