// Entry normalisation on CUDA.
// Schema, reference and gradient: trainable_nn/ops/entry_norm.py.  The formula: entry_norm.h.
#include "memory.h"

namespace tnn {
namespace {
#include "../entry_norm.h"

// One derivative of one entry, and what it reads and writes.
template <class S, Derivative D> struct EntryMap {
  using T = typename Arithmetic<S>::type;
  EntryNorm<T, T> norm;
  const S *w, *g, *v;
  S *out, *out_w;

  // entries [i, i + N)
  template <int N> TNN_INLINE void operator()(int64_t i) const {
    const Pack<S, N> x = load<N>(w + i);
    Pack<S, N> h{}, u{}, y, y_w;
    if (has_g(D)) h = load<N>(g + i);
    if (has_v(D)) u = load<N>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T a = (T)x.entry[k];
      if (D == kValue || D == kPair) y.entry[k] = (S)norm.value(a);
      if (D == kFirst) y.entry[k] = (S)norm.first((T)h.entry[k], a);
      if (D == kPair) y_w.entry[k] = (S)norm.first((T)h.entry[k], a);
      if (D == kSecond) {
        y.entry[k] = (S)norm.first((T)u.entry[k], a);
        y_w.entry[k] = (S)norm.second((T)u.entry[k], (T)h.entry[k], a);
      }
    }
    store<N>(out + i, y);
    if (has_two_results(D)) store<N>(out_w + i, y_w);
  }
};

template <class S, Derivative D> EntryMap<S, D> entry_map(const Call& c) {
  using T = typename Arithmetic<S>::type;
  return {EntryNorm<T, T>((T)(1 / sqrt(c.eps)), (T)c.gain, (T)c.leak), (const S*)c.w, (const S*)c.g, (const S*)c.v,
          (S*)c.out, (S*)c.out_w};
}

// What thread `first` of `step` threads does: whole packs, then the ragged end entry by entry.
template <int N, class Map> TNN_INLINE void map_thread(Map map, int64_t first, int64_t step, int64_t n) {
  const int64_t whole = n / N;
  for (int64_t i = first; i < whole; i += step) map.template operator()<N>(i * N);
  for (int64_t i = whole * N + first; i < n; i += step) map.template operator()<1>(i);
}

template <int N, class Map> __global__ void map_kernel(Map map, int64_t n) {
  map_thread<N>(map, (int64_t)blockIdx.x * blockDim.x + threadIdx.x, (int64_t)gridDim.x * blockDim.x, n);
}

constexpr int kThreads = 256, kMaxBlocks = 132 * 16;

template <class S, Derivative D> int launch_entries(const Call& c, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(S);
  const bool wide = all_aligned16(c);
  const int64_t items = c.numel / (wide ? N : 1), blocks = (items + kThreads - 1) / kThreads;
  const unsigned grid = (unsigned)(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
  if (wide) map_kernel<N><<<grid, kThreads, 0, stream>>>(entry_map<S, D>(c), c.numel);
  else map_kernel<1><<<grid, kThreads, 0, stream>>>(entry_map<S, D>(c), c.numel);
  return (int)cudaGetLastError();
}

}  // namespace

int entry_norm_cuda(const Call& c, void* stream) {
  return for_dtype_and_derivative(c, [&](auto s, auto is) {
    return launch_entries<decltype(s), decltype(is)::derivative>(c, (cudaStream_t)stream);
  });
}

}  // namespace tnn
