// Places in an ascending list for the threads of a threadgroup that take part; all threads must call this.
//
// `before` is scratch for 32 numbers. Adds how many take part to `listed`; returns a thread's place behind what was
// listed.
inline uint places_of(
    bool take, thread uint& listed, threadgroup uint* before, uint simdgroup_index, uint lane, uint simdgroups) {
  const uint inside = simd_prefix_exclusive_sum(uint(take));
  const uint total = simd_sum(uint(take));
  if (lane == 0) before[simdgroup_index] = total;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Every simdgroup adds up those before it, so that nothing more need be passed around.
  const uint theirs = lane < simdgroups ? before[lane] : 0u;
  const uint earlier = simd_sum(lane < simdgroup_index ? theirs : 0u);
  const uint all = simd_sum(theirs);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint place = listed + earlier + inside;
  listed += all;
  return place;
}
