// Barriers, and functions of a simdgroup: 32 lanes that meet at one place of the program.
// Sums are a butterfly tree in the operand's own type; the GPU's order is not documented.
#pragma once
#include "math.h"

MSL_RUNTIME void msl_rt_barrier(bool whole_threadgroup, int flags);
// Waits until every lane is here, then writes the lanes' values to `all`, where a bit of `mask` is set.
MSL_RUNTIME void msl_rt_gather(const thread void *value, uint size, thread void *all, thread uint *mask, thread uint *lane);
MSL_RUNTIME void msl_rt_bad_lane(int lane);

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_FN void threadgroup_barrier(mem_flags flags) { msl_rt_barrier(true, (int)flags); }
MSL_FN void simdgroup_barrier(mem_flags flags) { msl_rt_barrier(false, (int)flags); }

template <class T> struct msl_lanes {
  T at[32];
  uint mask;
  uint lane;
};
template <class T> MSL_FN void msl_gather(T x, thread msl_lanes<T> &lanes) {
  static_assert(sizeof(T) <= 16, "simdgroup functions take at most 16 bytes");
  msl_rt_gather(&x, sizeof(T), lanes.at, &lanes.mask, &lanes.lane);
}
// What a function of simdgroups leaves undefined: NaN, or -1.
template <class T> MSL_FN T msl_undefined() {
  T x;
  __builtin_memset(&x, 0xff, sizeof x);
  return x;
}
template <class T> MSL_FN T msl_pick(thread msl_lanes<T> &lanes, int lane) {
  if (lane >= 0 && lane < 32 && (lanes.mask >> lane & 1)) return lanes.at[lane];
  msl_rt_bad_lane(lane);
  return msl_undefined<T>();
}

#define MSL_REDUCE(NAME, EXPRESSION)                                       \
  template <class T> MSL_APART T msl_##NAME(thread msl_lanes<T> &lanes) {  \
    uint present = lanes.mask;                                             \
    for (int half_ = 16; half_; half_ >>= 1)                               \
      for (int i = 0; i < half_; ++i) {                                    \
        bool low = present >> i & 1, high = present >> (i + half_) & 1;    \
        T a = lanes.at[i], b = lanes.at[i + half_];                        \
        if (low && high) lanes.at[i] = (T)(EXPRESSION);                    \
        else if (high) lanes.at[i] = b, present |= 1u << i;                \
      }                                                                    \
    return lanes.at[0];                                                    \
  }                                                                        \
  template <class T> MSL_FN T NAME(T x) {                                  \
    msl_lanes<T> lanes;                                                    \
    msl_gather(x, lanes);                                                  \
    return msl_##NAME(lanes);                                              \
  }
MSL_REDUCE(simd_sum, a + b) MSL_REDUCE(simd_product, a * b)
MSL_REDUCE(simd_max, a < b ? b : a) MSL_REDUCE(simd_min, b < a ? b : a)
MSL_REDUCE(simd_and, a & b) MSL_REDUCE(simd_or, a | b) MSL_REDUCE(simd_xor, a ^ b)
#undef MSL_REDUCE

#define MSL_SCAN(NAME, FIRST, END, EXPRESSION)                             \
  template <class T> MSL_APART T msl_##NAME(thread msl_lanes<T> &lanes) {  \
    T a = (T)FIRST;                                                        \
    for (uint i = 0; i < lanes.lane + END; ++i)                            \
      if (lanes.mask >> i & 1) {                                           \
        T b = lanes.at[i];                                                 \
        a = (T)(EXPRESSION);                                               \
      }                                                                    \
    return a;                                                              \
  }                                                                        \
  template <class T> MSL_FN T NAME(T x) {                                  \
    msl_lanes<T> lanes;                                                    \
    msl_gather(x, lanes);                                                  \
    return msl_##NAME(lanes);                                              \
  }
MSL_SCAN(simd_prefix_inclusive_sum, 0, 1, a + b) MSL_SCAN(simd_prefix_exclusive_sum, 0, 0, a + b)
MSL_SCAN(simd_prefix_inclusive_product, 1, 1, a * b) MSL_SCAN(simd_prefix_exclusive_product, 1, 0, a * b)
#undef MSL_SCAN

