"""How a kernel is written, compiled and cached.

A kernel is a Numba function `(arguments, tile, thread)` of int64: the address of its packed arguments, which piece of
the work to do, and which thread does it. All kernels have this one C signature, so that a program is a list of
addresses. Kernels are compiled when first needed and kept in a folder of our own, keyed by everything that their
machine code depends on: Numba itself looks only at the file of the function, not at the intrinsics that it calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import llvmlite
import numba
import platformdirs
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.extending import intrinsic

SIGNATURE = types.void(types.int64, types.int64, types.int64)
_KINDS = {"i": (types.int64, ir.IntType(64)), "f": (types.float64, ir.DoubleType())}


@intrinsic(prefer_literal=True)
def unpack(context, arguments, layout):
    """The 8-byte arguments at an address, as a tuple.

    Args:
        layout: a literal string with "i" for each int64 (numbers and addresses) and "f" for each float64.
    """
    letters = layout.literal_value
    result = types.Tuple([_KINDS[c][0] for c in letters])

    def codegen(ctx, builder, signature, args):
        values = []
        for i, c in enumerate(letters):
            address = builder.add(args[0], ir.IntType(64)(8 * i))
            values.append(builder.load(builder.inttoptr(address, _KINDS[c][1].as_pointer()), align=8))
        return ctx.make_tuple(builder, signature.return_type, values)

    return result(types.int64, layout), codegen


@intrinsic
def call_kernel(context, function, arguments, tile, thread):
    """Calls the kernel at an address."""
    long = ir.IntType(64)

    def codegen(ctx, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [long] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.digest()


_SOURCES = _digest_of_sources()
"""Taken at import: a process that outlives an upgrade must not file its old code under the new one's name."""


def cache_folder() -> Path:
    """Where compiled kernels of this version, Numba and instruction set are kept."""
    digest = hashlib.sha256(_SOURCES)
    codegen = cpu_target.target_context.codegen()
    versions = (numba.__version__, llvmlite.__version__, codegen._tm_features, codegen._llvm_module.triple)
    digest.update(repr(versions).encode())
    return platformdirs.user_cache_path("ondevice") / "kernels" / digest.hexdigest()[:16]


@contextlib.contextmanager
def our_cache():
    """Numba decorators inside cache in our folder; the caller's own setting is untouched."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_folder())
    try:
        yield
    finally:
        config.CACHE_DIR = before


def named(label: str) -> Callable[[Callable], Callable]:
    """Decorator: puts a label into a function's name, and so into the names of its machine code.

    Numba tells functions of one name apart by a number that starts anew in every process. Two shapes of a function
    cached by two processes could carry one symbol, and whichever a third process loaded first would stand for both.
    """

    def rename(function: Callable) -> Callable:
        word = re.sub(r"\W+", "_", label)
        function.__name__ += f"_{word}"
        function.__qualname__ += f"_{word}"
        return function

    return rename


class _LabelledCache(FunctionCache):
    """A kernel's cache entry, found by its label.

    Numba would look at the values that the function encloses, and those of a kernel made for one shape are functions
    that pickle differently in every process. The folder stands for the sources, and labels tell shapes apart.
    """

    def __init__(self, function: Callable, label: str) -> None:
        self._label = label
        super().__init__(function)

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), self._label


def _compile(function: Callable, label: str) -> CFunc:
    made = CFunc(function, (SIGNATURE.args, SIGNATURE.return_type), locals={}, options={"error_model": "numpy"})
    made._cache = _LabelledCache(function, label)
    made.compile()
    return made


_compiling = threading.Lock()


class Kernel:
    """A kernel that is compiled when first asked for.

    Args:
        function: the Numba source.
        label: what it is called in progress and profiles; unlike any other kernel's.
    """

    def __init__(self, function: Callable, label: str) -> None:
        self.function, self.label = named(label)(function), label
        self._compiled = None

    @property
    def ready(self) -> bool:
        """Whether `address` answers at once."""
        return self._compiled is not None

    @property
    def address(self) -> int:
        """Address of the machine code, compiled or loaded from the cache now if need be."""
        if self._compiled is None:
            with _compiling, our_cache():
                if self._compiled is None:
                    self._compiled = _compile(self.function, self.label)
        return self._compiled.address


def kernel(label: str) -> Callable[[Callable], Kernel]:
    """Decorator: makes a Kernel of a function `(arguments, tile, thread)`."""
    return lambda function: Kernel(function, label)


def compile_all(kernels: Iterable[Kernel], progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compiles kernels ahead of their use.

    Args:
        progress: called with (done, of how many, kernel's label) before each one that is not ready.
    """
    waiting = [k for k in dict.fromkeys(kernels) if not k.ready]
    for i, item in enumerate(waiting):
        if progress:
            progress(i, len(waiting), item.label)
        _ = item.address
    if progress and waiting:
        progress(len(waiting), len(waiting), "")
