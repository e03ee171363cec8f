// The loads of the Hopper attention kernel to shared memory: keys and values by TMA, queries by the consumer warpgroup
// that needs them. Codes that must be widened: widen_sm90.cuh.
#pragma once
#include "shared_sm90.cuh"

namespace inferix::sm90 {

// A position in the circular buffer of stages: use n is in stage n % kStages, and is the n / kStages-th use of it.
template <int kStages>
struct PipelineState {
  uint32_t stage = 0, phase = 0;
  INFERIX_DEVICE void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

INFERIX_DEVICE void load_scales(const Plane& plane, int64_t first, float* to, uint64_t* barrier, int count) {
  tma_load_1d(static_cast<const float*>(plane.scales) + first, to, barrier, count * sizeof(float));
}

template <Kind kKind, int kD>
INFERIX_DEVICE void load_keys(const AttentionArgs& p, const TensorMap (&maps)[kMaxPools],
                              SharedStorage<kKind, kD>& shared, int stage, const Unit (&units)[kUnits], int head) {
  using S = SharedStorage<kKind, kD>;
  uint64_t* full = &shared.keys_full[stage];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int row = units[u].row + head * p.page_size, pool = units[u].pool;
    const TensorMap& map = maps[pool];
    if constexpr (S::kEightBit) {
      tma_load_5d(map, shared.keys[stage] + u * S::kUnitBytes, full, 0, 0, 0, 0, row / 16);
      load_scales(p.k[pool], row, shared.key_scales[stage] + u * kUnitKeys, full, kUnitKeys);
    } else {
      for (int panel = 0; panel < S::kPanels; ++panel)
        tma_load_2d(map, shared.keys[stage] + panel * S::kPanelBytes + u * S::kPanelBytes / kUnits, full, panel * 64,
                    row);
    }
  }
}

template <Kind kKind, int kD>
INFERIX_DEVICE void load_values(const AttentionArgs& p, const TensorMap (&maps)[kMaxPools],
                                SharedStorage<kKind, kD>& shared, int stage, const Unit (&units)[kUnits], int head) {
  using S = SharedStorage<kKind, kD>;
  uint64_t* full = &shared.values_full[stage];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int pool = units[u].pool;
    const TensorMap& map = maps[pool];
    if constexpr (S::kEightBit) {
      const int row = (units[u].row / p.page_size + head) * kD;
      tma_load_5d(map, shared.values[stage] + u * S::kUnitBytes, full, units[u].row % p.page_size, 0, 0, 0, row / 16);
      load_scales(p.v[pool], row, shared.value_scales[stage] + u * kD, full, kD);
    } else {
      const int row = units[u].row + head * p.page_size;
      for (int panel = 0; panel < S::kPanels; ++panel)
        tma_load_2d(map, shared.values[stage] + panel * S::kPanelBytes + u * S::kPanelBytes / kUnits, full, panel * 64,
                    row);
    }
  }
}

// The producer thread.
template <Kind kKind, int kD>
INFERIX_DEVICE void produce(const AttentionArgs& p, const TensorMaps& maps, SharedStorage<kKind, kD>& shared) {
  using S = SharedStorage<kKind, kD>;
  PipelineState<S::kStages> pipeline;
  ProducerState& producer = shared.producer;
  for (producer.begin(p); producer.more; producer.step(p)) {
    const int stage = pipeline.stage, head = producer.head(p);
    mbarrier_wait(&shared.keys_empty[stage], pipeline.phase ^ 1);
    shared.tiles[stage] = producer.info();
    mbarrier_arrive_expect_tx(&shared.keys_full[stage], S::kKeyBytes);
    load_keys(p, maps.keys, shared, stage, producer.units, head);
    mbarrier_wait(&shared.values_empty[stage], pipeline.phase ^ 1);
    mbarrier_arrive_expect_tx(&shared.values_full[stage], S::kValueBytes);
    load_values(p, maps.values, shared, stage, producer.units, head);
    pipeline.advance();
  }
}

