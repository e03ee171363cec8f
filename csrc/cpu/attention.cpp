// paged_attention and merge_attention on the CPU: tasks, and how a task loads queries, walks its pages and stores rows.
// The micro-kernels are in attention_tile.h.
//
// Products are in the precision of the pages: floats in float32, bfloat16 and coarser formats in bfloat16, int8 in int8
// as far as the call's `precision` allows it, where the CPU has the instructions. Otherwise all of it is float32.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_arrivals.h"
#include "attention_groups.h"
#include "attention_operands.h"
#include "pages.h"
#include "parallel.h"

namespace inferix {
namespace {

constexpr float kLn2 = 0.69314718f;

// All query rows of a task use each tile that was packed once; their accumulators should fit the L2 cache.
constexpr int64_t kRowsPerTask = 256;

// With tile registers a product takes less time than it takes to read sums from the L2 cache: so a pair of groups meets
// as many tiles as fit there before the next pair does. And to transpose values takes the time of a hundred rows.
constexpr int64_t kAmxRowsPerTask = 1024, kAmxTiles = 16;

struct RowAddress {
  int64_t element(const Rows& rows) const { return token * rows.token_stride + head * rows.head_stride; }
  int64_t token, head;
};

RowAddress address(const PagedAttentionParams& p, const Task& task, int64_t row) {
  const int64_t group = p.query_heads / p.shape.H, r = task.first_row + row;
  return {p.q_indptr[task.segment] + r / group, task.head * group + r % group};
}

// Two terms of a query make sums 255 times as large: wider heads are multiplied as if the call were exact.
Arithmetic key_arithmetic(const PagedAttentionParams& p, Codec codec, Isa isa) {
  const bool too_wide = p.precision == Precision::automatic && width(p) > kMostTwoTerms;
  return arithmetic_of(codec, isa, too_wide ? Precision::exact : p.precision);
}

// Loads the queries, scaled so that scores are in units of log 2, and initialises the online softmax.
template <typename S>
INFERIX_INLINE void load_queries(Isa isa, const PagedAttentionParams& p, const Task& task, int64_t out_columns,
                                 Workspace& w) {
  const int64_t D = width(p), stride = round_up(D, kLanes);
  const int64_t groups = round_up(task.rows, isa >= Isa::amx ? kPair * kLanes : kLanes) / kLanes;
  bool wanted[kArithmetics] = {};
  for (int i = 0; i < p.pools.count; ++i) wanted[key_arithmetic(p, p.pools.pool[i].k.codec, isa)] = true;
  Column lowest;
  std::fill_n(lowest.lane, kLanes, -kInfinity);
  w.running.assign(groups, OnlineSoftmax{lowest, Column{}});
  w.out.assign(groups * out_columns, Column{});
  w.q_scale.assign(p.variants * groups, Column{});
  float *x = w.row.floats((kLanes + 1) * stride), *words = x + stride;  // a row; the words of sixteen
  std::fill_n(x, (kLanes + 1) * stride, 0.f);
  for (int arithmetic = 0; arithmetic < kArithmetics; ++arithmetic) {  // kInt8 last: the scales are its
    const int64_t terms = terms_of(static_cast<Arithmetic>(arithmetic), p.precision);
    const int64_t count = terms * words_of(D, static_cast<Arithmetic>(arithmetic));
    w.q[arithmetic].resize(wanted[arithmetic] ? p.variants * groups * count : 0);
    for (int64_t group = 0; wanted[arithmetic] && group < p.variants * groups; ++group) {
      const int64_t variant = group / groups, first = group % groups * kLanes;
      for (int64_t row = first; row < std::min(task.rows, first + kLanes); ++row) {
        const int64_t at = variant * p.q_variant_stride + address(p, task, row).element(p.q);
        to_floats(isa, p.q_dtype, static_cast<const char*>(p.q.data) + at * element_bytes(p.q_dtype), D, 1, D, x, D);
        for (int64_t d = 0; d < D; ++d) x[d] *= p.scale * kLog2E;
        int32_t* row_words = reinterpret_cast<int32_t*>(words + (row - first) * stride);
        w.q_scale[group].lane[row - first] = to_words(static_cast<Arithmetic>(arithmetic), x, D, terms, row_words);
      }
      alignas(64) Column block[kLanes];
      for (int64_t n = 0; n < count; n += kLanes) {
        S::transpose(words + n, stride, block[0].lane, kLanes);
        std::copy_n(block, std::min<int64_t>(kLanes, count - n), &w.q[arithmetic][group * count + n]);
      }
    }
  }
}

// Attention over two disjoint sets of keys, by their lse, becomes attention over both.
struct Merge {
  Merge(float lse_a, float lse_b) {
    const float highest = std::max(lse_a, lse_b);
    // -inf on both sides: any finite number in the maximum's place makes both weights 0.
    const float base = highest == -kInfinity ? 0.f : highest;
    const float weight_a = std::exp(lse_a - base), weight_b = std::exp(lse_b - base), total = weight_a + weight_b;
    lse = base + std::log(total);
    share_a = weight_a != 0.f ? weight_a / total : 0.f, share_b = weight_b != 0.f ? weight_b / total : 0.f;
  }
  // A side that saw no key contributes nothing, whatever it holds: 0 * NaN is NaN, hence the selection. A share that is
  // NaN is not 0, and shows.
  float join(float a, float b) const {
    return (share_a != 0.f ? a * share_a : 0.f) + (share_b != 0.f ? b * share_b : 0.f);
  }
  float lse, share_a, share_b;
};

// One row of the result: x[D], to be multiplied with `inverse`.
INFERIX_INLINE void store_row(Isa isa, const PagedAttentionParams& p, const RowAddress& at, float mine, float inverse,
                              float* __restrict x, float* __restrict before) {
  const int64_t D = width(p);
  float& lse = p.lse[at.token * p.query_heads + at.head];
  char* out = static_cast<char*>(p.out.data) + at.element(p.out) * element_bytes(p.out_dtype);
  for (int64_t d = 0; d < D; ++d) x[d] *= inverse;
  if (p.accumulate) {
    const Merge merge(mine, lse);
    to_floats(isa, p.out_dtype, out, D, 1, D, before, D);
    for (int64_t d = 0; d < D; ++d) x[d] = merge.join(x[d], before[d]);
    lse = merge.lse;
  } else {
    lse = mine;
  }
  from_floats(isa, p.out_dtype, x, D, 1, D, out, D);
}

template <typename S>
INFERIX_INLINE void store_rows(Isa isa, const PagedAttentionParams& p, const Task& task, int64_t out_columns,
                               Workspace& w) {
  float *x = w.row.floats((kLanes + 1) * out_columns), *before = x + kLanes * out_columns;
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t group = row / kLanes, lane = row % kLanes;
    for (int64_t d = 0; lane == 0 && d < out_columns; d += kLanes)
      S::transpose(w.out[group * out_columns + d].lane, kLanes, x + d, out_columns);
    const float sum = w.running[group].sum.lane[lane], base = w.running[group].base.lane[lane];
    const bool nothing = sum == 0.f || base == kNothing;
    const float lse = nothing ? -kInfinity : (base + std::log2(sum)) * kLn2 + w.max_bias;
    store_row(isa, p, address(p, task, row), lse, nothing ? 0.f : 1.f / sum, x + lane * out_columns, before);
  }
}

// The largest bias of a list's entries that have tokens; 0 if none is finite. In float32 a score vanishes beside a
// bias of 1e9, and one of -3e38 overflows in units of log 2: so biases are taken relative to the largest.
float max_bias(const PagedAttentionParams& p, int64_t list) {
  float largest = -kInfinity;
  for (int64_t i = p.page_indptr[list]; p.page_bias && i < p.page_indptr[list + 1]; ++i)
    if (p.entries.lens[i] > 0) largest = std::max(largest, p.page_bias[i]);
  return largest == -kInfinity ? 0.f : largest;
}

// Goes on with the task whose state is in the workspace. False if it stops before a page that is not there yet.
template <typename S>
INFERIX_INLINE bool attend_task(Isa isa, const PagedAttentionParams& p, const Task& task, AttendGroups single,
                                AttendGroups pair, Workspace& w) {
  const Call call(p, task);
  const int64_t list = list_of(p, task), list_end = p.page_indptr[list + 1];
  if (w.entry == kNotBegun) {
    load_queries<S>(isa, p, task, call.out_columns, w);
    w.max_bias = max_bias(p, list), w.entry = p.page_indptr[list];
  }
  const int64_t groups = static_cast<int64_t>(w.running.size());
  w.tiles.resize(isa >= Isa::amx ? kAmxTiles : 1);
  int64_t packed = 0;  // tiles for tile registers; all of them meet a pair of groups before the next pair does
  const auto attend_packed = [&]() INFERIX_INLINE_LAMBDA {
#if defined(__x86_64__)
    if constexpr (S::kWidth == 16) attend_in_tiles(call, packed, w);
#endif
    packed = 0;
  };
  for (int64_t i = w.entry; i < list_end; ++i) {
    if (!has_arrived(p, i)) {
      attend_packed();
      w.entry = i;
      return false;
    }
    const float bias = p.page_bias ? (p.page_bias[i] - w.max_bias) * kLog2E : 0.f;
    if (bias == -kInfinity) continue;
    const int64_t start = p.entries.starts ? p.entries.starts[i] : 0, end = start + p.entries.lens[i];
    const Location page = locate(p.pools, p.entries.ids[i]);
    const Tile k_tile = tile_of(page.pool->k, p.shape, page.page, task.head);
    const Tile v_tile = tile_of(page.pool->v, p.shape, page.page, task.head);
    const NextPage next = NextPage::of(p, task, i + 1, list_end);
    if (isa >= Isa::amx) next.fetch(0, 1);
    for (int64_t first = start; first < end; first += kTileKeys) {
      PackedTile& tile = w.tiles[packed];
      tile.count = std::min<int64_t>(kTileKeys, end - first);
      tile.position = p.page_positions ? p.page_positions[i] + first - start : 0;
      if (call.view(0, groups, tile) == View::none) continue;
      tile.k_arithmetic = key_arithmetic(p, k_tile.codec, isa);
      tile.v_arithmetic = arithmetic_of(v_tile.codec, isa, p.precision);
      tile.bias = bias, tile.variant = p.page_variants ? p.page_variants[i] : 0;
      pack_keys<S>(isa, k_tile, first, tile.count, call.cap == 0.f ? bias : 0.f, w, tile);
      pack_values<S>(isa, v_tile, first, tile.count, w, tile);
      const bool in_tiles = tile.k_arithmetic == kTiles && tile.v_arithmetic == kTiles;
      if (in_tiles)
        ++packed;
      else
        attend_tile(call, tile, next, single, pair, w);
      if (packed == kAmxTiles) attend_packed();
    }
  }
  attend_packed();
  store_rows<S>(isa, p, task, call.out_columns, w);
  return true;
}

using Attend = bool (*)(Isa, const PagedAttentionParams&, const Task&, Workspace&);

#define INFERIX_GROUPS(level, target, width, Registers)                                               \
  target void attend_##level(const Call& call, const PackedTile& tile, int64_t group, Workspace& w) { \
    attend_groups<Simd<width>, Registers>(call, tile, group, w);                                      \
  }

