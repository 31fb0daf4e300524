"""Weights on torch's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ondevice.checkpoint.quantization import Tensor, dequantize


class Matrix(Protocol):
    """A matrix [out, in]."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias: [N, in] -> [N, out], in x's type."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows [N] as floats [N, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """A matrix [out, in] of floats."""

    weight: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return functional.embedding(index, self.weight)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True, slots=True)
class Joined:
    """Linears with a common input: matrices one below the other, each with its part [out_i] of the biases."""

    parts: tuple[Matrix, ...]
    biases: tuple[torch.Tensor | None, ...]

    def product(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias (+ residual)."""
        products = [part.product(x, bias) for part, bias in zip(self.parts, self.biases)]
        y = products[0] if len(products) == 1 else torch.cat(products, 1)
        return y if residual is None else residual + y

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def to_tensor(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of an array, in its own type if no other is given; never memory of the array, which may be a file's."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        made = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    elif array.dtype == np.uint32:
        made = torch.from_numpy(array.view(np.int32).copy())
    else:
        made = torch.from_numpy(array.copy())
    return made.to(device=device, dtype=dtype or made.dtype)


def floats_of(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a checkpoint as floats of a type."""
    if isinstance(tensor, np.ndarray):
        return to_tensor(tensor, device, dtype)
    exact = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(dequantize(tensor, exact)).to(device=device, dtype=dtype)


def pack_joined(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    matrix: Callable[[Tensor], Matrix],
    vector: Callable[[Tensor], torch.Tensor],
) -> Joined:
    """Linears [out_i, in]; those of floats become one matrix."""
    if len(weights) > 1 and all(isinstance(w, np.ndarray) for w in weights):
        whole = np.concatenate([np.asarray(w) for w in weights])
        if all(b is None for b in biases):
            return Joined((matrix(whole),), (None,))
        parts = [np.zeros(w.shape[0], np.float32) if b is None else dequantize(b) for w, b in zip(weights, biases)]
        return Joined((matrix(whole),), (vector(np.concatenate(parts)),))
    return Joined(tuple(matrix(w) for w in weights), tuple(None if b is None else vector(b) for b in biases))
