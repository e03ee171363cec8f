// merge_attention on CUDA: a warp per row. Compiled for sm_80 and sm_90a, never run on a GPU.
#include "../attention.h"
#include "check.cuh"
#include "elements.cuh"

namespace inferix {
namespace {

constexpr int kThreads = 256, kRowsPerBlock = kThreads / kWarp;

template <typename In, typename Out>
__global__ void merge_attention_kernel(MergeAttentionParams p) {
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const float a = p.lse_a[row], b = p.lse_b[row], highest = fmaxf(a, b);
  // -inf on both sides: any finite number in the maximum's place makes both weights 0.
  const float base = highest == -INFINITY ? 0.f : highest;
  const float weight_a = expf(a - base), weight_b = expf(b - base), total = weight_a + weight_b;
  const float share_a = weight_a / total, share_b = weight_b / total;
  const In *x = static_cast<const In*>(p.out_a) + row * p.D, *y = static_cast<const In*>(p.out_b) + row * p.D;
  Out* out = static_cast<Out*>(p.out) + row * p.D;
  // A side that saw no key contributes nothing, whatever its out holds: 0 * NaN is NaN, so it is chosen away. A
  // weight that is NaN is not 0, and shows.
  for (int64_t d = lane; d < p.D; d += kWarp)
    out[d] = from_float<Out>((weight_a != 0.f ? to_float(x[d]) * share_a : 0.f) +
                             (weight_b != 0.f ? to_float(y[d]) * share_b : 0.f));
  // lse may be lse_a or lse_b: every lane has read them before one of them writes.
  __syncwarp();
  if (lane == 0) p.lse[row] = base + logf(total);
}

}  // namespace

void merge_attention_cuda(const MergeAttentionParams& p, void* stream) {
  if (p.rows == 0) return;
  const dim3 grid(static_cast<unsigned>((p.rows + kRowsPerBlock - 1) / kRowsPerBlock));
  with_float_type(p.in_dtype, [&](auto in) {
    with_float_type(p.out_dtype, [&](auto out) {
      merge_attention_kernel<decltype(in), decltype(out)>
          <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check_launch("merge_attention");
}

}  // namespace inferix
