// quantize_rows and linear on the CPU.
#include "../linear.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "codecs.h"
#include "elements.h"
#include "norms.h"
#include "parallel.h"

namespace inferix {
namespace {

float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::gelu: return 0.5f * x * (1.f + std::erf(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  }
  return x;
}

const float* row_of(const Groups& groups, int64_t width, int64_t row, int64_t rows) {
  return groups.data ? groups.data + row / (rows / groups.groups) * width : nullptr;
}

void prepare(const QuantizeRowsParams& p, int64_t row, float* y) {
  if (p.norm == Norm::layer) subtract_mean(y, p.K);
  if (p.norm != Norm::none) {
    const float inverse = inverse_rms(y, p.K, p.eps);
    for (int64_t k = 0; k < p.K; ++k) y[k] *= inverse;
  }
  if (p.weight)
    for (int64_t k = 0; k < p.K; ++k) y[k] *= p.weight[k];
  if (p.bias)
    for (int64_t k = 0; k < p.K; ++k) y[k] += p.bias[k];
  if (const float* scale = row_of(p.scale, p.K, row, p.M))
    for (int64_t k = 0; k < p.K; ++k) y[k] *= 1.f + scale[k];
  if (const float* shift = row_of(p.shift, p.K, row, p.M))
    for (int64_t k = 0; k < p.K; ++k) y[k] += shift[k];
  if (p.activation != Activation::none)
    for (int64_t k = 0; k < p.K; ++k) y[k] = activate(y[k], p.activation);
}

// An element of x @ weight.T, in units of both scales.
float dot(const LinearParams& p, int64_t m, int64_t n) {
  if (p.codec == Codec::i8_token) {
    const int8_t *x = static_cast<const int8_t*>(p.x) + m * p.K, *w = static_cast<const int8_t*>(p.weight) + n * p.K;
    int32_t sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += int32_t(x[k]) * int32_t(w[k]);
    return float(sum);
  }
  const E4m3 *x = static_cast<const E4m3*>(p.x) + m * p.K, *w = static_cast<const E4m3*>(p.weight) + n * p.K;
  return sum_of(p.K, [x, w](int64_t k) { return to_float(x[k]) * to_float(w[k]); });
}

template <typename Out>
void finish(const LinearParams& p, int64_t m, const float* y) {
  const float* gate = row_of(p.gate, p.N, m, p.M);
  Out* out = static_cast<Out*>(p.out) + m * p.N;
  with_float_type(p.residual_dtype, [&](auto type) {
    const auto* residual = p.residual ? static_cast<const decltype(type)*>(p.residual) + m * p.N : nullptr;
    for (int64_t n = 0; n < p.N; ++n) {
      float value = activate(p.bias ? y[n] + p.bias[n] : y[n], p.activation);
      if (gate) value *= gate[n];
      if (residual) value += to_float(residual[n]);
      out[n] = from_float<Out>(value);
    }
  });
}

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p, const Cpu& cpu) {
  constexpr int64_t kRowsPerTask = 16;
  parallel_for(cpu.threads, (p.M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    thread_local std::vector<float> y;
    y.resize(p.K);
    for (int64_t row = task * kRowsPerTask; row < std::min(p.M, (task + 1) * kRowsPerTask); ++row) {
      const int64_t bytes = p.x_dtype == DType::f32 ? 4 : 2;
      to_floats(cpu.isa, p.x_dtype, static_cast<const char*>(p.x) + row * p.x_stride * bytes, p.K, 1, p.K, y.data(),
                p.K);
      prepare(p, row, y.data());
      char* codes = static_cast<char*>(p.codes) + row * p.K;
      encode(cpu.isa, Tile{p.codec, 1, p.K, codes, reinterpret_cast<char*>(p.scales + row), nullptr}, y.data(), p.K, 1);
    }
  });
}

void linear_cpu(const LinearParams& p, const Cpu& cpu) {
  if (p.codec == Codec::i8_token && p.K > kMaxInt8Terms)
    throw std::invalid_argument("x.codes must have at most " + std::to_string(kMaxInt8Terms) + " columns, got " +
                                std::to_string(p.K));
  parallel_for(cpu.threads, p.M, [&](int64_t m) {
    thread_local std::vector<float> y;
    y.resize(p.N);
    for (int64_t n = 0; n < p.N; ++n) y[n] = dot(p, m, n) * (p.x_scales[m] * p.weight_scales[n]);
    with_float_type(p.out_dtype, [&](auto out) { finish<decltype(out)>(p, m, y.data()); });
  });
}

}  // namespace inferix
