// quantize_rows and add_norm on the CPU: what stands before a linear layer, in float32, then codes or floats.
#include <algorithm>

#include "../linear.h"
#include "linear_activation.h"
#include "codecs.h"
#include "norms.h"
#include "parallel.h"

namespace inferix {
namespace {

// y becomes residual + gate * y; the residual's row in float32, or null.
INFERIX_INLINE void add(const RowsParams& p, int64_t row, float* __restrict y, const float* __restrict residual) {
  if (const float* gate = p.gate.row(row, p.M, p.K))
    for (int64_t k = 0; k < p.K; ++k) y[k] *= gate[k];
  if (residual)
    for (int64_t k = 0; k < p.K; ++k) y[k] += residual[k];
}

// y is a whole number of Columns, zeros past K.
template <typename S>
INFERIX_INLINE void prepare(const RowsParams& p, int64_t row, float* __restrict y) {
  if (p.norm == Norm::layer) subtract_mean(y, p.K);
  if (p.norm != Norm::none) {
    const float inverse = inverse_rms(y, p.K, p.eps);
    for (int64_t k = 0; k < p.K; ++k) y[k] *= inverse;
  }
  if (p.weight)
    for (int64_t k = 0; k < p.K; ++k) y[k] *= p.weight[k];
  if (p.bias)
    for (int64_t k = 0; k < p.K; ++k) y[k] += p.bias[k];
  if (const float* scale = p.scale.row(row, p.M, p.K))
    for (int64_t k = 0; k < p.K; ++k) y[k] *= 1.f + scale[k];
  if (const float* shift = p.shift.row(row, p.M, p.K))
    for (int64_t k = 0; k < p.K; ++k) y[k] += shift[k];
  with_activation<S>(p.activation, [&](auto activate) INFERIX_INLINE_LAMBDA {
    for (int64_t k = 0; k < p.K; k += kLanes) {
      Column& column = *reinterpret_cast<Column*>(y + k);
      for (int part = 0; part < S::kParts; ++part) S::part(column, part) = activate(S::part(column, part));
    }
  });
}

// The two steps for one instruction set.
struct Steps {
  void (*add)(const RowsParams&, int64_t, float*, const float*);
  void (*prepare)(const RowsParams&, int64_t, float*);
};

void add_portable(const RowsParams& p, int64_t row, float* y, const float* r) { add(p, row, y, r); }
void prepare_portable(const RowsParams& p, int64_t row, float* y) { prepare<Simd<4>>(p, row, y); }
constexpr Steps kPortable{add_portable, prepare_portable};
#if defined(__x86_64__)
INFERIX_V3 void add_v3(const RowsParams& p, int64_t row, float* y, const float* r) { add(p, row, y, r); }
INFERIX_V4 void add_v4(const RowsParams& p, int64_t row, float* y, const float* r) { add(p, row, y, r); }
INFERIX_V3 void prepare_v3(const RowsParams& p, int64_t row, float* y) { prepare<Simd<8>>(p, row, y); }
INFERIX_V4 void prepare_v4(const RowsParams& p, int64_t row, float* y) { prepare<Simd<16>>(p, row, y); }
Steps steps_for(Isa isa) { return dispatch<Steps>(isa, kPortable, {add_v3, prepare_v3}, {add_v4, prepare_v4}); }
#else
Steps steps_for(Isa) { return kPortable; }
#endif

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
    float *y = buffer.floats(2 * most * stride), *residual = p.residual ? y + most * stride : nullptr;
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
      for (int64_t i = 0; i < count && !plain; ++i) steps.prepare(p, row + i, y + i * stride);
      const int64_t bytes = element_bytes(p.codec);
      char* scales = reinterpret_cast<char*>(p.scales ? p.scales + row : nullptr);
      encode(cpu.isa, {p.codec, count, p.K, p.K * bytes, place(static_cast<char*>(p.out), row, bytes), scales, nullptr},
             y, stride, count);
    }
  });
}

}  // namespace inferix
