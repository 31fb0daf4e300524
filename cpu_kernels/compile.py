"""How a kernel is written and compiled.

A kernel is a Numba function `(arguments, tile, thread)` of int64: the address of its packed arguments, which piece of
the work to do, and which thread does it. All kernels have this one C signature, so that a program is a list of
addresses. Kernels are compiled when first needed. Their machine code is kept in a folder of our own, since Numba's
cache looks only at the file of the function and not at the intrinsics that it calls, and is loaded by LLVM alone:
getting Numba ready to compile takes longer than loading all that a model needs.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from cpu_kernels import code_cache
from cpu_kernels.linking import link_before_machine_code

link_before_machine_code()

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


def named(label: str) -> Callable[[Callable], Callable]:
    """Decorator: puts a label into a function's name, so that shapes of a function can be told apart in LLVM's code."""

    def rename(function: Callable) -> Callable:
        word = re.sub(r"\W+", "_", label)
        function.__name__ += f"_{word}"
        function.__qualname__ += f"_{word}"
        return function

    return rename


@global_compiler_lock
def _machine_code(function: Callable, signature, name: str) -> bytes:
    """Object code with one C function of that name, which takes the signature's arguments as they are."""
    flags = compiler.Flags()
    cpu_target.options.parse_as_flags(flags, {"nopython": True, "error_model": "numpy"})
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.no_compile = True
    context = cpu_target.target_context
    made = compiler.compile_extra(
        cpu_target.typing_context, context, function, signature.args, signature.return_type, flags, locals={}
    )
    made.library.add_ir_module(_wrapper(context, made.fndesc, name))
    made.library.enable_object_caching()
    made.library.finalize()
    return made.library._get_compiled_object()


def _wrapper(context, inner, name: str) -> ir.Module:
    """A C function around a compiled one. Numba's own would need Python for errors, which no kernel can raise."""
    module = context.create_module(f"wrapper of {name}")
    kind = context.call_conv.get_function_type(inner.restype, inner.argtypes)
    callee = ir.Function(module, kind, inner.llvm_func_name)
    values = [context.get_value_type(t) for t in inner.argtypes]
    outer = ir.Function(module, ir.FunctionType(ir.VoidType(), values), name)
    builder = ir.IRBuilder(outer.append_basic_block())
    status, _ = context.call_conv.call_function(builder, callee, inner.restype, inner.argtypes, outer.args)
    with builder.if_then(status.is_error, likely=False):
        trap = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "llvm.trap")
        builder.call(trap, [])
    builder.ret_void()
    return module


@functools.cache
def _loader() -> llvm.LLJIT:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


_loaded: list[llvm.ResourceTracker] = []
"""Machine code stays for good: programs know it by its address only."""
_numbers = itertools.count()


def _load(code: bytes, name: str) -> int:
    """Puts object code into memory. Returns the address of its function of that name."""
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol(name)
    tracker = builder.link(_loader(), f"{name} {next(_numbers)}")
    _loaded.append(tracker)
    return tracker[name]


_compiling = threading.RLock()


class Kernel:
    """A kernel that is compiled when first asked for.

    Args:
        function: the Numba source.
        label: what it is called in progress and profiles; unlike any other kernel's.
        signature: where it is not that of kernels; returns nothing.
    """

    def __init__(self, function: Callable, label: str, signature=SIGNATURE) -> None:
        self.function, self.label, self.signature = named(label)(function), label, signature
        self._address: int | None = None

    @property
    def ready(self) -> bool:
        """Whether `address` answers at once."""
        return self._address is not None

    @property
    def address(self) -> int:
        """Address of the machine code, loaded from the cache or compiled now if need be."""
        if not self.ready:
            with _compiling:
                if not self.load():
                    self._compile()
        return self._address

    def load(self) -> bool:
        """Loads the machine code if it is in the cache. Returns whether the kernel is ready."""
        with _compiling:
            path = None if self.ready else self._file()
            code = None if path is None else code_cache.read(path)
            if code is not None:
                try:
                    self._address = _load(code, self._name)
                except RuntimeError as error:  # LLVM's, for code that this system cannot link
                    code_cache.complain(path, f"cannot be loaded: {error}")
            return self.ready

    def _compile(self) -> None:
        code = _machine_code(self.function, self.signature, self._name)
        path = self._file()
        if path is not None:
            code_cache.write(path, code)
        self._address = _load(code, self._name)

    @property
    def _name(self) -> str:
        return re.sub(r"\W", "_", f"kernel {self.label}")

    def _file(self) -> Path | None:
        return code_cache.file_of(self.label, self.function.__code__.co_filename)


def kernel(label: str) -> Callable[[Callable], Kernel]:
    """Decorator: makes a Kernel of a function `(arguments, tile, thread)`."""
    return lambda function: Kernel(function, label)


def compile_all(kernels: Iterable[Kernel], progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compiles kernels ahead of their use.

    Args:
        progress: called with (done, of how many, kernel's label) before each one that must be compiled.
    """
    waiting = [k for k in dict.fromkeys(kernels) if not k.load()]
    for i, item in enumerate(waiting):
        if progress:
            progress(i, len(waiting), item.label)
        _ = item.address
    if progress and waiting:
        progress(len(waiting), len(waiting), "")
