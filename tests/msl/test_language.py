"""What kernels can say: types, templates, vectors, functions of simdgroups, atomics, attributes; against NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.msl.emulator import emulated
from tests.msl.findings import EmulatorError

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741


def run(
    body: str,
    inputs: dict[str, Any],
    dtype: Any = mx.float32,
    n: int = 64,
    grid: tuple[int, int, int] = (64, 1, 1),
    group: tuple[int, int, int] = (64, 1, 1),
    header: str = "",
    made: dict[str, Any] | None = None,
    **more: Any,
) -> np.ndarray:
    """The only output, `out`, with `n` elements; bfloat16 as float32."""
    with emulated() as metal:
        metal.schedule("random", 3)
        kernel = mx.fast.metal_kernel("k", list(inputs), ["out"], body, header, **(made or {}))
        (out,) = kernel(
            inputs=list(inputs.values()),
            grid=grid,
            threadgroup=group,
            output_shapes=[(n,)],
            output_dtypes=[dtype],
            **more,
        )
        return np.array(out.astype(mx.float32) if dtype == mx.bfloat16 else out)


FLOATS = [mx.float32, mx.float16, mx.bfloat16]
INTEGERS = [mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_dtype_in_and_out(dtype):
    """As arrays, as arrays of less than 8, as numbers, and as the template's types."""
    x, few, one = mx.arange(64).astype(dtype), mx.array([1, 2, 3]).astype(dtype), mx.array(5).astype(dtype)
    got = run(I + "out[i] = T(x[i] + few[2] + one);", {"x": x, "few": few, "one": one}, dtype, template=[("T", dtype)])
    assert got.tolist() == [i + 8 for i in range(64)]


def test_bool_and_numbers_of_python():
    got = run(
        I + "out[i] = (x[i] && yes ? 2 : 1) + n * half_;",
        {"x": mx.arange(64) % 2 == 0, "yes": True, "n": 3, "half_": 0.5},
    )
    assert got.tolist() == [3.5 if i % 2 == 0 else 2.5 for i in range(64)]


def test_constants_of_the_template():
    body = I + "if (FLAG) out[i] = T(N) + sizeof(T); else out[i] = 0;"
    template = [("T", mx.float16), ("N", -3), ("FLAG", True)]
    assert set(run(body, {}, template=template).tolist()) == {-1.0}
    template[2] = ("FLAG", False)
    assert set(run(body, {}, template=template).tolist()) == {0.0}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_of_short_floats(dtype):
    """To the nearest even, as MLX does it on a CPU, infinities and NaN included."""
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32) * 100
    values[:5] = [np.inf, -np.inf, np.nan, 1e30, 1.00390625]
    got = run(I + "out[i] = T(x[i]);", {"x": mx.array(values)}, dtype, template=[("T", dtype)])
    np.testing.assert_array_equal(got, np.array(mx.array(values).astype(dtype).astype(mx.float32)))


def test_literals_are_single_precision():
    """1.0 is a float in MSL: no overload is ambiguous, and sums are not made in double precision."""
    got = run(I + "out[i] = max(x[i], 1.0) + (x[i] + 0.1 - x[i]) * 1e8;", {"x": mx.full((64,), 4096.0)})
    assert got[0] == np.float32(4096) + (np.float32(4096) + np.float32(0.1) - np.float32(4096)) * np.float32(1e8)


def test_vectors():
    x = mx.arange(64).astype(mx.float16)
    body = I + (
        "half4 a = *(const device half4*)(x + i / 4 * 4);\n"
        "float4 b = float4(a) * 2.0f + float4(1.0f);\n"
        "float4 c = float4(b.xy, float2(0.0f, b.w));\n"
        "uint2 p = uint2(1u, uint(i));\n"
        "vec<float, 4> d = max(c, float4(3.0f));\n"
        "out[i] = dot(d, float4(1.0f, 1.0f, 1.0f, 1.0f)) + float(p.x);"
    )
    a = np.arange(64).reshape(16, 4) * 2.0 + 1
    a[:, 2] = 0
    want = np.repeat(np.maximum(a, 3).sum(1) + 1, 4)
    np.testing.assert_array_equal(run(body, {"x": x}), want)


