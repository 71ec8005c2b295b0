// The 16-bit storage types; arithmetic is in float.  Rounding is to nearest even, NaN stays NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace tnn {
namespace TNN_ISA {

template <class To, class From> inline To bit_cast(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float f) {
    const uint32_t b = bit_cast<uint32_t>(f);
    bits = f != f ? 0x7fc0 : (uint16_t)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
  operator float() const { return bit_cast<float>((uint32_t)bits << 16); }
};

// By exponent arithmetic: float adds do the rounding and the denormals.
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float f) {
    const uint32_t w = bit_cast<uint32_t>(f), doubled = w + w, exponent = doubled & 0xff000000u;
    const uint32_t bias = ((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u;
    const float rounded = bit_cast<float>(bias) + std::fabs(f) * 0x1p+112f * 0x1p-110f;
    const uint32_t r = bit_cast<uint32_t>(rounded);
    const uint32_t magnitude = ((r >> 13) & 0x7c00u) + (r & 0x0fffu);
    bits = (uint16_t)(((w & 0x80000000u) >> 16) | (doubled > 0xff000000u ? 0x7e00u : magnitude));
  }
  operator float() const {
    const uint32_t w = (uint32_t)bits << 16, doubled = w + w;
    const float normal = bit_cast<float>((doubled >> 4) + (0xe0u << 23)) * 0x1p-112f;
    const float denormal = bit_cast<float>((doubled >> 17) | (126u << 23)) - 0.5f;
    return bit_cast<float>((w & 0x80000000u) | bit_cast<uint32_t>(doubled < (1u << 27) ? denormal : normal));
  }
};

}  // namespace TNN_ISA
}  // namespace tnn