// SOURCE: the lane to read from. A read past the edge is undefined where EDGE is set, and a finding elsewhere.
#define MSL_SHUFFLE(NAME, OPERAND, SOURCE, EDGE)                           \
  template <class T> MSL_FN T NAME(T x, ushort OPERAND) {                  \
    msl_lanes<T> lanes;                                                    \
    msl_gather(x, lanes);                                                  \
    int lane = (int)lanes.lane, from = SOURCE;                             \
    (void)lane;                                                            \
    if (EDGE && (from < 0 || from > 31)) return msl_undefined<T>();        \
    return msl_pick(lanes, from);                                          \
  }
MSL_SHUFFLE(simd_shuffle, source, (int)source, false)
MSL_SHUFFLE(simd_broadcast, source, (int)source, false)
MSL_SHUFFLE(simd_shuffle_xor, mask, lane ^ (int)mask, false)
MSL_SHUFFLE(simd_shuffle_down, delta, lane + (int)delta, true)
MSL_SHUFFLE(simd_shuffle_up, delta, lane - (int)delta, true)
MSL_SHUFFLE(simd_shuffle_rotate_down, delta, (lane + (int)delta) & 31, false)
MSL_SHUFFLE(simd_shuffle_rotate_up, delta, (lane - (int)delta) & 31, false)
MSL_SHUFFLE(quad_shuffle_xor, mask, (lane & ~3) | ((lane ^ (int)mask) & 3), false)
MSL_SHUFFLE(quad_broadcast, source, (lane & ~3) | ((int)source & 3), false)
#undef MSL_SHUFFLE

template <class T> MSL_FN T simd_broadcast_first(T x) {
  msl_lanes<T> lanes;
  msl_gather(x, lanes);
  return lanes.at[__builtin_ctz(lanes.mask)];
}
template <class T> MSL_FN T simd_shuffle_and_fill_down(T x, T fill, ushort delta) {
  msl_lanes<T> lanes, fills;
  msl_gather(x, lanes);
  msl_gather(fill, fills);
  int from = (int)lanes.lane + (int)delta;
  return from < 32 ? msl_pick(lanes, from) : msl_pick(fills, from - 32);
}
template <class T> MSL_FN T simd_shuffle_and_fill_up(T x, T fill, ushort delta) {
  msl_lanes<T> lanes, fills;
  msl_gather(x, lanes);
  msl_gather(fill, fills);
  int from = (int)lanes.lane - (int)delta;
  return from >= 0 ? msl_pick(lanes, from) : msl_pick(fills, from + 32);
}
template <class T> MSL_FN T quad_sum(T x) {
  msl_lanes<T> lanes;
  msl_gather(x, lanes);
  uint first = lanes.lane & ~3u;
  return (T)((T)(lanes.at[first] + lanes.at[first + 1]) + (T)(lanes.at[first + 2] + lanes.at[first + 3]));
}

struct simd_vote {
  ulong bits;
  explicit operator ulong() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};
MSL_APART uint msl_votes(thread msl_lanes<uint> &lanes) {
  uint votes = 0;
  for (int i = 0; i < 32; ++i)
    if ((lanes.mask >> i & 1) && lanes.at[i]) votes |= 1u << i;
  return votes;
}
MSL_FN uint msl_ballot(bool predicate, thread uint &mask) {
  msl_lanes<uint> lanes;
  msl_gather((uint)predicate, lanes);
  mask = lanes.mask;
  return msl_votes(lanes);
}
MSL_FN simd_vote simd_ballot(bool predicate) {
  uint mask;
  simd_vote vote;
  vote.bits = msl_ballot(predicate, mask);
  return vote;
}
MSL_FN simd_vote simd_active_threads_mask() { return simd_ballot(true); }
MSL_FN bool simd_all(bool predicate) {
  uint mask, votes = msl_ballot(predicate, mask);
  return votes == mask;
}
MSL_FN bool simd_any(bool predicate) {
  uint mask;
  return msl_ballot(predicate, mask) != 0;
}
MSL_FN bool simd_is_first() {
  msl_lanes<uint> lanes;
  msl_gather(0u, lanes);
  return lanes.lane == (uint)__builtin_ctz(lanes.mask);
}

}  // namespace metal
