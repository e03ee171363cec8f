// quantize_rows and add_norm on the CPU: what stands before a linear layer, in float32, then codes or floats.
#include <algorithm>
#include <cmath>

#include "../linear.h"
#include "linear_activation.h"
#include "codecs.h"
#include "parallel.h"

namespace inferix {
namespace {

// y becomes residual + gate * y; the residual's row in float32, or null.
INFERIX_INLINE void add(const RowsParams& p, int64_t row, float* __restrict y, const float* __restrict residual) {
  const float* __restrict gate = p.gate.row(row, p.M, p.K);
  if (gate && residual)
    for (int64_t k = 0; k < p.K; ++k) y[k] = y[k] * gate[k] + residual[k];
  else if (gate)
    for (int64_t k = 0; k < p.K; ++k) y[k] *= gate[k];
  else
    for (int64_t k = 0; k < p.K; ++k) y[k] += residual[k];
}

// What follows the norm of a row is one product and one sum, (n * weight + bias) * (1 + scale) + shift: the two terms.
INFERIX_INLINE void combine(const RowsParams& p, int64_t row, float* __restrict factor, float* __restrict offset) {
  const float *__restrict scale = p.scale.row(row, p.M, p.K), *__restrict shift = p.shift.row(row, p.M, p.K);
  for (int64_t k = 0; k < p.K; ++k) factor[k] = 1.f, offset[k] = 0.f;
  if (p.weight) std::copy_n(p.weight, p.K, factor);
  if (p.bias) std::copy_n(p.bias, p.K, offset);
  if (scale)
    for (int64_t k = 0; k < p.K; ++k) factor[k] *= 1.f + scale[k], offset[k] *= 1.f + scale[k];
  if (shift)
    for (int64_t k = 0; k < p.K; ++k) offset[k] += shift[k];
}

// The sum of term(y[k]), k < count, as 32 partial sums, the same on every CPU; y is aligned.
template <typename S, typename Term>
INFERIX_INLINE float sum_of(const float* y, int64_t count, const Term& term) {
  using Lanes = typename S::Lanes;
  constexpr int kRegisters = 2 * S::kParts;
  Lanes sums[kRegisters] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes)
    unroll<kRegisters>([&](auto i) INFERIX_INLINE_LAMBDA {
      sums[i] += term(*reinterpret_cast<const Lanes*>(y + k + i * S::kWidth));
    });
  float sum = 0.f;
  for (; k < count; ++k) sum += term(y[k]);
  for (const Lanes& part : sums)
    for (int i = 0; i < S::kWidth; ++i) sum += part[i];
  return sum;
}

// y is a whole number of Columns; factor and offset from combine, or null.
template <typename S>
INFERIX_INLINE void prepare(const RowsParams& p, float* __restrict y, const float* __restrict factor,
                            const float* __restrict offset) {
  float mean = 0.f, inverse = 1.f;
  if (p.norm == Norm::layer)
    mean = sum_of<S>(y, p.K, [](const auto& x) INFERIX_INLINE_LAMBDA { return x; }) / float(p.K);
  if (p.norm != Norm::none) {
    const auto square = [mean](const auto& x) INFERIX_INLINE_LAMBDA { return (x - mean) * (x - mean); };
    inverse = 1.f / std::sqrt(sum_of<S>(y, p.K, square) / float(p.K) + p.eps);
  }
  if (factor)
    for (int64_t k = 0; k < p.K; ++k) y[k] = (y[k] - mean) * inverse * factor[k] + offset[k];
  else if (p.norm != Norm::none)
    for (int64_t k = 0; k < p.K; ++k) y[k] = (y[k] - mean) * inverse;
  with_activation<S>(p.activation, [&](auto activate) INFERIX_INLINE_LAMBDA {
    for (int64_t k = 0; k < p.K; k += kLanes) {
      Column& column = *reinterpret_cast<Column*>(y + k);
      for (int part = 0; part < S::kParts; ++part) S::part(column, part) = activate(S::part(column, part));
    }
  });
}

// The steps for one instruction set.
struct Steps {
  void (*add)(const RowsParams&, int64_t row, float* y, const float* residual);
  void (*combine)(const RowsParams&, int64_t row, float* factor, float* offset);
  void (*prepare)(const RowsParams&, float* y, const float* factor, const float* offset);
};

#define INFERIX_STEPS(target, name, S)                                                                        \
  target void add_##name(const RowsParams& p, int64_t row, float* y, const float* r) { add(p, row, y, r); }    \
  target void combine_##name(const RowsParams& p, int64_t row, float* f, float* o) { combine(p, row, f, o); }  \
  target void prepare_##name(const RowsParams& p, float* y, const float* f, const float* o) {                  \
    prepare<S>(p, y, f, o);                                                                                    \
  }                                                                                                            \
  constexpr Steps k_##name{add_##name, combine_##name, prepare_##name};
