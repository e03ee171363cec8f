// paged_attention on Hopper: the kernel itself, on top of ptx.cuh and wgmma.cuh. Compiled for the CPU too, on top of
// tests/cuda/native/machine.h.
//
// Warp-specialised, four warpgroups in a block. The last, the producer, loads keys and values by TMA, straight from the
// pages that the plan names, into a circular buffer of stages: once for all 192 query rows of the block. If they must
// be widened for the tensor cores it does that too; else one of its threads is enough. The others, the consumers, have
// 64 rows each and go through the stages independently: scores, softmax, weighted sum of values. While one waits for
// its wgmma the others keep the tensor cores busy.
//
// A row is a query and one of the query heads that read the same KV head: row r of a strip is query r / group, query
// head head * group + r % group.
#pragma once
#include "widen_sm90.cuh"

namespace inferix::sm90 {

constexpr int kScores = kBlockN / 2;  // of a thread: 64 rows of 128 keys, over 128 threads

// What a warpgroup's scores are multiplied with, of a thread's two rows, in units of log 2.
template <Kind kKind, int kD>
struct ScoreScales {
  float of_row[is_eight_bit(kKind) ? 2 : 1];

  INFERIX_DEVICE float at(const AttentionArgs& p, int r) const {
    if constexpr (is_eight_bit(kKind)) return of_row[r];
    else return p.scale;
  }
  INFERIX_DEVICE void read(const AttentionArgs& p, const SharedStorage<kKind, kD>& shared, int warpgroup, int t) {
    if constexpr (is_eight_bit(kKind))
#pragma unroll
      for (int r = 0; r < 2; ++r) of_row[r] = p.scale * shared.query_scales[warpgroup][accumulator_row(t, 2 * r)];
  }
};

// Where an array of SharedStorage lies, in the units of a descriptor: one sum, of what is the same all the time.
#define INFERIX_START_OF(S, base, member) ((base) + uint32_t(offsetof(S, member) / kChunk))

// scores[i] = q . k of a key tile, without the scale of the query's row.
template <Kind kKind, int kD>
INFERIX_DEVICE void qk_product(SharedStorage<kKind, kD>& shared, int stage, int warpgroup, float (&scores)[kScores],
                               int t) {
  using S = SharedStorage<kKind, kD>;
  const uint32_t base = shared_address(&shared) / kChunk;
  const uint64_t q = k_major_descriptor(
      INFERIX_START_OF(S, base, queries) + warpgroup * (kWgmmaM * S::kWidth / kChunk), S::kRowBytes);
  const uint64_t k =
      k_major_descriptor(INFERIX_START_OF(S, base, keys) + stage * (S::kTileBytes / kChunk), S::kRowBytes);
  // Floats become scores where they are: the registers are not there twice.
  int32_t integers[is_int8(kKind) ? kScores : 1];
  auto& raw = [&]() -> auto& {
    if constexpr (is_int8(kKind)) return integers;
    else return scores;
  }();
  warpgroup_fence_operand(raw);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < S::kWidth / kWgmmaKBytes; ++step) {
    const uint64_t left = q + k_major_offset(step, kWgmmaM, S::kWidth) / kChunk;
    const uint64_t right = k + k_major_offset(step, kBlockN, S::kWidth) / kChunk;
    if constexpr (is_int8(kKind)) wgmma_ss_s8(raw, left, right, step > 0);
    else if constexpr (S::kEightBit) wgmma_ss_e4m3(raw, left, right, step > 0);
    else if constexpr (query_type(kKind) == DType::f16) wgmma_ss_f16(raw, left, right, step > 0);
    else wgmma_ss_bf16(raw, left, right, step > 0);
  }
  wgmma_commit_group();
  wgmma_wait_all();
  warpgroup_fence_operand(raw);
  if constexpr (S::kKeyScales) {
    constexpr int kRun = S::kPerRegister;  // neighbouring keys of a thread: with 8 bits four, see key_of_column_8
    const float* scales = shared.key_scales[stage] + t % 4 * kRun;
#pragma unroll
    for (int i = 0; i < kScores; i += 2 * kRun) {
      const Floats<kRun> scale = *reinterpret_cast<const Floats<kRun>*>(scales + 2 * i);
#pragma unroll
      for (int n = 0; n < 2 * kRun; ++n) scores[i + n] = float(raw[i + n]) * scale.x[n / 4 * 2 + n % 2];
    }
  }
}

