"""Random weights of a given shape, made tensor by tensor when they are asked for."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import BITS, GROUP_SIZES, Quantized, Tensor
from ondevice.errors import OptionError
from ondevice.machine import memory_bytes
from ondevice.spec import ModelSpec

FLOAT_BITS = 16


class RandomWeights:
    """What the decoder asks of a checkpoint: `spec`, `files`, `prefers_sketch`, `tensor` and `release`.

    Matrices, embedding and head included, have codes that are random bits under equal scales without biases, as GGUF's
    Q4_0 and Q8_0 have; with 16 bits they are float16. Scales keep the variance of what passes through, so logits are
    finite. The same tensor is the same at each call.

    Args:
        spec: of the model.
        bits: 4, 5, 6, 8 or 16.
        group_size: 32, 64 or 128 inputs with a common scale; no meaning with 16 bits.

    Raises:
        OptionError: bits or group size that there are none of or that do not fit the shape, or too little memory.
    """

    files = ()
    prefers_sketch = False

    def __init__(self, spec: ModelSpec, bits: int = 4, group_size: int = 32) -> None:
        self.spec, self.bits, self.group_size = spec, bits, group_size
        self._shapes = spec.tensors()
        self._check_format()
        self._check_memory()

    def tensor(self, name: str) -> Tensor:
        """A tensor by its canonical name: a norm of ones, a bias of zeros, or a random matrix."""
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 1.0 - self.spec.norm_offset if "norm" in name and name.endswith("weight") else 0.0
            return np.full(shape, value, np.float32)
        rows, inputs = shape
        random = np.random.Generator(np.random.SFC64(list(name.encode())))
        if self.bits == FLOAT_BITS:
            return _random_floats(random, rows, inputs)
        packed = random.integers(0, 1 << 32, (rows, inputs * self.bits // 32), np.uint32)
        # Codes spread evenly over 2**bits values have a standard deviation of 2**bits / sqrt(12).
        scale = math.sqrt(12 / inputs) / 2**self.bits
        scales = np.full((rows, inputs // self.group_size), scale, np.float16)
        return Quantized(packed, scales, None, self.bits, self.group_size)

    def stored(self, name: str) -> tuple[str, int]:
        """Type and bytes of a tensor, as of `Checkpoint.stored`."""
        count = math.prod(self._shapes[name])
        if len(self._shapes[name]) == 1:
            return "F32", count * 4
        if self.bits == FLOAT_BITS:
            return "F16", count * 2
        return f"affine {self.bits}-bit g{self.group_size}", round(count * (self.bits + 16 / self.group_size) / 8)

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def _check_format(self) -> None:
        if self.bits not in (*BITS, FLOAT_BITS):
            raise OptionError(f"bits is {self.bits}; choose one of {', '.join(map(str, (*BITS, FLOAT_BITS)))}")
        if self.bits == FLOAT_BITS:
            return
        widths = {shape[1] for shape in self._shapes.values() if len(shape) == 2}
        fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        if self.group_size not in fitting:
            choice = f"choose from {', '.join(map(str, fitting))}" if fitting else "no group size does: use 16 bits"
            raise OptionError(
                f"group size {self.group_size} does not divide the widths of this shape "
                f"({', '.join(map(str, sorted(widths)))}); {choice}"
            )

    def _check_memory(self) -> None:
        each = self.bits + (0 if self.bits == FLOAT_BITS else 16 / self.group_size)
        need = sum(math.prod(shape) for shape in self._shapes.values()) * each / 8
        available = memory_bytes()[1]
        if available is not None and need > available:
            raise OptionError(
                f"weights of this shape take {need / 1e9:.1f} GB at {self.bits} bits and {available / 1e9:.1f} GB are "
                "available; choose fewer bits or a smaller shape"
            )


def _random_floats(random: np.random.Generator, rows: int, inputs: int) -> NDArray[np.float16]:
    """float16 of random sign and mantissa under one exponent: the power of two next to 1 / sqrt(inputs)."""
    raw = random.integers(0, 1 << 16, (rows, inputs), np.uint16)
    raw &= np.uint16(0x83FF)
    raw |= np.uint16((15 + round(math.log2(inputs**-0.5 / 1.5))) << 10)
    return raw.view(np.float16)
