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

// The A operand of the scores of 8-bit pages: a thread's fragment of its warpgroup's queries, in registers. 16-bit
// queries stay in shared memory.
template <Kind kKind, int kD>
struct QueryFragments {
  using S = SharedStorage<kKind, kD>;
  uint32_t word[S::kEightBit ? S::kWidth / kWgmmaKBytes : 1][4];
  float scales[2];  // of scores in units of log 2, of the thread's two rows

  INFERIX_DEVICE float scale(const AttentionArgs& p, int r) const {
    if constexpr (S::kEightBit) return scales[r];
    else return p.scale;
  }
  INFERIX_DEVICE void read(const AttentionArgs& p, const SharedStorage<kKind, kD>& shared, int warpgroup, int t) {
    if constexpr (S::kEightBit) {
#pragma unroll
      for (int r = 0; r < 2; ++r) scales[r] = p.scale * shared.query_scales[warpgroup][accumulator_row(t, 2 * r)];
#pragma unroll
      for (int step = 0; step < S::kWidth / kWgmmaKBytes; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          word[step][r] = *reinterpret_cast<const uint32_t*>(
              shared.queries[warpgroup] + tile_offset(a_fragment_row(t, r), step * kWgmmaKBytes + a_fragment_byte(t, r),
                                                      kWgmmaM, S::kWidth));
    }
  }
};

// scores[i] = q . k of the units from `first` on, without the scale of the query's row.
template <Kind kKind, int kD>
INFERIX_DEVICE void qk_product(SharedStorage<kKind, kD>& shared, int stage, int first,
                               const QueryFragments<kKind, kD>& queries, int warpgroup,
                               float (&scores)[SharedStorage<kKind, kD>::kScores], int t) {
  using S = SharedStorage<kKind, kD>;
  const uint64_t q = k_major_descriptor(opaque(shared_address(shared.queries[warpgroup])), S::kRowBytes);
  const uint64_t k = k_major_descriptor(shared_address(shared.keys[stage]) + first * S::kUnitBytes, S::kRowBytes);
  typename S::Score raw[S::kScores];
  warpgroup_fence_operand(raw);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < S::kWidth / kWgmmaKBytes; ++step) {
    const uint64_t right = k + k_major_offset(step, kBlockN, S::kWidth) / kChunk;
    if constexpr (is_int8(kKind)) wgmma_rs_s8(raw, queries.word[step], right, step > 0);
    else if constexpr (S::kEightBit) wgmma_rs_e4m3(raw, queries.word[step], right, step > 0);
    else if constexpr (query_type(kKind) == DType::f16)
      wgmma_ss_f16(raw, q + k_major_offset(step, kWgmmaM, S::kWidth) / kChunk, right, step > 0);
    else wgmma_ss_bf16(raw, q + k_major_offset(step, kWgmmaM, S::kWidth) / kChunk, right, step > 0);
  }
  wgmma_commit_group();
  wgmma_wait_all();
  warpgroup_fence_operand(raw);
  if constexpr (S::kKeyScales) {
    constexpr int kRun = S::kPerRegister;  // neighbouring keys of a thread: with 8 bits four, see key_of_column_8
    const float* scales = shared.key_scales[stage] + first * kUnitKeys + t % 4 * kRun;
#pragma unroll
    for (int i = 0; i < S::kScores; i += 2 * kRun) {
      const Floats<kRun> scale = *reinterpret_cast<const Floats<kRun>*>(scales + 2 * i);
#pragma unroll
      for (int n = 0; n < 2 * kRun; ++n) scores[i + n] = float(raw[i + n]) * scale.x[n / 4 * 2 + n % 2];
    }
  } else {
#pragma unroll
    for (int i = 0; i < S::kScores; ++i) scores[i] = raw[i];
  }
}

// The online softmax of a thread's two rows so far.
struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY};  // of the scores, in units of log 2
  float row_sum[2] = {0.f, 0.f};  // this thread's part of the sum of 2^(score - row_max + kLog2WeightScale)
};

// The units that are multiplied together.
template <int kStepUnits>
struct Step {
  int length[kStepUnits];
  float bias[kStepUnits];
  INFERIX_DEVICE Step(const TileInfo& tile, int first) {
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) {
      length[u] = tile.length[first + u];
      bias[u] = tile.bias[first + u];
    }
  }
};

