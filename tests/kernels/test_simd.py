"""The vector operations at their extremes, on every value where that is possible."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np
import pytest

from cpu_kernels import simd
from cpu_kernels.compile import Kernel, kernel, unpack
from cpu_kernels.exponential import exp
from cpu_kernels.integer_dots import instruction_set, integer_dots
from cpu_kernels.simd import (
    VOID,
    A,
    largest,
    load_f16,
    load_f32,
    op,
    set_f32,
    store_f16,
    store_f32,
    total,
)


@kernel("to f16")
def to_f16(arguments, tile, thread):
    out, x, n = unpack(arguments, "iii")
    for i in range(0, n, 16):
        store_f16(out + 2 * i, load_f32(x + 4 * i))


@kernel("from f16")
def from_f16(arguments, tile, thread):
    out, x, n = unpack(arguments, "iii")
    for i in range(0, n, 16):
        store_f32(out + 4 * i, load_f16(x + 2 * i))


@kernel("exp")
def exponential(arguments, tile, thread):
    out, x, n = unpack(arguments, "iii")
    for i in range(0, n, 16):
        store_f32(out + 4 * i, exp(load_f32(x + 4 * i)))


@kernel("reduce")
def reductions(arguments, tile, thread):
    out, x = unpack(arguments, "ii")
    set_f32(out, total(load_f32(x)))
    set_f32(out + 4, largest(load_f32(x)))


DOTS = 8
"""Vectors of one dot product, as in 32 inputs of a linear."""


@functools.cache
def dots(bits: int) -> Kernel:
    """Kernel: int32 [16] out = start + the dot products of DOTS vectors of codes and bytes."""

    @op(VOID(A, A, A, A))
    def build(b, out, u, s, start):
        us, ss = ([simd.load_bytes.build(b, simd.offset(b, at, 64 * i)) for i in range(DOTS)] for at in (u, s))
        total = integer_dots(b, simd.splat_i32_at.build(b, start), us, ss, bits)
        b.store(total, simd.pointer(b, out, simd.I.llvm), align=4)

    @kernel(f"dots of {bits} bits")
    def run(arguments, tile, thread):
        out, u, s, start = unpack(arguments, "iiii")
        build(out, u, s, start)

    return run


def call(item: Kernel, *arguments: np.ndarray | int) -> None:
    words = np.array([a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments], np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(item.address)(words.ctypes.data, 0, 0)


def over_lanes(item: Kernel, x: np.ndarray, dtype: type) -> np.ndarray:
    assert len(x) % 16 == 0
    out = np.empty(len(x), dtype)
    call(item, out, x, len(x))
    return out


def test_every_float16_widens_exactly() -> None:
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        expected = half.astype(np.float32)
    assert np.array_equal(over_lanes(from_f16, half, np.float32), expected, equal_nan=True)


def test_narrowing_rounds_to_even() -> None:
    with np.errstate(invalid="ignore"):
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


VALUES: dict[str, Callable[[np.random.RandomState, int], np.ndarray]] = {
    "largest": lambda r, n: np.full(n, 127),
    "most negative": lambda r, n: np.full(n, -128),
    "mixed signs": lambda r, n: np.where(np.arange(n) % 2, 127, -128),
    "quads of mixed signs": lambda r, n: np.where(np.arange(n) // 4 % 2, 127, -128),
    "random": lambda r, n: r.randint(-128, 128, n),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_dot_products_never_saturate(bits: int, values: str) -> None:
    random = np.random.RandomState(1)
    s = VALUES[values](random, 64 * DOTS)
    for u in (np.full(s.shape, 2**bits - 1), random.randint(0, 2**bits, s.shape)):
        out, start = np.empty(16, np.int32), np.array([7], np.int32)
        call(dots(bits), out, u.astype(np.uint8), s.astype(np.int8), start)
        assert out.tolist() == (7 + (u * s).reshape(DOTS, 16, 4).sum(axis=(0, 2))).tolist()


def test_instruction_set_is_the_expected_one() -> None:
    """Those who compile for another CPU say in the environment what they expect."""
    known = ("vnni512", "vnni256", "avx2", "neon_i8mm", "neon_dot", "generic")
    assert instruction_set() in os.environ.get("ONDEVICE_TEST_INSTRUCTION_SET", " ".join(known)).split()
