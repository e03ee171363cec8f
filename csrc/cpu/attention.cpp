// paged_attention and merge_attention on the CPU.
//
// Sixteen query rows lie side by side in a vector register. Keys and values are then read in the order they are
// stored, one scalar at a time for all sixteen rows; the softmax over keys needs no sum across a register; and a page
// may hold any number of valid tokens without a mask.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elements.h"
#include "pages.h"
#include "parallel.h"
#include "simd.h"

namespace inferix {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A task's query rows share each 8-bit page converted once. 96 rows of 64 channels keep their state in 48 KB.
constexpr int64_t kRowsPerTask = 96;
// Keys whose scores are held at once.
constexpr int64_t kKeys = 64;

// Rows of one segment that read the same KV head: row r is query r / group, query head head * group + r % group.
struct Task {
  int64_t segment, head, first_row, rows;
};

// What a thread needs for a task; kept between calls, since a task is short.
struct Workspace {
  std::vector<Column> q, out;        // [variants][groups][D], [groups][D rounded up to the kernel's rows]
  std::vector<Column> largest, sum;  // [groups]  of the scores, in units of log 2; of 2^(score - largest)
  Buffer k, v;                       // [kKeys, D]  a decoded part of a page
};

// acc[i] += sum over n < count of a[offsets[i] + n * step] * columns[n]
template <typename S, int kRows>
INFERIX_INLINE void multiply_add(const float* a, const int64_t (&offsets)[kRows], int64_t step, const Column* columns,
                                 int64_t count, typename S::Lanes (&acc)[kRows][S::kParts]) {
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int part = 0; part < S::kParts; ++part)
        acc[i][part] += a[offsets[i] + n * step] * S::part(columns[n], part);
    }
  }
}

// scores[key] = k[key] . q + bias for each of sixteen queries.
template <typename S, int kRows>
INFERIX_INLINE void score_keys(const float* k, int64_t count, int64_t D, const Column* q, float bias, Column* scores) {
  for (int64_t first = 0; first < count; first += kRows) {
    // Past the last key the last one again: nothing invalid is read, and its result is dropped.
    int64_t offsets[kRows];
    for (int i = 0; i < kRows; ++i) offsets[i] = std::min(first + i, count - 1) * D;
    typename S::Lanes acc[kRows][S::kParts] = {};
    multiply_add<S>(k, offsets, 1, q, D, acc);
    for (int i = 0; i < kRows && first + i < count; ++i)
      for (int part = 0; part < S::kParts; ++part) S::part(scores[first + i], part) = acc[i][part] + bias;
  }
}

// scores become 2^(score - largest); returns what everything summed before must be multiplied with.
template <typename S>
INFERIX_INLINE Column soften(Column* scores, int64_t count, Column& largest, Column& sum) {
  Column shrink;
  for (int part = 0; part < S::kParts; ++part) {
    typename S::Lanes highest = S::part(largest, part);
    for (int64_t key = 0; key < count; ++key) highest = S::larger(S::part(scores[key], part), highest);
    const typename S::Lanes factor = S::exp2(S::part(largest, part) - highest);
    typename S::Lanes total = S::part(sum, part) * factor;
    for (int64_t key = 0; key < count; ++key) {
      const typename S::Lanes weight = S::exp2(S::part(scores[key], part) - highest);
      S::part(scores[key], part) = weight;
      total += weight;
    }
    S::part(largest, part) = highest;
    S::part(sum, part) = total;
    S::part(shrink, part) = factor;
  }
  return shrink;
}

// out[d] = out[d] * shrink + sum over keys of weights[key] * v[key][d]
template <typename S, int kRows>
INFERIX_INLINE void add_values(const float* v, int64_t count, int64_t D, const Column* weights, const Column& shrink,
                               Column* out) {
  for (int64_t first = 0; first < D; first += kRows) {
    int64_t offsets[kRows];
    typename S::Lanes acc[kRows][S::kParts];
    for (int i = 0; i < kRows; ++i) {
      offsets[i] = std::min(first + i, D - 1);  // out has room for a whole last step
      for (int part = 0; part < S::kParts; ++part)
        acc[i][part] = S::part(out[first + i], part) * S::part(shrink, part);
    }
    multiply_add<S>(v, offsets, D, weights, count, acc);
    for (int i = 0; i < kRows; ++i)
      for (int part = 0; part < S::kParts; ++part) S::part(out[first + i], part) = acc[i][part];
  }
}

