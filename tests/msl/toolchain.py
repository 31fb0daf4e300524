"""The compiler: clang and lld from the wheel `ziglang`, so that every machine runs the same one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.msl.findings import EmulatorError

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"
MACHINE = "-march=x86-64-v3"  # float16 needs its conversions


@functools.cache
def compiler() -> str:
    """The program that is clang and lld.

    Raises:
        EmulatorError: this machine has none, or cannot run the emulator.
    """
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        raise EmulatorError(f"the emulator runs on Linux on x86-64, not on {sys.platform} {platform.machine()}")
    spec = find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        raise EmulatorError("no clang: it comes with the wheel ziglang; pip install -e '.[dev]'")
    program = Path(spec.submodule_search_locations[0]) / "zig"
    if not os.access(program, os.X_OK):
        raise EmulatorError(f"no clang: {program} is missing; pip install --force-reinstall ziglang")
    return str(program)


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `clang` or `ld.lld`; whoever calls looks at the return code."""
    return subprocess.run([compiler(), tool, *map(str, arguments)], check=False, capture_output=True, text=True)


def run_or_fail(tool: str, *arguments: str | Path) -> str:
    """The same where only the emulator itself can be at fault; returns stdout."""
    result = run(tool, *arguments)
    if result.returncode:
        raise EmulatorError(f"{tool} failed:\n{result.stderr[-4000:]}")
    return result.stdout


@functools.cache
def cache() -> Path:
    """A folder of this user's for compiled kernels, in the folder for temporary files."""
    folder = Path(tempfile.gettempdir()) / f"ondevice-msl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise EmulatorError(f"{folder}: another user's; code is loaded from it")
    return folder


@functools.cache
def fingerprint() -> str:
    """Of the emulator: what it compiles is not found again once any of its files or the compiler changes."""
    files = [HERE / "toolchain.py", HERE / "compile.py", *INCLUDE.rglob("*"), *RUNTIME.iterdir()]
    content = b"".join(path.read_bytes() for path in sorted(files) if path.is_file())
    content += str(INCLUDE).encode()  # precompiled headers know where they came from
    return hashlib.sha256(content + run_or_fail("clang", "--version").encode()).hexdigest()


@contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """Gives a folder to make `path` in, as a file of that name; nothing where it exists. Processes may compete."""
    if path.exists():
        yield None
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        yield folder
        (folder / path.name).rename(path)


@functools.cache
def runtime_object() -> Path:
    """The compiled runtime, to be linked to every kernel."""
    path = cache() / f"runtime-{fingerprint()[:16]}.o"
    with made_once(path) as folder:
        if folder:
            freestanding = "-std=c++17 -ffreestanding -nostdinc -fno-exceptions -fno-rtti -fno-stack-protector"
            flags = f"-x c++ {freestanding} -fvisibility=hidden -O2 -fPIC {MACHINE}".split()
            run_or_fail("clang", *flags, "-c", RUNTIME / "runtime.cpp", "-o", folder / path.name)
    return path


@functools.cache
def prelude(*flags: str) -> tuple[str, ...]:
    """`flags`, and those that bring what MLX puts before a kernel, precompiled: it is longer than any kernel."""
    key = hashlib.sha256(repr((fingerprint(), flags)).encode()).hexdigest()[:16]
    path = cache() / f"prelude-{key}.pch"
    with made_once(path) as folder:
        if folder:
            emit = ["-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp", "-c"]
            run_or_fail("clang", *flags, *emit, INCLUDE / "metal_stdlib", "-o", folder / path.name)
    return (*flags, "-include-pch", str(path))


@functools.cache
def mathematics() -> None:
    """Makes libm's functions known to kernels that are loaded later."""
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
