// The CPU kernels: the machine's best instruction set, all of torch's threads.
#include <cstdlib>
#include <cstring>

#include "../boxed.h"
#include "pool.h"

namespace tnn {

#define TNN_DECLARE(isa)                                          \
  namespace isa {                                                 \
  bool entry_norm(const Call&, int64_t begin, int64_t end);       \
  bool weight_norm(const Call&, int64_t begin, int64_t end);      \
  }
TNN_DECLARE(scalar)
#ifdef TNN_X86
TNN_DECLARE(avx2)
TNN_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  CpuKernel entry_norm, weight_norm;
};

// TRAINABLE_NN_CPU=scalar|avx2|avx512 takes a lesser set, for tests.
Kernels choose() {
#ifdef TNN_X86
  const char* wish = getenv("TRAINABLE_NN_CPU");
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && (!wish || !strcmp(wish, "avx512"))) return {avx512::entry_norm, avx512::weight_norm};
  if (v3 && (!wish || strcmp(wish, "scalar"))) return {avx2::entry_norm, avx2::weight_norm};
#endif
  return {scalar::entry_norm, scalar::weight_norm};
}

constexpr int64_t kGrain = 32768;  // entries a thread is worth waking for; ATen's own figure

Tensor like(const Tensor& w) { return Pool::instance().empty_like(w, w.numel() * size_of(w.dtype())); }

void run(CpuKernel kernel, const Call& call, int64_t items) {
  struct Job {
    CpuKernel kernel;
    const Call& call;
    bool known;
  } job = {kernel, call, true};
  const auto part = [](int64_t begin, int64_t end, void* context) {
    Job& job = *static_cast<Job*>(context);
    if (!job.kernel(job.call, begin, end)) job.known = false;
  };
  const int64_t entries_per_item = call.numel / items, grain = 1 + (kGrain - 1) / entries_per_item;
  if (items <= grain) part(0, items, &job);
  else TNN_CHECK(torch_parallel_for(0, items, grain, part, &job));
  if (!job.known) bad_dtype();
}

struct Cpu {
  static const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
  }
  template <Derivative D> static void entry_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int) { run(kernels().entry_norm, call, call.numel); });
  }
  template <Derivative D> static void weight_norm(StableIValue* stack, uint64_t inputs, uint64_t) {
    boxed(D, stack, inputs, like, [](const Call& call, int) { run(kernels().weight_norm, call, call.rows.count); });
  }
};

const bool registered = register_device<Cpu>("CPU");

}  // namespace

// For trainable_nn/ops/native.py, through ctypes.
extern "C" __attribute__((visibility("default"))) uint64_t tnn_empty_cache() { return Pool::instance().clear(); }

}  // namespace tnn