def test_bits_and_bytes():
    x = mx.array(np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32))
    body = I + (
        "uint v = x[i]; uchar4 b = as_type<uchar4>(v);\n"
        "out[i] = popcount(v) + clz(v) + ctz(v) + uint(b.x) + uint(b.w) + (v >> 28) + extract_bits(v, 4, 8);"
    )
    want = [
        v.bit_count() + (32 - v.bit_length()) + ((v & -v).bit_length() - 1) + (v & 255) + (v >> 24) + (v >> 28)
        + ((v >> 4) & 255)
        for v in x.tolist()
    ]  # fmt: skip
    assert run(body, {"x": x}, mx.uint32).tolist() == want


def test_functions_of_numbers():
    x = mx.array(np.linspace(-3, 3, 64, dtype=np.float32))
    v = np.array(x).astype(np.float64)
    for text, want in {
        "exp(v) + fast::exp(v) + precise::exp(v)": 3 * np.exp(v),
        "metal::tanh(v) + rsqrt(v * v + 1.0f)": np.tanh(v) + 1 / np.sqrt(v * v + 1),
        "log(abs(v) + 1) + floor(v) + ceil(v) + rint(v)": np.log(np.abs(v) + 1) + np.floor(v) + np.ceil(v) + np.rint(v),
        "fma(v, v, v) + clamp(v, -1.0f, 1.0f) + select(1.0f, 2.0f, v > 0)": v * v + v + np.clip(v, -1, 1)
        + np.where(v > 0, 2, 1),
        "isnan(v / 0.0f * 0.0f) + isinf(INFINITY) + min(int(v), 2)": 2 + np.minimum(np.trunc(v), 2),
        "pow(abs(v), 1.5f) + exp2(v) + sin(v) * cos(v) + sign(v)": np.abs(v) ** 1.5 + 2**v + np.sin(v) * np.cos(v)
        + np.sign(v),
    }.items():  # fmt: skip
        np.testing.assert_allclose(run(I + f"float v = x[i]; out[i] = {text};", {"x": x}), want, rtol=2e-6, atol=2e-6)


def lanes() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 9, 64).astype(np.float32)


def by_simdgroup(function) -> np.ndarray:
    return np.concatenate([np.broadcast_to(function(each), 32) for each in lanes().reshape(2, 32)])


LANES = np.arange(32)
SIMD = {
    "simd_sum(v)": np.sum,
    "simd_max(v)": np.max,
    "simd_min(v)": np.min,
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "simd_shuffle(v, ushort(7))": lambda v: v[7],
    "simd_shuffle(v, ushort(31 - lane))": lambda v: v[::-1],
    "simd_broadcast(v, 3)": lambda v: v[3],
    "simd_broadcast_first(v)": lambda v: v[0],
    "simd_shuffle_xor(v, 5)": lambda v: v[LANES ^ 5],
    "select(simd_shuffle_down(v, 4), 0.0f, lane > 27)": lambda v: np.r_[v[4:], [0] * 4],
    "select(simd_shuffle_up(v, 4), 0.0f, lane < 4)": lambda v: np.r_[[0] * 4, v[:28]],
    "simd_shuffle_rotate_down(v, 3)": lambda v: np.roll(v, -3),
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
    "simd_shuffle_and_fill_down(v, -v, 2)": lambda v: np.r_[v[2:], -v[:2]],
    "simd_shuffle_and_fill_up(v, -v, 2)": lambda v: np.r_[-v[30:], v[:30]],
    "simd_xor(uint(v))": lambda v: np.bitwise_xor.reduce(v.astype(int)),
    "simd_and(uint(v)) + simd_or(uint(v))": lambda v: (
        np.bitwise_and.reduce(v.astype(int)) + np.bitwise_or.reduce(v.astype(int))
    ),
    "popcount(ulong(simd_ballot(v > 4)))": lambda v: (v > 4).sum(),
    "popcount(ulong(simd_ballot(v > 4)) & ((1ul << lane) - 1))": lambda v: np.cumsum(v > 4) - (v > 4),
    "simd_all(v > 0) + 2 * simd_any(v > 99) + 4 * simd_all(v > 4)": lambda v: 1,
    "simd_is_first()": lambda v: LANES == 0,
    "quad_sum(v)": lambda v: np.repeat(v.reshape(8, 4).sum(1), 4),
    "quad_shuffle_xor(v, 1)": lambda v: v[LANES ^ 1],
    "simd_sum(float2(v, 1.0f)).x + simd_sum(half(1))": lambda v: v.sum() + 32,
    "float(simd_max(long(v) << 40) >> 40)": np.max,
}


