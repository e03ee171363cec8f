// qkv_prologue on the CPU: one task per page written. Bias, norm and rotation of a page's tokens in float32, then the
// page's tiles.
#include "../qkv.h"

#include <cstring>

#include "norms.h"
#include "pages.h"
#include "parallel.h"

namespace inferix {
namespace {

// x[size] becomes its norm, in groups of group_size, the weight's length: a layer norm if there is a bias.
INFERIX_INLINE void norm(float* x, int64_t size, const float* weight, const float* bias, int64_t group_size,
                         float eps) {
  for (float* end = x + size; x < end; x += group_size) {
    if (bias) subtract_mean(x, group_size);
    const float inverse = inverse_rms(x, group_size, eps);
    for (int64_t i = 0; i < group_size; ++i) x[i] = x[i] * inverse * weight[i];
    if (bias)
      for (int64_t i = 0; i < group_size; ++i) x[i] += bias[i];
  }
}

// Turns the first 2 * pairs channels of one head; rope is [pairs, 2]: cos, sin.
INFERIX_INLINE void rotate(float* __restrict x, const float* __restrict rope, int64_t pairs, bool interleaved) {
  if (interleaved) {
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1], cos = rope[2 * j], sin = rope[2 * j + 1];
      x[2 * j] = a * cos - b * sin;
      x[2 * j + 1] = a * sin + b * cos;
    }
  } else {
    float* __restrict second = x + pairs;
    for (int64_t j = 0; j < pairs; ++j) {
      const float a = x[j], b = second[j], cos = rope[2 * j], sin = rope[2 * j + 1];
      x[j] = a * cos - b * sin;
      second[j] = a * sin + b * cos;
    }
  }
}

// One token's q, k and v in float32, x [(query_heads + 2 H) * D].
INFERIX_INLINE void prepare(const QkvPrologueParams& p, int64_t token, float* x) {
  const int64_t D = p.pages.k.width, q_size = p.query_heads * D, k_size = p.shape.H * D, width = q_size + 2 * k_size;
  if (p.bias)
    for (int64_t i = 0; i < width; ++i) x[i] += p.bias[i];
  if (p.norm_q) norm(x, q_size, p.norm_q, p.norm_q_bias, p.norm_q_size, p.eps);
  if (p.norm_k) norm(x + q_size, k_size, p.norm_k, p.norm_k_bias, p.norm_k_size, p.eps);
  if (p.rope)
    for (int64_t head = 0; head < p.query_heads + p.shape.H; ++head)
      rotate(x + head * D, p.rope + token * p.rope_pairs * 2, p.rope_pairs, p.interleaved);
  if (p.k_mean)
    for (int64_t i = 0; i < k_size; ++i) x[q_size + i] -= p.k_mean[i];
}

using Prepare = void (*)(const QkvPrologueParams&, int64_t, float*);

void prepare_portable(const QkvPrologueParams& p, int64_t token, float* x) { prepare(p, token, x); }

#if defined(__x86_64__)
INFERIX_V3 void prepare_v3(const QkvPrologueParams& p, int64_t token, float* x) { prepare(p, token, x); }
INFERIX_V4 void prepare_v4(const QkvPrologueParams& p, int64_t token, float* x) { prepare(p, token, x); }

Prepare prepare_for(Isa isa) { return dispatch<Prepare>(isa, prepare_portable, prepare_v3, prepare_v4); }
#else
Prepare prepare_for(Isa) { return prepare_portable; }
#endif

}  // namespace

void qkv_prologue_cpu(const QkvPrologueParams& p, const Cpu& cpu) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, p.pages.pages, s.page_size, p.T, true);
  const int64_t D = p.pages.k.width, q_size = p.query_heads * D, k_size = s.H * D, width = q_size + 2 * k_size;
  const int64_t bytes = p.dtype == DType::f32 ? 4 : 2;
  const Prepare prepare_token = prepare_for(cpu.isa);
  parallel_for(cpu.threads, p.where.n, [&](int64_t entry) {
    const int64_t length = p.where.lens[entry];
    // Keys and values are buffered until their page is complete; a token's row stays in the L1 cache meanwhile.
    thread_local Buffer buffer;
    float *x = buffer.floats(width + length * 2 * k_size), *rows = x + width;
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = starts[entry] + t;
      const char* from = static_cast<const char*>(p.qkv) + token * p.qkv_stride * bytes;
      to_floats(cpu.isa, p.dtype, from, width, 1, width, x, width);
      // The next token arrives while this one is computed.
      for (int64_t i = 0; token + 1 < p.T && i < width * bytes; i += 64)
        __builtin_prefetch(from + p.qkv_stride * bytes + i);
      prepare_token(p, token, x);
      from_floats(cpu.isa, p.dtype, x, q_size, 1, q_size, static_cast<char*>(p.q) + token * q_size * bytes, q_size);
      std::memcpy(rows + t * 2 * k_size, x + q_size, 2 * k_size * sizeof(float));
    }
    for (int64_t head = 0; head < s.H; ++head) {
      const float* k = rows + head * D;
      write_tile(cpu.isa, tile_of(p.pages.k, s, p.where.ids[entry], head), k, 2 * k_size, length);
      write_tile(cpu.isa, tile_of(p.pages.v, s, p.where.ids[entry], head), k + k_size, 2 * k_size, length);
    }
  });
}

}  // namespace inferix