// 64 query rows of one variant to shared memory, as 8-bit pages need them. Rows past the end are zeros.
template <Kind kKind, int kD>
INFERIX_DEVICE void load_queries(const AttentionArgs& p, int variant, SharedStorage<kKind, kD>& shared, int warpgroup,
                                 int t) {
  using S = SharedStorage<kKind, kD>;
  t = opaque(t);
  const RowBlock rows = shared.consumers[warpgroup].rows;
  constexpr int kChunks = kD * 2 / kChunk;                           // of a row of bf16
  constexpr int kStep = kWarpgroup / kChunks, kLoads = kWgmmaM / kStep;  // rows at once, and how often
  const int first = t / kChunks, chunk = t % kChunks;
  const char* from = p.q + 2 * (variant * p.q_variant_stride) + chunk * kChunk;
  Chunk loaded[kLoads];  // all are on their way before the first is needed
#pragma unroll
  for (int n = 0; n < kLoads; ++n) {
    const int r = first + n * kStep;
    loaded[n] = Chunk{};
    if (rows.has(r))
      loaded[n] = *reinterpret_cast<const Chunk*>(
          from + 2 * (rows.query(r) * p.q_token_stride + rows.head(r) * p.q_head_stride));
  }
  named_barrier_sync(1 + warpgroup, kWarpgroup);  // no warp still multiplies the queries before
#pragma unroll
  for (int load = 0; load < kLoads; ++load) {
    const int r = first + load * kStep;
    const Chunk x = loaded[load];
    if constexpr (S::kEightBit) {
      float values[8];
      uint32_t largest = 0;  // as bits, of which a NaN's are the largest: a row with one gets a scale that is NaN
      for (int n = 0; n < 8; ++n) {
        values[n] = float_of(n % 2 ? x.word[n / 2] & 0xffff0000u : x.word[n / 2] << 16);
        const uint32_t magnitude = bits_of(values[n]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
      }
      for (int distance = kChunks / 2; distance > 0; distance /= 2) {
        const uint32_t other = shfl_xor(largest, distance);
        largest = other > largest ? other : largest;
      }
      const float amax = float_of(largest < bits_of(kAmaxFloor) ? bits_of(kAmaxFloor) : largest);
      constexpr float kTop = is_int8(kKind) ? kInt8Max : kE4m3Max;
      const float inverse = div_rn(kTop, amax);
      if (chunk == 0) shared.query_scales[warpgroup][r] = amax * (1.f / kTop);
      for (int n = 0; n < 8; ++n) values[n] *= inverse;
      uint32_t* to = reinterpret_cast<uint32_t*>(shared.queries[warpgroup] + tile_offset(r, chunk * 8, kWgmmaM, kD));
      to[0] = S::pack_codes(values);
      to[1] = S::pack_codes(values + 4);
    } else {
      *reinterpret_cast<Chunk*>(shared.queries[warpgroup] + tile_offset(r, chunk * kChunk, kWgmmaM, kD * 2)) = x;
    }
  }
  fence_proxy_async();
  named_barrier_sync(1 + warpgroup, kWarpgroup);
}

// Values past the end of a page may be anything, and their weight of 0 does not undo a NaN: they become 0. So do the
// scales of a page of nothing. Each warpgroup does it for itself; that others do the same at the same time is harmless.
template <Kind kKind, int kD>
INFERIX_DEVICE void clear_unused_values(SharedStorage<kKind, kD>& shared, int stage, int u, int length, int warpgroup,
                                        int t) {
  using S = SharedStorage<kKind, kD>;
  t = opaque(t);
  if constexpr (S::kEightBit) {
    for (int channel = t; channel < kD; channel += kWarpgroup) {
      char* unit = shared.values[stage] + u * S::kUnitBytes;
      for (int key = length & ~3; key < kUnitKeys; key += 4) {
        uint32_t& word = *reinterpret_cast<uint32_t*>(unit + tile_offset(channel, key, kD, kUnitKeys));
        word = key < length ? word & ((1u << 8 * (length - key)) - 1) : 0;
      }
      if (length == 0) shared.value_scales[stage][u * kD + channel] = 0.f;
    }
  } else {
    constexpr int kRowChunks = 128 / kChunk;
    const int first = u * kUnitKeys + length, count = (kUnitKeys - length) * kRowChunks;
    for (int panel = 0; panel < S::kPanels; ++panel)
      for (int i = t; i < count; i += kWarpgroup)
        *reinterpret_cast<Chunk*>(shared.values[stage] + panel * S::kPanelBytes + first * 128 + i * kChunk) = Chunk{};
  }
  fence_proxy_async();
  named_barrier_sync(1 + warpgroup, kWarpgroup);
}

}  // namespace inferix::sm90
