"""Which homes there are, whether one can run here, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ondevice_parity.check import Home

CPU_ERROR = 3e-2
"""Of products of 4 and 8 bits on a CPU, which multiply int8 codes of their inputs."""


@dataclass(frozen=True)
class Entry:
    """A home.

    Args:
        obstacle: why it cannot run here, and the way out; None if it can.
        open: makes it.
    """

    obstacle: Callable[[], str | None]
    open: Callable[[], Home]


def _reference() -> Home:
    from ondevice.ops.reference import ReferenceOps
    from ondevice_parity.ops_home import OpsHome

    return OpsHome(ReferenceOps, np.float64)


def _cpu() -> Home:
    from cpu_kernels.compile import compile_all
    from cpu_kernels.threads import POOL
    from ondevice.ops.cpu import CpuOps
    from ondevice_parity.ops_home import OpsHome

    compile_all(POOL, None)
    return OpsHome(CpuOps, np.float16, CPU_ERROR, halves=True)


def _torch_obstacle() -> str | None:
    from ondevice.ops import torch_device

    # Its twins are in the kernels' own files, which need both.
    problems = (torch_device.torch_obstacle(), torch_device.triton_obstacle())
    return next((problem for problem in problems if problem is not None), None)


def _torch() -> Home:
    import torch

    from ondevice_parity.torch_home import TorchHome

    return TorchHome(torch.device("cpu"), twin=True)


def _triton_obstacle() -> str | None:
    from ondevice.ops import torch_device

    problems = torch_device.cuda_obstacles()
    way = "" if torch_device.interpreting() else f"; or {torch_device.INTERPRET}=1 interprets them on the CPU"
    return "; ".join(problems) + way if problems else None


def _triton() -> Home:
    from ondevice.ops.torch_device import find_cuda, require_cuda

    require_cuda()
    from ondevice_parity.torch_home import TorchHome

    return TorchHome(find_cuda().device)


def _mlx_obstacle() -> str | None:
    from ondevice.ops import mlx_device

    return mlx_device.obstacle()


def _metal_obstacle() -> str | None:
    if problem := _mlx_obstacle():
        return problem
    from metal_kernels import launch

    if launch.runs_here():
        return None
    return "no Apple GPU is MLX's default device here; the tests run the kernels' text in an emulator"


def _metal(twin: bool) -> Home:
    from ondevice_parity.metal_home import MetalHome

    return MetalHome(twin)


HOMES = {
    "reference": Entry(lambda: None, _reference),
    "cpu": Entry(lambda: None, _cpu),
    "metal": Entry(_metal_obstacle, lambda: _metal(twin=False)),
    "mlx": Entry(_mlx_obstacle, lambda: _metal(twin=True)),
    "triton": Entry(_triton_obstacle, _triton),
    "torch": Entry(_torch_obstacle, _torch),
}
"""By name. "mlx" is the twins of Metal's kernels in plain MLX, on its default device; "torch" is those of Triton's in
plain torch, on the CPU."""
