// paged_attention on Hopper: the kernel itself, on top of ptx.cuh and wgmma.cuh. The host compiles it too, on top of
// tests/cuda/native/machine.h.
//
// Four warpgroups in a block. The last asks TMA for keys and values, straight from the pages that the plan names, into a
// ring of stages: once for all 192 query rows of the block. If they must be widened for the tensor cores it does that
// too; else one of its threads is enough. The others have 64 rows each and go through the ring on their own: scores,
// softmax, weighted values. While one waits for its product the others keep the tensor cores busy.
//
// A row is a query and one of the query heads that read the same KV head: row r of a strip is query r / group, query
// head head * group + r % group.
#pragma once
#include "widen_sm90.cuh"

namespace inferix::sm90 {

// The left operand of the scores of 8-bit pages: a thread's part of its warpgroup's queries, in registers. Those of 16
// bits stay in shared memory.
template <Kind kKind, int kD>
struct Queries {
  using S = Shared<kKind, kD>;
  uint32_t word[S::kEightBit ? S::kWidth / kStepBytes : 1][4];
  float scales[2];  // of scores in units of log 2, of the thread's two rows

  INFERIX_DEVICE float scale(const AttentionArgs& p, int r) const {
    if constexpr (S::kEightBit) return scales[r];
    else return p.scale;
  }
  INFERIX_DEVICE void read(const AttentionArgs& p, const Shared<kKind, kD>& shared, int warpgroup, int t) {
    if constexpr (S::kEightBit) {
#pragma unroll
      for (int r = 0; r < 2; ++r) scales[r] = p.scale * shared.query_scales[warpgroup][accumulator_row(t, 2 * r)];
#pragma unroll
      for (int step = 0; step < S::kWidth / kStepBytes; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          word[step][r] = *reinterpret_cast<const uint32_t*>(
              shared.queries[warpgroup] + tile_offset(a_row(t, r), step * kStepBytes + a_byte(t, r), kRows, S::kWidth));
    }
  }
};

// scores[i] = q . k of the units from `first` on, in units of each query row's scale.
template <Kind kKind, int kD>
INFERIX_DEVICE void score(Shared<kKind, kD>& shared, int stage, int first, const Queries<kKind, kD>& queries,
                          int warpgroup, float (&scores)[Shared<kKind, kD>::kScores], int t) {
  using S = Shared<kKind, kD>;
  const uint64_t q = k_major(opaque(shared_address(shared.queries[warpgroup])), S::kRowBytes);
  const uint64_t k = k_major(shared_address(shared.keys[stage]) + first * S::kUnitBytes, S::kRowBytes);
  typename S::Score raw[S::kScores];
  pin(raw);
  multiply_begin();
#pragma unroll
  for (int step = 0; step < S::kWidth / kStepBytes; ++step) {
    const uint64_t right = k + k_major_step(step, kTileKeys, S::kWidth) / kChunk;
    if constexpr (kKind == Kind::i8f8) multiply_registers_s8(raw, queries.word[step], right, step > 0);
    else if constexpr (kKind == Kind::fp8) multiply_registers_e4m3(raw, queries.word[step], right, step > 0);
    else if constexpr (kKind == Kind::f16)
      multiply_shared_f16(raw, q + k_major_step(step, kRows, S::kWidth) / kChunk, right, step > 0);
    else multiply_shared_bf16(raw, q + k_major_step(step, kRows, S::kWidth) / kChunk, right, step > 0);
  }
  multiply_commit();
  multiply_wait();
  pin(raw);
  if constexpr (S::kKeyScales) {
    constexpr int kRun = S::kPacked;  // neighbouring keys of a thread: with 8 bits four, see key_of_column_8
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

// What a thread keeps of its two rows.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};  // score, in units of log 2
  float sum[2] = {0.f, 0.f};                  // this thread's part of the sum of 2^(score - largest + lift)
};

// What there is to know of the units of a step.
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

// What turns scores of a unit into exponents: score * scale + offset = score in units of log 2 - largest + lift.
template <int kStepUnits>
struct Exponents {
  float scale[2], offset[2][kStepUnits];  // of the thread's two rows
};

// Finds the largest score so far. What was summed before shrinks as it grows, which it soon does no more.
template <Kind kKind, int kD, int kStepUnits, int kScores>
INFERIX_DEVICE void find_largest(float (&scores)[kScores], const Step<kStepUnits>& step,
                                 Exponents<kStepUnits>& exponents, Softmax& rows, float (&out)[kD / 2], int t) {
  using S = Shared<kKind, kD>;
#pragma unroll
  for (int u = 0; u < kStepUnits; ++u) {
    if (step.length[u] == kUnitKeys) continue;
    const int length = step.length[u] - key_of(t, 0, S::kEightBit);  // key_of(t, i) = key_of(t, 0) + key_of(0, i)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (key_of(0, i, S::kEightBit) >= length) scores[32 * u + i] = -INFINITY;
  }
  float shrink[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (row_slot(i) == r) highest = larger(highest, scores[32 * u + i]);
      top = larger(top, fused(highest, exponents.scale[r], step.bias[u]));
    }
    top = larger(top, shuffle_xor(top, 1));
    top = larger(larger(top, shuffle_xor(top, 2)), rows.largest[r]);
    // Nothing but -inf so far: any finite number in its place makes all weights 0.
    const float base = top == -INFINITY ? 0.f : top;
    shrink[r] = exp2_approx(rows.largest[r] - base);
    rows.largest[r] = top;
    rows.sum[r] *= shrink[r];
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) exponents.offset[r][u] = step.bias[u] - base + S::kLift;
  }
  if (any_in_warp(shrink[0] != 1.f || shrink[1] != 1.f))
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= shrink[row_slot(i)];
}

// The weights of a unit, as the left operand of the weighted sum.
template <Kind kKind, int kD, int kStepUnits, int kScores, int kSteps>
INFERIX_DEVICE void weigh(const float (&scores)[kScores], int u, const Exponents<kStepUnits>& exponents, Softmax& rows,
                          uint32_t (&weights)[kSteps][4]) {
  using S = Shared<kKind, kD>;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float w[S::kPacked];
#pragma unroll
      for (int n = 0; n < S::kPacked; ++n) {
        const int i = S::a_source(word, n, step), r = row_slot(i);
        w[n] = exp2_approx(fused(scores[32 * u + i], exponents.scale[r], exponents.offset[r][u]));
        rows.sum[r] += w[n];
      }
      weights[step][word] = S::pack_weights(w);
    }
    pin(weights[step]);
  }
}

