// Weight normalisation on CUDA: a block for each row.
// Schema, reference and gradient: trainable_nn/ops/weight_norm.py.  The formula: weight_norm.h.
//
// A row has three phases, each a map over the threads of its block, so that tests can run them on the
// host: sums of a thread, sums of the block, results.  The second reading of the row comes from cache.
#include <cmath>

#include "memory.h"

namespace tnn {
namespace {
#include "../weight_norm.h"

template <class S, Derivative D> struct RowMap {
  using T = typename Arithmetic<S>::type;
  static constexpr bool kShrinks = sizeof(S) == 8;
  Rows rows;
  double eps, gain;
  const S *w, *g, *v;
  S *out, *out_w;

  // f.operator()<N>(i) for each pack of the row that is this thread's; N divides the runs, or is 1
  template <int N, class F> TNN_INLINE void for_packs(int64_t row, int64_t thread, int64_t threads, F f) const {
    const int64_t packs = rows.inner / N, all = rows.outer * packs;
    for (int64_t j = thread; j < all; j += threads) {
      const int64_t o = j / packs;
      f((o * rows.count + row) * rows.inner + (j - o * packs) * N);
    }
  }

  template <int N> TNN_INLINE RowSums sums(int64_t row, int64_t thread, int64_t threads, double scale) const {
    RowSums s;
    for_packs<N>(row, thread, threads, [&](int64_t i) {
      const Pack<S, N> x = load<N>(w + i);
      Pack<S, N> h{}, u{};
      if (has_g(D)) h = load<N>(g + i);
      if (has_v(D)) u = load<N>(v + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const double a = (double)(T)x.entry[k] * scale, b = (double)(T)h.entry[k], c = (double)(T)u.entry[k];
        s.ww += a * a;
        if (has_g(D)) s.wg += a * b;
        if (D == kSecond) s.wv += a * c, s.vg += b * c;
      }
    });
    return s;
  }

  template <int N>
  TNN_INLINE void results(int64_t row, int64_t thread, int64_t threads, const RowFactors& factors) const {
    const WeightNorm<double, kShrinks> norm(factors);
    const FloatRow<float> in_float(factors);
    const bool fits = !has_v(D) && !kShrinks && factors.fits_float();
    for_packs<N>(row, thread, threads, [&](int64_t i) {
      const Pack<S, N> x = load<N>(w + i);
      Pack<S, N> h{}, u{}, y, y_w;
      if (has_g(D)) h = load<N>(g + i);
      if (has_v(D)) u = load<N>(v + i);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const double a = (T)x.entry[k], b = (T)h.entry[k], c = (T)u.entry[k];
        const auto value = [&] { return (S)(fits ? (T)in_float.value((float)a) : (T)norm.value(a)); };
        const auto first = [&] { return (S)(fits ? (T)in_float.first_g((float)b, (float)a) : (T)norm.first_g(b, a)); };
        if (D == kValue || D == kPair) y.entry[k] = value();
        if (D == kFirst) y.entry[k] = first();
        if (D == kPair) y_w.entry[k] = first();
        if (D == kSecond) {
          y.entry[k] = (S)(T)norm.first_v(c, a);
          y_w.entry[k] = (S)(T)norm.second(c, b, a);
        }
      }
      store<N>(out + i, y);
      if (has_two_results(D)) store<N>(out_w + i, y_w);
    });
  }

  // the rare row of float64 whose squares overflow is summed again, smaller
  TNN_INLINE static bool overflows(double ww) { return kShrinks && ww > kShrinkAbove; }
};

template <class S, Derivative D> RowMap<S, D> row_map(const Call& c) {
  return {c.rows, c.eps, c.gain, (const S*)c.w, (const S*)c.g, (const S*)c.v, (S*)c.out, (S*)c.out_w};
}

__device__ double block_sum(double x) {
  __shared__ double warps[32];
  const unsigned lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = blockDim.x >> 5;
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // a former sum has been read
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  x = warps[0];  // in one order for all threads: deterministic
  for (unsigned i = 1; i < count; ++i) x += warps[i];
  return x;
}

template <Derivative D> __device__ RowSums block_sums(RowSums s) {
  s.ww = block_sum(s.ww);
  if (has_g(D)) s.wg = block_sum(s.wg);
  if (D == kSecond) s.wv = block_sum(s.wv), s.vg = block_sum(s.vg);
  return s;
}

template <int N, Derivative D, class Map> __global__ void row_kernel(Map map) {
  for (int64_t row = blockIdx.x; row < map.rows.count; row += gridDim.x) {
    RowSums s = block_sums<D>(map.template sums<N>(row, threadIdx.x, blockDim.x, 1.0));
    const bool again = Map::overflows(s.ww);
    if (again)
      s = block_sums<D>(map.template sums<N>(row, threadIdx.x, blockDim.x, kShrink));
    const RowFactors factors(s, map.eps, map.gain, again);
    map.template results<N>(row, threadIdx.x, blockDim.x, factors);
  }
}

template <class S, Derivative D> int launch_rows(const Call& c, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(S);
  const bool wide = all_aligned16(c) && c.rows.inner % N == 0;
  const int64_t packs = c.rows.outer * c.rows.inner / (wide ? N : 1);
  int threads = 32;
  while (threads < 512 && threads * 2 < packs) threads *= 2;
  const unsigned grid = (unsigned)(c.rows.count < (1 << 30) ? c.rows.count : (1 << 30));
  if (wide) row_kernel<N, D><<<grid, threads, 0, stream>>>(row_map<S, D>(c));
  else row_kernel<1, D><<<grid, threads, 0, stream>>>(row_map<S, D>(c));
  return (int)cudaGetLastError();
}

}  // namespace

int weight_norm_cuda(const Call& c, void* stream) {
  return for_dtype_and_derivative(c, [&](auto s, auto is) {
    return launch_rows<decltype(s), decltype(is)::derivative>(c, (cudaStream_t)stream);
  });
}

}  // namespace tnn
