// Sixteen floats side by side, as the compiler's own vector type: one zmm, two ymm or four NEON registers.
#pragma once
#include <cstdint>

namespace inferix {

// Everything that handles a Lanes is inlined into a function compiled for one instruction set.
#define INFERIX_INLINE [[gnu::always_inline]] inline

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

// The alignment is spelled out: that of a bare vector type follows the instruction set of the code that asks for it.
struct alignas(4 * kLanes) Column {
  Lanes lanes;
};

INFERIX_INLINE Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }

// 2^x, within 2 units in the last place; 0 below 2^-126, NaN for NaN. x at most 127.
INFERIX_INLINE Lanes exp2(const Lanes& x_in) {
  const Lanes lowest = Lanes{} - 127.f;
  const Lanes x = x_in < lowest ? lowest : x_in;  // this way round a NaN passes
  const Lanes shifted = x + 12582912.f;           // 1.5 * 2^23: the integer part lands in the low mantissa bits
  const Lanes f = x - (shifted - 12582912.f);     // [-1/2, 1/2]
  // Least relative error over [-1/2, 1/2], degree 6: 2.7e-9.
  Lanes p = f * 1.5344105e-4f + 1.3405462e-3f;
  p = p * f + 9.6185449e-3f;
  p = p * f + 5.5503126e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314724e-1f;
  p = p * f + 1.f;
  // 2^n by its exponent field; n = -127 gives the bits of 0. A cast between vector types keeps the bits.
  return p * (Lanes)(((IntLanes)shifted + 127) << 23);
}

}  // namespace inferix