INFERIX_GROUPS(one_portable, , 4, PortableBlock)
bool attend_portable(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  return attend_task<Simd<4>>(isa, p, task, attend_one_portable, nullptr, w);
}

#if defined(__x86_64__)
INFERIX_GROUPS(one_v3, INFERIX_V3, 8, V3Block)
INFERIX_V3 bool attend_v3(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  return attend_task<Simd<8>>(isa, p, task, attend_one_v3, nullptr, w);
}

// Of so few keys arranging tiles takes longer than multiplying them: float32 needs the least of it. It goes by the list alone: a row's result does not
// depend on the rows beside it.
bool has_few_keys(const PagedAttentionParams& p, int64_t list) {
  int64_t keys = 0;
  for (int64_t i = p.page_indptr[list]; i < p.page_indptr[list + 1] && keys <= kLanes; ++i) keys += p.entries.lens[i];
  return keys <= kLanes;
}

using V4Single = Block<V4Block::kRows * V4Block::kGroups, 1>;
INFERIX_GROUPS(one_v4, INFERIX_V4, 16, V4Single)
INFERIX_GROUPS(two_v4, INFERIX_V4, 16, V4Block)
INFERIX_V4 bool attend_v4(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  if (isa == Isa::amx && has_few_keys(p, list_of(p, task))) isa = Isa::avx512;
  const Tiles tiles(isa >= Isa::amx);
  return attend_task<Simd<16>>(isa, p, task, attend_one_v4, attend_two_v4, w);
}

