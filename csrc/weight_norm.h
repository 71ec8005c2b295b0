// Weight normalisation, the arithmetic of one row, for every back end.
//
//   P(w) = gain w rho, rho = (eps + |w|^2)^(-1/2), n = rho w:
//   DP(w) g                       = gain rho (g - n <n, g>)
//   gradient in w of <v, DP(w) g> = gain rho^2 (n (3 a b - c) - b v - a g),  a = <n, v>, b = <n, g>, c = <v, g>
//
// Sums are in double, whatever the weights are stored in, so that the radial part of DP(w) g, a
// difference of nearly equal numbers, keeps its digits; so are results, but for FloatRow.  A row of doubles
// whose squares overflow is shrunk by a power of two f: with x = f w and q = rho / f, n = q x.
//
// No include guard: each back end includes this file in its own namespace, after minus_product.

struct RowSums {
  double ww = 0, wg = 0, wv = 0, vg = 0;
};

constexpr double kShrink = 0x1p-600, kShrinkAbove = 0x1p1000;  // of |w|^2

// What one row multiplies its entries with; the sums are those of x = f w where it is shrunk.
struct RowFactors {
  double f, value, along_g, along_v, second_n, second_v, second_g, second;

  RowFactors() = default;
  TNN_INLINE RowFactors(const RowSums& s, double eps, double gain, bool shrunk) {
    f = shrunk ? kShrink : 1;
    const double length = eps * f * f + s.ww;
    const double q = length < 1e308 ? 1 / std::sqrt(length) : length - length;  // an infinite row is NaN, not zero
    const double a = q * s.wv, b = q * s.wg;
    value = gain * q;
    along_g = q * b;
    along_v = q * a;
    second_n = q * (3 * a * b - s.vg);
    second_v = b;
    second_g = a;
    second = gain * q * q;
  }

  TNN_INLINE double scale() const { return f * value; }

  // Whether FloatRow's factors are far from the ends of float.
  TNN_INLINE bool fits_float() const {
    return value > 0x1p-100 && value < 0x1p100 && along_g < 0x1p100 && along_g > -0x1p100;
  }
};

// Value and first derivative in float, to the same last digits: along_g goes in as the sum of two
// floats, and each fused c - a b, the back end's minus_product, rounds once.
template <class T> struct FloatRow {
  T value_, high, low;
  TNN_INLINE explicit FloatRow(const RowFactors& row)
      : value_(T{} + (float)row.value), high(T{} + (float)row.along_g),
        low(T{} + (float)(row.along_g - (double)(float)row.along_g)) {}
  TNN_INLINE T value(T w) const { return w * value_; }
  TNN_INLINE T first_g(T g, T w) const { return minus_product(minus_product(g, w, high), w, low) * value_; }
};

// T is double, or a register of it; Shrinks: whether f may be other than 1.
template <class T, bool Shrinks> struct WeightNorm {
  T f, value_, along_g, along_v, second_n, second_v, second_g, second_;
  TNN_INLINE explicit WeightNorm(const RowFactors& row)
      : f(T{} + row.f), value_(T{} + row.value), along_g(T{} + row.along_g), along_v(T{} + row.along_v),
        second_n(T{} + row.second_n), second_v(T{} + row.second_v), second_g(T{} + row.second_g),
        second_(T{} + row.second) {}

  TNN_INLINE T shrunk(T x) const { return Shrinks ? x * f : x; }
  TNN_INLINE T value(T w) const { return shrunk(w) * value_; }
  TNN_INLINE T first_g(T g, T w) const { return shrunk((g - shrunk(w) * along_g) * value_); }
  TNN_INLINE T first_v(T v, T w) const { return shrunk((v - shrunk(w) * along_v) * value_); }
  TNN_INLINE T second(T v, T g, T w) const {
    return shrunk(shrunk((shrunk(w) * second_n - v * second_v - g * second_g) * second_));
  }
};
