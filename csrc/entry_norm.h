// Entry normalisation, the arithmetic of one entry, for every back end.
//
//   P(w) = gain w (eps + w^2)^(-1/2) + leak w;  t = w eps^(-1/2), r = (1 + t^2)^(-1/2), y = t r:
//   P   = gain y + leak w      P' = gain eps^(-1/2) r^3 + leak      P'' = -3 gain eps^(-1) y r^4
//
// T is float or double, or a register of them (gcc vector extension); nothing but + - * and the back
// end's inv_sqrt, smaller and larger is used.
//
// Every finite w is safe: 1 + t^2 is cut off at `most`, where r^3 is below the smallest number, and y at 1.
// The terms leak w and 0 w let an infinite or NaN weight come out as no number.
//
// No include guard: each back end includes this file in its own namespace, after those functions.

template <class S> struct EntryNormLimit;
template <> struct EntryNormLimit<float> {
  static constexpr float most = 0x1p120f;
};
template <> struct EntryNormLimit<double> {
  static constexpr double most = 0x1p1000;
};

template <class T, class S> struct EntryNorm {
  T root, steepest, gain, leak;  // root = eps^(-1/2), steepest = gain root

  TNN_INLINE EntryNorm(S root_, S gain_, S leak_)
      : root(constant(root_)), steepest(constant(root_ * gain_)), gain(constant(gain_)), leak(constant(leak_)) {}

  TNN_INLINE static T constant(S s) { return T{} + s; }
  TNN_INLINE static T r(T t) { return inv_sqrt(smaller(constant(1) + t * t, constant(EntryNormLimit<S>::most))); }
  TNN_INLINE static T y(T t, T r) { return larger(smaller(t * r, constant(1)), constant(-1)); }

  TNN_INLINE T value(T w) const {
    const T t = w * root;
    return gain * y(t, r(t)) + leak * w;
  }
  TNN_INLINE T first(T g, T w) const {
    const T q = r(w * root);
    return ((g * q) * (steepest * q)) * q + (leak * g + constant(0) * w);
  }
  TNN_INLINE T second(T v, T g, T w) const {
    const T t = w * root, q = r(t), k = root * q;
    return (constant(-3) * gain) * y(t, q) * ((v * q) * k) * ((g * q) * k) + constant(0) * w;
  }
};
