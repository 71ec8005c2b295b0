// Registers of one instruction set: load, store, widen, inv_sqrt.
//
// Each source under cpu/ is compiled once per instruction set with -DTNN_ISA=scalar|avx2|avx512, and
// everything lies in a namespace of that name, so that the linker never mixes them.
#pragma once
#include "../kernels.h"
#include "half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && !defined(TNN_SHORT)
#define TNN_BYTES 64
#elif defined(__AVX2__)
#define TNN_BYTES 32
#endif

namespace tnn {
namespace TNN_ISA {

// the type that arithmetic is done in
template <class S> struct Arithmetic {
  using type = float;
};
template <> struct Arithmetic<double> {
  using type = double;
};

TNN_INLINE float inv_sqrt(float s) { return 1.0f / __builtin_sqrtf(s); }
TNN_INLINE double inv_sqrt(double s) { return 1.0 / __builtin_sqrt(s); }
template <class T> TNN_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> TNN_INLINE T larger(T a, T b) { return a > b ? a : b; }

#ifdef TNN_BYTES
typedef float FloatV __attribute__((vector_size(TNN_BYTES)));
typedef double DoubleV __attribute__((vector_size(TNN_BYTES)));

template <class S> struct Register {
  using type = FloatV;
};
template <> struct Register<double> {
  using type = DoubleV;
};

template <class V> TNN_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
TNN_INLINE FloatV load(const float* p) { return load_as<FloatV>(p); }
TNN_INLINE DoubleV load(const double* p) { return load_as<DoubleV>(p); }
TNN_INLINE void store(float* p, FloatV v) { memcpy(p, &v, sizeof v); }
TNN_INLINE void store(double* p, DoubleV v) { memcpy(p, &v, sizeof v); }

#if TNN_BYTES == 64
// A 14-bit estimate and Newton steps r (3/2 - s r^2 / 2), each of which doubles the digits: three times
// the speed of square root and division.  s is a normal number in all callers.
TNN_INLINE FloatV inv_sqrt(FloatV s) {
  const FloatV r = (FloatV)_mm512_rsqrt14_ps((__m512)s), h = s * 0.5f;
  return r * (1.5f - (h * r) * r);
}
TNN_INLINE DoubleV inv_sqrt(DoubleV s) {
  const DoubleV h = s * 0.5;
  DoubleV r = (DoubleV)_mm512_rsqrt14_pd((__m512d)s);
  r = r * (1.5 - (h * r) * r);
  r = r * (1.5 - (h * r) * r);
  return r * (1.5 - (h * r) * r);
}
TNN_INLINE FloatV smaller(FloatV a, FloatV b) { return (FloatV)_mm512_min_ps((__m512)a, (__m512)b); }
TNN_INLINE FloatV larger(FloatV a, FloatV b) { return (FloatV)_mm512_max_ps((__m512)a, (__m512)b); }
TNN_INLINE DoubleV smaller(DoubleV a, DoubleV b) { return (DoubleV)_mm512_min_pd((__m512d)a, (__m512d)b); }
TNN_INLINE DoubleV larger(DoubleV a, DoubleV b) { return (DoubleV)_mm512_max_pd((__m512d)a, (__m512d)b); }
TNN_INLINE FloatV minus_product(FloatV c, FloatV a, FloatV b) {
  return (FloatV)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
TNN_INLINE FloatV load(const half* p) { return (FloatV)_mm512_cvtph_ps(load_as<__m256i>(p)); }
TNN_INLINE void store(half* p, FloatV v) {
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
TNN_INLINE FloatV load(const bfloat16* p) {
  return (FloatV)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
}
TNN_INLINE void store(bfloat16* p, FloatV v) {
  const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  r = _mm512_srli_epi32(r, 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  const __m256i b = _mm512_cvtepi32_epi16(r);
  memcpy(p, &b, sizeof b);
}
TNN_INLINE DoubleV lower(FloatV v) { return (DoubleV)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
TNN_INLINE DoubleV upper(FloatV v) {
  return (DoubleV)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
}
TNN_INLINE FloatV join(DoubleV low, DoubleV high) {
  const __m512d lower_half = _mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps((__m512d)low)));
  return (FloatV)_mm512_castpd_ps(_mm512_insertf64x4(lower_half, _mm256_castps_pd(_mm512_cvtpd_ps((__m512d)high)), 1));
}
#else
#ifdef TNN_SHORT  // the bits of the 64-byte registers
TNN_INLINE FloatV inv_sqrt(FloatV s) {
  const FloatV r = (FloatV)_mm256_rsqrt14_ps((__m256)s), h = s * 0.5f;
  return r * (1.5f - (h * r) * r);
}
#else
TNN_INLINE FloatV inv_sqrt(FloatV s) {  // a 12-bit estimate and two Newton steps
  const FloatV h = s * 0.5f;
  FloatV r = (FloatV)_mm256_rsqrt_ps((__m256)s);
  r = r * (1.5f - (h * r) * r);
  return r * (1.5f - (h * r) * r);
}
#endif
TNN_INLINE DoubleV inv_sqrt(DoubleV s) { return 1.0 / (DoubleV)_mm256_sqrt_pd((__m256d)s); }
TNN_INLINE FloatV smaller(FloatV a, FloatV b) { return (FloatV)_mm256_min_ps((__m256)a, (__m256)b); }
TNN_INLINE FloatV larger(FloatV a, FloatV b) { return (FloatV)_mm256_max_ps((__m256)a, (__m256)b); }
TNN_INLINE DoubleV smaller(DoubleV a, DoubleV b) { return (DoubleV)_mm256_min_pd((__m256d)a, (__m256d)b); }
TNN_INLINE DoubleV larger(DoubleV a, DoubleV b) { return (DoubleV)_mm256_max_pd((__m256d)a, (__m256d)b); }
TNN_INLINE FloatV minus_product(FloatV c, FloatV a, FloatV b) {
  return (FloatV)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
TNN_INLINE FloatV load(const half* p) { return (FloatV)_mm256_cvtph_ps(load_as<__m128i>(p)); }
TNN_INLINE void store(half* p, FloatV v) {
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
TNN_INLINE FloatV load(const bfloat16* p) {
  return (FloatV)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
}
TNN_INLINE void store(bfloat16* p, FloatV v) {
  const __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  r = _mm256_srli_epi32(r, 16);
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  memcpy(p, &packed, 16);
}
TNN_INLINE DoubleV lower(FloatV v) { return (DoubleV)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
TNN_INLINE DoubleV upper(FloatV v) { return (DoubleV)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
TNN_INLINE FloatV join(DoubleV low, DoubleV high) {
  const __m256 lower_half = _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)low));
  return (FloatV)_mm256_insertf128_ps(lower_half, _mm256_cvtpd_ps((__m256d)high), 1);
}
#endif

#else  // one entry at a time
template <class S> struct Register {
  using type = typename Arithmetic<S>::type;
};
template <class S> TNN_INLINE typename Arithmetic<S>::type load(const S* p) {
  return (typename Arithmetic<S>::type)*p;
}
template <class S> TNN_INLINE void store(S* p, typename Arithmetic<S>::type v) { *p = (S)v; }
#endif

// A register's entries in double: part[i] are registers of it, or single numbers.
template <class D, int N> struct Parts {
  D part[N]{};
};
#ifdef TNN_BYTES
using Double = DoubleV;
TNN_INLINE Parts<DoubleV, 2> widen(FloatV v) { return {{lower(v), upper(v)}}; }
TNN_INLINE Parts<DoubleV, 1> widen(DoubleV v) { return {{v}}; }
TNN_INLINE Parts<DoubleV, 2> load_wide(const float* p) {  // both halves from memory: no register is taken apart
  const auto half = [](const float* q) {
#if TNN_BYTES == 64
    return (DoubleV)_mm512_cvtps_pd(_mm256_loadu_ps(q));
#else
    return (DoubleV)_mm256_cvtps_pd(_mm_loadu_ps(q));
#endif
  };
  return {{half(p), half(p + TNN_BYTES / 8)}};
}
template <class S> TNN_INLINE auto load_wide(const S* p) { return widen(load(p)); }
TNN_INLINE FloatV narrow(const Parts<DoubleV, 2>& p) { return join(p.part[0], p.part[1]); }
TNN_INLINE DoubleV narrow(const Parts<DoubleV, 1>& p) { return p.part[0]; }
constexpr int kSummed = 64 / TNN_BYTES;  // accumulators: eight doubles in every instruction set, so one order of adding
TNN_INLINE double total(const DoubleV (&v)[kSummed]) {
  double sum = 0;
  for (const DoubleV& part : v)
    for (unsigned i = 0; i < sizeof part / sizeof sum; ++i) sum += part[i];
  return sum;
}
#else
using Double = double;
template <class T> TNN_INLINE Parts<double, 1> widen(T x) { return {{(double)x}}; }
template <class S> TNN_INLINE auto load_wide(const S* p) { return widen(load(p)); }
TNN_INLINE double narrow(const Parts<double, 1>& p) { return p.part[0]; }
constexpr int kSummed = 1;
TNN_INLINE double total(const double (&x)[1]) { return x[0]; }
#endif
// f on each part
template <int N, class F, class... P> TNN_INLINE Parts<Double, N> each(F f, const Parts<Double, N>& p, const P&... rest) {
  Parts<Double, N> out;
  for (int i = 0; i < N; ++i) out.part[i] = f(p.part[i], rest.part[i]...);
  return out;
}

// Entries of one register.
template <class S> constexpr int64_t lanes() {
  return sizeof(typename Register<S>::type) / sizeof(typename Arithmetic<S>::type);
}

// The ragged end of a run goes through the same code in a padded register, so that the last bit of an
// entry depends neither on its place nor on how threads split the range.
template <class S> TNN_INLINE typename Register<S>::type load_end(const S* p, int64_t n) {
  S padded[lanes<S>()];
  memset(padded, 0, sizeof padded);
  memcpy(padded, p, n * sizeof(S));
  return load(padded);
}
template <class S, class V> TNN_INLINE void store_end(S* p, V v, int64_t n) {
  S padded[lanes<S>()];
  store(padded, v);
  memcpy(p, padded, n * sizeof(S));
}

// One register's place in a run: whole, or the first `count` entries.
template <class S, bool Whole> struct Place {
  int64_t index, count;
  TNN_INLINE auto load(const S* run) const {
    if constexpr (Whole) return TNN_ISA::load(run + index);
    else return load_end(run + index, count);
  }
  TNN_INLINE auto load_wide(const S* run) const {
    if constexpr (Whole) return TNN_ISA::load_wide(run + index);
    else return widen(load_end(run + index, count));
  }
  template <class V> TNN_INLINE void store(S* run, V v) const {
    if constexpr (Whole) TNN_ISA::store(run + index, v);
    else store_end(run + index, v, count);
  }
  // into the second cache, to be read or written soon; any address will do
  TNN_INLINE void fetch(const S* run) const { __builtin_prefetch(run + index, 0, 2); }
  TNN_INLINE void fetch_to_write(const S* run) const { __builtin_prefetch(run + index, 1, 2); }
};

// f(place) for each register of a run of n entries; the last may be partial.
template <class S, class F> TNN_INLINE void for_registers(int64_t n, F f) {
  constexpr int64_t N = lanes<S>();
  int64_t i = 0;
  for (; i + N <= n; i += N) f(Place<S, true>{i, N});
  if (i < n) f(Place<S, false>{i, n - i});
}

template <class F> bool for_dtype(int32_t dtype, F f) {
  switch (dtype) {
    case kHalf: f(half()); return true;
    case kFloat: f(float()); return true;
#ifndef TNN_SHORT
    case kDouble: f(double()); return true;
#endif
    case kBFloat16: f(bfloat16()); return true;
  }
  return false;
}

}  // namespace TNN_ISA
}  // namespace tnn
