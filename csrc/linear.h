// quantize_rows, add_norm, linear: see inferix_kernels/reference for what they mean.
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

// quantize_rows and add_norm: what a row becomes on its way into a layer, as codes or as floats.
struct RowsParams {
  const void* x;  // [M, K]  x_dtype; rows x_stride elements apart
  int64_t x_stride;
  Groups gate;                 // K wide
  const void* residual;        // [M, K]  residual_dtype, or null
  void* summed;                // [M, K]  summed_dtype, written, or null; may be residual
  const float *weight, *bias;  // [K] or null
  Groups scale, shift;         // K wide
  void* out;                   // [M, K]  codec's, written; may be residual or x, if they are as wide
  float* scales;               // [M]     written; null where the codec has none
  int64_t M, K;
  float eps;
  Norm norm;
  Activation activation;
  Codec codec;  // i8_token, e4m3_token or a float's
  DType x_dtype, residual_dtype, summed_dtype;
  INFERIX_FIELDS(x, x_stride, gate, residual, summed, weight, bias, scale, shift, out, scales, M, K, eps, norm,
                 activation, codec, x_dtype, residual_dtype, summed_dtype)
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

void rows_cpu(const RowsParams& params, const Cpu& cpu);
void linear_cpu(const LinearParams& params, const Cpu& cpu);

}  // namespace inferix
