// Weight normalisation, the arithmetic of one row, for every back end.
//
//   P(w) = gain w rho, rho = (eps + |w|^2)^(-1/2), n = rho w:
//   DP(w) g                       = gain rho (g - n <n, g>)
//   gradient in w of <v, DP(w) g> = gain rho^2 (n (3 a b - c) - b v - a g),  a = <n, v>, b = <n, g>, c = <v, g>
//
// A row so long that rho leaves the normal numbers is first shrunk by a power of two f: with
// x = f w and q = rho / f, n = q x.  Sums are in double, so a row of float needs no second look.
#pragma once
#include <cmath>

#include "kernels.h"

namespace tnn {

struct RowSums {
  double ww = 0, wg = 0, wv = 0, vg = 0;
};

// Where a row is shrunk, and by how much.
template <class S> struct Shrink;
template <> struct Shrink<float> {
  static constexpr double above = 0x1p120, factor = 0x1p-64;  // of |w|^2
};
template <> struct Shrink<double> {
  static constexpr double above = 0x1p1000, factor = 0x1p-600;
};

// What one row multiplies its entries with; S is the type of the arithmetic.
template <class S> struct RowFactors {
  S f, value, along_g, along_v, second_n, second_v, second_g, second;

  // sums of the unshrunk row, or, where `shrunk`, of x = f w
  RowFactors() = default;
  TNN_INLINE RowFactors(RowSums s, double eps, double gain, bool shrunk) {
    double scale = 1;
    if (shrunk || s.ww > Shrink<S>::above) {
      scale = Shrink<S>::factor;
      if (!shrunk) s.ww *= scale * scale, s.wg *= scale, s.wv *= scale;
    }
    const double length = eps * scale * scale + s.ww;
    const double q = length < 1e308 ? 1 / sqrt(length) : length - length;  // an infinite row is NaN, not zero
    const double a = q * s.wv, b = q * s.wg;
    f = (S)scale;
    value = (S)(gain * q);
    along_g = (S)(q * b);
    along_v = (S)(q * a);
    second_n = (S)(q * (3 * a * b - s.vg));
    second_v = (S)b;
    second_g = (S)a;
    second = (S)(gain * q * q);
  }
};

// T is S, or a register of it.
template <class T, class S> struct WeightNorm {
  T f, value_, along_g, along_v, second_n, second_v, second_g, second_;
  TNN_INLINE explicit WeightNorm(const RowFactors<S>& row)
      : f(T{} + row.f), value_(T{} + row.value), along_g(T{} + row.along_g), along_v(T{} + row.along_v),
        second_n(T{} + row.second_n), second_v(T{} + row.second_v), second_g(T{} + row.second_g),
        second_(T{} + row.second) {}

  TNN_INLINE T value(T w) const { return (w * f) * value_; }
  TNN_INLINE T first_g(T g, T w) const { return ((g - (w * f) * along_g) * value_) * f; }
  TNN_INLINE T first_v(T v, T w) const { return ((v - (w * f) * along_v) * value_) * f; }
  TNN_INLINE T second(T v, T g, T w) const {
    return ((((w * f) * second_n - v * second_v - g * second_g) * second_) * f) * f;
  }
};

}  // namespace tnn
