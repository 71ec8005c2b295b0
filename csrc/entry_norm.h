// Entry normalisation, the arithmetic of one entry, for every back end.
//
//   P(w) = gain w (eps + w^2)^(-1/2) + leak w;  t = w eps^(-1/2), r = (1 + t^2)^(-1/2), y = t r:
//   P   = gain y + leak w      P' = gain eps^(-1/2) r^3 + leak      P'' = -3 gain eps^(-1) y r^4
//
// T is float or double, or a register of them (gcc vector extension): nothing but + - * ?: and the
// back end's inv_sqrt is used.  The limits keep every finite w away from overflow, see
// trainable_nn/ops/entry_norm.py; 0 * w lets an infinite or NaN weight come out as NaN.
//
// No include guard: each back end includes this file in its own namespace, after its inv_sqrt.

template <class S> struct EntryNormLimits;
template <> struct EntryNormLimits<float> {
  static constexpr float flat = 0x1p14f, end = 0x1p100f, far = 0x1p40f, shrink = 0x1p-60f;
};
template <> struct EntryNormLimits<double> {
  static constexpr double flat = 0x1p28, end = 0x1p900, far = 0x1p300, shrink = 0x1p-500;
};

template <class T, class S> struct EntryNorm {
  using Limits = EntryNormLimits<S>;
  T root, gain, leak;  // root = eps^(-1/2)

  TNN_INLINE static T constant(S s) { return T{} + s; }
  TNN_INLINE static T clamp(T t, S limit) {
    const T high = constant(limit), low = constant(-limit);
    t = t > high ? high : t;
    return t < low ? low : t;
  }
  // t, and r with all its digits however large t is
  TNN_INLINE T scaled(T w, T& t) const {
    t = clamp(w * root, Limits::end);
    const T size = t < T{} ? -t : t;
    const T scale = size > constant(Limits::far) ? constant(Limits::shrink) : constant(1);
    const T u = t * scale;
    return scale * inv_sqrt(scale * scale + u * u);
  }

  TNN_INLINE T value(T w) const {
    const T t = clamp(w * root, Limits::flat);  // past it P is gain sign(w) to the last bit
    return gain * (t * inv_sqrt(constant(1) + t * t)) + leak * w;
  }
  TNN_INLINE T first(T g, T w) const {
    T t;
    const T r = scaled(w, t);
    return gain * (((g * r) * (root * r)) * r) + leak * g + constant(0) * w;
  }
  TNN_INLINE T second(T v, T g, T w) const {
    T t;
    const T r = scaled(w, t), k = root * r;
    return (constant(-3) * gain) * (t * r) * ((v * r) * k) * ((g * r) * k) + constant(0) * w;
  }
};
