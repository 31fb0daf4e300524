"""Mutants of a small kernel that has what large ones have: a list of rows, a ragged end, lanes, scratch and a barrier.

It tests the emulator, whatever becomes of the project's own kernels.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject

GROUPS = 2  # simdgroups of a threadgroup
HEADER = """
template <typename T>
inline float squared(const device T* x, uint n, uint first, uint step) {
  float s = 0.0f;
  for (uint i = first; i < n; i += step) s += float(x[i]) * float(x[i]);
  return s;
}
"""
BODY = """
  threadgroup float parts[NSG];
  uint lane = thread_index_in_simdgroup;
  uint sg = simdgroup_index_in_threadgroup;
  uint tid = thread_index_in_threadgroup;
  uint r = threadgroup_position_in_grid.y;
  uint n = x_shape[1];
  const device T* row = x + size_t(rows[r]) * n;
  float s = squared(row, n, tid, NSG * 32);
  s = simd_sum(s);
  if (lane == 0) parts[sg] = s;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = 0.0f;
  for (int i = 0; i < NSG; ++i) all += parts[i];
  float scale = rsqrt(all / float(n) + eps);
  for (uint i = tid; i < n; i += NSG * 32) out[r * n + i] = T(float(row[i]) * scale);
"""


def normalized(x: mx.array, rows: mx.array, eps: float) -> mx.array:
    """Rows of `x`, chosen by `rows`, divided by the root of their mean square."""
    kernel = mx.fast.metal_kernel("chosen_rms", ["x", "rows", "eps"], ["out"], BODY, HEADER)
    (out,) = kernel(
        inputs=[x, rows, eps],
        template=[("T", x.dtype), ("NSG", GROUPS)],
        grid=(GROUPS * 32, rows.size, 1),
        threadgroup=(GROUPS * 32, 1, 1),
        output_shapes=[(rows.size, x.shape[1])],
        output_dtypes=[x.dtype],
    )
    return out


def check() -> None:
    """Against float64, 7 and 9 rows of 101, the last one among them: less than 8 are passed otherwise."""
    x = np.random.default_rng(0).standard_normal((12, 101)).astype(np.float16)
    for chosen in ([11, 0, 3, 3, 7, 2, 9], [11, 0, 3, 3, 7, 2, 9, 1, 4]):
        got = np.array(normalized(mx.array(x), mx.array(chosen, dtype=mx.int32), 1e-5))
        rows = x[chosen].astype(np.float64)
        want = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(got, want, atol=2e-3)


SUBJECTS = (
    Subject(
        "chosen_rms",
        check,
        (
            Mutant("no barrier", "  threadgroup_barrier(mem_flags::mem_threadgroup);\n", "", Kind.RACE),
            Mutant("barrier of the wrong memory", "mem_threadgroup", "mem_device", Kind.RACE),
            Mutant("barrier of the simdgroup only", "threadgroup_barrier(", "simdgroup_barrier(", Kind.RACE),
            Mutant(
                "barrier of one simdgroup",
                "  threadgroup_barrier(",
                "  if (sg == 0) threadgroup_barrier(",
                Kind.DIVERGENT_BARRIER,
            ),
            Mutant(
                "lanes leave before the sum",
                "  s = simd_sum(s);",
                "  if (tid > 40) return;\n  s = simd_sum(s);",
                Kind.FINISHED_LANES,
            ),
            Mutant("lane 31 left out", "s = simd_sum(s);", "if (lane < 31) s = simd_sum(s);", Kind.DIVERGENT_SIMD),
            Mutant("sum over lanes forgotten", "  s = simd_sum(s);\n", "", Kind.WRONG),
            Mutant("every lane stores the sum", "if (lane == 0) parts", "parts", Kind.RACE),
            Mutant("only one simdgroup stores", "if (lane == 0)", "if (tid == 0)", Kind.UNINITIALISED),
            Mutant("last simdgroup left out", "i < NSG; ++i", "i < NSG - 1; ++i", Kind.WRONG),
            Mutant("scratch of one float less", "parts[NSG];", "parts[NSG - 1];", Kind.OUT_OF_BOUNDS),
            Mutant("list of rows not read", "size_t(rows[r])", "size_t(r)", Kind.WRONG),
            Mutant("row after the chosen one", "size_t(rows[r])", "size_t(rows[r] + 1)", Kind.OUT_OF_BOUNDS),
            Mutant("list read one further", "rows[r]", "rows[r + 1]", Kind.OUT_OF_BOUNDS),
            Mutant("end of the row left out of the sum", "i < n; i += step", "i + 1 < n; i += step", Kind.WRONG),
            Mutant("end of the row not written", "i < n; i += NSG", "i + 1 < n; i += NSG", Kind.UNWRITTEN),
            Mutant("one element too many written", "i < n; i += NSG", "i <= n; i += NSG", Kind.OUT_OF_BOUNDS),
            Mutant("sum not initialised", "float s = 0.0f;", "float s;", Kind.COMPILE),
            Mutant("pointer without address space", "const device T* row", "const T* row", Kind.COMPILE),
            Mutant("double", "float all = 0.0f", "double all = 0.0f", Kind.COMPILE),
        ),
    ),
)
