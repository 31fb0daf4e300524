"""What every launch shares: whether the kernels can run on these tensors, and memory for what they write."""

from __future__ import annotations

from typing import Any

import torch
import triton

from cuda_kernels import interpreter, memory

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "abs", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU."""
    return bool(triton.knobs.runtime.interpret)


if interpreted():
    interpreter.mend()


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device; callers take the torch twin where not."""
    return device.type == "cuda" or interpreted()


def need_device(device: torch.device) -> None:
    """Refuses tensors that the kernels cannot run on.

    Raises:
        ValueError: they are not on an NVIDIA GPU, and Triton's interpreter is off.
    """
    if not runs_on(device):
        raise ValueError(
            f"Triton kernels run on an NVIDIA GPU, and these tensors are on {device}: move them to 'cuda', set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels, or take the twin, ..._torch"
        )


def need_kind(kind: str) -> None:
    """Raises ValueError unless an activation is known."""
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(KINDS)}; take one of them")


def need_float(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless a tensor is of a type that the kernels take."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; convert it to float16, bfloat16 or float32")


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that a kernel writes: whatever it held before, or poison where tests ask for it."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if memory.POISON:
        tensor.fill_(float("nan") if dtype.is_floating_point else memory.NO_INDEX)
    return tensor


def along_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its last dimension does not lie in one piece; other strides may be any."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def up_to_power(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two that is not below n, between two others."""
    return int(min(most, max(least, triton.next_power_of_2(max(1, n)))))


def absent(tensor: torch.Tensor | None, other: Any) -> Any:
    """A tensor, or what a kernel gets in its place and does not read."""
    return other if tensor is None else tensor