struct RowAddress {
  int64_t element(const Rows& rows) const { return token * rows.token_stride + head * rows.head_stride; }
  int64_t token, head;
};

RowAddress address(const PagedAttentionParams& p, const Task& task, int64_t row) {
  const int64_t group = p.query_heads / p.shape.H, r = task.first_row + row;
  return {p.q_indptr[task.segment] + r / group, task.head * group + r % group};
}

int64_t width(const PagedAttentionParams& p) { return p.pools.pool[0].k.width; }

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Queries in, scaled so that scores come out in units of log 2, and the running state to start from.
template <typename Q>
void begin(const PagedAttentionParams& p, const Task& task, int64_t out_columns, Workspace& w) {
  const int64_t D = width(p), groups = round_up(task.rows, kLanes) / kLanes;
  Column lowest;
  std::fill_n(lowest.lane, kLanes, -kInfinity);
  w.q.assign(p.variants * groups * D, Column{});
  w.out.assign(groups * out_columns, Column{});
  w.largest.assign(groups, lowest);
  w.sum.assign(groups, Column{});
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t group = row / kLanes, lane = row % kLanes;
    const RowAddress at = address(p, task, row);
    for (int64_t variant = 0; variant < p.variants; ++variant) {
      const Q* q = static_cast<const Q*>(p.q.data) + variant * p.q_variant_stride + at.element(p.q);
      Column* columns = &w.q[(variant * groups + group) * D];
      for (int64_t d = 0; d < D; ++d) columns[d].lane[lane] = to_float(q[d]) * (p.scale * kLog2E);
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
    share_a = weight_a > 0.f ? weight_a / total : 0.f, share_b = weight_b > 0.f ? weight_b / total : 0.f;
  }
  // A side that saw no key contributes nothing, whatever it holds: 0 * NaN is NaN, so it is chosen away.
  float join(float a, float b) const {
    return (share_a != 0.f ? a * share_a : 0.f) + (share_b != 0.f ? b * share_b : 0.f);
  }
  float lse, share_a, share_b;
};

template <typename Out>
void finish(const PagedAttentionParams& p, const Task& task, int64_t out_columns, const Workspace& w) {
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t group = row / kLanes, lane = row % kLanes;
    const RowAddress at = address(p, task, row);
    const float sum = w.sum[group].lane[lane], inverse = sum == 0.f ? 0.f : 1.f / sum;
    Out* out = static_cast<Out*>(p.out.data) + at.element(p.out);
    float& lse = p.lse[at.token * p.query_heads + at.head];
    float mine = sum == 0.f ? -kInfinity : (w.largest[group].lane[lane] + std::log2(sum)) * kLn2;
    const Merge merge(mine, p.accumulate ? lse : -kInfinity);
    for (int64_t d = 0; d < width(p); ++d) {
      const float value = w.out[group * out_columns + d].lane[lane] * inverse;
      out[d] = from_float<Out>(p.accumulate ? merge.join(value, to_float(out[d])) : value);
    }
    lse = p.accumulate ? merge.lse : mine;
  }
}

