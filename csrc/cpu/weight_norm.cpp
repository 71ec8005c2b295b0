// Weight normalisation on the CPU, compiled once per instruction set.
// Schema, reference and gradient: trainable_nn/ops/weight_norm.py.  The formula: weight_norm.h.
//
// A row is read twice, the second time from cache: sums, then results; while one row is written the next
// is summed, so that memory is never idle.  Rows whose runs are long are taken one at a time; rows whose
// entries lie scattered (a transposed matrix) are taken side by side.
//
// A long contiguous row is cut in pieces that threads share: sums of each piece, added up in order, then the
// results of each piece.  Pieces are of one size, so that no bit depends on the number of threads.
#include <vector>

#include "vector.h"

namespace tnn {
namespace TNN_ISA {
namespace {
#include "../weight_norm.h"

template <Derivative D> struct Sums {
  Double ww[kSummed]{}, wg[kSummed]{}, wv[kSummed]{}, vg[kSummed]{};
  TNN_INLINE void add(int at, Double w, Double g, Double v) {
    ww[at] += w * w;
    if (D != kValue) wg[at] += w * g;
    if (D == kSecond) wv[at] += w * v, vg[at] += v * g;
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

  S* first_result() const { return D == kPair ? out_w : out; }  // of DP(w) g
  int64_t run_start(int64_t row, int64_t o) const {
    return (o * call.rows.count + row) * call.rows.inner;
  }

  // The rare row of float64 whose squares overflow is summed again, smaller.
  static bool overflows(const RowSums& sums) { return kShrinks && sums.ww > kShrinkAbove; }
  void add_shrunk(RowSums& s, int64_t begin, int64_t n) const {
    for (int64_t i = begin; i < begin + n; ++i) {
      const double x = (double)w[i] * kShrink, h = D != kValue ? (double)g[i] : 0;
      const double u = D == kSecond ? (double)v[i] : 0;
      s.ww += x * x, s.wg += x * h, s.wv += x * u, s.vg += u * h;
    }
  }
  RowFactors factors(const RowSums& sums, int64_t row) const {
    if (!overflows(sums)) return RowFactors(sums, call.eps, call.gain, false);
    RowSums again;
    for (int64_t o = 0; o < call.rows.outer; ++o) add_shrunk(again, run_start(row, o), call.rows.inner);
    return RowFactors(again, call.eps, call.gain, true);
  }

  template <class Place>
  TNN_INLINE void add(Sums<D>& sums, Place at, int64_t i) const {
    const auto x = at.load_wide(w + i), h = D != kValue ? at.load_wide(g + i) : x;
    const auto u = D == kSecond ? at.load_wide(v + i) : x;
    for (unsigned p = 0; p < sizeof x.part / sizeof x.part[0]; ++p) 
      sums.add(p % kSummed, x.part[p], h.part[p], u.part[p]);
  }

  // each(place, i, sums) for each register of n entries; the sums of what it adds there
  static constexpr int64_t kSummands = 1024;  // sums of sums: rounding grows with a row's root, not with the row
  template <class F> static TNN_INLINE void for_run(RowSums& total, int64_t begin, int64_t n, F each) {
    for (int64_t j = 0; j < n; j += kSummands) {
      Sums<D> sums;
      const int64_t i = begin + j;
      for_registers<S>(n - j < kSummands ? n - j : kSummands, [&](auto at) { each(at, i, sums); });
      sums.add_to(total);
    }
  }
  template <class F> TNN_INLINE RowSums for_row(int64_t row, F each) const {
    RowSums total;
    for (int64_t o = 0; o < call.rows.outer; ++o) for_run(total, run_start(row, o), call.rows.inner, each);
    return total;
  }

  // Writes a row, from cache, and sums the next one, from memory, in one go.
  template <bool Next, class Write> RowSums write_and_sum(int64_t row, Write write) const {
    const int64_t inner = call.rows.inner;
    return for_row(row, [=, *this](auto at, int64_t i, Sums<D>& sums) {
      constexpr int64_t ahead = 4096 / sizeof(S);  // the hardware fetches ahead within a page of 4 KiB only
      if constexpr (Next) {
        const int64_t next = i + inner;
        at.fetch(w + next + ahead);
        if (D != kValue) at.fetch(g + next + ahead);
        add(sums, at, next);
      }
      at.fetch_to_write(out + i + inner);
      if (D == kPair) at.fetch_to_write(out_w + i + inner);
      write(at, i);
    });
  }

  static constexpr bool kOnlyFirst = D == kFirst || D == kScales;  // DP(w) g is written, P(w) is not
  void write_scale(int64_t row, const RowFactors& factors) const {
    if constexpr (D == kScales) static_cast<double*>(call.out_w)[row] = factors.scale();
  }

  // use(write), with write(place, i) making the results of a row's register from its factors.
  template <class F> TNN_INLINE auto with_writer(const RowFactors& row, F use) const {
#ifdef TNN_BYTES
    if constexpr (!has_v(D) && sizeof(Stored) == 4)
      if (row.fits_float()) {
        const FloatRow<FloatV> norm(row);
        return use([=, *this](auto at, int64_t i) {
          if constexpr (D == kValue || D == kPair) at.store(out + i, norm.value(at.load(w + i)));
          if constexpr (has_g(D)) at.store(first_result() + i, norm.first_g(at.load(g + i), at.load(w + i)));
        });
      }
#endif
    const WeightNorm<Double, kShrinks> norm(row);
    return use([=, *this](auto at, int64_t i) {
      const auto value = [&](Double a) { return norm.value(a); };
      const auto first_g = [&](Double a, Double b) { return norm.first_g(b, a); };
      const auto first_v = [&](Double a, Double b) { return norm.first_v(b, a); };
      const auto second = [&](Double a, Double b, Double c) { return norm.second(c, b, a); };
      const auto x = at.load_wide(w + i);
      if (D == kValue || D == kPair) at.store(out + i, narrow(each(value, x)));
      if (kOnlyFirst || D == kPair) at.store(first_result() + i, narrow(each(first_g, x, at.load_wide(g + i))));
      if (D == kSecond) {
        const auto u = at.load_wide(v + i);
        at.store(out + i, narrow(each(first_v, x, u)));
        at.store(out_w + i, narrow(each(second, x, at.load_wide(g + i), u)));
      }
    });
  }

  // Writes a row, given its sums; the sums of the next row.
  template <bool Next> RowSums one_row(int64_t row, const RowSums& sums) const {
    const RowFactors of_row = factors(sums, row);
    write_scale(row, of_row);
    return with_writer(of_row, [&](auto write) { return write_and_sum<Next>(row, write); });
  }

  void one_by_one(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    RowSums sums = for_row(begin, [*this](auto at, int64_t i, Sums<D>& sums) { add(sums, at, i); });
    for (int64_t row = begin; row + 1 < end; ++row) sums = one_row<true>(row, sums);
    one_row<false>(end - 1, sums);
  }

  // f(piece, first entry, entries) for all pieces of a contiguous row, from all threads.
  static constexpr int64_t kPiece = 1 << 16;
  template <class F> void each_piece(ForPieces for_pieces, int64_t row, F f) const {
    const int64_t n = call.rows.inner, begin = run_start(row, 0);
    const auto one = [&](int64_t p) { f(p, begin + p * kPiece, n - p * kPiece < kPiece ? n - p * kPiece : kPiece); };
    const auto call_one = [](int64_t p, void* one_) { (*static_cast<decltype(one)*>(one_))(p); };
    for_pieces((n + kPiece - 1) / kPiece, call_one, (void*)&one);
  }
  template <class F> RowSums sum_pieces(ForPieces for_pieces, int64_t row, F add_piece) const {
    std::vector<RowSums> parts(call.rows.inner / kPiece + 1);
    each_piece(for_pieces, row, [&](int64_t p, int64_t i, int64_t n) { add_piece(parts[p], i, n); });
    RowSums total;
    for (const RowSums& s : parts) total.ww += s.ww, total.wg += s.wg, total.wv += s.wv, total.vg += s.vg;
    return total;
  }
  void long_row(int64_t row, ForPieces for_pieces) const {
    RowSums sums = sum_pieces(for_pieces, row, [&](RowSums& s, int64_t i, int64_t n) {
      for_run(s, i, n, [&](auto at, int64_t j, Sums<D>& some) { add(some, at, j); });
    });
    const bool again = overflows(sums);
    if (again)
      sums = sum_pieces(for_pieces, row, [&](RowSums& s, int64_t i, int64_t n) { add_shrunk(s, i, n); });
    const RowFactors of_row(sums, call.eps, call.gain, again);
    write_scale(row, of_row);
    with_writer(of_row, [&](auto write) {
      each_piece(for_pieces, row, [&](int64_t, int64_t i, int64_t n) {
        for_registers<S>(n, [&](auto at) { write(at, i); });
      });
    });
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
    for (int64_t r = 0; r < n; ++r) write_scale(row + r, all[r] = factors(sums[r], row + r));
    for (int64_t o = 0; o < call.rows.outer; ++o)
      for (int64_t r = 0; r < n; ++r) {
        const WeightNorm<double, kShrinks> norm(all[r]);
        for (int64_t i = run_start(row + r, o), end = i + inner; i < end; ++i) {
          const double x = wide(w[i]);
          if (D == kValue || D == kPair) out[i] = (S)(Stored)norm.value(x);
          if (kOnlyFirst || D == kPair) first_result()[i] = (S)(Stored)norm.first_g(wide(g[i]), x);
          if (D == kSecond) {
            out[i] = (S)(Stored)norm.first_v(wide(v[i]), x);
            out_w[i] = (S)(Stored)norm.second(wide(v[i]), wide(g[i]), x);
          }
        }
      }
  }

  static constexpr int64_t kRun = 256 / sizeof(Stored);  // entries of a run that is worth registers
  void run(int64_t begin, int64_t end) const {
    if (call.rows.outer == 1 || call.rows.inner >= kRun)
      one_by_one(begin, end);
    else
      for (int64_t row = begin; row < end; row += kSide) rows_side_by_side(row, end - row < kSide ? end - row : kSide);
  }
};

template <class F> bool for_kernel(const Call& call, F f) {
  return for_dtype(call.dtype, [&](auto s) {
    using S = decltype(s);
    switch (call.derivative) {
      case kValue: return f(Kernel<S, kValue>(call));
      case kFirst: return f(Kernel<S, kFirst>(call));
      case kSecond: return f(Kernel<S, kSecond>(call));
      case kPair: return f(Kernel<S, kPair>(call));
      case kScales: return f(Kernel<S, kScales>(call));
    }
  });
}

}  // namespace

bool weight_norm(const Call& call, int64_t begin, int64_t end) {
  return for_kernel(call, [&](const auto& kernel) { kernel.run(begin, end); });
}

#ifndef TNN_SHORT
bool weight_norm_of_long_rows(const Call& call, ForPieces for_pieces) {
  return for_kernel(call, [&](const auto& kernel) {
    for (int64_t row = 0; row < call.rows.count; ++row) kernel.long_row(row, for_pieces);
  });
}
#endif

}  // namespace TNN_ISA
}  // namespace tnn
