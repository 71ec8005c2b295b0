// Weight normalisation on the CPU, compiled once per instruction set.
// Schema, reference and gradient: trainable_nn/ops/weight_norm.py.  The formula: weight_norm.h.
//
// A row is read twice, the second time from cache: sums, then results.  Rows whose runs are long are
// taken one at a time; rows whose entries lie scattered (a transposed matrix) are taken side by side.
#include "../weight_norm.h"
#include "vector.h"

namespace tnn {
namespace TNN_ISA {
namespace {

// Sums of products in double, a register wide.
template <class V> struct Sum;
#ifdef TNN_BYTES
TNN_INLINE double total(DoubleV v) {
  double sum = 0;
  for (int64_t i = 0; i < lanes<double>(); ++i) sum += v[i];
  return sum;
}
template <> struct Sum<FloatV> {
  DoubleV low{}, high{};
  TNN_INLINE void add(FloatV a, FloatV b) {
    low += lower(a) * lower(b);
    high += upper(a) * upper(b);
  }
  TNN_INLINE double value() const { return total(low + high); }
};
template <> struct Sum<DoubleV> {
  DoubleV sum{};
  TNN_INLINE void add(DoubleV a, DoubleV b) { sum += a * b; }
  TNN_INLINE double value() const { return total(sum); }
};
#endif
template <class T> struct ScalarSum {
  double sum = 0;
  TNN_INLINE void add(T a, T b) { sum += (double)a * (double)b; }
  TNN_INLINE double value() const { return sum; }
};
template <> struct Sum<float> : ScalarSum<float> {};
template <> struct Sum<double> : ScalarSum<double> {};

template <class V> struct Sums {
  Sum<V> ww, wg, wv, vg;
  template <Derivative D> TNN_INLINE void add(V w, V g, V v) {
    ww.add(w, w);
    if (D != kValue) wg.add(w, g);
    if (D == kSecond) wv.add(w, v), vg.add(v, g);
  }
  RowSums value() const { return {ww.value(), wg.value(), wv.value(), vg.value()}; }
};

template <class S, Derivative D> struct Kernel {
  using T = typename Arithmetic<S>::type;
  using V = typename Register<S>::type;
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
        const double x = (double)w[i] * Shrink<T>::factor, h = D != kValue ? (double)g[i] : 0;
        const double u = D == kSecond ? (double)v[i] : 0;
        s.ww += x * x, s.wg += x * h, s.wv += x * u, s.vg += u * h;
      }
    return s;
  }
  RowFactors<T> factors(const RowSums& sums, int64_t row) const {
    const bool again = sizeof(S) == 8 && sums.ww > Shrink<T>::above;
    return RowFactors<T>(again ? shrunk_sums(row) : sums, call.eps, call.gain, again);
  }

  void one_row(int64_t row) const {
    Sums<V> sums;
    for (int64_t o = 0; o < call.rows.outer; ++o) {
      const int64_t i = run_start(row, o);
      for_registers<S>(call.rows.inner, [&](auto load, auto) {
        const V x = load(w + i), h = D != kValue ? load(g + i) : V{}, u = D == kSecond ? load(v + i) : V{};
        sums.template add<D>(x, h, u);
      });
    }
    const WeightNorm<V, T> norm(factors(sums.value(), row));
    for (int64_t o = 0; o < call.rows.outer; ++o) {
      const int64_t i = run_start(row, o);
      for_registers<S>(call.rows.inner, [&](auto load, auto store) {
        const V x = load(w + i);
        if (D == kValue) store(out + i, norm.value(x));
        if (D == kFirst) store(out + i, norm.first_g(load(g + i), x));
        if (D == kSecond) {
          const V u = load(v + i);
          store(out + i, norm.first_v(u, x));
          store(out_w + i, norm.second(u, load(g + i), x));
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
          const double x = (T)w[i];
          sums[r].ww += x * x;
          if (D != kValue) sums[r].wg += x * (double)(T)g[i];
          if (D == kSecond) sums[r].wv += x * (double)(T)v[i], sums[r].vg += (double)(T)v[i] * (double)(T)g[i];
        }
    RowFactors<T> all[kSide];
    for (int64_t r = 0; r < n; ++r) all[r] = factors(sums[r], row + r);
    for (int64_t o = 0; o < call.rows.outer; ++o)
      for (int64_t r = 0; r < n; ++r) {
        const WeightNorm<T, T> norm(all[r]);
        for (int64_t i = run_start(row + r, o), end = i + inner; i < end; ++i) {
          const T x = (T)w[i];
          if (D == kValue) out[i] = (S)norm.value(x);
          if (D == kFirst) out[i] = (S)norm.first_g((T)g[i], x);
          if (D == kSecond) out[i] = (S)norm.first_v((T)v[i], x), out_w[i] = (S)norm.second((T)v[i], (T)g[i], x);
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
