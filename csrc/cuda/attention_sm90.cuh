// paged_attention on Hopper: the kernel itself, on top of ptx.cuh and wgmma.cuh. The host compiles it too, on top of
// tests/native/machine.h.
//
// Four warpgroups in a block. One thread of the last asks TMA for keys and values, straight from the pages that the plan
// names, into a ring of stages. The others have 64 query rows each (192 together read every key once from shared memory)
// and go through the ring on their own: scores, softmax, weighted values. While one waits for its product the others
// keep the tensor cores busy.
//
// A row is a query and one of the query heads that read the same KV head: row r of a strip is query r / group, query
// head head * group + r % group.
#pragma once
#include "attention_sm90.h"
#include "shared_sm90.cuh"

namespace inferix::sm90 {

INFERIX_DEVICE const Unit* units_of(const AttentionArgs& p, const Item& item) {
  const int list = p.lists_per_segment == 1 ? item.strip / p.heads : item.strip;
  return p.units + p.list_start[list] + kUnits * item.first;
}

// A place in the ring of stages: use n is in stage n % kStages, and is the n / kStages-th use of it.
template <int kStages>
struct Place {
  uint32_t stage = 0, parity = 0;
  INFERIX_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <Kind kKind, int kD>
INFERIX_DEVICE void load_keys(const AttentionArgs& p, const TensorMap& map, Shared<kKind, kD>& shared, int stage,
                              const Unit (&units)[kUnits], int head) {
  using S = Shared<kKind, kD>;
  uint64_t* full = &shared.keys_full[stage];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int row = units[u].row + head * p.page_size;
    if constexpr (S::kEightBit) {
      load_box(map, shared.keys[stage] + u * S::kUnitBytes, full, 0, 0, 0, 0, row / 16);
      load_bytes(p.k_scales + row, shared.key_scales[stage] + u * kUnitKeys, full, kUnitKeys * sizeof(float));
    } else {
      for (int panel = 0; panel < S::kPanels; ++panel)
        load_box(map, shared.keys[stage] + panel * S::kPanelBytes + u * S::kPanelBytes / kUnits, full, panel * 64, row);
    }
  }
}

template <Kind kKind, int kD>
INFERIX_DEVICE void load_values(const AttentionArgs& p, const TensorMap& map, Shared<kKind, kD>& shared, int stage,
                                const Unit (&units)[kUnits], int head) {
  using S = Shared<kKind, kD>;
  uint64_t* full = &shared.values_full[stage];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if constexpr (S::kEightBit) {
      const int row = (units[u].row / p.page_size + head) * kD;
      load_box(map, shared.values[stage] + u * S::kUnitBytes, full, units[u].row % p.page_size, row);
      load_bytes(p.v_scales + row, shared.value_scales[stage] + u * kD, full, kD * sizeof(float));
    } else {
      const int row = units[u].row + head * p.page_size;
      for (int panel = 0; panel < S::kPanels; ++panel)
        load_box(map, shared.values[stage] + panel * S::kPanelBytes + u * S::kPanelBytes / kUnits, full, panel * 64,
                 row);
    }
  }
}

// The loading thread.
template <Kind kKind, int kD>
INFERIX_DEVICE void produce(const AttentionArgs& p, const TensorMap& keys, const TensorMap& values,
                            Shared<kKind, kD>& shared) {
  using S = Shared<kKind, kD>;
  Place<S::kStages> place;
  Turn& turn = shared.turns[kConsumers];
  turn.items = Items(p.work, block_index());
  while (turn.items.next(p.work, turn.item)) {
    const Unit* next = units_of(p, turn.item);
    const int head = turn.item.strip % p.heads;
    for (int left = turn.item.count; left > 0; --left) {
      const Unit units[kUnits] = {next[0], next[1]};  // on their way while we wait
      next += kUnits;
      const int stage = place.stage;
      barrier_wait(&shared.keys_empty[stage], place.parity ^ 1);
      shared.tiles[stage] = {{units[0].length, units[1].length}, {units[0].bias, units[1].bias}, units[0].variant};
      barrier_arrive_expecting(&shared.keys_full[stage], S::kKeyBytes);
      load_keys(p, keys, shared, stage, units, head);
      barrier_wait(&shared.values_empty[stage], place.parity ^ 1);
      barrier_arrive_expecting(&shared.values_full[stage], S::kValueBytes);
      load_values(p, values, shared, stage, units, head);
      place.advance();
    }
  }
}