// Scores of a unit become exponents by one fma: score * scale + offset = score in units of log 2 - row_max +
// kLog2WeightScale.
template <int kStepUnits>
struct Exponents {
  float scale[2], offset[2][kStepUnits];  // of the thread's two rows
};

// First half of an online softmax step: the new row maximum. Earlier sums are multiplied with alpha = 2^(old maximum -
// new maximum), which soon is 1 and then skipped.
template <Kind kKind, int kD, int kStepUnits, int kScores>
INFERIX_DEVICE void update_row_max(float (&scores)[kScores], const Step<kStepUnits>& step,
                                   Exponents<kStepUnits>& exponents, Softmax& rows, float (&out)[kD / 2], int t) {
  using S = SharedStorage<kKind, kD>;
#pragma unroll
  for (int u = 0; u < kStepUnits; ++u) {
    if (step.length[u] == kUnitKeys) continue;
    const int length = step.length[u] - key_of(t, 0, S::kEightBit);  // key_of(t, i) = key_of(t, 0) + key_of(0, i)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (key_of(0, i, S::kEightBit) >= length) scores[32 * u + i] = -INFINITY;
  }
  float alpha[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (row_in_thread(i) == r) highest = fmax(highest, scores[32 * u + i]);
      top = fmax(top, fma(highest, exponents.scale[r], step.bias[u]));
    }
    top = fmax(top, shfl_xor(top, 1));
    top = fmax(fmax(top, shfl_xor(top, 2)), rows.row_max[r]);
    // Nothing but -inf so far: any finite number in its place makes all weights 0.
    const float base = top == -INFINITY ? 0.f : top;
    alpha[r] = exp2_approx(rows.row_max[r] - base);
    rows.row_max[r] = top;
    rows.row_sum[r] *= alpha[r];
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) exponents.offset[r][u] = step.bias[u] - base + S::kLog2WeightScale;
  }
  if (any_in_warp(alpha[0] != 1.f || alpha[1] != 1.f))
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= alpha[row_in_thread(i)];
}

