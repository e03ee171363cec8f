// Element types the CPU kernels read and write, and the conversions a GPU has in hardware.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"

// A function compiled for three generations of x86, chosen when the module is loaded. With a * b + c left in two
// roundings (see CMakeLists.txt) all of them give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && ((defined(__clang__) && __clang_major__ >= 16) || __GNUC__ >= 12)
#define INFERIX_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define INFERIX_CLONES
#endif

namespace inferix {

struct Bf16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(int8_t x) { return float(x); }

template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
// To the nearest, halves to even. A NaN stays one: rounding up its mantissa could carry it to infinity.
template <> inline Bf16 from_float<Bf16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// |x| <= 2^22. Adding 1.5 * 2^23 pushes the fraction out of the mantissa, halves to even; unlike nearbyint it
// vectorises on every x86.
inline float round_half_even(float x) { return (x + 12582912.f) - 12582912.f; }

// Rounding first keeps |x / scale|, which rounding of the scale can push past 127 by an ulp, at 127.
inline int8_t quantized(float x, float scale) {
  const float code = round_half_even(x / scale);
  return static_cast<int8_t>(code > kInt8Max ? kInt8Max : code < -kInt8Max ? -kInt8Max : code);
}

// Largest |x| as bits: positive floats order as integers do, and integer maxima vectorise without -ffast-math.
inline uint32_t max_magnitude(uint32_t largest, float x) { return std::max(largest, bits_of(x) & 0x7fffffff); }

inline float int8_scale(uint32_t largest) { return std::max(float_of(largest), kAmaxFloor) / kInt8Max; }

// Calls function(T{}) with the element type of a dtype.
template <typename Function>
void with_float_type(const char* argument, DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32: return function(float{});
    case DType::bf16: return function(Bf16{});
    default: unsupported(argument, dtype);
  }
}

template <typename Function>
void with_page_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32: return function(float{});
    case DType::bf16: return function(Bf16{});
    case DType::i8: return function(int8_t{});
  }
}

}  // namespace inferix