INFERIX_STEPS(, portable, Simd<4>)
#if defined(__x86_64__)
INFERIX_STEPS(INFERIX_V3, v3, Simd<8>)
INFERIX_STEPS(INFERIX_V4, v4, Simd<16>)
Steps steps_for(Isa isa) { return dispatch<Steps>(isa, k_portable, k_v3, k_v4); }
#else
Steps steps_for(Isa) { return k_portable; }
#endif

// What combine made of the last row, until the groups of another are others.
class Combined {
 public:
  Combined(const RowsParams& p, const Steps& steps, float* room, int64_t stride)
      : p_(p), steps_(steps), factor_(room), offset_(room + stride),
        wanted_(p.weight || p.bias || p.scale.data || p.shift.data) {}

  void prepare(int64_t row, float* y) {
    const float *scale = p_.scale.row(row, p_.M, p_.K), *shift = p_.shift.row(row, p_.M, p_.K);
    if (wanted_ && (!made_ || scale != scale_ || shift != shift_)) steps_.combine(p_, row, factor_, offset_);
    made_ = true, scale_ = scale, shift_ = shift;
    steps_.prepare(p_, y, wanted_ ? factor_ : nullptr, offset_);
  }

 private:
  const RowsParams& p_;
  const Steps& steps_;
  float *const factor_, *const offset_;
  const bool wanted_;
  bool made_ = false;
  const float *scale_ = nullptr, *shift_ = nullptr;
};

}  // namespace

void rows_cpu(const RowsParams& p, const Cpu& cpu) {
  constexpr int64_t kRowsPerTask = 16, kFloats = 4096;  // at once, in the L1 cache
  const Steps steps = steps_for(cpu.isa);
  const int64_t stride = (p.K + kLanes - 1) / kLanes * kLanes,
                most = std::max<int64_t>(1, kFloats / std::max<int64_t>(stride, 1));
  const bool plain = p.norm == Norm::none && !p.weight && !p.bias && !p.scale.data && !p.shift.data &&
                     p.activation == Activation::none;
  const auto place = [&p](auto* base, int64_t row, int64_t bytes) { return base + row * p.K * bytes; };
  parallel_for(cpu.threads, (p.M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    thread_local Buffer buffer;
    float *y = buffer.floats((2 * most + 2) * stride), *residual = p.residual ? y + most * stride : nullptr;
    Combined combined(p, steps, y + 2 * most * stride, stride);
    const int64_t end = std::min(p.M, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; row += most) {
      const int64_t count = std::min(most, end - row);
      const char* x = static_cast<const char*>(p.x) + row * p.x_stride * element_bytes(p.x_dtype);
      to_floats(cpu.isa, p.x_dtype, x, p.x_stride, count, p.K, y, stride);
      if (residual) {
        const char* from = place(static_cast<const char*>(p.residual), row, element_bytes(p.residual_dtype));
        to_floats(cpu.isa, p.residual_dtype, from, p.K, count, p.K, residual, stride);
      }
      for (int64_t i = 0; i < count && (residual || p.gate.data); ++i)
        steps.add(p, row + i, y + i * stride, residual ? residual + i * stride : nullptr);
      if (p.summed) {  // what follows is of the sum as it was rounded
        char* to = place(static_cast<char*>(p.summed), row, element_bytes(p.summed_dtype));
        from_floats(cpu.isa, p.summed_dtype, y, stride, count, p.K, to, p.K);
        if (p.summed_dtype != DType::f32) to_floats(cpu.isa, p.summed_dtype, to, p.K, count, p.K, y, stride);
      }
      for (int64_t i = 0; i < count && !plain; ++i) combined.prepare(row + i, y + i * stride);
      const int64_t bytes = element_bytes(p.codec);
      char* scales = reinterpret_cast<char*>(p.scales ? p.scales + row : nullptr);
      encode(cpu.isa, {p.codec, count, p.K, p.K * bytes, place(static_cast<char*>(p.out), row, bytes), scales, nullptr},
             y, stride, count);
    }
  });
}

}  // namespace inferix
