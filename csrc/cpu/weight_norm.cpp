// Weight normalisation on the CPU, compiled once per instruction set.
// Schema, reference and gradient: trainable_nn/ops/weight_norm.py.  The formula: weight_norm.h.
//
// A row is read twice, the second time from cache: sums, then results.  Rows whose runs are long are
// taken one at a time; rows whose entries lie scattered (a transposed matrix) are taken side by side.
#include "vector.h"

namespace tnn {
namespace TNN_ISA {
namespace {
#include "../weight_norm.h"

template <Derivative D> struct Sums {
  Double ww{}, wg{}, wv{}, vg{};
  TNN_INLINE void add(Double w, Double g, Double v) {
    ww += w * w;
    if (D != kValue) wg += w * g;
    if (D == kSecond) wv += w * v, vg += v * g;
  }
  TNN_INLINE void add_to(RowSums& sums) const {
    sums.ww += total(ww), sums.wg += total(wg), sums.wv += total(wv), sums.vg += total(vg);
  }
};

template <class S, Derivative D> struct Kernel {
  using Stored = typename Arithmetic<S>::type;  // 16-bit types are made from float
  static double wide(S entry) { return (Stored)entry; }
  static constexpr bool kShrinks = sizeof(S) == 8;
  const Call& call;
  const S *w, *g, *v;
  S *out, *out_w;

  explicit Kernel(const Call& c)
      : call(c), w((const S*)c.w), g((const S*)c.g), v((const S*)c.v), out((S*)c.out), out_w((S*)c.out_w) {}

  int64_t run_start(int64_t row, int64_t o) const {
    return (o * call.rows.count + row) * call.rows.inner;
  }

  // The rare row of float64 whose squares overflow: summed again, smaller.
  RowSums shrunk_sums(int64_t row) const {
    RowSums s;
    for (int64_t o = 0; o < call.rows.outer; ++o)
      for (int64_t i = run_start(row, o), end = i + call.rows.inner; i < end; ++i) {
        const double x = (double)w[i] * kShrink, h = D != kValue ? (double)g[i] : 0;
        const double u = D == kSecond ? (double)v[i] : 0;
        s.ww += x * x, s.wg += x * h, s.wv += x * u, s.vg += u * h;
      }
    return s;
  }
  RowFactors factors(const RowSums& sums, int64_t row) const {
    const bool again = kShrinks && sums.ww > kShrinkAbove;
    return RowFactors(again ? shrunk_sums(row) : sums, call.eps, call.gain, again);
  }

  static constexpr int64_t kSummands = 1024;  // sums of sums: rounding grows with a row's root, not with the row
  void add_run(RowSums& sums, int64_t i, int64_t n) const {
    for (int64_t j = 0; j < n; j += kSummands) {
      Sums<D> block;
      const int64_t k = i + j;
      for_registers<S>(n - j < kSummands ? n - j : kSummands, [&](auto at) {
        const auto x = widen(at.load(w + k)), h = D != kValue ? widen(at.load(g + k)) : x;
        const auto u = D == kSecond ? widen(at.load(v + k)) : x;
        for (unsigned p = 0; p < sizeof x.part / sizeof x.part[0]; ++p) block.add(x.part[p], h.part[p], u.part[p]);
      });
      block.add_to(sums);
    }
  }

#ifdef TNN_BYTES
  void float_results(int64_t row, const FloatRow<FloatV>& norm) const {
    for (int64_t o = 0; o < call.rows.outer; ++o) {
      const int64_t i = run_start(row, o), next = i + call.rows.inner;
      for_registers<S>(call.rows.inner, [&](auto at) {
        at.fetch(w + next);
        at.fetch_to_write(out + next);
        if constexpr (D == kValue) at.store(out + i, norm.value(at.load(w + i)));
        if constexpr (D == kFirst) {
          at.fetch(g + next);
          at.store(out + i, norm.first_g(at.load(g + i), at.load(w + i)));
        }
      });
    }
  }
#endif

  void one_row(int64_t row) const {
    RowSums sums;
    for (int64_t o = 0; o < call.rows.outer; ++o) add_run(sums, run_start(row, o), call.rows.inner);
    const RowFactors row_factors = factors(sums, row);
#ifdef TNN_BYTES
    if constexpr (D != kSecond && sizeof(Stored) == 4)
      if (row_factors.fits_float()) return float_results(row, FloatRow<FloatV>(row_factors));
#endif
    const WeightNorm<Double, kShrinks> norm(row_factors);
    for (int64_t o = 0; o < call.rows.outer; ++o) {
      const int64_t i = run_start(row, o);
      const int64_t next = i + call.rows.inner;  // this pass runs from cache: memory fetches the next row meanwhile
      for_registers<S>(call.rows.inner, [&](auto at) {
        at.fetch(w + next);
        at.fetch_to_write(out + next);
        if (D != kValue) at.fetch(g + next);
        const auto x = widen(at.load(w + i));
        const auto value = [&](Double a) { return norm.value(a); };
        const auto first_g = [&](Double a, Double b) { return norm.first_g(b, a); };
        const auto first_v = [&](Double a, Double b) { return norm.first_v(b, a); };
        const auto second = [&](Double a, Double b, Double c) { return norm.second(c, b, a); };
        if (D == kValue) at.store(out + i, narrow(each(value, x)));
        if (D == kFirst) at.store(out + i, narrow(each(first_g, x, widen(at.load(g + i)))));
        if (D == kSecond) {
          const auto u = widen(at.load(v + i));
          at.store(out + i, narrow(each(first_v, x, u)));
          at.store(out_w + i, narrow(each(second, x, widen(at.load(g + i)), u)));
        }
      });
    }
  }

  // Rows [row, row + n) side by side; their runs are neighbours in memory.
  static constexpr int64_t kSide = 64;
  void rows_side_by_side(int64_t row, int64_t n) const {
    const int64_t inner = call.rows.inner;
    RowSums sums[kSide];
    for (int64_t o = 0; o < call.rows.outer; ++o)
      for (int64_t r = 0; r < n; ++r)
        for (int64_t i = run_start(row + r, o), end = i + inner; i < end; ++i) {
          const double x = wide(w[i]), h = D != kValue ? wide(g[i]) : 0, u = D == kSecond ? wide(v[i]) : 0;
          sums[r].ww += x * x;
          if (D != kValue) sums[r].wg += x * h;
          if (D == kSecond) sums[r].wv += x * u, sums[r].vg += u * h;
        }
    RowFactors all[kSide];
    for (int64_t r = 0; r < n; ++r) all[r] = factors(sums[r], row + r);
    for (int64_t o = 0; o < call.rows.outer; ++o)
      for (int64_t r = 0; r < n; ++r) {
        const WeightNorm<double, kShrinks> norm(all[r]);
        for (int64_t i = run_start(row + r, o), end = i + inner; i < end; ++i) {
          const double x = wide(w[i]);
          if (D == kValue) out[i] = (S)(Stored)norm.value(x);
          if (D == kFirst) out[i] = (S)(Stored)norm.first_g(wide(g[i]), x);
          if (D == kSecond) {
            out[i] = (S)(Stored)norm.first_v(wide(v[i]), x);
            out_w[i] = (S)(Stored)norm.second(wide(v[i]), wide(g[i]), x);
          }
        }
      }
  }

  void run(int64_t begin, int64_t end) const {
    if (call.rows.outer == 1 || call.rows.inner >= 4 * lanes<S>())
      for (int64_t row = begin; row < end; ++row) one_row(row);
    else
      for (int64_t row = begin; row < end; row += kSide) rows_side_by_side(row, end - row < kSide ? end - row : kSide);
  }
};

}  // namespace

bool weight_norm(const Call& call, int64_t begin, int64_t end) {
  return for_dtype(call.dtype, [&](auto s) {
    using S = decltype(s);
    switch (call.derivative) {
      case kValue: return Kernel<S, kValue>(call).run(begin, end);
      case kFirst: return Kernel<S, kFirst>(call).run(begin, end);
      case kSecond: return Kernel<S, kSecond>(call).run(begin, end);
    }
  });
}

}  // namespace TNN_ISA
}  // namespace tnn
