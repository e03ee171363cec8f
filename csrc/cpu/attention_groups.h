// How groups of sixteen query rows meet packed tiles: one by one with vector registers, two at once with tile
// registers. Included by attention.cpp alone.
#pragma once
#include "attention_amx.h"
#include "attention_limits.h"
#include "attention_operands.h"
#include "pages.h"

namespace inferix {

constexpr float kLog2E = 1.44269504f;

// Rows of one segment that read the same KV head: row r is query r / group, query head head * group + r % group.
struct Task {
  int64_t segment, head, first_row, rows;
};

inline int64_t width(const PagedAttentionParams& p) { return p.pools.pool[0].k.width; }

inline int64_t list_of(const PagedAttentionParams& p, const Task& task) {
  return task.segment * p.lists_per_segment + (p.lists_per_segment == 1 ? 0 : task.head);
}

// Is the page of an entry there?
inline bool has_arrived(const PagedAttentionParams& p, int64_t entry) {
  if (!p.arrivals || p.arrivals[2 * entry] < 0) return true;
  return has_reached(p.counters + p.arrivals[2 * entry], p.arrivals[2 * entry + 1]);
}

template <typename S, typename Function>
INFERIX_INLINE void with_micro_kernels(Arithmetic arithmetic, const Function& function) {
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16) {
    if (arithmetic == kInt8) return function(MicroKernels<S, Int8Words>{});
    if (arithmetic == kBf16) return function(MicroKernels<S, Bf16Words>{});
    return function(MicroKernels<S, WideFloatWords>{});
  }
#endif
  function(MicroKernels<S, FloatWords<S>>{});
}

// Without one it holds all keys: they are then at position 0.
inline Window window_of(const PagedAttentionParams& p, int64_t segment) {
  constexpr int64_t kUnlimited = int64_t{1} << 40;
  if (!p.windows) return {kUnlimited, kUnlimited};
  return {p.windows[2 * segment], p.windows[2 * segment + 1]};
}

// Codes that are read next: a page is asked for while the one before it is multiplied.
struct NextPage {
  const char *k = nullptr, *v = nullptr;
  int64_t k_bytes = 0, v_bytes = 0;

  // Of an entry of the task's list, or of none past its end. Rows that do not lie side by side are not asked for.
  static NextPage of(const PagedAttentionParams& p, const Task& task, int64_t entry, int64_t end) {
    NextPage next;
    if (entry == end) return next;
    const Location page = locate(p.pools, p.entries.ids[entry]);
    const int64_t start = p.entries.starts ? p.entries.starts[entry] : 0;
    const int64_t count = std::min<int64_t>(kTileKeys, p.entries.lens[entry]);
    const auto ask = [&](const Plane& plane, const char*& codes, int64_t& bytes) {
      const Tile tile = tile_of(plane, p.shape, page.page, task.head);
      if (is_transposed(tile.codec) || tile.row != row_bytes(tile.codec, tile.width)) return;
      codes = tile.codes + start * tile.row, bytes = count * tile.row;
    };
    ask(page.pool->k, next.k, next.k_bytes);
    ask(page.pool->v, next.v, next.v_bytes);
    return next;
  }

  // One of `shares` equal parts.
  INFERIX_INLINE void fetch(int64_t share, int64_t shares) const {
    for (int64_t i = k_bytes * share / shares; i < k_bytes * (share + 1) / shares; i += 64)
      __builtin_prefetch(k + i, 0, 2);
    for (int64_t i = v_bytes * share / shares; i < v_bytes * (share + 1) / shares; i += 64)
      __builtin_prefetch(v + i, 0, 2);
  }
};

// What the tiles of a task have in common.
struct Call {
  Call(const PagedAttentionParams& p, const Task& task)
      : group_size(p.query_heads / p.shape.H),
        first_row(task.first_row),
        out_columns(round_up(width(p), 2 * kLanes)),
        window(window_of(p, task.segment)),
        cap(p.softcap * kLog2E),
        slopes(p.alibi_slopes ? p.alibi_slopes + task.segment * p.alibi_stride + task.head * group_size : nullptr),
        precision(p.precision) {}

