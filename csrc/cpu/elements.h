// Element types the CPU kernels read and write, and the conversions a GPU has in hardware: without branches, on
// integers and float32 alone, so that loops over them vectorise on every CPU and give the same bits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../dtypes.h"
#include "simd.h"

namespace inferix {

struct Bf16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// 4 bits of exponent, 3 of mantissa, no infinities, NaN is all ones.
struct E4m3 {
  uint8_t bits;
};

INFERIX_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

INFERIX_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// bits without the sign: of two, positive floats order as integers do, and integer maxima vectorise.
INFERIX_INLINE int32_t magnitude(float x) { return static_cast<int32_t>(bits_of(x) & 0x7fffffff); }

INFERIX_INLINE float to_float(float x) { return x; }
INFERIX_INLINE float to_float(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
INFERIX_INLINE float to_float(Half x) {
  const uint32_t m = x.bits & 0x7fff, shifted = m << 13;
  const float normal = float_of(shifted + ((m < 0x7c00 ? 127 - 15 : 2 * (127 - 15)) << 23));
  return float_of(bits_of(m < 0x0400 ? float(int32_t(m)) * 0x1p-24f : normal) | uint32_t(x.bits & 0x8000) << 16);
}
INFERIX_INLINE float to_float(E4m3 x) {
  const uint32_t m = x.bits & 0x7f;
  const float normal = float_of(m == 0x7f ? 0x7fc00000 : (m << 20) + ((127 - 7) << 23));
  return float_of(bits_of(m < 0x08 ? float(int32_t(m)) * 0x1p-9f : normal) | uint32_t(x.bits & 0x80) << 24);
}

// The float with this magnitude, to the nearest with kMantissa bits, halves to even: its exponent and mantissa fields,
// still with the bias of float32.
template <int kMantissa>
INFERIX_INLINE uint32_t round_mantissa(uint32_t magnitude) {
  constexpr int kDropped = 23 - kMantissa;
  return (magnitude + ((1u << (kDropped - 1)) - 1) + ((magnitude >> kDropped) & 1)) >> kDropped;
}

// The same in steps of `least`: the sum's last place is worth one step.
INFERIX_INLINE uint32_t steps_of(uint32_t magnitude, float least) {
  const float lift = least * 0x1p23f;
  return bits_of(float_of(magnitude) + lift) - bits_of(lift);
}

template <typename T> T from_float(float x);
template <> INFERIX_INLINE float from_float<float>(float x) { return x; }
// A NaN stays one: rounding up its mantissa could carry it to infinity.
template <> INFERIX_INLINE Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = bits_of(x), rounded = round_mantissa<7>(bits);  // beside the sign, which no carry reaches
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}
template <> INFERIX_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = bits_of(x), m = bits & 0x7fffffff;
  const uint32_t normal = std::min(round_mantissa<10>(std::min(m, 0x47800000u)) - ((127 - 15) << 10), 0x7c00u);
  const uint32_t rounded = m < 0x38800000 ? steps_of(m, 0x1p-24f) : m > 0x7f800000 ? 0x7e00 : normal;
  return {static_cast<uint16_t>(rounded | (bits >> 16 & 0x8000))};
}
// |x| < 464: it does not saturate. In 2^20 times the power of two below |x| the last place is a step of the mantissa;
// below 2^-6, the least normal number, steps stay what they are there. The code is put together in the highest byte:
// GCC would otherwise narrow each of its parts to a byte first. The sign is that of `like`.
INFERIX_INLINE E4m3 e4m3_of(float x, float like) {
  constexpr int32_t kLeast = (127 - 6) << 23;
  const uint32_t bits = bits_of(x);
  const uint32_t exponent = static_cast<uint32_t>(std::max(static_cast<int32_t>(bits & 0x7f800000), kLeast));
  // Only the lowest bits count: those of the power of two are 0.
  const uint32_t steps = bits_of(float_of(bits & 0x7fffffff) + float_of(exponent + (20 << 23)));
  const uint32_t code = (steps << 24) + ((exponent - kLeast) << 4);
  return {static_cast<uint8_t>((code | (bits_of(like) & 0x80000000)) >> 24)};
}

// |x| <= 2^22, to the nearest integer, halves to even: adding 1.5 * 2^23 pushes the fraction out of the mantissa and
// leaves the integer in its low bits. Unlike nearbyint it vectorises on every x86.
INFERIX_INLINE int32_t rounded(float x) { return static_cast<int32_t>(bits_of(x + 12582912.f) - bits_of(12582912.f)); }

// Calls function(T{}) with the element type of a dtype.
template <typename Function>
INFERIX_INLINE void with_float_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32: return function(float{});
    case DType::bf16: return function(Bf16{});
    case DType::f16: return function(Half{});
  }
}

}  // namespace inferix
