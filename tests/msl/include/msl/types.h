// Scalar and vector types, address spaces and limits of the Metal Shading Language.
//
// Read by two front ends of clang: "C++ for OpenCL", whose address spaces are MSL's and which makes the code that runs,
// and plain C++14, which checks the template that MLX writes around a kernel (OpenCL has no template kernels).
#pragma once

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;

#ifdef __OPENCL_CPP_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define MSL_RUNTIME extern "C" __attribute__((convergent))
#define MSL_FN inline __attribute__((convergent, always_inline, no_sanitize("thread", "undefined")))
#define MSL_APART inline __attribute__((noinline, no_sanitize("thread", "undefined")))  // keeps a kernel's code short
#else
#pragma clang diagnostic ignored "-Wuser-defined-literals"
#pragma clang diagnostic ignored "-Wreserved-user-defined-literal"
typedef _Float16 half;
constexpr half operator""h(long double x) { return (half)x; }
#define device
#define constant
#define threadgroup
#define thread
#define MSL_RUNTIME extern "C"
#define MSL_FN inline
#define MSL_APART inline
#endif

typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX 65504.0h
#define HALF_MIN 6.103515625e-05h
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_2_SQRTPI_F 1.12837916709551257390f

// F(type) for every element type of vectors. Vectors over 16 bytes are left out: accesses of 32 bytes are not checked.
#define MSL_INTEGERS(F) F(char) F(uchar) F(short) F(ushort) F(int) F(uint) F(long) F(ulong)
#define MSL_SMALL(F) F(char) F(uchar) F(short) F(ushort) F(int) F(uint) F(half) F(float) F(bfloat)
#define MSL_VECTORS_2(F) F(long, 2) F(ulong, 2)
#define MSL_VECTORS_OF(T, F) F(T, 2) F(T, 3) F(T, 4)
#define MSL_VECTORS(F)                                                                                            \
  MSL_VECTORS_OF(char, F) MSL_VECTORS_OF(uchar, F) MSL_VECTORS_OF(short, F) MSL_VECTORS_OF(ushort, F)              \
  MSL_VECTORS_OF(int, F) MSL_VECTORS_OF(uint, F) MSL_VECTORS_OF(half, F) MSL_VECTORS_OF(float, F)                  \
  MSL_VECTORS_OF(bfloat, F) MSL_VECTORS_2(F)

#define MSL_VECTOR(T, N) typedef T T##N __attribute__((ext_vector_type(N)));
MSL_VECTORS(MSL_VECTOR)
#undef MSL_VECTOR

namespace metal {

template <class T, int N> struct msl_vector;
template <class V> struct msl_parts {
  using element = V;
  enum { count = 1 };
};
#define MSL_VECTOR(T, N)                                  \
  template <> struct msl_vector<T, N> { using type = T##N; }; \
  template <> struct msl_parts<T##N> {                    \
    using element = T;                                    \
    enum { count = N };                                   \
  };
MSL_VECTORS(MSL_VECTOR)
#undef MSL_VECTOR

template <class T, int N> using vec = typename msl_vector<T, N>::type;

// Vector constructors: float4(a), float4(v2, v2), float4(v3, s), float4(half4). See the macros at the end of metal_stdlib.
template <class V, int Count> struct msl_append {
  template <class A> static void to(thread V &v, thread int &at, A a) {
    for (int k = 0; k < Count; ++k) v[at++] = (typename msl_parts<V>::element)a[k];
  }
};
template <class V> struct msl_append<V, 1> {
  template <class A> static void to(thread V &v, thread int &at, A a) { v[at++] = (typename msl_parts<V>::element)a; }
};
template <class... A> struct msl_total { enum { count = 0 }; };
template <class A, class... R> struct msl_total<A, R...> {
  enum { count = (int)msl_parts<A>::count + (int)msl_total<R...>::count };
};
template <class V, class A, int Count> struct msl_convert {
  static V from(A a) {
    static_assert(Count == (int)msl_parts<V>::count, "vectors of different lengths");
    return __builtin_convertvector(a, V);
  }
};
template <class V, class A> struct msl_convert<V, A, 1> {
  static V from(A a) { return (V)((typename msl_parts<V>::element)a); }
};
template <class V> MSL_FN V msl_make() { return (V)0; }
template <class V, class A> MSL_FN V msl_make(A a) { return msl_convert<V, A, msl_parts<A>::count>::from(a); }
template <class V, class A, class B, class... R> MSL_FN V msl_make(A a, B b, R... rest) {
  static_assert((int)msl_total<A, B, R...>::count == (int)msl_parts<V>::count, "wrong number of components");
  V v;
  int at = 0;
  msl_append<V, msl_parts<A>::count>::to(v, at, a);
  msl_append<V, msl_parts<B>::count>::to(v, at, b);
  int done[] = {0, (msl_append<V, msl_parts<R>::count>::to(v, at, rest), 0)...};
  (void)done;
  return v;
}

template <class T, class F> MSL_FN T as_type(F x) {
  static_assert(sizeof(T) == sizeof(F), "as_type: sizes differ");
  return __builtin_bit_cast(T, x);
}

template <class T> struct numeric_limits;
#define MSL_LIMITS(T, LOW, HIGH)                    \
  template <> struct numeric_limits<T> {            \
    static constexpr T max() { return HIGH; }       \
    static constexpr T min() { return LOW; }        \
    static constexpr T lowest() { return LOW; }     \
  };
MSL_LIMITS(char, -128, 127)
MSL_LIMITS(signed char, -128, 127)
MSL_LIMITS(uchar, 0, 255)
MSL_LIMITS(short, -32768, 32767)
MSL_LIMITS(ushort, 0, 65535)
MSL_LIMITS(int, INT_MIN, INT_MAX)
MSL_LIMITS(uint, 0, UINT_MAX)
MSL_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
MSL_LIMITS(ulong, 0, ~0ul)
#undef MSL_LIMITS
#define MSL_LIMITS(T, MIN, MAX)                                          \
  template <> struct numeric_limits<T> {                                 \
    static constexpr T max() { return (T)MAX; }                          \
    static constexpr T min() { return (T)MIN; }                          \
    static constexpr T lowest() { return (T)-MAX; }                      \
    static constexpr T infinity() { return (T)__builtin_inff(); }        \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }     \
  };
MSL_LIMITS(float, FLT_MIN, FLT_MAX)
MSL_LIMITS(half, 6.103515625e-05f, 65504.0f)
MSL_LIMITS(bfloat, FLT_MIN, 3.38953139e38f)
#undef MSL_LIMITS

}  // namespace metal