  // What `count` groups from `group` on see of a tile.
  View view(int64_t group, int64_t count, const PackedTile& tile) const {
    const int64_t row = first_row + group * kLanes;
    return window.of(row / group_size, (row + count * kLanes - 1) / group_size, tile.position, tile.count);
  }

  int64_t group_size, first_row, out_columns;
  Window window;
  float cap;
  const float* slopes;
  Precision precision;
};

// Between the products: what cap, slopes and window leave of the scores of one group, and the largest of it.
template <typename S>
INFERIX_INLINE void limit(const Call& call, const PackedTile& tile, int64_t group, Column* scores, Column& row_max,
                          Workspace& w) {
  const bool differ = call.slopes || call.view(group, 1, tile) != View::all;
  if (call.cap == 0.f && !differ) return;
  const LimitedRows rows(call.window, call.first_row + group * kLanes, call.group_size, call.slopes, kLog2E);
  row_max = limit_scores<S>(scores, tile.count, call.cap, tile.bias, differ ? &rows : nullptr, tile.position);
  floor_base<S>(w.running[group]);
}

// Groups group ... group + Registers::kGroups - 1 and one tile.
template <typename S, typename Registers>
INFERIX_INLINE void attend_groups(const Call& call, const PackedTile& tile, int64_t group, Workspace& w) {
  constexpr int kGroups = Registers::kGroups;
  const int64_t terms = terms_of(tile.k_arithmetic, call.precision), groups = static_cast<int64_t>(w.running.size());
  const int64_t q_group = tile.variant * groups + group;
  alignas(64) Column scores[kGroups][kTileKeys];
  Column row_max[kGroups], factor[kGroups];
  const Column *q[kGroups], *weights[kGroups], *q_scale = &w.q_scale[q_group];
  Column* out[kGroups];
  for (int i = 0; i < kGroups; ++i) {
    q[i] = &w.q[tile.k_arithmetic][(q_group + i) * terms * tile.keys.words];
    weights[i] = scores[i], out[i] = &w.out[(group + i) * call.out_columns];
  }
  with_micro_kernels<S>(tile.k_arithmetic, [&](auto kernels) INFERIX_INLINE_LAMBDA {
    if constexpr (decltype(kernels)::kInteger)
      if (terms == 2) return kernels.template qk_product<Registers, 2>(tile.keys, q, q_scale, scores, row_max);
    kernels.template qk_product<Registers>(tile.keys, q, q_scale, scores, row_max);
  });
  for (int i = 0; i < kGroups; ++i) {
    limit<S>(call, tile, group + i, scores[i], row_max[i], w);
    rescale<S>(row_max[i], w.running[group + i], out[i], call.out_columns);
  }
  with_micro_kernels<S>(tile.v_arithmetic, [&](auto kernels) INFERIX_INLINE_LAMBDA {
    for (int i = 0; i < kGroups; ++i)
      factor[i] = kernels.exponentiate(scores[i], tile.keys.count, row_max[i], w.running[group + i]);
    kernels.template pv_product<Registers>(tile.values, weights, factor, out);
  });
}

#if defined(__x86_64__)
// Two groups meet one tile after the other. While the scores of one become weights, the tile registers multiply the
// keys of the next and the values of the one before. Weights are taken relative to the base as it is, and again if
// that had to be raised, which is seldom.
template <int kEvery>
class PairPipeline {
  using S = Simd<16>;

 public:
  INFERIX_INLINE PairPipeline(const Call& call, int64_t group, Workspace& w) : call_(call), group_(group), w_(w) {}

  // next: the tile whose keys come now, or null.
  INFERIX_INLINE void advance(const PackedTile* next) {
    const int64_t count = scored_ ? scored_->keys.count : 0;
    Column *const scores = scores_[turn_], *const weights = weights_[turn_];
    OnlineSoftmax* const running = &w_.running[group_];
    Column row_max[kPair], sums[kPair];
    for (int64_t i = 0; i < kPair; ++i) {
      if (scored_) limit<S>(call_, *scored_, group_ + i, scores + i * count, row_max[i], w_);
      std::fill_n(row_max[i].lane, kLanes, -kInfinity);
      sums[i] = running[i].sum;
    }
    PairExponentials exponentials(scores, weights, running, row_max, count);
    if (next) products_.run<kEvery>(qk_product(*next), exponentials);
    if (weighted_)
      products_.run<kEvery>(pv_product(), exponentials);
    else
      products_.store();
    while (exponentials.left > 0) exponentials.step();
    for (int64_t i = 0; i < kPair && scored_; ++i)
      if (exceeds(row_max[i], running[i].base)) {
        products_.store();
        running[i].sum = sums[i];
        rescale<S>(row_max[i], running[i], out(i), call_.out_columns);
        PairExponentials again(scores + i * count, weights + i * count / 2, running + i, row_max + i, count);
        while (again.left > again.second) again.step();
      }
    weighted_ = scored_, scored_ = next;
    turn_ ^= 1;
  }