// The online softmax of a thread's two rows so far.
struct Softmax {
  // Of the scores, in units of log 2; before the first, so low that none is lower, and finite: with it as the base all
  // weights of nothing are 0.
  float row_max[2] = {-0x1p127f, -0x1p127f};
  float row_sum[2] = {0.f, 0.f};  // this thread's part of the sum of 2^(score - row_max + kLog2WeightScale)
};

// Scores of a unit become exponents by one fma: score * scale + offset = score in units of log 2 - row_max +
// kLog2WeightScale.
struct Exponents {
  float scale[2], offset[2][kUnits];  // of the thread's two rows
};

// First half of an online softmax step: the new row maximum. Earlier sums are multiplied with alpha = 2^(old maximum -
// new maximum), unless it is 1 in all rows of the warp, as it soon is.
template <Kind kKind, int kD>
INFERIX_DEVICE void update_row_max(float (&scores)[kScores], const TileInfo& tile, Exponents& exponents, Softmax& rows,
                                   float (&out)[kD / 2], int t) {
  using S = SharedStorage<kKind, kD>;
  if (!tile.whole)
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int length = tile.length[u] - key_of(t, 0, S::kEightBit);  // key_of(t, i) = key_of(t, 0) + key_of(0, i)
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (key_of(0, i, S::kEightBit) >= length) scores[32 * u + i] = -INFINITY;
    }
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = rows.row_max[r];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float highest = scores[32 * u + 2 * r];
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (row_in_thread(i) == r && i != 2 * r) highest = fmax(highest, scores[32 * u + i]);
      top[r] = fmax(top[r], fma(highest, exponents.scale[r], tile.bias[u]));
    }
    top[r] = fmax(top[r], shfl_xor(top[r], 1));
    top[r] = fmax(top[r], shfl_xor(top[r], 2));
    const float base = top[r] - S::kLog2WeightScale;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) exponents.offset[r][u] = tile.bias[u] - base;
  }
  if (any_in_warp(top[0] != rows.row_max[0] || top[1] != rows.row_max[1])) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float alpha = exp2_approx(rows.row_max[r] - top[r]);
      rows.row_max[r] = top[r];
      rows.row_sum[r] *= alpha;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i)
        if (row_in_thread(i) == r) out[i] *= alpha;
    }
  }
}

// Second half: the weights 2^exponent of a unit, as the A fragment of the weighted sum.
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void exponentiate(const float (&scores)[kScores], int u, const Exponents& exponents, Softmax& rows,
                                 uint32_t (&weights)[kSteps][4]) {
  using S = SharedStorage<kKind, kD>;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float w[S::kPerRegister];
#pragma unroll
      for (int n = 0; n < S::kPerRegister; ++n) {
        const int i = S::a_fragment_source(word, n, step), r = row_in_thread(i);
        w[n] = exp2_approx(fma(scores[32 * u + i], exponents.scale[r], exponents.offset[r][u]));
        rows.row_sum[r] += w[n];
      }
      weights[step][word] = S::pack_weights(w);
    }
    warpgroup_fence_operand(weights[step]);
  }
}

