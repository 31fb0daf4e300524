// Functions of numbers. Overloads are concrete, so that a call which is ambiguous in MSL is ambiguous here too.
// `fast::` and `precise::` are one: the accuracy of Apple's functions is not modelled.
#pragma once
#include "types.h"

#define MSL_LIBM(NAME) MSL_RUNTIME float NAME(float);
MSL_LIBM(expf) MSL_LIBM(exp2f) MSL_LIBM(logf) MSL_LIBM(log2f) MSL_LIBM(log10f) MSL_LIBM(sinf) MSL_LIBM(cosf)
MSL_LIBM(tanf) MSL_LIBM(tanhf) MSL_LIBM(sinhf) MSL_LIBM(coshf) MSL_LIBM(asinf) MSL_LIBM(acosf) MSL_LIBM(atanf)
#undef MSL_LIBM
MSL_RUNTIME float powf(float, float);
MSL_RUNTIME float fmodf(float, float);
MSL_RUNTIME float atan2f(float, float);

namespace metal {

#define MSL_MIN_MAX(T)                                \
  MSL_FN T min(T a, T b) { return b < a ? b : a; }    \
  MSL_FN T max(T a, T b) { return a < b ? b : a; }    \
  MSL_FN T clamp(T x, T low, T high) { return min(max(x, low), high); }
MSL_INTEGERS(MSL_MIN_MAX) MSL_MIN_MAX(half) MSL_MIN_MAX(float) MSL_MIN_MAX(bfloat)
#undef MSL_MIN_MAX

#define MSL_SELECT(T) MSL_FN T select(T a, T b, bool c) { return c ? b : a; }
MSL_INTEGERS(MSL_SELECT) MSL_SELECT(half) MSL_SELECT(float) MSL_SELECT(bfloat)
#undef MSL_SELECT

MSL_FN int abs(int x) { return x < 0 ? -x : x; }
MSL_FN long abs(long x) { return x < 0 ? -x : x; }

// In OpenCL `long` has 64 bits and `long long` 128.
#define MSL_BITS(T, U, BITS)                                                                       \
  MSL_FN T popcount(T x) { return (T)__builtin_popcountl((U)x); }                                 \
  MSL_FN T clz(T x) { return x ? (T)(__builtin_clzl((U)x) - (64 - BITS)) : (T)BITS; }             \
  MSL_FN T ctz(T x) { return x ? (T)__builtin_ctzl((U)x) : (T)BITS; }
MSL_BITS(int, uint, 32) MSL_BITS(uint, uint, 32) MSL_BITS(long, ulong, 64) MSL_BITS(ulong, ulong, 64)
MSL_BITS(ushort, ushort, 16) MSL_BITS(uchar, uchar, 8)
#undef MSL_BITS
MSL_FN uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : bits >= 32 ? x : (x >> offset) & ((1u << bits) - 1u);
}

#define MSL_ELEMENTWISE(NAME, T, N)  \
  MSL_FN T##N NAME(T##N v) {         \
    for (int i = 0; i < N; ++i) v[i] = NAME((T)v[i]); \
    return v;                        \
  }
#define MSL_UNARY(NAME, EXPRESSION)                                            \
  MSL_FN float NAME(float x) { return EXPRESSION; }                            \
  namespace precise { MSL_FN float NAME(float x) { return EXPRESSION; } }      \
  namespace fast { MSL_FN float NAME(float x) { return EXPRESSION; } }         \
  MSL_FN half NAME(half h) { float x = (float)h; return (half)(EXPRESSION); }  \
  MSL_FN bfloat NAME(bfloat h) { float x = (float)h; return (bfloat)(EXPRESSION); } \
  MSL_ELEMENTWISE(NAME, float, 2) MSL_ELEMENTWISE(NAME, float, 3) MSL_ELEMENTWISE(NAME, float, 4) \
  MSL_ELEMENTWISE(NAME, half, 2) MSL_ELEMENTWISE(NAME, half, 4)
