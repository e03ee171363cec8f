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

// A product and a sum for each column, n * factor + offset: with weight and bias, or 1 + scale and shift. The two are
// not made one: an infinite scale would meet the bias, or the 0 of none, alone.
struct Terms {
  const float *factor = nullptr, *offset = nullptr;
};

// What is not given is 1 and 0.
INFERIX_INLINE void combine(int64_t K, float more, const float* __restrict factor, const float* __restrict offset,
                            float* __restrict factors, float* __restrict offsets) {
  for (int64_t k = 0; k < K; ++k) factors[k] = 1.f, offsets[k] = 0.f;
  if (factor)
    for (int64_t k = 0; k < K; ++k) factors[k] = more + factor[k];
  if (offset) std::copy_n(offset, K, offsets);
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

// y is a whole number of Columns; each of first and second from combine, or null.
template <typename S>
INFERIX_INLINE void prepare(const RowsParams& p, float* __restrict y, const Terms& first, const Terms& second) {
  float mean = 0.f, inverse = 1.f;
  if (p.norm == Norm::layer)
    mean = sum_of<S>(y, p.K, [](const auto& x) INFERIX_INLINE_LAMBDA { return x; }) / float(p.K);
  if (p.norm != Norm::none) {
    const auto square = [mean](const auto& x) INFERIX_INLINE_LAMBDA { return (x - mean) * (x - mean); };
    inverse = 1.f / std::sqrt(sum_of<S>(y, p.K, square) / float(p.K) + p.eps);
  }
  const float *__restrict factor = first.factor, *__restrict offset = first.offset;
  if (factor)
    for (int64_t k = 0; k < p.K; ++k) y[k] = (y[k] - mean) * inverse * factor[k] + offset[k];
  else if (p.norm != Norm::none)
    for (int64_t k = 0; k < p.K; ++k) y[k] = (y[k] - mean) * inverse;
  const float *__restrict then = second.factor, *__restrict plus = second.offset;
  if (then)
    for (int64_t k = 0; k < p.K; ++k) y[k] = y[k] * then[k] + plus[k];
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
  void (*combine)(int64_t K, float more, const float* factor, const float* offset, float* factors, float* offsets);
  void (*prepare)(const RowsParams&, float* y, const Terms& first, const Terms& second);
};

#define INFERIX_STEPS(target, name, S)                                                                        \
  target void add_##name(const RowsParams& p, int64_t row, float* y, const float* r) { add(p, row, y, r); }    \
  target void combine_##name(int64_t K, float more, const float* f, const float* o, float* fs, float* os) {    \
    combine(K, more, f, o, fs, os);                                                                            \
  }                                                                                                            \
  target void prepare_##name(const RowsParams& p, float* y, const Terms& first, const Terms& second) {         \
    prepare<S>(p, y, first, second);                                                                           \
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

// What stands behind the norm of a row. Room for its terms: 4 rows.
class Combined {
 public:
  Combined(const RowsParams& p, const Steps& steps, float* room, int64_t stride)
      : p_(p), steps_(steps), room_(room), stride_(stride), modulated_(p.scale.data || p.shift.data) {
    if (p.weight || p.bias) affine_ = combined(0.f, p.weight, p.bias, room_);
  }

  void prepare(int64_t row, float* y) {
    const float *scale = p_.scale.row(row, p_.M, p_.K), *shift = p_.shift.row(row, p_.M, p_.K);
    if (modulated_ && (!modulation_.factor || scale != scale_ || shift != shift_))  // those of the last row's groups
      modulation_ = combined(1.f, scale, shift, room_ + 2 * stride_);
    scale_ = scale, shift_ = shift;
    steps_.prepare(p_, y, affine_.factor ? affine_ : modulation_, affine_.factor ? modulation_ : Terms{});
  }

 private:
  Terms combined(float more, const float* factor, const float* offset, float* to) const {
    steps_.combine(p_.K, more, factor, offset, to, to + stride_);
    return {to, to + stride_};
  }

  const RowsParams& p_;
  const Steps& steps_;
  float* const room_;
  const int64_t stride_;
  const bool modulated_;
  Terms affine_, modulation_;
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
    float *y = buffer.floats((2 * most + 4) * stride), *residual = p.residual ? y + most * stride : nullptr;
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