  INFERIX_INLINE void finish() {
    while (scored_ || weighted_) advance(nullptr);
    products_.store();
  }

 private:
  Column* out(int64_t i) { return &w_.out[(group_ + i) * call_.out_columns]; }

  INFERIX_INLINE static bool exceeds(const Column& row_max, const Column& base) {
    const S::IntLanes above = S::part(row_max, 0) > S::part(base, 0) + kHeadroom;
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= above[lane];
    return any != 0;
  }

  TileProduct qk_product(const PackedTile& tile) {
    const TileKeys& k = tile.keys;
    const int64_t groups = static_cast<int64_t>(w_.running.size());
    const Column* q = &w_.q[kTiles][(tile.variant * groups + group_) * k.words];
    Column* const to = scores_[turn_ ^ 1];
    return {k.rows,          k.stride,          k.words / kLanes, k.count, {q, q + k.words}, {k.columns, k.columns},
            k.column_stride, {to, to + k.count}};
  }

  TileProduct pv_product() {
    const TileValues& v = weighted_->values;
    const Column* const weights = weights_[turn_ ^ 1];
    return {v.rows,           v.stride, v.steps,         v.width, {weights, weights + weighted_->keys.count / 2},
            {out(0), out(1)}, 1,        {out(0), out(1)}};
  }

  const Call& call_;
  const int64_t group_;
  Workspace& w_;
  TileProducts products_;
  const PackedTile *scored_ = nullptr, *weighted_ = nullptr;
  int turn_ = 0;  // of scored_; the other is that of weighted_ and of the next
  alignas(64) Column scores_[2][kPair * kTileKeys], weights_[2][kPair * kTileKeys / 2];
};

// A pair of groups, and `count` packed tiles.
template <int kEvery>
INFERIX_V4 void attend_pair(const Call& call, int64_t count, int64_t group, Workspace& w) {
  PairPipeline<kEvery> pipeline(call, group, w);
  for (int64_t n = 0; n < count; ++n)
    if (call.view(group, kPair, w.tiles[n]) != View::none) pipeline.advance(&w.tiles[n]);
  pipeline.finish();
}

// All rows of the task, and `count` tiles packed for tile registers.
INFERIX_INLINE void attend_in_tiles(const Call& call, int64_t count, Workspace& w) {
  for (int64_t group = 0; group < static_cast<int64_t>(w.running.size()); group += kPair) {
    // There are as many multiplications for an exponential as there are 64 channels.
    if (call.out_columns <= 64)
      attend_pair<1>(call, count, group, w);
    else
      attend_pair<2>(call, count, group, w);
  }
}
#endif

// Groups from `group` on meet one tile. Functions of their own: all of it in one takes minutes to compile.
using AttendGroups = void (*)(const Call& call, const PackedTile& tile, int64_t group, Workspace& w);

// All rows of the task, and one tile: two groups at once where `pair` is given and both see any of it.
inline void attend_tile(const Call& call, const PackedTile& tile, const NextPage& next, AttendGroups single,
                        AttendGroups pair, Workspace& w) {
  const int64_t groups = static_cast<int64_t>(w.running.size());
  const auto sees = [&](int64_t group) { return call.view(group, 1, tile) != View::none; };
  for (int64_t group = 0; group < groups;) {
    next.fetch(group, groups);
    if (pair && group + 1 < groups && sees(group) && sees(group + 1)) {
      next.fetch(group + 1, groups);
      pair(call, tile, group, w);
      group += 2;
    } else {
      if (sees(group)) single(call, tile, group, w);
      ++group;
    }
  }
}

}  // namespace inferix