Attend attend_for(Isa isa) { return dispatch<Attend>(isa, attend_portable, attend_v3, attend_v4); }
#else
Attend attend_for(Isa) { return attend_portable; }
#endif

void check_indptr(const char* name, const int32_t* indptr, int64_t segments, int64_t end) {
  bool rises = indptr[0] == 0 && indptr[segments] == end;
  for (int64_t s = 0; s < segments; ++s) rises = rises && indptr[s] <= indptr[s + 1];
  if (!rises)
    throw std::invalid_argument(std::string("plan.") + name + " must rise from 0 to " + std::to_string(end) + ", got " +
                                std::to_string(indptr[0]) + " ... " + std::to_string(indptr[segments]));
}

void check_variants(const PagedAttentionParams& p) {
  for (int64_t i = 0; p.page_variants && i < p.entries.n; ++i)
    if (p.page_variants[i] < 0 || p.page_variants[i] >= p.variants)
      throw std::invalid_argument("plan.page_variants[" + std::to_string(i) + "] must be in [0, " +
                                  std::to_string(p.variants) + "), got " + std::to_string(p.page_variants[i]));
}

std::vector<Task> split(const PagedAttentionParams& p, Isa isa) {
  std::vector<Task> tasks;
  for (int64_t segment = 0; segment < p.segments; ++segment) {
    const int64_t rows = (p.q_indptr[segment + 1] - p.q_indptr[segment]) * (p.query_heads / p.shape.H);
    // Equal shares, whole registers.
    const int64_t most = isa >= Isa::amx ? kAmxRowsPerTask : kRowsPerTask;
    const int64_t shares = std::max<int64_t>((rows + most - 1) / most, 1);
    const int64_t share = round_up((rows + shares - 1) / shares, kLanes);
    for (int64_t head = 0; head < p.shape.H; ++head)
      for (int64_t first = 0; first < rows; first += share)
        tasks.push_back({segment, head, first, std::min(share, rows - first)});
  }
  return tasks;
}

