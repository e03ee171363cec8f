// qkv_prologue on the CPU: one task per page written. Bias, norm and rotation of a page's tokens in float32, then the
// page's tiles.
#include "../qkv.h"

#include <vector>

#include "elements.h"
#include "norms.h"
#include "pages.h"
#include "parallel.h"

namespace inferix {
namespace {

// x[size] becomes its norm, in groups of group_size, the weight's length: a layer norm if there is a bias.
void norm(float* x, int64_t size, const float* weight, const float* bias, int64_t group_size, float eps) {
  for (float* end = x + size; x < end; x += group_size) {
    if (bias) subtract_mean(x, group_size);
    const float inverse = inverse_rms(x, group_size, eps);
    for (int64_t i = 0; i < group_size; ++i) x[i] = x[i] * inverse * weight[i];
    if (bias)
      for (int64_t i = 0; i < group_size; ++i) x[i] += bias[i];
  }
}

// Turns the first 2 * pairs channels of one head; rope is [pairs, 2]: cos, sin.
void rotate(float* x, const float* rope, int64_t pairs, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : pairs;
  for (int64_t j = 0; j < pairs; ++j) {
    float &a = x[j * step], &b = x[j * step + distance];
    const float cos = rope[2 * j], sin = rope[2 * j + 1], turned = a * cos - b * sin;
    b = a * sin + b * cos;
    a = turned;
  }
}

template <typename X>
void prepare_token(const QkvPrologueParams& p, int64_t token, float* x) {
  const int64_t D = p.pages.k.width, q_size = p.query_heads * D, k_size = p.shape.H * D, width = q_size + 2 * k_size;
  const X* from = static_cast<const X*>(p.qkv) + token * p.qkv_stride;
  for (int64_t i = 0; i < width; ++i) x[i] = to_float(from[i]);
  if (p.bias)
    for (int64_t i = 0; i < width; ++i) x[i] += p.bias[i];
  if (p.norm_q) norm(x, q_size, p.norm_q, p.norm_q_bias, p.norm_q_size, p.eps);
  if (p.norm_k) norm(x + q_size, k_size, p.norm_k, p.norm_k_bias, p.norm_k_size, p.eps);
  if (p.rope)
    for (int64_t head = 0; head < p.query_heads + p.shape.H; ++head)
      rotate(x + head * D, p.rope + token * p.rope_pairs * 2, p.rope_pairs, p.interleaved);
  if (p.k_mean)
    for (int64_t i = 0; i < k_size; ++i) x[q_size + i] -= p.k_mean[i];
  X* q = static_cast<X*>(p.q) + token * q_size;
  for (int64_t i = 0; i < q_size; ++i) q[i] = from_float<X>(x[i]);
}

}  // namespace

void qkv_prologue_cpu(const QkvPrologueParams& p, const Cpu& cpu) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, p.pages.pages, s.page_size, p.T, true);
  const int64_t D = p.pages.k.width, q_size = p.query_heads * D, k_size = s.H * D, width = q_size + 2 * k_size;
  with_float_type(p.dtype, [&](auto type) {
    parallel_for(cpu.threads, p.where.n, [&](int64_t entry) {
      const int64_t length = p.where.lens[entry];
      thread_local std::vector<float> rows;  // [length, width]
      rows.resize(length * width);
      for (int64_t t = 0; t < length; ++t)
        prepare_token<decltype(type)>(p, starts[entry] + t, rows.data() + t * width);
      for (int64_t head = 0; head < s.H; ++head) {
        const float* k = rows.data() + q_size + head * D;
        write_tile(cpu.isa, tile_of(p.pages.k, s, p.where.ids[entry], head), k, width, length);
        write_tile(cpu.isa, tile_of(p.pages.v, s, p.where.ids[entry], head), k + k_size, width, length);
      }
    });
  });
}

}  // namespace inferix
