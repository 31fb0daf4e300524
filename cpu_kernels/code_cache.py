"""Machine code of compiled kernels, kept on disk.

A folder belongs to one version of our sources, one Numba and one instruction set; a file in it to one kernel. What
cannot be read is compiled again, what cannot be written is compiled at every start, and the user is told once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
import platformdirs
from numba.core import config
from numba.core.codegen import get_host_cpu_features

_LOG = logging.getLogger("ondevice")
_DIGEST_BYTES = 32
ENDING = ".code"


def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.digest()


_SOURCES = _digest_of_sources()
"""Taken at import: a process that outlives an upgrade must not file its old code under the new one's name."""


@functools.cache
def target() -> tuple[str, str, str]:
    """What Numba compiles for: triple, processor and features, as its settings or this machine say."""
    features = config.CPU_FEATURES
    return (
        llvm.get_process_triple(),
        config.CPU_NAME or llvm.get_host_cpu_name(),
        get_host_cpu_features() if features is None else features,
    )


def cache_folder() -> Path:
    """Where compiled kernels of this version, Numba and instruction set are kept."""
    key = (_SOURCES, numba.__version__, llvmlite.__version__, *target())
    return platformdirs.user_cache_path("ondevice") / "kernels" / hashlib.sha256(repr(key).encode()).hexdigest()[:16]


@functools.cache
def _digest_of_file(name: str) -> bytes:
    return hashlib.sha256(Path(name).read_bytes()).digest()


def file_of(label: str, source: str) -> Path | None:
    """The file of a kernel.

    Args:
        label: of the kernel.
        source: file that it is written in: of kernels outside this package the folder knows nothing.

    Returns:
        The path; None where the source is no file, so that nothing would say when it changes.
    """
    try:
        digest = hashlib.sha256(_digest_of_file(source) + label.encode()).hexdigest()[:16]
    except OSError:
        return None
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', label)}-{digest}{ENDING}"


def read(path: Path) -> bytes | None:
    """The machine code in a file; None where there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(path.parent, f"cannot be read: {error.strerror}")
        return None
    code = data[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == data[:_DIGEST_BYTES]:
        return code
    complain(path, "damaged")
    return None


def complain(path: Path, problem: str) -> None:
    """Says that a file is of no use."""
    _LOG.warning("%s: %s; this kernel is compiled again", path, problem)


def write(path: Path, code: bytes) -> None:
    """Keeps machine code. The file appears whole: other processes may read or write the same one."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _warn_once(path.parent, f"cannot be written: {error.strerror}")


_warned: set[Path] = set()


def _warn_once(folder: Path, problem: str) -> None:
    if folder in _warned:
        return
    _warned.add(folder)
    way_out = "kernels are compiled anew at every start: make it writable, free space, or set XDG_CACHE_HOME"
    _LOG.warning("%s: %s; %s", folder, problem, way_out)
