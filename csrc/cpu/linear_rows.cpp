// quantize_rows on the CPU: what stands before a linear layer, in float32, then codes.
#include <algorithm>

#include "../linear.h"
#include "linear_activation.h"
#include "codecs.h"
#include "norms.h"
#include "parallel.h"

namespace inferix {
namespace {

// y is a whole number of Columns, zeros past K.
template <typename S>
INFERIX_INLINE void prepare(const QuantizeRowsParams& p, int64_t row, float* __restrict y) {
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

using Prepare = void (*)(const QuantizeRowsParams&, int64_t, float*);
void prepare_portable(const QuantizeRowsParams& p, int64_t row, float* y) { prepare<Simd<4>>(p, row, y); }
#if defined(__x86_64__)
INFERIX_V3 void prepare_v3(const QuantizeRowsParams& p, int64_t row, float* y) { prepare<Simd<8>>(p, row, y); }
INFERIX_V4 void prepare_v4(const QuantizeRowsParams& p, int64_t row, float* y) { prepare<Simd<16>>(p, row, y); }
Prepare prepare_for(Isa isa) { return dispatch<Prepare>(isa, prepare_portable, prepare_v3, prepare_v4); }
#else
Prepare prepare_for(Isa) { return prepare_portable; }
#endif

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p, const Cpu& cpu) {
  constexpr int64_t kRowsPerTask = 16, kFloats = 4096;  // at once, in the L1 cache
  const Prepare prepare_row = prepare_for(cpu.isa);
  const int64_t stride = (p.K + kLanes - 1) / kLanes * kLanes,
                most = std::max<int64_t>(1, kFloats / std::max<int64_t>(stride, 1));
  const bool plain = p.norm == Norm::none && !p.weight && !p.bias && !p.scale.data && !p.shift.data &&
                     p.activation == Activation::none;
  parallel_for(cpu.threads, (p.M + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    thread_local Buffer buffer;
    float* y = buffer.floats(most * stride);
    const int64_t end = std::min(p.M, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; row += most) {
      const int64_t count = std::min(most, end - row);
      const char* x = static_cast<const char*>(p.x) + row * p.x_stride * element_bytes(p.x_dtype);
      to_floats(cpu.isa, p.x_dtype, x, p.x_stride, count, p.K, y, stride);
      for (int64_t i = 0; i < count && !plain; ++i) prepare_row(p, row + i, y + i * stride);
      const Tile codes{
          p.codec, count, p.K, p.K, static_cast<char*>(p.codes) + row * p.K, reinterpret_cast<char*>(p.scales + row),
          nullptr};
      encode(cpu.isa, codes, y, stride, count);
    }
  });
}

}  // namespace inferix
