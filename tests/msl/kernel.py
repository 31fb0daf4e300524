"""Kernels as `mx.fast.metal_kernel` gives them, run by the emulator on `mx.array`."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from tests.msl import native
from tests.msl.compile import Library, compiled
from tests.msl.findings import EmulatorError, Finding, KernelError, Kind
from tests.msl.signature import Array, Parameter, Signature, Template, dtype_name, signature

if TYPE_CHECKING:
    from tests.msl.emulator import Emulator

MAX_THREADS = 1024
MAX_BUFFERS = 31
MAX_THREADGROUP_BYTES = 32 << 10
PREEMPT = 24
"""In random order a thread stops at one of that many accesses."""
MAX_STEPS = 50_000_000
"""Accesses, barriers or functions of simdgroups of one call: some seconds."""


def is_kernel(full_name: str, name: str) -> bool:
    """Whether a kernel has this name, but for the package before it and the checksum of its text behind it."""
    return re.fullmatch(rf"(?:ondevice_)?{re.escape(name)}(?:_[0-9a-f]{{8}})?", full_name) is not None


@dataclass(frozen=True)
class Run:
    """One call of a kernel: what it was given, and what was counted."""

    kernel: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    threadgroup_bytes: int
    accesses: int
    simd_operations: int
    barriers: int
    groups: int


@dataclass(frozen=True)
class _Buffer:
    """An argument: its storage, and the element that races are looked for by."""

    name: str
    data: np.ndarray
    flags: int

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last, which for strided inputs is not the sum of elements."""
        if not self.data.size:
            return 0
        reach = sum((n - 1) * abs(s) for n, s in zip(self.data.shape, self.data.strides))
        return reach + self.data.itemsize


class Kernel:
    """What `metal_kernel` returns: call it with keywords, as MLX's."""

    def __init__(
        self,
        emulator: Emulator,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
    ) -> None:
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.emulator, self.name, self.source, self.header = emulator, name, source, header
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Runs the kernel.

        Raises:
            KernelError: it is wrong; the error has the findings.
            ValueError: lists of arguments do not have the lengths that the kernel was made with.
        """
        for what, values, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(values) != len(names):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(values)}."
                )
        arrays = [each if isinstance(each, mx.array) else mx.array(each) for each in inputs]
        made = signature(
            self.name,
            self.source,
            self.header,
            self.input_names,
            [Array(dtype_name(a.dtype), a.ndim, a.size) for a in arrays],
            self.output_names,
            [dtype_name(d) for d in output_dtypes],
            list(template or []),
            self.atomic_outputs,
        )
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{made.text}\n```")
        self._check_limits(made, grid, threadgroup)
        library = compiled(self.name, self.source, self.header, made)
        used = sum(size for _, size in library.variables)
        if used > MAX_THREADGROUP_BYTES:
            self._over(f"{used} bytes of threadgroup memory, over {MAX_THREADGROUP_BYTES}")
        given = [self._numpy(array) for array in arrays]
        outputs = [_output(tuple(s), d, init_value) for s, d in zip(output_shapes, output_dtypes)]
        buffers = [_bound(p, given, outputs, init_value is not None) for p in made.parameters]
        launch = self._run(library, buffers, grid, threadgroup)
        counted = (launch.accesses, launch.simd_operations, launch.barriers, launch.groups)
        self.emulator.runs.append(Run(self.name, made.text, grid, threadgroup, used, *counted))
        findings = [
            native.explained(found, library, [(b.name, b.data.itemsize, str(b.data.shape)) for b in buffers])
            for found in launch.findings[: launch.n_findings]
        ]
        if any(is_kernel(self.name, name) for name in self.emulator.may_leave_unwritten):
            findings = [finding for finding in findings if finding.kind is not Kind.UNWRITTEN]
        if findings:
            raise KernelError(self.name, findings)
        if not launch.accesses:
            raise EmulatorError(f"kernel {self.name}: no access to memory was seen")
        return [_mlx(output, dtype) for output, dtype in zip(outputs, output_dtypes)]

    def _over(self, text: str) -> None:
        raise KernelError(self.name, [Finding(Kind.LIMIT, text)])

    def _check_limits(self, made: Signature, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
        for what, sizes in (("grid", grid), ("threadgroup", threadgroup)):
            if len(sizes) != 3 or min(sizes) < 1:
                self._over(f"{what} {tuple(sizes)}: three sizes of at least 1 are needed")
        if math.prod(threadgroup) > MAX_THREADS:
            self._over(f"threadgroup {tuple(threadgroup)}: {math.prod(threadgroup)} threads, over {MAX_THREADS}")
        if len(made.parameters) > MAX_BUFFERS:
            self._over(f"{len(made.parameters)} buffers, over {MAX_BUFFERS}")

    def _numpy(self, array: mx.array) -> np.ndarray:
        """An input's elements; bfloat16 as the uint16 of its bits."""
        if array.dtype == mx.bfloat16:
            array = array.view(mx.uint16)
        if self.ensure_row_contiguous:
            array = mx.contiguous(array)
        return np.array(array, copy=False)

    def _run(
        self, library: Library, buffers: Sequence[_Buffer], grid: Sequence[int], threadgroup: Sequence[int]
    ) -> native.Launch:
        table = (native.Buffer * len(buffers))()
        for row, buffer in zip(table, buffers):
            row.base, row.size = buffer.data.ctypes.data, buffer.span
            row.element, row.flags = buffer.data.itemsize, buffer.flags
        found = (native.NativeFinding * native.MAX_FINDINGS)()
        launch = native.Launch(
            grid=tuple(grid),
            group=tuple(map(min, threadgroup, grid)),  # as MLX does
            seed=self.emulator.seed,
            order=native.ORDERS[self.emulator.order],
            preempt=PREEMPT if self.emulator.order == "random" else 0,
            n_buffers=len(buffers),
            max_findings=native.MAX_FINDINGS,
            max_steps=MAX_STEPS,
            buffers=table,
            findings=found,
        )
        with _LOCK:
            if library.code.msl_run(native.c.byref(launch)):
                raise EmulatorError(f"kernel {self.name}: no address space left for its buffers")
        return launch


_LOCK = threading.Lock()
"""A library runs one launch at a time."""


def _output(shape: tuple[int, ...], dtype: Any, init_value: float | None) -> np.ndarray:
    """Filled with `init_value`, else with NaN or -1, so that what was not written shows."""
    if init_value is not None:
        filled = mx.full(shape, init_value, dtype=dtype)
        return np.array(filled.view(mx.uint16) if dtype == mx.bfloat16 else filled)
    element = np.uint16 if dtype == mx.bfloat16 else np.dtype(dtype_name(dtype))
    output = np.empty(shape, element)
    output.reshape(-1).view(np.uint8)[...] = 0xFF
    return output


def _mlx(output: np.ndarray, dtype: Any) -> mx.array:
    array = mx.array(output)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def _bound(p: Parameter, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], filled: bool) -> _Buffer:
    """What a parameter points to."""
    if p.binds == "output":
        return _Buffer(p.name, outputs[p.index], native.WRITABLE | (native.INITIALISED if filled else 0))
    array = inputs[p.index]
    match p.binds:
        case "shape":
            array = np.array(array.shape, np.int32)
        case "strides":
            array = np.array([stride // array.itemsize for stride in array.strides], np.int64)
        case "ndim":
            array = np.array(array.ndim, np.int32)
    return _Buffer(p.name, array, native.INITIALISED)
