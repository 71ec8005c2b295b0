// Loads and stores of 16 bytes, and the arithmetic type of each storage type.
//
// Only the CUDA runtime's own headers: a machine with nvcc, and with no GPU and no torch, compiles
// this.  Kernel bodies are host functions, too, so that tests run them thread by thread on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace tnn {

template <class S> struct Arithmetic {
  using type = float;
};
template <> struct Arithmetic<double> {
  using type = double;
};

TNN_INLINE float inv_sqrt(float s) {
#ifdef __CUDA_ARCH__
  return __frsqrt_rn(s);
#else
  return 1.0f / sqrtf(s);
#endif
}
TNN_INLINE double inv_sqrt(double s) {
#ifdef __CUDA_ARCH__
  return rsqrt(s);
#else
  return 1.0 / sqrt(s);
#endif
}

template <class T> TNN_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> TNN_INLINE T larger(T a, T b) { return a > b ? a : b; }
TNN_INLINE float minus_product(float c, float a, float b) { return fmaf(-a, b, c); }

template <class S, int N> struct alignas(sizeof(S) * N) Pack {
  S entry[N];
};

// One instruction of 16 bytes where N entries are that long.
template <int N, class S> TNN_INLINE Pack<S, N> load(const S* p) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) * N == 16) {
    Pack<S, N> pack;
    *reinterpret_cast<int4*>(&pack) = __ldg(reinterpret_cast<const int4*>(p));
    return pack;
  }
#endif
  return *reinterpret_cast<const Pack<S, N>*>(p);
}
template <int N, class S> TNN_INLINE void store(S* p, const Pack<S, N>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) * N == 16) {
    *reinterpret_cast<int4*>(p) = *reinterpret_cast<const int4*>(&pack);
    return;
  }
#endif
  *reinterpret_cast<Pack<S, N>*>(p) = pack;
}

inline bool aligned16(const void* p) { return ((uintptr_t)p & 15) == 0; }
inline bool all_aligned16(const Call& c) {
  return aligned16(c.w) && aligned16(c.g) && aligned16(c.v) && aligned16(c.out) && aligned16(c.out_w);
}

// f of a value of the storage type and of the derivative, as a type; -1: the dtype is not one of kDtypes.
template <Derivative D> struct Is {
  static constexpr Derivative derivative = D;
};
template <class S, class F> int for_derivative(Derivative derivative, F f) {
  switch (derivative) {
    case kValue: return f(S(), Is<kValue>());
    case kFirst: return f(S(), Is<kFirst>());
    case kSecond: return f(S(), Is<kSecond>());
    case kPair: return f(S(), Is<kPair>());
    case kScales: break;  // the CPU's alone
  }
  return -1;
}
template <class F> int for_dtype_and_derivative(const Call& c, F f) {
  switch (c.dtype) {
    case kHalf: return for_derivative<__half>(c.derivative, f);
    case kFloat: return for_derivative<float>(c.derivative, f);
    case kDouble: return for_derivative<double>(c.derivative, f);
    case kBFloat16: return for_derivative<__nv_bfloat16>(c.derivative, f);
  }
  return -1;
}

}  // namespace tnn
