// Does the emulator notice? Small kernels with one mistake each, named on the command line.
#include <string>

#include "machine.h"

using namespace inferix;
using namespace inferix::sm90;

namespace {

float source[4] = {1, 2, 3, 4};
std::string mistake;
bool has(const char* name) { return mistake == name; }

// Thread 0 loads four numbers eight times through one stage; all others add them up.
void pipeline() {
  float* stage = reinterpret_cast<float*>(shared_memory());
  auto* full = reinterpret_cast<uint64_t*>(shared_memory() + 64);
  auto* empty = full + 1;
  auto* sums = reinterpret_cast<float*>(shared_memory() + 128);
  const int t = thread_index();
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, has("an arrival too few") ? 64 : 63);
  }
  sync_threads();
  if (t == 0) {
    for (int use = 0; use < 8; ++use) {
      if (!has("no wait for the stage")) mbarrier_wait(empty, (use & 1) ^ 1);
      mbarrier_arrive_expect_tx(full, has("bytes too many") ? 32 : 16);
      tma_load_1d(source, stage, full, 16);
    }
    return;
  }
  float sum = 0;
  for (int use = 0; use < 8; ++use) {
    if (!has("no wait for the copy")) mbarrier_wait(full, has("the wrong phase") ? (use & 1) ^ 1 : use & 1);
    for (int i = 0; i < 4; ++i) sum += stage[i];
    mbarrier_arrive(empty);
  }
  sums[t] = sum;
}

// The product of two tiles that are cleared after it.
void product() {
  char* tile = shared_memory() + (-shared_address(shared_memory()) & 1023);
  const int t = thread_index();
  for (int i = t; i < 192 * 64; i += kWarpgroup) reinterpret_cast<uint16_t*>(tile)[i] = from_float<Bf16>(1.f).bits;
  sync_threads();
  float d[64];
  const uint32_t start = shared_address(tile) / kChunk;
  wgmma_ss_bf16(d, k_major_descriptor(start, 128), k_major_descriptor(start + 64 * 128 / kChunk, 128), false);
  wgmma_commit_group();
  if (has("no wait for the product")) std::memset(tile, 0, 192 * 128);
  wgmma_wait_all();
  if (d[5] != 16.f) fail("a wrong product");
}

}  // namespace

int main(int, char** argv) {
  mistake = argv[1];
  for (uint32_t seed = 0; seed < 20; ++seed) {
    Machine m(64, seed);
    machine = &m;
    m.run(0, 0, pipeline);
    for (int t = 1; t < 64; ++t)
      if (reinterpret_cast<float*>(shared_memory() + 128)[t] != 80.f) fail("a wrong sum");
    Machine other(kWarpgroup, seed);
    machine = &other;
    other.run(0, 0, product);
  }
}