template <typename S, int kRows>
INFERIX_INLINE void attend(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  const int64_t D = width(p), out_columns = (D + kRows - 1) / kRows * kRows;
  with_float_type(p.q_dtype, [&](auto q) { begin<decltype(q)>(p, task, out_columns, w); });
  Column scores[kKeys];
  const int64_t list = task.segment * p.lists_per_segment + (p.lists_per_segment == 1 ? 0 : task.head);
  for (int64_t i = p.page_indptr[list]; i < p.page_indptr[list + 1]; ++i) {
    const float bias = p.page_bias ? p.page_bias[i] * kLog2E : 0.f;
    if (bias == -kInfinity) continue;
    const Column* q = &w.q[(p.page_variants ? p.page_variants[i] : 0) * w.sum.size() * D];
    const Location page = locate(p.pools, p.entries.ids[i]);
    const Tile keys = tile_of(page.pool->k, p.shape, page.page, task.head);
    const Tile values = tile_of(page.pool->v, p.shape, page.page, task.head);
    for (int64_t first = 0; first < p.entries.lens[i]; first += kKeys) {
      const int64_t count = std::min<int64_t>(kKeys, p.entries.lens[i] - first);
      const float *k = floats_of(isa, keys, first, count, w.k), *v = floats_of(isa, values, first, count, w.v);
      for (size_t group = 0; group < w.sum.size(); ++group) {
        score_keys<S, kRows>(k, count, D, q + group * D, bias, scores);
        const Column shrink = soften<S>(scores, count, w.largest[group], w.sum[group]);
        add_values<S, kRows>(v, count, D, scores, shrink, &w.out[group * out_columns]);
      }
    }
  }
  with_float_type(p.out_dtype, [&](auto out) { finish<decltype(out)>(p, task, out_columns, w); });
}

using Attend = void (*)(Isa, const PagedAttentionParams&, const Task&, Workspace&);

// kRows * kParts sums must fit the registers beside a column: 8 of 32 zmm (more would wait for loads), 8 of 16 ymm or
// xmm, 16 of 32 on Arm.
#if defined(__aarch64__)
constexpr int kPortableRows = 4;
#else
constexpr int kPortableRows = 2;
#endif
void attend_portable(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<4>, kPortableRows>(isa, p, task, w);
}

#if defined(__x86_64__)
INFERIX_V3 void attend_v3(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<8>, 4>(isa, p, task, w);
}

INFERIX_V4 void attend_v4(Isa isa, const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<16>, 8>(isa, p, task, w);
}

Attend attend_for(Isa isa) { return choose<Attend>(isa, attend_portable, attend_v3, attend_v4); }
#else
Attend attend_for(Isa) { return attend_portable; }
#endif

void check_indptr(const char* name, const int32_t* indptr, int64_t segments, int64_t end) {
  bool rises = indptr[0] == 0 && indptr[segments] == end;
  for (int64_t s = 0; s < segments; ++s) rises = rises && indptr[s] <= indptr[s + 1];
  if (!rises)
    throw std::invalid_argument(std::string("plan.") + name + " must rise from 0 to " + std::to_string(end) +
                                ", got " + std::to_string(indptr[0]) + " ... " + std::to_string(indptr[segments]));
}

void check_variants(const PagedAttentionParams& p) {
  for (int64_t i = 0; p.page_variants && i < p.entries.n; ++i)
    if (p.page_variants[i] < 0 || p.page_variants[i] >= p.variants)
      throw std::invalid_argument("plan.page_variants[" + std::to_string(i) + "] must be in [0, " +
                                  std::to_string(p.variants) + "), got " + std::to_string(p.page_variants[i]));
}

std::vector<Task> split(const PagedAttentionParams& p) {
  std::vector<Task> tasks;
  for (int64_t segment = 0; segment < p.segments; ++segment) {
    const int64_t rows = (p.q_indptr[segment + 1] - p.q_indptr[segment]) * (p.query_heads / p.shape.H);
    for (int64_t head = 0; head < p.shape.H; ++head)
      for (int64_t first = 0; first < rows; first += kRowsPerTask)
        tasks.push_back({segment, head, first, std::min(kRowsPerTask, rows - first)});
  }
  return tasks;
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
  const std::vector<Task> tasks = split(p);
  const Attend attend_task = attend_for(cpu.isa);
  parallel_for(cpu.threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    thread_local Workspace workspace;
    attend_task(cpu.isa, p, tasks[i], workspace);
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
