// paged_attention on Hopper: the kernel itself, on top of ptx.cuh and wgmma.cuh. The host compiles it too, on top of
// tests/native/machine.h.
//
// Four warpgroups in a block. One thread of the last asks TMA for keys and values, straight from the pages that the plan
// names, into a ring of stages: once for all 192 query rows of the block. The others have 64 rows each and go through
// the ring on their own: scores, softmax, weighted values. While one waits for its product the others keep the tensor
// cores busy.
//
// A row is a query and one of the query heads that read the same KV head: row r of a strip is query r / group, query
// head head * group + r % group.
#pragma once
#include "load_sm90.cuh"

namespace inferix::sm90 {

// scores[i] = q . k, in units of each query row's scale.
template <Kind kKind, int kD>
INFERIX_DEVICE void score(Shared<kKind, kD>& shared, int stage, int warpgroup, float (&scores)[64], int t) {
  using S = Shared<kKind, kD>;
  const uint64_t q = k_major(opaque(shared_address(shared.queries[warpgroup])), S::kRowBytes);
  const uint64_t k = k_major(shared_address(shared.keys[stage]), S::kRowBytes);
  typename S::Score raw[64];
  pin(raw);
  multiply_begin();
#pragma unroll
  for (int step = 0; step < S::kWidth / kStepBytes; ++step)
    S::multiply_scores(raw, q + k_major_step(step, kRows, S::kWidth) / kChunk,
                       k + k_major_step(step, kTileKeys, S::kWidth) / kChunk, step > 0);
  multiply_commit();
  multiply_wait();
  pin(raw);
  if constexpr (S::kEightBit) {
    // A thread's columns of sixteen are four neighbouring keys: see key_of_column_8.
#pragma unroll
    for (int i = 0; i < 64; i += 8) {
      const Quad scale = *reinterpret_cast<const Quad*>(shared.key_scales[stage] + i * 2 + t % 4 * 4);
#pragma unroll
      for (int n = 0; n < 8; ++n) scores[i + n] = float(raw[i + n]) * scale.x[n / 4 * 2 + n % 2];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = raw[i];
  }
}

// What a thread keeps of its two rows.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY};  // score, in units of log 2
  float sum[2] = {0.f, 0.f};                  // this thread's part of the sum of 2^(score - largest + lift)
};

// What turns scores of a unit into exponents: score * scale + offset = score in units of log 2 - largest + lift.
struct Exponents {
  float scale[2], offset[2][kUnits];  // of the thread's two rows
};

// Finds the largest score so far. What was summed before shrinks as it grows.
template <Kind kKind, int kD>
INFERIX_DEVICE void find_largest(float (&scores)[64], const TileInfo& tile, Exponents& exponents, Softmax& rows,
                                 float (&out)[kD / 2], int t) {
  using S = Shared<kKind, kD>;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (tile.length[u] == kUnitKeys) continue;
    const int length = tile.length[u] - key_of(t, 0, S::kEightBit);  // key_of(t, i) = key_of(t, 0) + key_of(0, i)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (key_of(0, i, S::kEightBit) >= length) scores[32 * u + i] = -INFINITY;
  }
  float highest[2][kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    highest[0][u] = highest[1][u] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 32; ++i) highest[row_slot(i)][u] = larger(highest[row_slot(i)][u], scores[32 * u + i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = exponents.scale[r];
    float top = larger(fused(highest[r][0], scale, tile.bias[0]), fused(highest[r][1], scale, tile.bias[1]));
    top = larger(top, shuffle_xor(top, 1));
    top = larger(larger(top, shuffle_xor(top, 2)), rows.largest[r]);
    // Nothing but -inf so far: any finite number in its place makes all weights 0.
    const float base = top == -INFINITY ? 0.f : top, shrink = exp2_approx(rows.largest[r] - base);
    rows.largest[r] = top;
    rows.sum[r] *= shrink;
#pragma unroll
    for (int i = 0; i < kD / 2; ++i)
      if (row_slot(i) == r) out[i] *= shrink;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) exponents.offset[r][u] = tile.bias[u] - base + S::kLift;
  }
}

