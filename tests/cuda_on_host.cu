// Runs every thread of the CUDA kernels' bodies on the CPU, in turn: needs nvcc, and no GPU.
// Covers index arithmetic, ragged ends, dtypes and mathematics; not launches, alignment or races.
#include "../csrc/cuda/entry_norm.cu"
#include "../csrc/cuda/weight_norm.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

using namespace tnn;

template <class S> static double number(S x) { return (typename Arithmetic<S>::type)x; }

static const double kEps = 1e-2, kGain = 1.5, kLeak = 0.25;

template <class S> struct Data {
  std::vector<S> w, g, v, out, out_w;
  Call call = {};
  Data(Derivative derivative, Rows rows) {
    const int64_t n = rows.count * rows.outer * rows.inner;
    for (auto* x : {&w, &g, &v}) x->resize(n + 16);
    out.assign(n + 16, (S)7.f);
    out_w = out;
    for (int64_t i = 0; i < n; ++i) {
      w[i] = (S)(float)(2 * std::sin(0.3 * i));
      g[i] = (S)(float)std::sin(3.0 * i);
      v[i] = (S)(float)std::cos(1.7 * i);
    }
    call.derivative = derivative;
    call.numel = n;
    call.rows = rows;
    call.eps = kEps, call.gain = kGain, call.leak = kLeak;
    call.w = w.data(), call.g = g.data(), call.v = v.data();
    call.out = out.data(), call.out_w = out_w.data();
  }
  double worst = 0;
  void compare(S found, double expected) {
    worst = std::fmax(worst, std::fabs(number(found) - expected) / (std::fabs(expected) + 1e-2));
  }
  void nothing_past_the_end() {
    for (int64_t i = call.numel; i < (int64_t)out.size(); ++i)
      if ((float)out[i] != 7.f || (float)out_w[i] != 7.f) worst = 1e9;
  }
};

static double first(double g, double w) { return g * (kGain * kEps * std::pow(kEps + w * w, -1.5) + kLeak); }

template <class S, Derivative D, int N> static double entries(int64_t n, int64_t threads) {
  Data<S> d(D, {1, 1, n});
  for (int64_t t = 0; t < threads; ++t) map_thread<N>(entry_map<S, D>(d.call), t, threads, n);
  for (int64_t i = 0; i < n; ++i) {
    const double w = number(d.w[i]), g = number(d.g[i]), v = number(d.v[i]);
    if (D == kValue || D == kPair) d.compare(d.out[i], kGain * w / std::sqrt(kEps + w * w) + kLeak * w);
    if (D == kPair) d.compare(d.out_w[i], first(g, w));
    if (D == kFirst) d.compare(d.out[i], first(g, w));
    if (D == kSecond) {
      d.compare(d.out[i], first(v, w));
      d.compare(d.out_w[i], -3 * v * g * kGain * kEps * w * std::pow(kEps + w * w, -2.5));
    }
  }
  d.nothing_past_the_end();
  return d.worst;
}

template <class S, Derivative D, int N> static double rows(Rows r, int64_t threads) {
  Data<S> d(D, r);
  const auto map = row_map<S, D>(d.call);
  for (int64_t row = 0; row < r.count; ++row) {
    RowSums s;
    for (int64_t t = 0; t < threads; ++t) {
      const RowSums part = map.template sums<N>(row, t, threads, 1.0);
      s.ww += part.ww, s.wg += part.wg, s.wv += part.wv, s.vg += part.vg;
    }
    const RowFactors factors(s, kEps, kGain, false);
    for (int64_t t = 0; t < threads; ++t) map.template results<N>(row, t, threads, factors);
  }
  for (int64_t row = 0; row < r.count; ++row) {
    std::vector<int64_t> entry;
    for (int64_t i = 0; i < d.call.numel; ++i)
      if (i / r.inner % r.count == row) entry.push_back(i);
    double ww = 0, wg = 0, wv = 0, vg = 0;
    for (int64_t i : entry) {
      const double w = number(d.w[i]), g = number(d.g[i]), v = number(d.v[i]);
      ww += w * w, wg += w * g, wv += w * v, vg += v * g;
    }
    const double s = kEps + ww;
    for (int64_t i : entry) {
      const double w = number(d.w[i]), g = number(d.g[i]), v = number(d.v[i]);
      if (D == kValue || D == kPair) d.compare(d.out[i], kGain * w / std::sqrt(s));
      if (D == kPair) d.compare(d.out_w[i], kGain * (g - w * wg / s) / std::sqrt(s));
      if (D == kFirst) d.compare(d.out[i], kGain * (g - w * wg / s) / std::sqrt(s));
      if (D == kSecond) {
        d.compare(d.out[i], kGain * (v - w * wv / s) / std::sqrt(s));
        d.compare(d.out_w[i], kGain * std::pow(s, -1.5) * (3 * w * wv * wg / s - w * vg - v * wg - g * wv));
      }
    }
  }
  d.nothing_past_the_end();
  return d.worst;
}

template <class S, Derivative D> static double all() {
  constexpr int N = 16 / sizeof(S);
  double w = 0;
  for (int64_t threads : {1, 7, 256}) {
    for (int64_t n : {0, 1, 3, 8, 31, 1000, 4099})
      w = std::fmax(w, std::fmax(entries<S, D, N>(n, threads), entries<S, D, 1>(n, threads)));
    for (Rows r : {Rows{1, 1, 1}, Rows{3, 1, 27}, Rows{5, 4, 3}, Rows{7, 30, 1}, Rows{2, 1, 1000}})
      w = std::fmax(w, rows<S, D, 1>(r, threads));
    for (Rows r : {Rows{3, 1, 64}, Rows{2, 3, 16}}) w = std::fmax(w, rows<S, D, N>(r, threads));
  }
  return w;
}

template <class S> static int check(const char* name, double limit) {
  const double w = std::max({all<S, kValue>(), all<S, kFirst>(), all<S, kSecond>(), all<S, kPair>()});
  std::printf("%s %.3g %s\n", name, w, w < limit ? "ok" : "FAIL");
  return w < limit ? 0 : 1;
}

int main() {
  return check<float>("float32", 2e-5) + check<double>("float64", 1e-13) + check<__half>("float16", 2e-3) +
         check<__nv_bfloat16>("bfloat16", 1.5e-2);
}
