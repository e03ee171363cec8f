// quantize_rows, linear: see inferix_kernels/reference.py for what they mean.
#pragma once
#include "cpu.h"
#include "dtypes.h"
#include "fields.h"

namespace inferix {

enum class Norm : int32_t { none, layer, rms };
enum class Activation : int32_t { none, gelu, gelu_tanh };

// Row i / (M / groups) of it goes with row i of M.
struct Groups {
  const float* data;  // [groups, width] or null
  int64_t groups;     // divides M
  const float* row(int64_t i, int64_t M, int64_t width) const {
    return data ? data + i / (M / groups) * width : nullptr;
  }
  INFERIX_FIELDS(data, groups)
};

struct QuantizeRowsParams {
  const void* x;  // [M, K]  x_dtype; rows x_stride elements apart
  int64_t x_stride;
  const float *weight, *bias;  // [K] or null
  Groups scale, shift;         // K wide
  void* codes;                 // [M, K]  codec's, written
  float* scales;               // [M]     written
  int64_t M, K;
  float eps;
  Norm norm;
  Activation activation;
  Codec codec;  // i8_token or e4m3_token
  DType x_dtype;
  INFERIX_FIELDS(x, x_stride, weight, bias, scale, shift, codes, scales, M, K, eps, norm, activation, codec, x_dtype)
};

struct LinearParams {
  const void *x, *weight;                // [M, K], [N, K]  codec's
  const float *x_scales, *weight_scales;  // [M], [N]
  const float* bias;                     // [N] or null
  Groups gate;                           // N wide
  const void* residual;                  // [M, N]  residual_dtype, or null; may be out
  void* out;                             // [M, N]  out_dtype, written
  int64_t M, N, K;
  Activation activation;
  Codec codec;  // i8_token or e4m3_token
  DType residual_dtype, out_dtype;
  INFERIX_FIELDS(x, weight, x_scales, weight_scales, bias, gate, residual, out, M, N, K, activation, codec,
                 residual_dtype, out_dtype)
};

// int8 sums are 32 bits wide: of more products than this they could overflow.
constexpr int64_t kMaxInt8Terms = 131071;

void quantize_rows_cpu(const QuantizeRowsParams& params, const Cpu& cpu);
void linear_cpu(const LinearParams& params, const Cpu& cpu);

}  // namespace inferix
