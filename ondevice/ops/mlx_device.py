"""Where MLX computes: finding the library, its device, the number type and a stream for any thread.

This file does not import MLX before `require` has said how to get it where it is missing.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ondevice.errors import BackendError, OptionError

if TYPE_CHECKING:
    from ondevice.ops.base import Ops

DTYPES = ("bfloat16", "float32")
"""Types that the table can compute in. float16 is none of them: the hidden states of some models overflow it."""
DTYPE_VARIABLE = "ONDEVICE_MLX_DTYPE"


def obstacle() -> str | None:
    """Why MLX cannot be used, and the way out; None if it can."""
    try:
        import mlx.core  # noqa: F401
    except (ImportError, OSError, RuntimeError) as e:
        # A wheel without its library, or for a newer system, raises more than ImportError.
        return f"{_way_to_get(sys.platform, platform.machine())} ({str(e).splitlines()[0] if str(e) else e!r})"
    return None


def require() -> None:
    """Raises BackendError where MLX is missing, saying how to get it."""
    problem = obstacle()
    if problem is not None:
        raise BackendError(f"backend mlx needs MLX: {problem}")


def _way_to_get(system: str, processor: str) -> str:
    if system == "linux":
        return "it is not installed; `pip install 'ondevice[mlx-cpu]'` gets its build for CPUs, which is slow"
    if system == "darwin" and processor == "arm64":
        return "it is not installed, or not for this version of macOS; `pip install mlx` gets it (macOS 14 or newer)"
    return f"it has no build for {system} on {processor}; take --backend cpu"


@dataclass(frozen=True, slots=True)
class MlxDevice:
    """One of MLX's devices, and what the table computes in there.

    Args:
        device: MLX's own.
        gpu: whether it is one.
        metal: whether custom Metal kernels can run on it.
        name: for people: "GPU (Apple M2, Metal)" or "CPU (...)".
        dtype: of weights, activations, keys and values. The hidden state between layers is float32.
        stream: that all work goes through; it stands for one of its own in every thread.
    """

    device: Any
    gpu: bool
    metal: bool
    name: str
    dtype: Any
    stream: Any


def mlx_table(kv_bits: int = 0) -> Ops:
    """The table of this machine: with our Metal kernels on an Apple GPU. kv_bits: as of MlxOps."""
    if find_device().metal:
        from ondevice.ops.mlx_metal import MetalOps

        return MetalOps(kv_bits)
    from ondevice.ops.mlx import MlxOps

    return MlxOps(kv_bits)


def find_device() -> MlxDevice:
    """MLX's default device: the GPU where it has one.

    Raises:
        OptionError: ONDEVICE_MLX_DTYPE names no type that the table can compute in.
    """
    import mlx.core as mx

    device = mx.default_device()
    gpu, metal = device.type == mx.gpu, mx.metal.is_available()
    # Only a Mac shows what Metal calls its device; MLX promises "device_name" on all of them.
    model = mx.device_info(device).get("device_name", "unnamed")
    name = f"{'GPU' if gpu else 'CPU'} ({model}{', Metal' if gpu and metal else ''})"
    dtype = getattr(mx, _dtype_name("bfloat16" if gpu else "float32"))
    # Streams belong to the thread that makes them, and models are run from others (a menu bar, a server).
    return MlxDevice(device, gpu, gpu and metal, name, dtype, mx.new_thread_local_stream(device))


def _dtype_name(default: str) -> str:
    name = os.environ.get(DTYPE_VARIABLE, "") or default
    if name not in DTYPES:
        raise OptionError(f"{DTYPE_VARIABLE} is {name!r}; the mlx backend computes in {' or '.join(DTYPES)}")
    return name