// out += weights . values of a unit. With 16 bits the wgmmas are only issued and committed: the caller waits.
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void pv_product(SharedStorage<kKind, kD>& shared, int stage, int u,
                               const uint32_t (&weights)[kSteps][4], float (&out)[kD / 2], int t) {
  using S = SharedStorage<kKind, kD>;
  const uint32_t base = shared_address(&shared) / kChunk + stage * (S::kTileBytes / kChunk);
  const uint32_t start = INFERIX_START_OF(S, base, values);
  if constexpr (S::kEightBit) {
    // Tensor cores accumulate e4m3 products in about 14 bits: each unit's sums are scaled and added in float32.
    // 64 channels at a time: 128 would not leave enough registers.
    constexpr int kSums = 32;
#pragma unroll
    for (int first = 0; first < kD / 2; first += kSums) {
      float part[kSums];
      warpgroup_fence_operand(part);
      wgmma_fence();
      const uint64_t v = k_major_descriptor(start + (u * S::kUnitBytes + 2 * first * kUnitKeys) / kChunk, kUnitKeys);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        wgmma_rs_e4m3(part, weights[step], v + k_major_offset(step, kD, kUnitKeys) / kChunk, step > 0);
      wgmma_commit_group();
      wgmma_wait_all();
      warpgroup_fence_operand(part);
      const float* scales = shared.value_scales[stage] + u * kD + channel_of(t, 0, true);
#pragma unroll
      for (int i = 0; i < kSums; i += 8) {
        const Floats<4> scale = *reinterpret_cast<const Floats<4>*>(scales + channel_of(0, first + i, true));
#pragma unroll
        for (int j = 0; j < 8; ++j)
          out[first + i + j] = fma(part[i + j], scale.x[j / 4 * 2 + j % 2], out[first + i + j]);
      }
    }
  } else {
    wgmma_fence();
    const uint64_t v = S::kTransposed ? k_major_descriptor(start + u * S::kUnitBytes / kChunk, kUnitKeys * 2)
                                      : mn_major_descriptor(start, kBlockN) + mn_major_offset(u * kSteps) / kChunk;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t offset = S::kTransposed ? k_major_offset(step, kD, kUnitKeys * 2) : mn_major_offset(step);
      const uint64_t right = v + offset / kChunk;
      if constexpr (query_type(kKind) == DType::f16) wgmma_rs_f16<S::kTransposed>(out, weights[step], right, true);
      else wgmma_rs_bf16<S::kTransposed>(out, weights[step], right, true);
    }
    wgmma_commit_group();
  }
}

// Out and lse of one of a thread's two rows: of a whole query tile to the result, of a part of one to partial_out.
template <int kD, int kRow, bool kEightBit>
INFERIX_DEVICE void finish(const AttentionArgs& p, const ConsumerState& state, const Softmax& softmax,
                           float log2_weight_scale, const float (&out)[kD / 2], int warpgroup, int t) {
  const WorkItem item = state.item;
  const RowBlock rows = state.rows;
  t = opaque(t);
  float sum = softmax.row_sum[kRow];
  sum += shfl_xor(sum, 1);
  sum += shfl_xor(sum, 2);
  const float inverse = sum == 0.f ? 0.f : div_rn(1.f, sum);
  const float lse = sum == 0.f ? -INFINITY : (softmax.row_max[kRow] - log2_weight_scale + log2_approx(sum)) * kLn2;
  const int r = accumulator_row(t, 2 * kRow), channel = channel_of(t, 0, kEightBit);
  if (!item.whole) {
    const int64_t at = int64_t(item.partial) * kBlockM + warpgroup * kWgmmaM + r;
#pragma unroll
    for (int i = 0; i < kD / 2; i += 4)
      *reinterpret_cast<Pair*>(p.partial_out + at * kD + channel + channel_of(0, i, kEightBit)) =
          Pair{{out[i + 2 * kRow] * inverse, out[i + 2 * kRow + 1] * inverse}};
    if (t % 4 == 0) p.partial_lse[at] = lse;
  } else if (rows.has(r)) {
    const RowEpilogue epilogue = row_epilogue(p, rows.query(r), rows.head(r), lse);
    sync_quad();  // all have read lse
    if (t % 4 == 0) epilogue.write_lse(p);
    epilogue.write<kD / 8>(
        p, [&](int i) { return channel + channel_of(0, 4 * i, kEightBit); },
        [&](int i) { return Pair{{out[4 * i + 2 * kRow] * inverse, out[4 * i + 2 * kRow + 1] * inverse}}; });
  }
}

// The warpgroup's next item, to shared memory: registers are for what the loop over keys needs. False after the last.
template <Kind kKind, int kD>
INFERIX_DEVICE bool next_work_item(const AttentionArgs& p, SharedStorage<kKind, kD>& shared, int warpgroup, int t) {
  ConsumerState& state = shared.consumers[warpgroup];
  named_barrier_sync(1 + warpgroup, kWarpgroup);  // all are done with the one before
  if (t == 0) {
    state.more = state.scheduler.next(p.work, state.item);
    if (state.more) state.rows = rows_of(p, state.item.strip, state.item.tile, warpgroup * kWgmmaM);
  }
  named_barrier_sync(1 + warpgroup, kWarpgroup);
  return state.more;
}

