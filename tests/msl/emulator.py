"""What stands in for `mx.fast.metal_kernel`: the emulator, or Metal itself where there is a GPU.

Both have the same face, so that one test runs on either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from tests.msl import native, toolchain
from tests.msl.kernel import Kernel, Run, is_kernel

SCHEDULES = (("forward", 0), ("reverse", 0), ("random", 0), ("random", 1), ("random", 2))
"""Orders in which threads run, and seeds: what a kernel that is right must not depend on."""

Edit = Callable[[str, str, str], tuple[str, str]]
"""Given a kernel's name, source and header: the source and header to run instead."""


class Emulator:
    """Makes kernels that the emulator runs.

    Attributes:
        order, seed: the schedule of the next calls; `forward`, `reverse` or `random`.
        runs: one entry for each call of a kernel.
        may_leave_unwritten: names of kernels (as `is_kernel` takes them) whose outputs may have unwritten elements.
        edit: changes the text of kernels made from now on; for mutants.
        on_gpu: False: nothing here ran on a GPU.
    """

    on_gpu = False

    def __init__(self) -> None:
        toolchain.compiler()
        self.order, self.seed = "forward", 0
        self.runs: list[Run] = []
        self.may_leave_unwritten: set[str] = set()
        self.edit: Edit | None = None

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict[str, str] | None = None,
    ) -> Kernel:
        """The same call as `mx.fast.metal_kernel`. The math mode changes nothing here."""
        mode = (compile_options or {}).get("math_mode", "safe")
        if mode not in ("safe", "relaxed", "fast"):
            raise ValueError(f"[metal_kernel] math_mode {mode!r}: safe, relaxed or fast")
        if self.edit:
            source, header = self.edit(name, source, header)
        return Kernel(self, name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs)

    def schedule(self, order: str, seed: int = 0) -> None:
        """Sets the order in which threads run from now on."""
        if order not in native.ORDERS:
            raise ValueError(f"order {order!r}: {', '.join(native.ORDERS)}")
        self.order, self.seed = order, seed

    def schedules(self, given: Sequence[tuple[str, int]] = SCHEDULES) -> Iterator[tuple[str, int]]:
        """Sets each schedule in turn: `for _ in metal.schedules(): check(...)`."""
        try:
            for order, seed in given:
                self.schedule(order, seed)
                yield order, seed
        finally:
            self.schedule("forward")

    def ran(self, name: str) -> int:
        """How many times a kernel was called; names are compared as `is_kernel` does."""
        return sum(is_kernel(run.kernel, name) for run in self.runs)


class Gpu:
    """Metal's own kernels, counted. Schedules are what the GPU makes of them: one."""

    on_gpu = True

    def __init__(self) -> None:
        self._metal_kernel: Any = mx.fast.metal_kernel
        self._names: list[str] = []
        self.may_leave_unwritten: set[str] = set()

    def metal_kernel(self, name: str, *args: Any, **kwargs: Any) -> Callable[..., list[mx.array]]:
        kernel = self._metal_kernel(name, *args, **kwargs)

        def call(**given: Any) -> list[mx.array]:
            self._names.append(name)
            return kernel(**given)

        return call

    def schedule(self, order: str, seed: int = 0) -> None:
        pass

    def schedules(self, given: Sequence[tuple[str, int]] = SCHEDULES) -> Iterator[tuple[str, int]]:
        yield "gpu", 0

    def ran(self, name: str) -> int:
        return sum(is_kernel(each, name) for each in self._names)


@contextmanager
def emulated() -> Iterator[Emulator]:
    """The emulator in place of `mx.fast.metal_kernel`, whatever this machine has."""
    with _instead(Emulator()) as emulator:
        yield emulator


@contextmanager
def metal_kernels() -> Iterator[Emulator | Gpu]:
    """The GPU where there is one, else the emulator."""
    with _instead(Gpu() if mx.metal.is_available() else Emulator()) as kernels:
        yield kernels


@contextmanager
def _instead(kernels: Any) -> Iterator[Any]:
    """Wrappers make their kernels once and keep them: what they kept is forgotten before and after."""
    _forget()
    try:
        with mock.patch.object(mx.fast, "metal_kernel", kernels.metal_kernel):
            yield kernels
    finally:
        _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "metal_kernels":
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
