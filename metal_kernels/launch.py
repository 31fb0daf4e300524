"""How a `.metal` body becomes a kernel of MLX, and what every launch shares."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import mlx.core as mx

HERE = Path(__file__).parent
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "abs", "none")
"""Activations; `activation.metal` knows them by their place here."""
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
SIMD = 32
"""Threads of a simdgroup."""
_making = threading.Lock()


def text_of(name: str) -> str:
    """A file of this folder: the body of a kernel, or functions that several use."""
    return (HERE / f"{name}.metal").read_text()


@cache
def _made(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], uses: tuple[str, ...], packed: bool) -> Any:
    body, header = text_of(name), "".join(map(text_of, uses))
    return mx.fast.metal_kernel(
        # MLX looks compiled kernels up by name, so that another text must have another.
        name=f"ondevice_{name}_{crc32((header + body).encode()):08x}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header=header,
        ensure_row_contiguous=packed,
    )


def launch(
    name: str,
    inputs: dict[str, Any],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    threads: int,
    template: dict[str, Any],
    uses: Sequence[str] = (),
    packed: bool = True,
) -> list[mx.array]:
    """Runs the body `name`.metal.

    Args:
        inputs: arrays and numbers, by the names that the body gives them.
        outputs: shapes and types.
        grid: threadgroups.
        threads: of a threadgroup, a multiple of 32.
        template: constants of the text; each new set is compiled.
        uses: files with functions that the body calls.
        packed: copies inputs that do not lie in one piece; a body that takes strides does without.

    Returns:
        The outputs, in order; what the kernel left out is undefined.
    """
    with _making:
        kernel = _made(name, tuple(inputs), tuple(outputs), tuple(uses), packed)
    result: list[mx.array] = kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=(grid[0] * threads, grid[1], grid[2]),
        threadgroup=(threads, 1, 1),
        template=list(template.items()),
    )
    return result


def forget() -> None:
    """Makes kernels anew when they are launched next, as after `mx.fast.metal_kernel` was replaced."""
    with _making:
        _made.cache_clear()


def runs_here() -> bool:
    """Whether kernels can run: on an Apple GPU that is MLX's default device. Callers take the twins where not."""
    return bool(mx.metal.is_available()) and mx.default_device().type == mx.gpu


def need_gpu() -> None:
    """Refuses to run where there is no Apple GPU.

    Raises:
        RuntimeError: Metal is missing, or MLX's default device is the CPU.
    """
    if not runs_here():
        raise RuntimeError(
            f"Metal kernels run on an Apple GPU, and MLX's default device is {mx.default_device()}: on a Mac call "
            "mx.set_default_device(mx.gpu), elsewhere take the twin, ..._mlx"
        )


def need_kind(kind: str) -> None:
    """Raises ValueError unless an activation is known."""
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(KINDS)}; take one of them")


def need_float(name: str, array: mx.array) -> None:
    """Raises ValueError unless an array is of a type that the kernels take."""
    if array.dtype not in FLOATS:
        raise ValueError(f"{name} is {array.dtype}; convert it to float16, bfloat16 or float32")


def tiles(n: int, size: int) -> int:
    """Pieces of a size that n things fill."""
    return -(-n // size)


def up_to_power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def absent(array: mx.array | None, other: mx.array) -> mx.array:
    """An array, or what a kernel gets in its place and does not read."""
    return other if array is None else array
