// The CPU kernels: the machine's best instruction set, all of torch's threads.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../boxed.h"
#include "conv_rows.h"
#include "pool.h"

namespace tnn {

#define TNN_DECLARE(isa)                                          \
  namespace isa {                                                 \
  bool entry_norm(const Call&, int64_t begin, int64_t end);       \
  bool weight_norm(const Call&, int64_t begin, int64_t end);      \
  bool weight_norm_of_long_rows(const Call&, ForPieces);          \
  }
TNN_DECLARE(scalar)
#ifdef TNN_X86
TNN_DECLARE(avx2)
TNN_DECLARE(avx512)
TNN_DECLARE(avx512_short)
#endif

namespace {

struct Kernels {
  CpuKernel entry_norm, weight_norm;
  CpuPiecesKernel weight_norm_of_long_rows;
  CpuKernel short_entry_norm, short_weight_norm;

  // A core slows down for about a millisecond once it has met 64-byte registers, by a sixth where it was
  // measured, so a small call goes without.  The bits are the same; in float64 they are not.
  static bool is_short(const Call& c) { return c.numel <= 4096 && c.dtype != kDouble; }
  CpuKernel entry_norm_of(const Call& c) const { return is_short(c) ? short_entry_norm : entry_norm; }
  CpuKernel weight_norm_of(const Call& c) const { return is_short(c) ? short_weight_norm : weight_norm; }
};
#define TNN_KERNELS(isa, small) \
  {isa::entry_norm, isa::weight_norm, isa::weight_norm_of_long_rows, small::entry_norm, small::weight_norm}

// TRAINABLE_NN_CPU=scalar|avx2|avx512 takes a lesser set, for tests.
Kernels choose() {
#ifdef TNN_X86
  const char* wish = getenv("TRAINABLE_NN_CPU");
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && (!wish || !strcmp(wish, "avx512"))) return TNN_KERNELS(avx512, avx512_short);
  if (v3 && (!wish || strcmp(wish, "scalar"))) return TNN_KERNELS(avx2, avx2);
#endif
  return TNN_KERNELS(scalar, scalar);
}

constexpr int64_t kGrain = 32768;  // entries a thread is worth waking for; ATen's own figure

Tensor like(const Tensor& w) { return Pool::instance().empty_like(w, w.numel() * size_of(w.dtype())); }

void run(CpuKernel kernel, const Call& call, int64_t items) {
  struct Job {
    CpuKernel kernel;
    const Call& call;
    std::atomic<bool> known;
  } job = {kernel, call, {true}};
  const auto part = [](int64_t begin, int64_t end, void* context) {
    Job& job = *static_cast<Job*>(context);
    if (!job.kernel(job.call, begin, end)) job.known.store(false, std::memory_order_relaxed);
  };
  const int64_t entries_per_item = call.numel / items, grain = 1 + (kGrain - 1) / entries_per_item;
  if (items <= grain) part(0, items, &job);
  else TNN_CHECK(torch_parallel_for(0, items, grain, part, &job));
  if (!job.known) bad_dtype();
}

void for_pieces(int64_t pieces, void (*piece)(int64_t, void*), void* context) {
  struct Job {
    void (*piece)(int64_t, void*);
    void* context;
  } job = {piece, context};
  const auto part = [](int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<Job*>(context);
    for (int64_t p = begin; p < end; ++p) job.piece(p, job.context);
  };
  TNN_CHECK(torch_parallel_for(0, pieces, 1, part, &job));
}

// Entries from which a row is cut in pieces; by the row alone, so that its bits depend on nothing else.
constexpr int64_t kLong = 1 << 18;

void run_rows(const Kernels& kernels, const Call& call) {
  if (call.rows.outer > 1 || call.rows.inner < kLong) return run(kernels.weight_norm_of(call), call, call.rows.count);
  if (!kernels.weight_norm_of_long_rows(call, for_pieces)) bad_dtype();
}

struct Cpu {
  static const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
  }
  template <Derivative D> static void entry_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int) { run(kernels().entry_norm_of(call), call, call.numel); });
  }
  template <Derivative D> static void weight_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int) { run_rows(kernels(), call); });
  }
  static void conv_rows(StableIValue* stack, uint64_t, uint64_t) {
    weight_norm_conv_rows(stack, like, [](const Call& call) { run_rows(kernels(), call); });
  }
};

const bool registered = register_device<Cpu>("CPU", Operator{"weight_norm_conv_rows", Cpu::conv_rows});

}  // namespace

// For trainable_nn/ops/native.py, through ctypes.
extern "C" __attribute__((visibility("default"))) uint64_t tnn_empty_cache() { return Pool::instance().clear(); }

}  // namespace tnn