Workspace& own_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

template <typename In, typename Out>
void merge_row(const MergeAttentionParams& p, int64_t row) {
  const Merge merge(p.lse_a[row], p.lse_b[row]);
  p.lse[row] = merge.lse;
  const In *x = static_cast<const In*>(p.out_a) + row * p.D, *y = static_cast<const In*>(p.out_b) + row * p.D;
  Out* out = static_cast<Out*>(p.out) + row * p.D;
  for (int64_t d = 0; d < p.D; ++d) out[d] = from_float<Out>(merge.join(to_float(x[d]), to_float(y[d])));
}

}  // namespace

void paged_attention_cpu(const PagedAttentionParams& p, const Cpu& cpu) {
  check_indptr("q_indptr", p.q_indptr, p.segments, p.T);
  check_indptr("page_indptr", p.page_indptr, p.segments * p.lists_per_segment, p.entries.n);
  entry_starts("plan.page_ids", "plan.page_lens", p.entries, total_pages(p.pools), p.shape.page_size, -1, false);
  check_variants(p);
  check_arrivals(p);
  const std::vector<Task> tasks = split(p, cpu.isa);
  const Attend attend_task = attend_for(cpu.isa);
  const auto attend = [&](const Task& task, Workspace& w) { return attend_task(cpu.isa, p, task, w); };
  if (p.arrivals) {
    ArrivingTasks arriving(p, tasks);
    parallel_for(cpu.threads, cpu.threads, [&](int64_t) { arriving.work(attend, own_workspace()); });
    return arriving.require_all();
  }
  parallel_for(cpu.threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    Workspace& w = own_workspace();
    w.entry = kNotBegun;
    attend(tasks[i], w);
  });
}

void merge_attention_cpu(const MergeAttentionParams& p, const Cpu& cpu) {
  constexpr int64_t kRowsPerChunk = 256;
  with_float_type(p.in_dtype, [&](auto in) {
    with_float_type(p.out_dtype, [&](auto out) {
      parallel_for(cpu.threads, (p.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
        const int64_t end = std::min(p.rows, (chunk + 1) * kRowsPerChunk);
        for (int64_t row = chunk * kRowsPerChunk; row < end; ++row) merge_row<decltype(in), decltype(out)>(p, row);
      });
    });
  });
}

}  // namespace inferix
