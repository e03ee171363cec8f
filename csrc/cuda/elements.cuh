// Element types of the CUDA kernels, on a GPU and in the emulation on the CPU. Their rounding is that of
// inferix_kernels/reference.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#else
#include "machine.h"
#endif
#include "../dtypes.h"

namespace inferix {

constexpr int kWarp = 32;

#ifdef __CUDACC__
using Bf16 = __nv_bfloat16;
using Half = __half;

INFERIX_DEVICE float to_float(float x) { return x; }
INFERIX_DEVICE float to_float(Bf16 x) { return __bfloat162float(x); }
INFERIX_DEVICE float to_float(Half x) { return __half2float(x); }

template <typename T> INFERIX_DEVICE T from_float(float x);
template <> INFERIX_DEVICE float from_float<float>(float x) { return x; }
template <> INFERIX_DEVICE Bf16 from_float<Bf16>(float x) { return __float2bfloat16_rn(x); }
template <> INFERIX_DEVICE Half from_float<Half>(float x) { return __float2half_rn(x); }

// Calls function(T{}) with the element type of a dtype.
template <typename Function>
void with_float_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32: return function(float{});
    case DType::bf16: return function(Bf16{});
    case DType::f16: return function(Half{});
  }
}
#endif

// e4m3 in arithmetic: GPUs before Ada have no instruction for it. |x| <= 448. In 2^20 times the power of two below |x|
// the last place is a step of the mantissa; below 2^-6, the least normal number, steps stay what they are there.
INFERIX_DEVICE uint8_t e4m3_code(float x) {
  using namespace sm90;
  constexpr uint32_t kLeast = (127 - 6) << 23;
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, own = bits & 0x7f800000;
  const uint32_t exponent = own < kLeast ? kLeast : own;
  const uint32_t steps = bits_of(float_of(magnitude) + float_of(exponent + (20 << 23)));
  return uint8_t(((steps & 0xff) + ((exponent - kLeast) >> 20)) | bits >> 24 & 0x80);
}
INFERIX_DEVICE float e4m3_value(uint8_t code) {
  using namespace sm90;
  const uint32_t m = code & 0x7f;  // 2^120 moves the exponent's bias, of subnormal numbers too
  const float magnitude = m == 0x7f ? float_of(0x7fc00000) : float_of(m << 20) * 0x1p120f;
  return code & 0x80 ? -magnitude : magnitude;
}

}  // namespace inferix
