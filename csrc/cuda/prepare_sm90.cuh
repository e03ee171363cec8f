// Before and after the attention kernel on Hopper: the plan becomes units of 64 keys and a work table; partial results
// of query tiles become rows of the result. Compiled for the CPU too.
#pragma once
#include "shared_sm90.cuh"

namespace inferix::sm90 {

constexpr int kPrepareThreads = 1024, kWarpThreads = 32;

template <typename T>
INFERIX_DEVICE T warp_prefix_sum(T x, int lane) {
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const T below = shfl_up(x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// Where a page is: in which pool of the pass, and as which of its pages. pool -1: in none.
struct PoolPage {
  int pool, page;
};
INFERIX_DEVICE PoolPage locate(const PrepareArgs& p, int id) {
  PoolPage found{-1, 0};
  for (int i = 0; i < p.pools; ++i) {
    const uint32_t page = uint32_t(id) - uint32_t(p.pool[i].first);
    if (page < uint32_t(p.pool[i].count)) found = {i, int(page)};
  }
  return found;
}

// Units of entry e that belong to a variant: none if the entry is of no pool of the pass, empty, or does not fit.
INFERIX_DEVICE int units_in(const PrepareArgs& p, int e, int variant) {
  const int length = p.page_lens[e];
  const bool fits = locate(p, p.page_ids[e]).pool >= 0 && length >= 0 && length <= p.page_size;
  if (!fits || (p.page_variants ? p.page_variants[e] : 0) != variant) return 0;
  if (p.page_bias && p.page_bias[e] == -INFINITY) return 0;
  return (length + kUnitKeys - 1) / kUnitKeys;
}

// In units of log 2. What is finite stays so: only -inf leaves a page out.
INFERIX_DEVICE float unit_bias(const PrepareArgs& p, int e) {
  constexpr float kMost = 0x1p126f;
  const float bias = p.page_bias ? p.page_bias[e] * kLog2E : 0.f;
  return bias < -kMost ? -kMost : bias > kMost ? kMost : bias;
}

// A warp makes the units of one list, by variant. Each variant has whole key tiles. Returns the number of units.
INFERIX_DEVICE int make_units(const PrepareArgs& p, int list, int lane) {
  const Range entries = range_of(p.page_indptr, list, p.entries);
  const int64_t start = unit_start(list, entries.begin, p.variants, p.page_size);
  if (lane == 0) p.list_start[list] = start;
  Unit* to = p.units + start;
  int count = 0;
  for (int variant = 0; variant < p.variants; ++variant) {
    for (int64_t first = entries.begin; first < entries.end; first += kWarpThreads) {
      const int e = int(first) + lane, parts = e < entries.end ? units_in(p, e, variant) : 0;
      const int below = warp_prefix_sum(parts, lane);
      const PoolPage at = parts ? locate(p, p.page_ids[e]) : PoolPage{0, 0};
      for (int i = 0; i < parts; ++i) {
        const int left = p.page_lens[e] - i * kUnitKeys;
        to[count + below - parts + i] = {at.page * p.heads * p.page_size + i * kUnitKeys,
                                         int16_t(left < kUnitKeys ? left : kUnitKeys), int16_t(at.pool),
                                         unit_bias(p, e), variant};
      }
      count += shfl_idx(below, kWarpThreads - 1);
    }
    // A unit of nothing is read like any other: from the first page.
    if (lane == 0 && count % kUnits) to[count] = {0, 0, 0, 0.f, variant};
    count += count % kUnits;
  }
  if (lane < kUnits && count == 0) to[lane] = {0, 0, 0, 0.f, 0};
  return count == 0 ? kUnits : count;
}

// A warp sums up tiles and work over the strips.
INFERIX_DEVICE void make_table(const PrepareArgs& p, int lane) {
  int tiles = 0, longest = 0, shortest = 0x7fffffff;
  int64_t work = 0;
  for (int first = 0; first < p.work.strips; first += kWarpThreads) {
    const int strip = first + lane, segment = strip / p.heads;
    int own_tiles = 0, length = 0;
    if (strip < p.work.strips) {
      const Range queries = range_of(p.q_indptr, segment, p.T);
      own_tiles = int(((queries.end - queries.begin) * p.group + kBlockM - 1) / kBlockM);
      length = p.list_tiles[p.lists_per_segment == 1 ? segment : strip];
    }
    const int64_t own_work = int64_t(own_tiles) * length;
    const int tiles_to = warp_prefix_sum(own_tiles, lane);
    const int64_t work_to = warp_prefix_sum(own_work, lane);
    if (strip < p.work.strips) {
      p.work.tile_start[strip] = tiles + tiles_to - own_tiles;
      p.work.work_start[strip] = work + work_to - own_work;
      p.work.key_tiles[strip] = length;
    }
    if (own_tiles) {
      longest = length > longest ? length : longest;
      shortest = length < shortest ? length : shortest;
    }
    tiles += shfl_idx(tiles_to, kWarpThreads - 1);
    work += shfl_idx(work_to, kWarpThreads - 1);
  }
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const int other = shfl_xor(longest, distance), least = shfl_xor(shortest, distance);
    longest = other > longest ? other : longest;
    shortest = least < shortest ? least : shortest;
  }
  const int whole = whole_tiles(tiles, longest == shortest ? longest : 0, p.work.blocks);
  for (int block = lane; block <= p.work.blocks; block += kWarpThreads)
    p.work.work_range_start[block] = work_range_start(work, int64_t(whole) * longest, block, p.work.blocks);
  if (lane != 0) return;
  p.work.tile_start[p.work.strips] = tiles;
  p.work.work_start[p.work.strips] = work;
  *p.work.whole = whole;
}

// One block: a plan is a few hundred numbers.
INFERIX_KERNEL(kPrepareThreads) prepare_kernel(INFERIX_GRID_CONSTANT PrepareArgs p) {
  const int warp = thread_index() / kWarpThreads, lane = thread_index() % kWarpThreads;
  const int lists = p.segments * p.lists_per_segment;
  for (int list = warp; list < lists; list += kPrepareThreads / kWarpThreads) {
    const int units = make_units(p, list, lane);
    if (lane == 0) p.list_tiles[list] = units / kUnits;
  }
  sync_threads();
  if (warp == 0) make_table(p, lane);
}

// Merges the partial results of split query tiles: a warp per row, in the order of the blocks.
constexpr int kMergeThreads = 256, kMergeParts = 12;

template <int kD>
INFERIX_KERNEL(kMergeThreads) merge_partials_kernel(INFERIX_GRID_CONSTANT AttentionArgs p) {
  const int block = block_index(), warp = thread_index() / kWarpThreads, lane = thread_index() % kWarpThreads;
  const SplitTile split = split_tile(p.work, block);
  if (split.blocks == 0) return;
  const RowBlock rows = rows_of(p, split.strip, split.tile, 0);
  constexpr int kStep = kMergeThreads / kWarpThreads * kMergeParts;
  for (int r = block_index_y() * (kMergeThreads / kWarpThreads) + warp; r < kBlockM && rows.has(r); r += kStep) {
    float top = -INFINITY;
    for (int n = 0; n < split.blocks; ++n) {
      const int partial = partial_of(p.work, block, n);
      if (partial >= 0) top = fmax(top, p.partial_lse[int64_t(partial) * kBlockM + r]);
    }
    const float base = top == -INFINITY ? 0.f : top;
    float total = 0.f, sums[kD / kWarpThreads] = {};
    for (int n = 0; n < split.blocks; ++n) {
      const int partial = partial_of(p.work, block, n);
      if (partial < 0) continue;
      const int64_t at = int64_t(partial) * kBlockM + r;
      const float weight = exp_approx(p.partial_lse[at] - base);
      total += weight;
      for (int i = 0; i < kD / kWarpThreads; i += 2) {
        const Pair x = *reinterpret_cast<const Pair*>(p.partial_out + at * kD + kWarpThreads * i + 2 * lane);
        sums[i] = fma(weight, x.x[0], sums[i]);
        sums[i + 1] = fma(weight, x.x[1], sums[i + 1]);
      }
    }
    const float inverse = total == 0.f ? 0.f : div_rn(1.f, total);
    const float lse = total == 0.f ? -INFINITY : base + log2_approx(total) * kLn2;
    const RowEpilogue epilogue = row_epilogue(p, rows.query(r), rows.head(r), lse);
    sync_warp();  // all have read lse
    if (lane == 0) epilogue.write_lse(p);
    epilogue.write<kD / kWarpThreads / 2>(
        p, [&](int i) { return 2 * kWarpThreads * i + 2 * lane; },
        [&](int i) { return Pair{{sums[2 * i] * inverse, sums[2 * i + 1] * inverse}}; });
  }
}

}  // namespace inferix::sm90
