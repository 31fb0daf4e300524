"""Where the torch tables compute: finding the libraries and the device, and saying what is missing.

This file imports neither torch nor Triton before it has been asked for one of them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ondevice.errors import BackendError, OptionError

TRITON = "3.6"
"""The version of Triton that the kernels are written for."""
CAPABILITY = (8, 0)
"""The oldest processors whose instructions the kernels use: Ampere's."""
TRITON_INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch."""
INTERPRET = "ONDEVICE_TRITON_INTERPRET"
DEVICE = "ONDEVICE_TORCH_DEVICE"
DTYPE = "ONDEVICE_TORCH_DTYPE"
DEVICES = ("cpu", "mps", "cuda")
DTYPES = ("bfloat16", "float32")
"""Types that the tables compute in. float16 is none of them: the hidden states of some models overflow it."""


@dataclass(frozen=True, slots=True)
class TorchDevice:
    """A device of torch, and what a table computes in there.

    Args:
        device: torch's own.
        name: for people.
        dtype: of weights, normed inputs, keys and values. The hidden state between layers is float32.
        graphs: whether steps can be recorded as CUDA graphs.
    """

    device: Any
    name: str
    dtype: Any
    graphs: bool


def interpreting() -> bool:
    """Whether the user wants Triton's kernels interpreted on a CPU."""
    return os.environ.get(INTERPRET, "") not in ("", "0")


def torch_obstacle() -> str | None:
    """Why torch cannot be used, and the way out; None if it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as e:
        return f"torch is not installed, or does not load ({str(e).splitlines()[0]}): pip install 'ondevice[triton]'"
    return None


def cuda_obstacles() -> list[str]:
    """Everything that keeps Triton's kernels from running here, each with its way out; empty if nothing does."""
    problems = [problem for problem in (torch_obstacle(), triton_obstacle()) if problem is not None]
    if interpreting():
        return problems
    driver = _driver_obstacle()
    if driver is not None:
        problems.append(driver)
    if torch_obstacle() is None:
        import torch

        if torch.version.cuda is None:
            problems.append(f"torch {torch.__version__} is built without CUDA: install a build of torch with it")
        elif driver is None:
            problems += _device_obstacles()
    return problems


def triton_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        system = (sys.platform, platform.machine())
        if system != ("linux", "x86_64"):
            return f"triton has builds for Linux on x86-64 only, and this is {' on '.join(system)}: take --backend cpu"
        return "triton is not installed: pip install 'ondevice[triton]'"
    # Not by importing it: whether it interprets is decided then.
    found = metadata.version("triton")
    if not found.startswith(TRITON + "."):
        return f"triton is {found}, the kernels are for {TRITON}: pip install 'triton=={TRITON}.0'"
    return None


def _driver_obstacle() -> str | None:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1 was not found): install it, or run on a machine with a GPU"
    return None


def _device_obstacles() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [
            "torch finds no NVIDIA GPU that it can use: `nvidia-smi` lists those of the driver, and "
            f"CUDA_VISIBLE_DEVICES ({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) may hide them"
        ]
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        name, have, need = torch.cuda.get_device_name(), *(".".join(map(str, c)) for c in (capability, CAPABILITY))
        return [f"{name} has compute capability {have}, the kernels need {need} (Ampere) or newer: take --backend cpu"]
    return []


def require_cuda() -> None:
    """Raises BackendError where backend cuda cannot run, naming all that is missing; prepares the interpreter."""
    problems = cuda_obstacles()
    if problems:
        way = (
            "" if interpreting() else f". Without a GPU, {INTERPRET}=1 interprets the kernels on the CPU (slow, a test)"
        )
        raise BackendError("backend cuda cannot run here: " + "; ".join(problems) + way)
    if interpreting() and os.environ.get(TRITON_INTERPRET) != "1":
        if "triton" in sys.modules:
            raise BackendError(f"{INTERPRET} was set after Triton had been loaded: set it before Python starts")
        # Triton reads this when kernels are defined.
        os.environ[TRITON_INTERPRET] = "1"


def find_cuda() -> TorchDevice:
    """What backend cuda runs on, after `require_cuda`: the first GPU, or the CPU where kernels are interpreted."""
    import torch

    if interpreting():
        return TorchDevice(torch.device("cpu"), "CPU (Triton's interpreter)", _dtype("float32"), False)
    device = torch.device("cuda", torch.cuda.current_device())
    return TorchDevice(device, f"GPU ({torch.cuda.get_device_name(device)})", _dtype("bfloat16"), True)


def require_torch() -> None:
    """Raises BackendError where there is no torch."""
    problem = torch_obstacle()
    if problem is not None:
        raise BackendError(f"backend torch cannot run here: {problem}")


def find_torch() -> TorchDevice:
    """What backend torch runs on: the CPU, or what ONDEVICE_TORCH_DEVICE names.

    Raises:
        OptionError: no such device, or it is not here.
    """
    import torch

    kind = os.environ.get(DEVICE, "") or "cpu"
    if kind not in DEVICES:
        raise OptionError(f"{DEVICE} is {kind!r}; choose one of {', '.join(DEVICES)}")
    here = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    if not here[kind]:
        found = ", ".join(name for name in DEVICES if here[name])
        raise OptionError(f"{DEVICE} is {kind}, and torch {torch.__version__} finds none here; it finds {found}")
    name = {"cpu": "CPU", "mps": "GPU (Metal)", "cuda": "GPU"}[kind]
    return TorchDevice(torch.device(kind), f"{name}, by torch {torch.__version__}", _dtype("float32"), False)


def _dtype(default: str) -> Any:
    import torch

    name = os.environ.get(DTYPE, "") or default
    if name not in DTYPES:
        raise OptionError(f"{DTYPE} is {name!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)