def test_functions_of_simdgroups():
    body = I + "uint lane = thread_index_in_simdgroup; float v = x[i];\n"
    body += "".join(f"out[{64 * n} + i] = {text};\n" for n, text in enumerate(SIMD))
    got = run(body, {"x": mx.array(lanes())}, n=64 * len(SIMD)).reshape(-1, 64)
    for row, (text, want) in zip(got, SIMD.items()):
        np.testing.assert_array_equal(row, by_simdgroup(want), err_msg=text)


def test_sum_of_a_short_simdgroup():
    """40 threads are one simdgroup and 8 lanes of another."""
    got = run("out[thread_position_in_grid.x] = simd_sum(1.0f);", {}, n=40, grid=(40, 1, 1))
    assert got.tolist() == [32] * 32 + [8] * 8


def test_atomics():
    body = I + (
        "threadgroup atomic_uint seen;\n"
        "if (i == 0) atomic_store_explicit(&seen, 0u, memory_order_relaxed);\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "uint place = atomic_fetch_add_explicit(&seen, 1u, memory_order_relaxed);\n"
        "atomic_fetch_add_explicit(&out[0], 1u, memory_order_relaxed);\n"
        "atomic_fetch_max_explicit(&out[1], place, memory_order_relaxed);\n"
        "atomic_fetch_or_explicit(&out[2 + place / 32], 1u << (place % 32), memory_order_relaxed);"
    )
    got = run(body, {}, mx.uint32, n=4, made={"atomic_outputs": True}, init_value=0)
    assert got.tolist() == [64, 63, 2**32 - 1, 2**32 - 1]


def test_sum_of_floats_by_atomics():
    body = I + "atomic_fetch_add_explicit(&out[i % 2], float(i), memory_order_relaxed);"
    got = run(body, {}, n=2, made={"atomic_outputs": True}, init_value=0.5)
    assert got.tolist() == [sum(range(0, 64, 2)) + 0.5, sum(range(1, 64, 2)) + 0.5]


