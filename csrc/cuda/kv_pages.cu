// Launches of kv_append, kv_commit and kv_gather. Compiled for sm_80 and sm_90a, never run on a GPU;
// tests/cuda/native emulates one on the CPU and runs the kernels there.
#include "kv_pages.cuh"

#include "check.cuh"

namespace inferix {
namespace {

void check_width(const char* op, const Pool& pool) {
  for (const int64_t width : {pool.k.width, pool.v.width})
    if (width > kMaxWidth)
      throw Unsupported(std::string(op) + ": the CUDA kernel takes at most " + std::to_string(kMaxWidth) +
                        " channels, got " + std::to_string(width));
}

// What another's cache may have, and ours has not.
void check_layout(const char* op, const Pool& pool, const PageShape& shape) {
  if (!is_contiguous(pool, shape)) throw Unsupported(std::string(op) + ": the CUDA kernel takes contiguous pages only");
}

template <typename Params>
void launch(const char* op, void (*kernel)(Params), const Params& p, const PageList& list, void* stream) {
  const dim3 grid(static_cast<unsigned>(list.n), static_cast<unsigned>(p.shape.H));
  kernel<<<grid, kPageThreads, sizeof(PageSharedStorage), static_cast<cudaStream_t>(stream)>>>(p);
  check_launch(op);
}

}  // namespace

void kv_append_cuda(const KvAppendParams& p, void* stream) {
  check_width("kv_append", p.pages);
  check_layout("kv_append", p.pages, p.shape);
  if (p.where.starts) throw Unsupported("kv_append: the CUDA kernel takes no where.starts");
  if (p.where.n == 0) return;
  launch("kv_append", kv_append_kernel, p, p.where, stream);
}

void kv_commit_cuda(const KvCommitParams& p, void* stream) {
  check_width("kv_commit", p.source);
  check_layout("kv_commit", p.source, p.shape);
  check_layout("kv_commit", p.target, p.shape);
  if (p.source_list.n == 0) return;
  launch("kv_commit", kv_commit_kernel, p, p.source_list, stream);
}

void kv_gather_cuda(const KvGatherParams& p, void* stream) {
  for (int i = 0; i < p.pools.count; ++i) check_layout("kv_gather", p.pools.pool[i], p.shape);
  if (p.where.n == 0) return;
  launch("kv_gather", kv_gather_kernel, p, p.where, stream);
}

}  // namespace inferix
