// Element types of the CUDA kernels. Their rounding is that of inferix_kernels/reference.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../dtypes.h"

namespace inferix {

constexpr int kWarp = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

__device__ inline float int8_scale(float largest) { return __fdiv_rn(fmaxf(largest, kAmaxFloor), kInt8Max); }

// __fdiv_rn: the division of the reference, also where a compiler flag asks for a faster one.
__device__ inline int8_t quantized(float x, float scale) {
  return static_cast<int8_t>(fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -kInt8Max), kInt8Max));
}

__device__ inline float warp_max(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

// Calls function(T{}) with the element type of a dtype.
template <typename Function>
void with_float_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32: return function(float{});
    case DType::bf16: return function(__nv_bfloat16{});
    case DType::f16: return function(__half{});
  }
}

}  // namespace inferix
