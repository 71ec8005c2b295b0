// What every back end agrees on: dtypes, operators, and the layout of a call.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define TNN_INLINE __host__ __device__ __forceinline__
#else
#define TNN_INLINE inline __attribute__((always_inline))
#endif

namespace tnn {

// torch's ScalarType numbers, fixed by its stable ABI
enum Dtype : int32_t { kHalf = 5, kFloat = 6, kDouble = 7, kBFloat16 = 15 };

// value: P(w).  first: DP(w) g.  second: DP(w) v, and the gradient in w of <v, DP(w) g>.
// pair: P(w) and DP(w) g.  scales, of weight_norm on the CPU: DP(w) g, and s in double, P(w) = s w row by row.
enum Derivative { kValue, kFirst, kSecond, kPair, kScales };
TNN_INLINE constexpr bool has_g(Derivative d) { return d != kValue; }
TNN_INLINE constexpr bool has_v(Derivative d) { return d == kSecond; }
TNN_INLINE constexpr bool has_two_results(Derivative d) { return d >= kSecond; }

// Rows of a dense tensor: an index of dimension 0.  Row r is `outer` runs of `inner` entries;
// run o begins at o * count * inner + r * inner.  A contiguous tensor has outer = 1.
struct Rows {
  int64_t count, outer, inner;
};

// One call on tensors of the same dense layout.
struct Call {
  Derivative derivative;
  int32_t dtype;
  int64_t numel;
  Rows rows;
  double eps, gain, leak;
  const void *w, *g, *v;    // null where the derivative has none
  void *out, *out_w;        // out_w: the second of two results; of scales, rows.count doubles
};

constexpr int64_t size_of(int32_t dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }

constexpr const char* kDtypes = "float16, bfloat16, float32 or float64";

// The loops of one instruction set, over entries or rows [begin, end); false: not one of kDtypes.
using CpuKernel = bool (*)(const Call&, int64_t begin, int64_t end);

// Calls piece(p, context) for each p < pieces, from all threads.
using ForPieces = void (*)(int64_t pieces, void (*piece)(int64_t p, void* context), void* context);

// All rows, one after the other, in pieces; rows.outer is 1.
using CpuPiecesKernel = bool (*)(const Call&, ForPieces);

// On a CUDA stream; a cudaError_t, or -1 where the dtype is not one of kDtypes.
int entry_norm_cuda(const Call&, void* stream);
int weight_norm_cuda(const Call&, void* stream);

}  // namespace tnn