// 64 query rows of one variant to shared memory, as 8-bit pages need them. Rows past the end are zeros.
template <Kind kKind, int kD>
INFERIX_DEVICE void load_queries(const AttentionArgs& p, int variant, Shared<kKind, kD>& shared, int warpgroup, int t) {
  using S = Shared<kKind, kD>;
  t = opaque(t);
  const RowBlock rows = shared.turns[warpgroup].rows;
  constexpr int kChunks = kD * 2 / kChunk;  // of a row of bf16
  sync_named(1 + warpgroup, kWarpgroup);    // no warp still multiplies the ones before
#pragma unroll 4
  for (int i = t; i < kRows * kChunks; i += kWarpgroup) {
    const int r = i / kChunks, chunk = i % kChunks;
    Chunk x = {};
    if (rows.has(r)) {
      const int64_t at = variant * p.q_variant_stride + rows.query(r) * p.q_token_stride + rows.head(r) * p.q_head_stride;
      x = *reinterpret_cast<const Chunk*>(p.q + 2 * at + chunk * kChunk);
    }
    if constexpr (S::kEightBit) {
      float values[8];
      uint32_t largest = 0;  // as bits, of which a NaN's are the largest: a row with one gets a scale that is NaN
      for (int n = 0; n < 8; ++n) {
        values[n] = float_of(n % 2 ? x.word[n / 2] & 0xffff0000u : x.word[n / 2] << 16);
        const uint32_t magnitude = bits_of(values[n]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
      }
      for (int distance = kChunks / 2; distance > 0; distance /= 2) {
        const uint32_t other = shuffle_xor(largest, distance);
        largest = other > largest ? other : largest;
      }
      const float amax = float_of(largest < bits_of(kAmaxFloor) ? bits_of(kAmaxFloor) : largest);
      constexpr float kTop = kKind == Kind::i8f8 ? kInt8Max : kE4m3Max;
      const float inverse = divide(kTop, amax);
      if (chunk == 0) shared.query_scales[warpgroup][r] = amax * (1.f / kTop);
      for (int n = 0; n < 8; ++n) values[n] *= inverse;
      uint32_t* to = reinterpret_cast<uint32_t*>(shared.queries[warpgroup] + tile_offset(r, chunk * 8, kRows, kD));
      to[0] = S::pack_codes(values);
      to[1] = S::pack_codes(values + 4);
    } else {
      *reinterpret_cast<Chunk*>(shared.queries[warpgroup] + tile_offset(r, chunk * kChunk, kRows, kD * 2)) = x;
    }
  }
  fence_stores();
  sync_named(1 + warpgroup, kWarpgroup);
}

// Values past the end of a page may be anything, and their weight of 0 does not undo a NaN: they become 0. So do the
// scales of a page of nothing. Each warpgroup does it for itself; that others do the same at the same time is harmless.
template <Kind kKind, int kD>
INFERIX_DEVICE void clear_unused_values(Shared<kKind, kD>& shared, int stage, const TileInfo& tile, int warpgroup,
                                        int t) {
  using S = Shared<kKind, kD>;
  t = opaque(t);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int length = tile.length[u];
    if (length == kUnitKeys) continue;
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
  }
  fence_stores();
  sync_named(1 + warpgroup, kWarpgroup);
}

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

