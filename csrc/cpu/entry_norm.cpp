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
  const auto from = [begin](const void* p) { return (const S*)p + begin; };
  const S *w = from(call.w), *g = from(call.g), *v = from(call.v);
  S *out = (S*)call.out + begin, *out_w = (S*)call.out_w + begin;
  const EntryNorm<V, T> norm((T)(1 / __builtin_sqrt(call.eps)), (T)call.gain, (T)call.leak);
  const int64_t n = end - begin;
  constexpr int64_t ahead = 4096 / sizeof(S);  // the hardware fetches ahead within a page of 4 KiB only
  switch (call.derivative) {
    case kValue:
      return for_registers<S>(n, [&](auto at) {
        at.fetch(w + ahead);
        at.fetch_to_write(out + ahead);
        at.store(out, norm.value(at.load(w)));
      });
    case kFirst:
      return for_registers<S>(n, [&](auto at) {
        at.fetch(w + ahead);
        at.fetch(g + ahead);
        at.fetch_to_write(out + ahead);
        at.store(out, norm.first(at.load(g), at.load(w)));
      });
    case kPair:
      return for_registers<S>(n, [&](auto at) {
        at.fetch(w + ahead);
        at.fetch(g + ahead);
        at.fetch_to_write(out + ahead);
        at.fetch_to_write(out_w + ahead);
        const V x = at.load(w);
        at.store(out, norm.value(x));
        at.store(out_w, norm.first(at.load(g), x));
      });
    case kSecond:
      return for_registers<S>(n, [&](auto at) {
        const V x = at.load(w), u = at.load(v);
        at.store(out, norm.first(u, x));
        at.store(out_w, norm.second(u, at.load(g), x));
      });
    case kScales: return;  // a row has none
  }
}

}  // namespace

bool entry_norm(const Call& call, int64_t begin, int64_t end) {
  return for_dtype(call.dtype, [&](auto s) { run<decltype(s)>(call, begin, end); });
}

}  // namespace TNN_ISA
}  // namespace tnn
