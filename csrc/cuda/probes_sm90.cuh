// Each stage of the attention kernel by itself, for its first run on a GPU: a failure here explains a failure of the
// whole. Compiled for the CPU too.
#pragma once
#include "attention_sm90.cuh"

namespace inferix::sm90 {

// One key tile by TMA, widened if its kind is, as it lies in shared memory: keys [tile bytes], values [tile bytes], the
// scales of keys that multiply scores [128], and with 8 bits those of values [2, D].
template <Kind kKind, int kD>
INFERIX_KERNEL(kWarpgroup)
probe_load_kernel(INFERIX_GRID_CONSTANT AttentionArgs p, INFERIX_GRID_CONSTANT TensorMaps maps, int first_row,
                  int second_row, int head, char* keys, char* values, float* key_scales, float* value_scales) {
  using S = SharedStorage<kKind, kD>;
  S& shared = shared_storage<kKind, kD>();
  const int t = thread_index();
  Unit(&units)[kUnits] = shared.producer.units;
  uint64_t *keys_full = &shared.keys_full[0], *values_full = &shared.values_full[0];
  if constexpr (S::kWide) keys_full = &shared.raw.keys.full, values_full = &shared.raw.values.full;
  if (t == 0) {
    units[0] = {first_row, kUnitKeys, 0, 0.f, 0};
    units[1] = {second_row, kUnitKeys, 0, 0.f, 0};
    mbarrier_init(keys_full, 1);
    mbarrier_init(values_full, 1);
    fence_mbarrier_init();
    if constexpr (S::kWide) {
      load_raw(p, p.k, maps.keys, units, head, shared.raw.keys);
      load_raw(p, p.v, maps.values, units, head, shared.raw.values);
    } else {
      mbarrier_arrive_expect_tx(keys_full, S::kKeyBytes);
      load_keys(p, maps.keys, shared, 0, units, head);
      mbarrier_arrive_expect_tx(values_full, S::kValueBytes);
      load_values(p, maps.values, shared, 0, units, head);
    }
  }
  sync_threads();
  mbarrier_wait(keys_full, 0);
  mbarrier_wait(values_full, 0);
  if constexpr (S::kWide) {
    widen_keys(shared, 0, t);
    widen_values(shared, 0, {kUnitKeys, kUnitKeys}, t);
    sync_threads();
  }
  for (int i = t; i < S::kTileBytes; i += kWarpgroup) {
    keys[i] = shared.keys[0][i];
    values[i] = shared.values[0][i];
  }
  if constexpr (S::kKeyScales)
    for (int i = t; i < kBlockN; i += kWarpgroup) key_scales[i] = shared.key_scales[0][i];
  if constexpr (S::kEightBit)
    for (int i = t; i < kUnits * kD; i += kWarpgroup) value_scales[i] = shared.value_scales[0][i];
}

// scores [64, 128] = q [64, width bytes] . k [128, width bytes], of the type that is multiplied; columns in the order
// of k's rows.
template <Kind kKind, int kD>
INFERIX_KERNEL(kWarpgroup)
probe_scores_kernel(const char* q, const char* k, float* scores) {
  using S = SharedStorage<kKind, kD>;
  S& shared = shared_storage<kKind, kD>();
  const int t = thread_index();
  for (int i = t; i < kWgmmaM * S::kWidth; i += kWarpgroup)
    shared.queries[0][tile_offset(i / S::kWidth, i % S::kWidth, kWgmmaM, S::kWidth)] = q[i];
  for (int i = t; i < kBlockN * S::kWidth; i += kWarpgroup)
    shared.keys[0][tile_offset(i / S::kWidth, i % S::kWidth, kBlockN, S::kWidth)] = k[i];
  if constexpr (S::kKeyScales)
    for (int i = t; i < kBlockN; i += kWarpgroup) shared.key_scales[0][i] = 1.f;
  fence_proxy_async();
  sync_threads();
  float mine[kScores];
  qk_product(shared, 0, 0, mine, t);
#pragma unroll
  for (int i = 0; i < kScores; ++i) scores[accumulator_row(t, i) * kBlockN + accumulator_column(t, i)] = mine[i];
}

// out [64, D] = weights [64, 128] . v. v as bytes: [128, D]; transposed [2, D, 64], of each unit of 64 keys, and with 8
// bits in the order of channel_of.
template <Kind kKind, int kD>
INFERIX_KERNEL(kWarpgroup)
probe_values_kernel(const float* weights, const char* v, float* out) {
  using S = SharedStorage<kKind, kD>;
  S& shared = shared_storage<kKind, kD>();
  const int t = thread_index();
  for (int i = t; i < S::kTileBytes; i += kWarpgroup) {
    if constexpr (S::kTransposed) {
      constexpr int kWide = kUnitKeys * S::kElementBytes;
      const int u = i / S::kUnitBytes, within = i % S::kUnitBytes;
      shared.values[0][u * S::kUnitBytes + tile_offset(within / kWide, within % kWide, kD, kWide)] = v[i];
    } else {
      shared.values[0][tile_offset(i / (2 * kD), i % (2 * kD), kBlockN, 2 * kD)] = v[i];
    }
  }
  for (int i = t; i < kUnits * kD; i += kWarpgroup) shared.value_scales[0][S::kEightBit ? i : 0] = 1.f;
  fence_proxy_async();
  sync_threads();
  float mine[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) mine[i] = 0.f;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    uint32_t packed[S::kUnitSteps][4];
#pragma unroll
    for (int step = 0; step < S::kUnitSteps; ++step)
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float w[S::kPerRegister];
#pragma unroll
        for (int n = 0; n < S::kPerRegister; ++n) {
          const int i = S::a_fragment_source(word, n, step);
          w[n] = weights[accumulator_row(t, i) * kBlockN + u * kUnitKeys + key_of(t, i, S::kEightBit)];
        }
        packed[step][word] = S::pack_weights(w);
      }
    pv_product(shared, 0, u, packed, mine, t);
    wgmma_wait_all();
    warpgroup_fence_operand(mine);
  }
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) out[accumulator_row(t, i) * kD + channel_of(t, i, S::kEightBit)] = mine[i];
}

}  // namespace inferix::sm90