// weights = 2^(score - largest + lift), packed as the left operand of the weighted sum; shrink is what everything summed
// before must be multiplied with.
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void soften(float (&scores)[64], const TileInfo& tile, const float (&scale)[2], Softmax& rows,
                           uint32_t (&weights)[kSteps][4], float (&shrink)[2], int t) {
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
    float top = larger(fused(highest[r][0], scale[r], tile.bias[0]), fused(highest[r][1], scale[r], tile.bias[1]));
    top = larger(top, shuffle_xor(top, 1));
    top = larger(larger(top, shuffle_xor(top, 2)), rows.largest[r]);
    // Nothing but -inf so far: any finite number in its place makes all weights 0.
    const float base = top == -INFINITY ? 0.f : top;
    shrink[r] = exp2_approx(rows.largest[r] - base);
    rows.largest[r] = top;
    rows.sum[r] *= shrink[r];
    highest[r][0] = tile.bias[0] - base + S::kLift;
    highest[r][1] = tile.bias[1] - base + S::kLift;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      constexpr int kPacked = S::kEightBit ? 4 : 2;
      float w[kPacked];
#pragma unroll
      for (int n = 0; n < kPacked; ++n) {
        const int i = S::kEightBit ? a_source_8(word, n, step) : a_source_16(word, n, step), r = row_slot(i);
        w[n] = exp2_approx(fused(scores[i], scale[r], highest[r][i / 32]));
        rows.sum[r] += w[n];
      }
      weights[step][word] = S::pack_weights(w);
    }
    pin(weights[step]);
  }
}

// out += weights . values
template <Kind kKind, int kD, int kSteps>
INFERIX_DEVICE void add_values(Shared<kKind, kD>& shared, int stage, const uint32_t (&a)[kSteps][4],
                               float (&out)[kD / 2], int t) {
  using S = Shared<kKind, kD>;
  const uint32_t address = shared_address(shared.values[stage]);
  if constexpr (S::kEightBit) {
    // Tensor cores keep 14 bits of an 8-bit sum's fraction: sums of a page are carried over to float32, by its scales.
    // 64 channels at a time: 128 would not leave enough registers.
#pragma unroll
    for (int n = 0; n < kUnits * kD / 64; ++n) {
      const int u = n / (kD / 64), first = n % (kD / 64) * 64;
      float part[32];
      pin(part);
      multiply_begin();
      const uint64_t v = k_major(address + u * S::kUnitBytes + first * kUnitKeys, kUnitKeys);
#pragma unroll
      for (int step = 0; step < S::kValueSteps / kUnits; ++step)
        multiply_registers_e4m3(part, a[u * S::kValueSteps / kUnits + step],
                                v + k_major_step(step, kD, kUnitKeys) / kChunk, step > 0);
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
    pin(out);
    multiply_begin();
    const uint64_t v = mn_major(address, kTileKeys);
#pragma unroll
    for (int step = 0; step < S::kValueSteps; ++step)
      multiply_registers_bf16(out, a[step], v + mn_major_step(step) / kChunk, true);
    multiply_commit();
    multiply_wait();
    pin(out);
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
    int variant = -1;
    for (int left = shared.turns[warpgroup].item.count; left > 0; --left) {
      const int stage = place.stage;
      barrier_wait(&shared.keys_full[stage], place.parity);
      if (shared.tiles[stage].variant != variant) {
        variant = shared.tiles[stage].variant;
        load_queries(p, variant, shared, warpgroup, t);
      }
      float scores[64], shrink[2];
      score(shared, stage, warpgroup, scores, opaque(t));
      const TileInfo tile = shared.tiles[stage];
      sync_warp();
      if (t % 32 == 0) barrier_arrive(&shared.keys_empty[stage]);
      float scale[2] = {p.scale, p.scale};
      if constexpr (S::kEightBit)
        for (int r = 0; r < 2; ++r) scale[r] *= shared.query_scales[warpgroup][accumulator_row(opaque(t), 2 * r)];
      uint32_t weights[S::kValueSteps][4];
      soften<kKind, kD>(scores, tile, scale, softmax, weights, shrink, opaque(t));
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) out[i] *= shrink[row_slot(i)];
      barrier_wait(&shared.values_full[stage], place.parity);
      if (tile.length[0] + tile.length[1] < kTileKeys) clear_unused_values(shared, stage, tile, warpgroup, t);
      add_values(shared, stage, weights, out, opaque(t));
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
  char* memory = shared_memory();
  S& shared = *reinterpret_cast<S*>(memory + (-shared_address(memory) & 1023));
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