ATTRIBUTES = {
    "thread_position_in_grid.{}": lambda g, t, d: g[d],
    "thread_position_in_threadgroup.{}": lambda g, t, d: g[d] % t[d],
    "threadgroup_position_in_grid.{}": lambda g, t, d: g[d] // t[d],
    "threads_per_grid.{}": lambda g, t, d: (10, 3, 2)[d],
    "threadgroups_per_grid.{}": lambda g, t, d: (3, 2, 2)[d],
    "dispatch_threads_per_threadgroup.{}": lambda g, t, d: t[d],
    "threads_per_threadgroup.{}": lambda g, t, d: min(t[d], (10, 3, 2)[d] - g[d] // t[d] * t[d]),
}


def test_attributes_of_a_ragged_grid():
    """10 x 3 x 2 threads in groups of 4 x 2 x 1: those at the edge are smaller."""
    words = [(word.format("xyz"[d]), want, d) for word, want in ATTRIBUTES.items() for d in range(3)]
    body = (
        "uint3 g = thread_position_in_grid; uint3 n = threads_per_grid;\n"
        "device int* mine = out + ((g.z * n.y + g.y) * n.x + g.x);\n"
    )
    body += "".join(f"mine[{60 * at}] = {word};\n" for at, (word, _, _) in enumerate(words))
    got = run(body, {}, mx.int32, n=60 * len(words), grid=(10, 3, 2), group=(4, 2, 1)).reshape(-1, 60)
    for row, (word, want, d) in zip(got, words):
        at = [want((x, y, z), (4, 2, 1), d) for z in range(2) for y in range(3) for x in range(10)]
        assert row.tolist() == at, word


def test_attributes_of_simdgroups():
    body = (
        "uint i = thread_index_in_threadgroup;\n"
        "out[i] = thread_index_in_simdgroup + 100 * simdgroup_index_in_threadgroup + 1000 * simdgroups_per_threadgroup"
        " + 10000 * threads_per_simdgroup + thread_index_in_quadgroup * 1000000;"
    )
    got = run(body, {}, mx.int32, n=80, grid=(40, 2, 1), group=(40, 2, 1))
    assert got.tolist() == [i % 32 + 100 * (i // 32) + 3000 + 320000 + 1000000 * (i % 4) for i in range(80)]


def test_threadgroup_is_cut_to_the_grid():
    """As MLX does: a group larger than the grid is as large as the grid."""
    got = run(
        "out[thread_index_in_threadgroup] = threads_per_threadgroup.x;", {}, n=5, grid=(5, 1, 1), group=(64, 1, 1)
    )
    assert got.tolist() == [5] * 5


def test_shapes_strides_and_rows_that_are_not_contiguous():
    x = mx.arange(12).reshape(3, 4).astype(mx.float32)
    body = I + (
        "int w = x_shape[1];\n"
        "out[i] = x[(i / w) * x_strides[0] + (i % w) * x_strides[1]] + 100 * x_ndim + 1000 * x_shape[0];"
    )
    for contiguous in (True, False):
        got = run(body, {"x": x.T}, n=12, grid=(12, 1, 1), made={"ensure_row_contiguous": contiguous})
        np.testing.assert_array_equal(got, np.array(x).T.reshape(-1) + 200 + 4000)
    body = I + "out[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)] + x_strides[0];"
    got = run(body, {"x": x.T}, n=12, grid=(12, 1, 1), made={"ensure_row_contiguous": False})
    np.testing.assert_array_equal(got, np.array(x).T.reshape(-1) + 1)


def test_inputs_of_seven_and_eight_elements_are_passed_differently():
    """What takes a pointer to them must be a template, as on the GPU."""
    header = "template <typename P> inline float last(P p, int n) { return float(p[n - 1]); }\n"
    for n in (1, 7, 8, 9):
        got = run(I + "out[i] = last(x, x_shape[0]);", {"x": mx.arange(n)}, header=header)
        assert set(got.tolist()) == {n - 1.0}


def test_structs_and_functions_of_the_header():
    header = (
        "struct Best {\n  float score;\n  int at;\n};\n"
        "template <int N> inline Best better(thread const Best& a, Best b) { return b.score > a.score ? b : a; }\n"
        "constant float LIMITS[3] = {1.0f, 2.0f, 3.0f};\n"
    )
    body = I + (
        "threadgroup Best all[64];\nall[i] = Best{x[i], int(i)};\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "Best best = all[0]; for (int j = 1; j < 64; ++j) best = better<3>(best, all[j]);\n"
        "out[i] = best.at + LIMITS[i % 3];"
    )
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    assert run(body, {"x": mx.array(x)}, header=header).tolist() == [x.argmax() + i % 3 + 1 for i in range(64)]


def test_calls_that_mlx_refuses():
    with emulated():
        with pytest.raises(ValueError, match="at least one output"):
            mx.fast.metal_kernel("k", [], [], "")
        with pytest.raises(ValueError, match="math_mode"):
            mx.fast.metal_kernel("k", [], ["out"], "", compile_options={"math_mode": "quick"})
    with pytest.raises(ValueError, match="`output_shapes` to have size 1 but got size 2"), emulated():
        mx.fast.metal_kernel("k", [], ["out"], "")(
            inputs=[],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,), (1,)],
            output_dtypes=[mx.float32],
        )
    with pytest.raises(TypeError, match="complex64"):
        run("out[0] = 0;", {"x": mx.array([1j])})


def test_what_the_emulator_lacks_is_its_own_error():
    """An include that is not there is no fault of the kernel."""
    with pytest.raises(EmulatorError, match="metal_raytracing"):
        run(I + "out[i] = 0;", {}, header="#include <metal_raytracing>\n")
