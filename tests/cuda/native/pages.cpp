// The CUDA kernels of kv_append, kv_commit, kv_gather and qkv_prologue, emulated on the CPU: a library that
// tests/cuda/machine.py calls with the structs of csrc/.
#include "describe.h"
#include "machine.h"

#include "../../../csrc/cuda/kv_pages.cuh"
#include "../../../csrc/cuda/qkv.cuh"

using namespace inferix;

namespace {

template <typename Kernel>
void run(int64_t blocks, int64_t blocks_y, Kernel&& kernel) {
  for (int64_t x = 0; x < blocks; ++x)
    for (int64_t y = 0; y < blocks_y; ++y) {
      sm90::Machine m(kPageThreads, uint32_t(x + y));
      sm90::machine = &m;
      m.run(int(x), int(y), kernel);
    }
}

}  // namespace

extern "C" {

const char* describe() {
  static const Description description = Description()
                                             .op<KvAppendParams>("kv_append")
                                             .op<KvCommitParams>("kv_commit")
                                             .op<KvGatherParams>("kv_gather")
                                             .op<QkvPrologueParams>("qkv_prologue");
  return description.text();
}
void kv_append(const KvAppendParams* p) {
  run(p->where.n, p->shape.H, [=] { kv_append_kernel(*p); });
}
void kv_commit(const KvCommitParams* p) {
  run(p->source_list.n, p->shape.H, [=] { kv_commit_kernel(*p); });
}
void kv_gather(const KvGatherParams* p) {
  run(p->where.n, p->shape.H, [=] { kv_gather_kernel(*p); });
}
void qkv_prologue(QkvPrologueParams* p) {
  std::vector<Moments> moments(p->T * (p->query_heads + p->shape.H));
  p->workspace = moments.data();
  const int64_t groups = moments_per_token(*p);
  run((p->T * groups + kPageWarps - 1) / kPageWarps, 1, [=] { qkv_moments_kernel(*p); });
  run(p->where.n, p->query_heads + 2 * p->shape.H, [=] { qkv_prologue_kernel(*p); });
}
}
