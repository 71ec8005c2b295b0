// Entry normalisation on the CPU, compiled once per instruction set.
// Schema, reference and gradient: trainable_nn/ops/entry_norm.py.  The formula: entry_norm.h.
#include "vector.h"

namespace tnn {
namespace TNN_ISA {
namespace {
#include "../entry_norm.h"

template <class S> void run(const Call& call, int64_t begin, int64_t end) {
  using T = typename Arithmetic<S>::type;
  using V = typename Register<S>::type;
  const auto at = [begin](const void* p) { return (const S*)p + begin; };
  const S *w = at(call.w), *g = at(call.g), *v = at(call.v);
  S *out = (S*)call.out + begin, *out_w = (S*)call.out_w + begin;
  const EntryNorm<V, T> norm = {V{} + (T)(1 / __builtin_sqrt(call.eps)), V{} + (T)call.gain, V{} + (T)call.leak};
  const int64_t n = end - begin;
  switch (call.derivative) {
    case kValue:
      return for_registers<S>(n, [&](auto load, auto store) { store(out, norm.value(load(w))); });
    case kFirst:
      return for_registers<S>(n, [&](auto load, auto store) { store(out, norm.first(load(g), load(w))); });
    case kSecond:
      return for_registers<S>(n, [&](auto load, auto store) {
        const V x = load(w), u = load(v);
        store(out, norm.first(u, x));
        store(out_w, norm.second(u, load(g), x));
      });
  }
}

}  // namespace

bool entry_norm(const Call& call, int64_t begin, int64_t end) {
  return for_dtype(call.dtype, [&](auto s) { run<decltype(s)>(call, begin, end); });
}

}  // namespace TNN_ISA
}  // namespace tnn