// out += weights . values of a unit. With 16 bits the product is only begun.
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void add_values(Shared<kKind, kD>& shared, int stage, int u, const uint32_t (&weights)[kSteps][4],
                               float (&out)[kD / 2], int t) {
  using S = Shared<kKind, kD>;
  const uint32_t address = shared_address(shared.values[stage]);
  if constexpr (S::kEightBit) {
    // Tensor cores keep about 14 bits of an 8-bit sum: sums of a page are carried over to float32, by its scales.
    // 64 channels at a time: 128 would not leave enough registers.
#pragma unroll
    for (int first = 0; first < kD; first += 64) {
      float part[32];
      pin(part);
      multiply_begin();
      const uint64_t v = k_major(address + u * S::kUnitBytes + first * kUnitKeys, kUnitKeys);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        multiply_registers_e4m3(part, weights[step], v + k_major_step(step, kD, kUnitKeys) / kChunk, step > 0);
      multiply_commit();
      multiply_wait();
      pin(part);
      const float* scales = shared.value_scales[stage] + u * kD + first + t % 4 * 2;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        const Pair scale = *reinterpret_cast<const Pair*>(scales + i * 2);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          out[first / 2 + i + j] = fused(part[i + j], scale.x[j % 2], out[first / 2 + i + j]);
      }
    }
  } else {
    multiply_begin();
    const uint64_t v = S::kTransposed ? k_major(address + u * S::kUnitBytes, kUnitKeys * 2)
                                      : mn_major(address, kTileKeys) + mn_major_step(u * kSteps) / kChunk;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t right = v + (S::kTransposed ? k_major_step(step, kD, kUnitKeys * 2) : mn_major_step(step)) / kChunk;
      if constexpr (kKind == Kind::f16) multiply_registers_f16<S::kTransposed>(out, weights[step], right, true);
      else multiply_registers_bf16<S::kTransposed>(out, weights[step], right, true);
    }
    multiply_commit();
  }
}

