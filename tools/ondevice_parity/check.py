"""Whether a kernel of a home gives what float64 NumPy gives: what cases share, and what a home must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor

F64 = NDArray[np.float64]
NO_INDEX = 54321
"""An index that must not be read: beyond every array, and near enough for the emulator to see which one was missed."""
TOLERANCES = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Of an error relative to the largest value, by the type that results, and what lies between, are rounded to."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a result is off, and how far it may be; an error that is NaN has failed."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class Unsupported(Exception):
    """A home has no way to run a case; the text says why."""


class Home:
    """Kernels of one platform, and how their arguments are made of NumPy arrays.

    Attributes:
        quantized_error: that products with quantized weights may add, relative to the largest value, where a home
            rounds what it multiplies them with.
    """

    quantized_error: float = 0.0

    def array(self, array: NDArray[Any]) -> Any:
        """An array of the same type and values; slices of it are views."""
        raise NotImplementedError

    def numpy(self, array: Any) -> NDArray[Any]:
        """A result: floats as float64, integers as they are."""
        raise NotImplementedError

    def rows(self, indices: NDArray[np.int32], count: NDArray[np.int32]) -> Any:
        """Lists of units."""
        raise NotImplementedError

    def view(self, keys: Any, values: Any, lengths: Any, block_table: Any) -> Any:
        """Keys and values that attention sees."""
        raise NotImplementedError

    def as_cached(self, array: NDArray[Any]) -> NDArray[Any]:
        """Keys or values as the home's cache can hold them."""
        return array

    def pack_ffn(self, *args: Any, **options: Any) -> Any:
        """An FFN of canonical arrays."""
        raise NotImplementedError

    def pack_linear(self, weight: Tensor, bias: NDArray[Any] | None) -> Any:
        """A linear [out, in], for `quantized_linear`."""
        raise Unsupported("it has no kernel of this name")

    def pack_inputs(self, weight: Tensor, bias: NDArray[Any] | None) -> Any:
        """A linear [out, in], for `sparse_inputs`."""
        raise Unsupported("it has no kernel of this name")

    def kernel(self, name: str, twin: bool = False) -> Callable[..., Any]:
        """A kernel's wrapper, or its twin."""
        raise NotImplementedError


Case = Callable[[Callable[..., Any], np.random.Generator, Home], Outcome]
"""Runs a kernel, or its twin, with random inputs."""
Table = dict[str, dict[str, Case]]
"""Cases by kernel and name."""


def close(
    result: NDArray[Any], expected: F64, dtype: str, ignore: NDArray[np.bool_] | None = None, more: float = 0.0
) -> Outcome:
    """The largest error relative to the largest value; infinite where a zero or a shape was missed, or NaN came.

    Args:
        more: that may be added to the type's tolerance.
        ignore: of the result's first dimensions, True where rounding may choose otherwise.
    """
    tolerance = TOLERANCES[dtype] + more
    if result.shape != expected.shape:
        return Outcome(float("inf"), tolerance)
    if ignore is not None:
        result, expected = result[~ignore], expected[~ignore]
    if not result.size:
        return Outcome(0.0, tolerance)
    # What is exactly 0, a head that is skipped for instance, must be exactly 0.
    zero = (expected == 0).all(axis=-1)
    if not np.isfinite(result).all() or result[zero].any():
        return Outcome(float("inf"), tolerance)
    scale = np.abs(expected).max()
    return Outcome(float(np.abs(result - expected).max() / scale) if scale else 0.0, tolerance)


def same_lists(home: Home, got: Any, mask: NDArray[np.bool_], unsure: NDArray[np.bool_] | None = None) -> Outcome:
    """0 if each list is ascending and names the units of its row of a mask; else how many rows do not.

    Args:
        unsure: units that may be listed or not.
    """
    wrong = 0
    indices, counts = home.numpy(got.indices), home.numpy(got.count)
    if len(indices) != len(mask) or counts.shape != (len(mask),):
        return Outcome(float("inf"), 0.0)
    for i, row in enumerate(mask):
        if not 0 <= counts[i] <= indices.shape[1]:
            wrong += 1
            continue
        mine = indices[i, : counts[i]]
        found = np.zeros(len(row), bool)
        found[mine[(mine >= 0) & (mine < len(row))]] = True
        differ = found != row
        if unsure is not None:
            differ &= ~unsure[i]
        wrong += bool(differ.any() or (np.diff(mine) <= 0).any() or found.sum() != counts[i])
    return Outcome(float(wrong), 0.0)


def numbers(rng: np.random.Generator, dtype: str, *shape: int, scale: float = 1.0) -> NDArray[Any]:
    """Normal values, rounded to a type."""
    return (rng.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def lists(rng: np.random.Generator, counts: Sequence[int], units: int, length: int | None = None) -> list[list[int]]:
    """Lists of so many units in random order; -1 stands for the last unit alone, -2 for all of them."""
    chosen = []
    for count in counts:
        order = rng.permutation(units).tolist()
        chosen.append([units - 1] if count == -1 else order[: units if count == -2 else min(count, units)])
    return chosen


def row_list(chosen: Sequence[Sequence[int]], length: int, home: Home, padding: int = NO_INDEX) -> Any:
    """Lists, padded with an index that must not be read, or with another that must not count."""
    indices = np.full((len(chosen), length), padding, np.int32)
    for row, units in zip(indices, chosen):
        row[: len(units)] = units
    return home.rows(indices, np.array([len(c) for c in chosen], np.int32))


def mask_of(chosen: Sequence[Sequence[int]], units: int) -> NDArray[np.bool_]:
    """Lists as a mask."""
    mask = np.zeros((len(chosen), units), bool)
    for row, mine in zip(mask, chosen):
        row[list(mine)] = True
    return mask
