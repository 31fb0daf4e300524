// Atomics: relaxed only. atomic<float> is for device memory only, as on the GPU.
#pragma once
#include "types.h"

// The runtime reads and writes: an access from here would count as one that is not atomic. Four bytes at a time.
MSL_RUNTIME uint msl_rt_atomic_read(ulong address, bool will_write);
MSL_RUNTIME void msl_rt_atomic_write(ulong address, uint value);

// clang predefines these names for OpenCL
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T msl_value; };
template struct atomic<int>;  // complete types, as the signature needs them
template struct atomic<uint>;
template struct atomic<float>;
template struct atomic<bool>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

template <class T> MSL_FN T msl_atomic_read(ulong address, bool will_write) {
  return __builtin_bit_cast(T, msl_rt_atomic_read(address, will_write));
}
template <class T> MSL_FN void msl_atomic_write(ulong address, T value) {
  msl_rt_atomic_write(address, __builtin_bit_cast(uint, value));
}
#define MSL_MODIFY(NAME, SPACE, T, EXPRESSION)                               \
  MSL_FN T NAME(volatile SPACE atomic<T> *p, T b, memory_order) {            \
    T a = msl_atomic_read<T>((ulong)p, true);                                \
    msl_atomic_write<T>((ulong)p, (T)(EXPRESSION));                          \
    return a;                                                                \
  }
#define MSL_ATOMIC(SPACE, T)                                                 \
  MSL_MODIFY(atomic_fetch_add_explicit, SPACE, T, a + b)                     \
  MSL_MODIFY(atomic_fetch_sub_explicit, SPACE, T, a - b)                     \
  MSL_MODIFY(atomic_exchange_explicit, SPACE, T, b)                          \
  MSL_FN T atomic_load_explicit(const volatile SPACE atomic<T> *p, memory_order) { \
    return msl_atomic_read<T>((ulong)p, false);                              \
  }                                                                          \
  MSL_FN void atomic_store_explicit(volatile SPACE atomic<T> *p, T b, memory_order) { \
    msl_atomic_read<T>((ulong)p, true);                                      \
    msl_atomic_write<T>((ulong)p, b);                                        \
  }                                                                          \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T> *p, thread T *expected, T desired, \
                                                    memory_order, memory_order) { \
    T found = msl_atomic_read<T>((ulong)p, true);                            \
    bool same = found == *expected;                                          \
    if (same) msl_atomic_write<T>((ulong)p, desired);                        \
    *expected = found;                                                       \
    return same;                                                             \
  }
#define MSL_ATOMIC_INTEGER(SPACE, T)                                         \
  MSL_ATOMIC(SPACE, T)                                                       \
  MSL_MODIFY(atomic_fetch_max_explicit, SPACE, T, a < b ? b : a)             \
  MSL_MODIFY(atomic_fetch_min_explicit, SPACE, T, b < a ? b : a)             \
  MSL_MODIFY(atomic_fetch_and_explicit, SPACE, T, a & b)                     \
  MSL_MODIFY(atomic_fetch_or_explicit, SPACE, T, a | b)                      \
  MSL_MODIFY(atomic_fetch_xor_explicit, SPACE, T, a ^ b)

MSL_ATOMIC_INTEGER(device, int)
MSL_ATOMIC_INTEGER(device, uint)
MSL_ATOMIC(device, float)
#ifdef __OPENCL_CPP_VERSION__
MSL_ATOMIC_INTEGER(threadgroup, int)
MSL_ATOMIC_INTEGER(threadgroup, uint)
#endif
#undef MSL_ATOMIC_INTEGER
#undef MSL_ATOMIC
#undef MSL_MODIFY

}  // namespace metal