// Out and lse of one of a thread's two rows: a piece of a query tile goes to its slot, a whole one to the result.
template <int kD, int kRow>
INFERIX_DEVICE void finish(const AttentionArgs& p, const Turn& turn, const Softmax& softmax, float lift,
                           const float (&out)[kD / 2], int warpgroup, int t) {
  const Item item = turn.item;
  const RowBlock rows = turn.rows;
  t = opaque(t);
  float sum = softmax.sum[kRow];
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  const float inverse = sum == 0.f ? 0.f : divide(1.f, sum);
  const float lse = sum == 0.f ? -INFINITY : (softmax.largest[kRow] - lift + log2_approx(sum)) * kLn2;
  const int r = accumulator_row(t, 2 * kRow), column = accumulator_column(t, 0);
  if (!item.whole) {
    const int64_t at = int64_t(item.slot) * kTileRows + warpgroup * kRows + r;
#pragma unroll
    for (int i = 0; i < kD / 2; i += 4)
      *reinterpret_cast<Pair*>(p.piece_out + at * kD + column + 2 * i) =
          Pair{{out[i + 2 * kRow] * inverse, out[i + 2 * kRow + 1] * inverse}};
    if (t % 4 == 0) p.piece_lse[at] = lse;
  } else if (rows.has(r)) {
    const Shares shares = shares_of(p, rows.query(r), rows.head(r), lse);
    sync_quad();  // all have read lse
    if (t % 4 == 0) shares.write_lse(p);
    shares.write<kD / 8>(
        p, [&](int i) { return column + 8 * i; },
        [&](int i) { return Pair{{out[4 * i + 2 * kRow] * inverse, out[4 * i + 2 * kRow + 1] * inverse}}; });
  }
}

// The warpgroup's next item, to shared memory: registers are for what the loop over keys needs. False after the last.
template <Kind kKind, int kD>
INFERIX_DEVICE bool next_turn(const AttentionArgs& p, Shared<kKind, kD>& shared, int warpgroup, int t) {
  Turn& turn = shared.turns[warpgroup];
  sync_named(1 + warpgroup, kWarpgroup);  // all are done with the one before
  if (t == 0) {
    turn.more = turn.items.next(p.work, turn.item);
    turn.variant = -1;
    if (turn.more) turn.rows = rows_of(p, turn.item.strip, turn.item.tile, warpgroup * kRows);
  }
  sync_named(1 + warpgroup, kWarpgroup);
  return turn.more;
}