// A consumer warpgroup.
template <Kind kKind, int kD>
INFERIX_DEVICE void consume(const AttentionArgs& p, SharedStorage<kKind, kD>& shared, int warpgroup, int t) {
  using S = SharedStorage<kKind, kD>;
  PipelineState<S::kStages> pipeline;
  ScoreScales<kKind, kD> scales;
  if (t == 0) shared.consumers[warpgroup].scheduler = TileScheduler(p.work, block_index());
  while (next_work_item(p, shared, warpgroup, t)) {
    float out[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
    Softmax softmax;
    for (bool last = false; !last;) {
      const int stage = pipeline.stage;
      mbarrier_wait(&shared.keys_full[stage], pipeline.phase);
      if (shared.tiles[stage].fresh) {
        load_queries(p, shared.tiles[stage].variant, shared, warpgroup, t);
        scales.read(p, shared, warpgroup, opaque(t));
      }
      float scores[kScores];
      qk_product(shared, stage, warpgroup, scores, opaque(t));
      const TileInfo tile = shared.tiles[stage];
      last = tile.last;
      sync_warp();
      if (t % 32 == 0) mbarrier_arrive(&shared.keys_empty[stage]);
      Exponents exponents{{scales.at(p, 0), scales.at(p, 1)}};
      update_row_max<kKind, kD>(scores, tile, exponents, softmax, out, opaque(t));
      uint32_t weights[kUnits][S::kUnitSteps][4];
      exponentiate<kKind, kD>(scores, 0, exponents, softmax, weights[0]);
      // With 8 bits the sums of a page need registers that scores have had.
      if constexpr (S::kEightBit) exponentiate<kKind, kD>(scores, 1, exponents, softmax, weights[1]);
      mbarrier_wait(&shared.values_full[stage], pipeline.phase);
      if constexpr (!S::kWide)
        if (!tile.whole)
          for (int u = 0; u < kUnits; ++u) clear_unused_values(shared, stage, u, tile.length[u], warpgroup, t);
      warpgroup_fence_operand(out);
      pv_product(shared, stage, 0, weights[0], out, opaque(t));
      // Else while the wgmmas of the unit before run.
      if constexpr (!S::kEightBit) exponentiate<kKind, kD>(scores, 1, exponents, softmax, weights[1]);
      pv_product(shared, stage, 1, weights[1], out, opaque(t));
      if constexpr (!S::kEightBit) wgmma_wait_all();
      warpgroup_fence_operand(out);
      sync_warp();
      if (t % 32 == 0) mbarrier_arrive(&shared.values_empty[stage]);
      pipeline.advance();
    }
    finish<kD, 0, S::kEightBit>(p, shared.consumers[warpgroup], softmax, S::kLog2WeightScale, out, warpgroup, t);
    finish<kD, 1, S::kEightBit>(p, shared.consumers[warpgroup], softmax, S::kLog2WeightScale, out, warpgroup, t);
  }
}

// Registers per thread, of the 65,536 of a multiprocessor.
constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
static_assert((kConsumers * kConsumerRegisters + kProducerRegisters) * kWarpgroup <= 65536);

template <Kind kKind, int kD>
INFERIX_KERNEL((kConsumers + 1) * kWarpgroup)
attention_kernel(INFERIX_GRID_CONSTANT AttentionArgs p, INFERIX_GRID_CONSTANT TensorMaps maps) {
  using S = SharedStorage<kKind, kD>;
  S& shared = shared_storage<kKind, kD>();
  const int thread = thread_index(), warpgroup = shfl_idx(thread / kWarpgroup, 0), t = thread % kWarpgroup;
  if (thread == 0) {
    for (int i = 0; i < p.pools; ++i) {
      if constexpr (S::kKeyMap) prefetch_tensormap(maps.keys[i]);
      if constexpr (S::kValueMap) prefetch_tensormap(maps.values[i]);
    }
    for (int stage = 0; stage < S::kStages; ++stage) {
      mbarrier_init(&shared.keys_full[stage], 1);
      mbarrier_init(&shared.values_full[stage], 1);
      mbarrier_init(&shared.keys_empty[stage], kConsumers * kWarpgroup / 32);
      mbarrier_init(&shared.values_empty[stage], kConsumers * kWarpgroup / 32);
    }
    if constexpr (S::kWide) {
      mbarrier_init(&shared.raw.keys.full, 1);
      mbarrier_init(&shared.raw.values.full, 1);
    }
    fence_mbarrier_init();
  }
  sync_threads();
  if (warpgroup == kConsumers) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if constexpr (S::kWide) produce_widened(p, maps.values, shared, t);
    else if (t == 0) produce(p, maps, shared);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    consume(p, shared, warpgroup, t);
  }
}

}  // namespace inferix::sm90