// Second half: the weights 2^exponent of a unit, as the A fragment of the weighted sum.
template <Kind kKind, int kD, int kStepUnits, int kScores, int kSteps>
INFERIX_DEVICE void exponentiate(const float (&scores)[kScores], int u, const Exponents<kStepUnits>& exponents,
                                 Softmax& rows, uint32_t (&weights)[kSteps][4]) {
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
  const uint32_t address = shared_address(shared.values[stage]);
  if constexpr (S::kEightBit) {
    // Tensor cores accumulate e4m3 products in about 14 bits: each unit's sums are scaled and added in float32.
    // 64 channels at a time: 128 would not leave enough registers.
#pragma unroll
    for (int first = 0; first < kD; first += 64) {
      float part[32];
      warpgroup_fence_operand(part);
      wgmma_fence();
      const uint64_t v = k_major_descriptor(address + u * S::kUnitBytes + first * kUnitKeys, kUnitKeys);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        wgmma_rs_e4m3(part, weights[step], v + k_major_offset(step, kD, kUnitKeys) / kChunk, step > 0);
      wgmma_commit_group();
      wgmma_wait_all();
      warpgroup_fence_operand(part);
      const float* scales = shared.value_scales[stage] + u * kD + first + t % 4 * 2;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        const Pair scale = *reinterpret_cast<const Pair*>(scales + i * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          out[first / 2 + i + j] = fma(part[i + j], scale.x[j % 2], out[first / 2 + i + j]);
      }
    }
  } else {
    wgmma_fence();
    const uint64_t v = S::kTransposed ? k_major_descriptor(address + u * S::kUnitBytes, kUnitKeys * 2)
                                      : mn_major_descriptor(address, kBlockN) + mn_major_offset(u * kSteps) / kChunk;
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
template <int kD, int kRow>
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
  const int r = accumulator_row(t, 2 * kRow), column = accumulator_column(t, 0);
  if (!item.whole) {
    const int64_t at = int64_t(item.partial) * kBlockM + warpgroup * kWgmmaM + r;
#pragma unroll
    for (int i = 0; i < kD / 2; i += 4)
      *reinterpret_cast<Pair*>(p.partial_out + at * kD + column + 2 * i) =
          Pair{{out[i + 2 * kRow] * inverse, out[i + 2 * kRow + 1] * inverse}};
    if (t % 4 == 0) p.partial_lse[at] = lse;
  } else if (rows.has(r)) {
    const RowEpilogue epilogue = row_epilogue(p, rows.query(r), rows.head(r), lse);
    sync_quad();  // all have read lse
    if (t % 4 == 0) epilogue.write_lse(p);
    epilogue.write<kD / 8>(
        p, [&](int i) { return column + 8 * i; },
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
    state.variant = -1;
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
  QueryFragments<kKind, kD> queries;
  if (t == 0) shared.consumers[warpgroup].scheduler = TileScheduler(p.work, block_index());
  while (next_work_item(p, shared, warpgroup, t)) {
    float out[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
    Softmax softmax;
    for (bool last = false; !last;) {
      const int stage = pipeline.stage;
      mbarrier_wait(&shared.keys_full[stage], pipeline.phase);
      if (shared.tiles[stage].variant != shared.consumers[warpgroup].variant) {
        load_queries(p, stage, shared, warpgroup, t);
        queries.read(p, shared, warpgroup, opaque(t));
      }
#pragma unroll 1
      for (int first = 0; first < kUnits; first += S::kStepUnits) {
        float scores[S::kScores];
        qk_product(shared, stage, first, queries, warpgroup, scores, opaque(t));
        const Step<S::kStepUnits> step(shared.tiles[stage], first);
        if (first + S::kStepUnits == kUnits) {
          last = shared.tiles[stage].last;
          sync_warp();
          if (t % 32 == 0) mbarrier_arrive(&shared.keys_empty[stage]);
        }
        Exponents<S::kStepUnits> exponents{{queries.scale(p, 0), queries.scale(p, 1)}};
        update_row_max<kKind, kD>(scores, step, exponents, softmax, out, opaque(t));
        uint32_t weights[S::kStepUnits][S::kUnitSteps][4];
        exponentiate<kKind, kD>(scores, 0, exponents, softmax, weights[0]);
        mbarrier_wait(&shared.values_full[stage], pipeline.phase);
        if constexpr (!S::kWide)
          for (int u = 0; u < S::kStepUnits; ++u)
            if (step.length[u] < kUnitKeys) clear_unused_values(shared, stage, first + u, step.length[u], warpgroup, t);
        warpgroup_fence_operand(out);
        pv_product(shared, stage, first, weights[0], out, opaque(t));
#pragma unroll
        for (int u = 1; u < S::kStepUnits; ++u) {  // while the wgmmas of the unit before run
          exponentiate<kKind, kD>(scores, u, exponents, softmax, weights[u]);
          pv_product(shared, stage, first + u, weights[u], out, opaque(t));
        }
        wgmma_wait_all();
        warpgroup_fence_operand(out);
      }
      sync_warp();
      if (t % 32 == 0) mbarrier_arrive(&shared.values_empty[stage]);
      pipeline.advance();
    }
    finish<kD, 0>(p, shared.consumers[warpgroup], softmax, S::kLog2WeightScale, out, warpgroup, t);
    finish<kD, 1>(p, shared.consumers[warpgroup], softmax, S::kLog2WeightScale, out, warpgroup, t);
  }
}

// Registers per thread, of the 65,536 of a multiprocessor.
constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
static_assert((kConsumers * kConsumerRegisters + kProducerRegisters) * kWarpgroup <= 65536);

template <Kind kKind, int kD>
INFERIX_KERNEL((kConsumers + 1) * kWarpgroup)
attention_kernel(INFERIX_GRID_CONSTANT AttentionArgs p, INFERIX_GRID_CONSTANT TensorMap keys,
                 INFERIX_GRID_CONSTANT TensorMap values) {
  using S = SharedStorage<kKind, kD>;
  S& shared = shared_storage<kKind, kD>();
  const int thread = thread_index(), warpgroup = shfl_idx(thread / kWarpgroup, 0), t = thread % kWarpgroup;
  if (thread == 0) {
    if constexpr (S::kKeyMap) prefetch_tensormap(keys);
    if constexpr (S::kValueMap) prefetch_tensormap(values);
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
    if constexpr (S::kWide) produce_widened(p, values, shared, t);
    else if (t == 0) produce(p, keys, values, shared);
  } else {
    warpgroup_reg_alloc<kConsumerRegisters>();
    consume(p, shared, warpgroup, t);
  }
}

}  // namespace inferix::sm90