// A multiplying warpgroup.
template <Kind kKind, int kD>
INFERIX_DEVICE void consume(const AttentionArgs& p, Shared<kKind, kD>& shared, int warpgroup, int t) {
  using S = Shared<kKind, kD>;
  Place<S::kStages> place;
  Queries<kKind, kD> queries;
  if (t == 0) shared.turns[warpgroup].items = Items(p.work, block_index());
  while (next_turn(p, shared, warpgroup, t)) {
    float out[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
    Softmax softmax;
    for (bool last = false; !last;) {
      const int stage = place.stage;
      barrier_wait(&shared.keys_full[stage], place.parity);
      if (shared.tiles[stage].variant != shared.turns[warpgroup].variant) {
        load_queries(p, stage, shared, warpgroup, t);
        queries.read(p, shared, warpgroup, opaque(t));
      }
#pragma unroll 1
      for (int first = 0; first < kUnits; first += S::kStepUnits) {
        float scores[S::kScores];
        score(shared, stage, first, queries, warpgroup, scores, opaque(t));
        const Step<S::kStepUnits> step(shared.tiles[stage], first);
        if (first + S::kStepUnits == kUnits) {
          last = shared.tiles[stage].last;
          sync_warp();
          if (t % 32 == 0) barrier_arrive(&shared.keys_empty[stage]);
        }
        Exponents<S::kStepUnits> exponents{{queries.scale(p, 0), queries.scale(p, 1)}};
        find_largest<kKind, kD>(scores, step, exponents, softmax, out, opaque(t));
        uint32_t weights[S::kStepUnits][S::kUnitSteps][4];
        weigh<kKind, kD>(scores, 0, exponents, softmax, weights[0]);
        barrier_wait(&shared.values_full[stage], place.parity);
        if constexpr (!S::kWide)
          for (int u = 0; u < S::kStepUnits; ++u)
            if (step.length[u] < kUnitKeys) clear_unused_values(shared, stage, first + u, step.length[u], warpgroup, t);
        pin(out);
        add_values(shared, stage, first, weights[0], out, opaque(t));
#pragma unroll
        for (int u = 1; u < S::kStepUnits; ++u) {  // while the product of the unit before is under way
          weigh<kKind, kD>(scores, u, exponents, softmax, weights[u]);
          add_values(shared, stage, first + u, weights[u], out, opaque(t));
        }
        multiply_wait();
        pin(out);
      }
      sync_warp();
      if (t % 32 == 0) barrier_arrive(&shared.values_empty[stage]);
      place.advance();
    }
    finish<kD, 0>(p, shared.turns[warpgroup], softmax, S::kLift, out, warpgroup, t);
    finish<kD, 1>(p, shared.turns[warpgroup], softmax, S::kLift, out, warpgroup, t);
  }
}

// Of the 65,536 registers of a multiprocessor.
constexpr int kMultiplyingRegisters = 160, kLoadingRegisters = 32;
static_assert((kConsumers * kMultiplyingRegisters + kLoadingRegisters) * kWarpgroup <= 65536);

template <Kind kKind, int kD>
INFERIX_KERNEL((kConsumers + 1) * kWarpgroup)
attention_kernel(INFERIX_GRID_CONSTANT AttentionArgs p, INFERIX_GRID_CONSTANT TensorMap keys,
                 INFERIX_GRID_CONSTANT TensorMap values) {
  using S = Shared<kKind, kD>;
  S& shared = shared_of_block<kKind, kD>();
  const int thread = thread_index(), warpgroup = shuffle_from(thread / kWarpgroup, 0), t = thread % kWarpgroup;
  if (thread == 0) {
    if constexpr (S::kKeyMap) prefetch_map(keys);
    if constexpr (S::kValueMap) prefetch_map(values);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(&shared.keys_full[stage], 1);
      barrier_init(&shared.values_full[stage], 1);
      barrier_init(&shared.keys_empty[stage], kConsumers * kWarpgroup / 32);
      barrier_init(&shared.values_empty[stage], kConsumers * kWarpgroup / 32);
    }
    if constexpr (S::kWide) {
      barrier_init(&shared.raw.keys.full, 1);
      barrier_init(&shared.raw.values.full, 1);
    }
    fence_barrier_init();
  }
  sync_block();
  if (warpgroup == kConsumers) {
    release_registers<kLoadingRegisters>();
    if constexpr (S::kWide) produce_widened(p, values, shared, t);
    else if (t == 0) produce(p, keys, values, shared);
  } else {
    claim_registers<kMultiplyingRegisters>();
    consume(p, shared, warpgroup, t);
  }
}

}  // namespace inferix::sm90
