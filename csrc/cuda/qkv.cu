// Launches of qkv_prologue. Compiled for sm_80 and sm_90a, never run on a GPU; tests/cuda/native emulates one
// on the CPU and runs the kernels there.
#include "qkv.cuh"

#include "check.cuh"

namespace inferix {

int64_t qkv_prologue_workspace(const QkvPrologueParams& p) {
  return p.T * (p.query_heads + p.shape.H) * int64_t(sizeof(Moments));  // at most a norm for each head
}

void qkv_prologue_cuda(const QkvPrologueParams& p, void* stream) {
  if (p.pages.k.width > kMaxWidth)
    throw Unsupported("qkv_prologue: the CUDA kernel takes at most " + std::to_string(kMaxWidth) + " channels, got " +
                      std::to_string(p.pages.k.width));
  if (!is_contiguous(p.pages, p.shape))
    throw Unsupported("qkv_prologue: the CUDA kernel takes contiguous pages only");
  if (p.where.n == 0 || p.T == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t q_groups = p.norm_q ? p.query_heads * p.pages.k.width / p.norm_q_size : 0;
  const int64_t k_groups = p.norm_k ? p.shape.H * p.pages.k.width / p.norm_k_size : 0;
  const int64_t moments = p.T * (q_groups + k_groups);
  if (moments) {
    qkv_moments_kernel<<<static_cast<unsigned>((moments + kPageWarps - 1) / kPageWarps), kPageThreads, 0, s>>>(p);
    check_launch("qkv_prologue");
  }
  const dim3 grid(static_cast<unsigned>(p.where.n), static_cast<unsigned>(p.query_heads + 2 * p.shape.H));
  qkv_prologue_kernel<<<grid, kPageThreads, sizeof(PageSharedStorage), s>>>(p);
  check_launch("qkv_prologue");
}

}  // namespace inferix
