// Atomics: relaxed only. atomic<float> is for device memory only, as on the GPU.
#pragma once
#include "types.h"

MSL_RUNTIME void msl_rt_atomic(ulong address, uint size, bool write);

// clang predefines these names for OpenCL
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_bool msl_atomic_bool

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T msl_value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define MSL_MODIFY(NAME, SPACE, T, EXPRESSION)                               \
  MSL_FN T NAME(volatile SPACE atomic<T> *p, T b, memory_order) {            \
    msl_rt_atomic((ulong)p, sizeof(T), true);                                \
    T a = p->msl_value;                                                      \
    p->msl_value = (T)(EXPRESSION);                                          \
    return a;                                                                \
  }
#define MSL_ATOMIC(SPACE, T)                                                 \
  MSL_MODIFY(atomic_fetch_add_explicit, SPACE, T, a + b)                     \
  MSL_MODIFY(atomic_fetch_sub_explicit, SPACE, T, a - b)                     \
  MSL_MODIFY(atomic_exchange_explicit, SPACE, T, b)                          \
  MSL_FN T atomic_load_explicit(const volatile SPACE atomic<T> *p, memory_order) { \
    msl_rt_atomic((ulong)p, sizeof(T), false);                               \
    return p->msl_value;                                                     \
  }                                                                          \
  MSL_FN void atomic_store_explicit(volatile SPACE atomic<T> *p, T b, memory_order) { \
    msl_rt_atomic((ulong)p, sizeof(T), true);                                \
    p->msl_value = b;                                                        \
  }                                                                          \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T> *p, thread T *expected, T desired, \
                                                    memory_order, memory_order) { \
    msl_rt_atomic((ulong)p, sizeof(T), true);                                \
    T found = p->msl_value;                                                  \
    if (found == *expected) {                                                \
      p->msl_value = desired;                                                \
      return true;                                                           \
    }                                                                        \
    *expected = found;                                                       \
    return false;                                                            \
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
