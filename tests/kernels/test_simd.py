"""The vector operations at their extremes, on every value where that is possible."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.simd import (
    dot_u8_s8,
    exp,
    largest,
    load_bytes,
    load_f16,
    load_f32,
    set_f32,
    splat_i32_at,
    store_f16,
    store_f32,
    to_float,
    total,
)


@kernel("to f16")
def to_f16(arguments, tile, thread):
    out, x = unpack(arguments, "ii")
    store_f16(out, load_f32(x))


@kernel("from f16")
def from_f16(arguments, tile, thread):
    out, x = unpack(arguments, "ii")
    store_f32(out, load_f16(x))


@kernel("exp")
def exponential(arguments, tile, thread):
    out, x = unpack(arguments, "ii")
    store_f32(out, exp(load_f32(x)))


@kernel("reduce")
def reductions(arguments, tile, thread):
    out, x = unpack(arguments, "ii")
    set_f32(out, total(load_f32(x)))
    set_f32(out + 4, largest(load_f32(x)))


@kernel("dot")
def dot(arguments, tile, thread):
    out, u, s, start = unpack(arguments, "iiii")
    store_f32(out, to_float(dot_u8_s8(splat_i32_at(start), load_bytes(u), load_bytes(s))))


def call(item: Kernel, *arrays: np.ndarray) -> None:
    words = np.array([a.ctypes.data for a in arrays], np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(item.address)(words.ctypes.data, 0, 0)


def over_lanes(item: Kernel, x: np.ndarray, dtype: type) -> np.ndarray:
    out = np.empty(len(x), dtype)
    for i in range(0, len(x), 16):
        call(item, out[i:], x[i:])
    return out


def test_every_float16_widens_exactly() -> None:
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert np.array_equal(over_lanes(from_f16, half, np.float32), half.astype(np.float32), equal_nan=True)


def test_narrowing_rounds_to_even() -> None:
    half = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (half[:31744] + half[1:31745]) / 2
    bits = np.random.RandomState(0).randint(0, 2**32, 160_000, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([half, between, np.nextafter(between, np.float32(0)), bits.view(np.float32)])
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(over_lanes(to_f16, x, np.float16), expected, equal_nan=True)


def test_exp_is_exact_to_float32() -> None:
    x = np.linspace(-87, 88, 160_000).astype(np.float32)
    got, expected = over_lanes(exponential, x, np.float32), np.exp(x.astype(np.float64))
    assert np.max(np.abs(got / expected - 1)) < 3e-7
    assert np.isnan(over_lanes(exponential, np.full(16, np.nan, np.float32), np.float32)).all()


@pytest.mark.parametrize("lane", range(16))
def test_reductions_see_every_lane(lane: int) -> None:
    x = np.full(16, -3.0, np.float32)
    x[lane] = 5
    out = np.empty(2, np.float32)
    call(reductions, out, x)
    assert out.tolist() == [-40.0, 5.0]


VALUES: dict[str, Callable[[np.random.RandomState], tuple[np.ndarray, np.ndarray]]] = {
    "largest": lambda r: (np.full(64, 255), np.full(64, 127)),
    "most negative": lambda r: (np.full(64, 255), np.full(64, -128)),
    "mixed signs": lambda r: (np.full(64, 255), np.where(np.arange(64) % 2, 127, -128)),
    "random": lambda r: (r.randint(0, 256, 64), r.randint(-128, 128, 64)),
}


@pytest.mark.parametrize("values", VALUES)
def test_dot_product_never_saturates(values: str) -> None:
    u, s = VALUES[values](np.random.RandomState(1))
    out, start = np.empty(16, np.float32), np.array([7], np.int32)
    call(dot, out, u.astype(np.uint8), s.astype(np.int8), start)
    assert out.tolist() == (7 + (u * s).reshape(16, 4).sum(axis=1)).tolist()


def test_instruction_set_is_a_known_one() -> None:
    assert simd.instruction_set() in ("vnni512", "avx2", "generic")