MSL_UNARY(exp, expf(x)) MSL_UNARY(exp2, exp2f(x)) MSL_UNARY(exp10, powf(10.0f, x))
MSL_UNARY(log, logf(x)) MSL_UNARY(log2, log2f(x)) MSL_UNARY(log10, log10f(x))
MSL_UNARY(sqrt, __builtin_sqrtf(x)) MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_UNARY(sin, sinf(x)) MSL_UNARY(cos, cosf(x)) MSL_UNARY(tan, tanf(x)) MSL_UNARY(tanh, tanhf(x))
MSL_UNARY(sinh, sinhf(x)) MSL_UNARY(cosh, coshf(x)) MSL_UNARY(atan, atanf(x)) MSL_UNARY(asin, asinf(x))
MSL_UNARY(acos, acosf(x)) MSL_UNARY(fabs, __builtin_fabsf(x)) MSL_UNARY(abs, __builtin_fabsf(x))
MSL_UNARY(floor, __builtin_floorf(x)) MSL_UNARY(ceil, __builtin_ceilf(x)) MSL_UNARY(round, __builtin_roundf(x))
MSL_UNARY(rint, __builtin_rintf(x)) MSL_UNARY(trunc, __builtin_truncf(x)) MSL_UNARY(fract, x - __builtin_floorf(x))
MSL_UNARY(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f) MSL_UNARY(saturate, x < 0 ? 0.0f : x > 1 ? 1.0f : x)
#undef MSL_UNARY
#undef MSL_ELEMENTWISE

#define MSL_BINARY(NAME, EXPRESSION)                                                    \
  MSL_FN float NAME(float x, float y) { return EXPRESSION; }                            \
  namespace precise { MSL_FN float NAME(float x, float y) { return EXPRESSION; } }      \
  namespace fast { MSL_FN float NAME(float x, float y) { return EXPRESSION; } }         \
  MSL_FN half NAME(half a, half b) { float x = (float)a, y = (float)b; return (half)(EXPRESSION); } \
  MSL_FN bfloat NAME(bfloat a, bfloat b) { float x = (float)a, y = (float)b; return (bfloat)(EXPRESSION); }
MSL_BINARY(pow, powf(x, y)) MSL_BINARY(powr, powf(x, y)) MSL_BINARY(fmod, fmodf(x, y)) MSL_BINARY(atan2, atan2f(x, y))
MSL_BINARY(fmin, __builtin_fminf(x, y)) MSL_BINARY(fmax, __builtin_fmaxf(x, y)) MSL_BINARY(divide, x / y)
MSL_BINARY(copysign, __builtin_copysignf(x, y))
#undef MSL_BINARY

#define MSL_FLOATING(T)                                                                           \
  MSL_FN T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); }         \
  MSL_FN T mix(T a, T b, T t) { return a + (b - a) * t; }                                         \
  MSL_FN bool isnan(T x) { return x != x; }                                                       \
  MSL_FN bool isinf(T x) { return __builtin_fabsf((float)x) == __builtin_inff(); }                \
  MSL_FN bool isfinite(T x) { return __builtin_fabsf((float)x) < __builtin_inff(); }
MSL_FLOATING(float) MSL_FLOATING(half) MSL_FLOATING(bfloat)
#undef MSL_FLOATING

#define MSL_VECTOR(T, N)                                                                          \
  MSL_FN T dot(T##N a, T##N b) {                                                                  \
    T s = (T)0;                                                                                   \
    for (int i = 0; i < N; ++i) s += a[i] * b[i];                                                 \
    return s;                                                                                     \
  }                                                                                               \
  MSL_FN T##N max(T##N a, T##N b) {                                                               \
    for (int i = 0; i < N; ++i) a[i] = max((T)a[i], (T)b[i]);                                     \
    return a;                                                                                     \
  }                                                                                               \
  MSL_FN T##N min(T##N a, T##N b) {                                                               \
    for (int i = 0; i < N; ++i) a[i] = min((T)a[i], (T)b[i]);                                     \
    return a;                                                                                     \
  }                                                                                               \
  MSL_FN T##N fma(T##N a, T##N b, T##N c) {                                                       \
    for (int i = 0; i < N; ++i) a[i] = fma((T)a[i], (T)b[i], (T)c[i]);                            \
    return a;                                                                                     \
  }                                                                                               \
  MSL_FN T##N clamp(T##N x, T##N low, T##N high) { return min(max(x, low), high); }
MSL_VECTOR(float, 2) MSL_VECTOR(float, 3) MSL_VECTOR(float, 4)
MSL_VECTOR(half, 2) MSL_VECTOR(half, 3) MSL_VECTOR(half, 4)
#undef MSL_VECTOR

}  // namespace metal