// The weights of a unit, as the left operand of the weighted sum.
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void weigh(const float (&scores)[64], int u, const Exponents& exponents, Softmax& rows,
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
    const uint64_t v = mn_major(address, kTileKeys) + mn_major_step(u * kSteps) / kChunk;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      multiply_registers_bf16(out, weights[step], v + mn_major_step(step) / kChunk, true);
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
  if (t == 0) shared.turns[warpgroup].items = Items(p.work, block_index());
  while (next_turn(p, shared, warpgroup, t)) {
    float out[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] = 0.f;
    Softmax softmax;
    for (bool last = false; !last;) {
      const int stage = place.stage;
      barrier_wait(&shared.keys_full[stage], place.parity);
      if (shared.tiles[stage].variant != shared.turns[warpgroup].variant) load_queries(p, stage, shared, warpgroup, t);
      float scores[64];
      score(shared, stage, warpgroup, scores, opaque(t));
      const TileInfo tile = shared.tiles[stage];
      last = tile.last;
      sync_warp();
      if (t % 32 == 0) barrier_arrive(&shared.keys_empty[stage]);
      Exponents exponents{{p.scale, p.scale}};
      if constexpr (S::kEightBit)
        for (int r = 0; r < 2; ++r)
          exponents.scale[r] *= shared.query_scales[warpgroup][accumulator_row(opaque(t), 2 * r)];
      find_largest<kKind, kD>(scores, tile, exponents, softmax, out, opaque(t));
      uint32_t weights[kUnits][S::kUnitSteps][4];
      weigh<kKind, kD>(scores, 0, exponents, softmax, weights[0]);
      if constexpr (S::kEightBit) weigh<kKind, kD>(scores, 1, exponents, softmax, weights[1]);
      barrier_wait(&shared.values_full[stage], place.parity);
      if (tile.length[0] + tile.length[1] < kTileKeys) clear_unused_values(shared, stage, tile, warpgroup, t);
      pin(out);
      add_values(shared, stage, 0, weights[0], out, opaque(t));
      // While the product of the first is under way. With 8 bits both are ready: scores would be in the way of parts.
      if constexpr (!S::kEightBit) weigh<kKind, kD>(scores, 1, exponents, softmax, weights[1]);
      add_values(shared, stage, 1, weights[1], out, opaque(t));
      multiply_wait();
      pin(out);
      sync_warp();
      if (t % 32 == 0) barrier_arrive(&shared.values_empty[stage]);
      place.advance();
    }
    finish<kD, 0>(p, shared.turns[warpgroup], softmax, S::kLift, out, warpgroup, t);
    finish<kD, 1>(p, shared.turns[warpgroup], softmax, S::kLift, out, warpgroup, t);
  }
}

template <Kind kKind, int kD>
INFERIX_KERNEL((kConsumers + 1) * kWarpgroup)
attention_kernel(INFERIX_GRID_CONSTANT AttentionArgs p, INFERIX_GRID_CONSTANT TensorMap keys,
                 INFERIX_GRID_CONSTANT TensorMap values) {
  using S = Shared<kKind, kD>;
  S& shared = shared_of_block<kKind, kD>();
  const int thread = thread_index(), warpgroup = shuffle_from(thread / kWarpgroup, 0), t = thread % kWarpgroup;
  if (thread == 0) {
    prefetch_map(keys);
    prefetch_map(values);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(&shared.keys_full[stage], 1);
      barrier_init(&shared.values_full[stage], 1);
      barrier_init(&shared.keys_empty[stage], kConsumers * kWarpgroup / 32);
      barrier_init(&shared.values_empty[stage], kConsumers * kWarpgroup / 32);
    }
    fence_barrier_init();
  }
  sync_block();
  if (warpgroup == kConsumers) {
    release_registers<32>();
    if (t == 0) produce(p, keys, values, shared);
  } else {
    claim_registers<160>();
    consume(p, shared, warpgroup, t);
  }
}

}  // namespace inferix::sm90
