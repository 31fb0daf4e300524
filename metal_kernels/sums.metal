// The sum over a threadgroup, the same in all of its threads; all must call this. `found` is scratch for 32 numbers.
inline float sum_of_all(float x, threadgroup float* found, uint simdgroup_index, uint lane, uint simdgroups) {
  const float total = simd_sum(x);
  if (lane == 0) found[simdgroup_index] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float all = simd_sum(lane < simdgroups ? found[lane] : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return all;
}
