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
  std::vector<Column> q, out;        // [groups][D], [groups][D rounded up to the kernel's rows]
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

// scores[key] = k[key] . q for each of sixteen queries.
template <typename S, int kRows>
INFERIX_INLINE void score_keys(const float* k, int64_t count, int64_t D, const Column* q, Column* scores) {
  for (int64_t first = 0; first < count; first += kRows) {
    // Past the last key the last one again: nothing invalid is read, and its result is dropped.
    int64_t offsets[kRows];
    for (int i = 0; i < kRows; ++i) offsets[i] = std::min(first + i, count - 1) * D;
    typename S::Lanes acc[kRows][S::kParts] = {};
    multiply_add<S>(k, offsets, 1, q, D, acc);
    for (int i = 0; i < kRows && first + i < count; ++i)
      for (int part = 0; part < S::kParts; ++part) S::part(scores[first + i], part) = acc[i][part];
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
template <typename Q, typename Out>
void begin(const PagedAttentionParams& p, const Task& task, int64_t out_columns, Workspace& w) {
  const int64_t D = width(p), groups = round_up(task.rows, kLanes) / kLanes;
  Column lowest;
  std::fill_n(lowest.lane, kLanes, -kInfinity);
  w.q.assign(groups * D, Column{});
  w.out.assign(groups * out_columns, Column{});
  w.largest.assign(groups, lowest);
  w.sum.assign(groups, Column{});
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t group = row / kLanes, lane = row % kLanes;
    const RowAddress at = address(p, task, row);
    const Q* q = static_cast<const Q*>(p.q.data) + at.element(p.q);
    for (int64_t d = 0; d < D; ++d) w.q[group * D + d].lane[lane] = to_float(q[d]) * (p.scale * kLog2E);
    const float lse = p.lse[at.token * p.query_heads + at.head];
    if (!p.accumulate || lse == -kInfinity) continue;
    const Out* out = static_cast<const Out*>(p.out.data) + at.element(p.out);
    for (int64_t d = 0; d < D; ++d) w.out[group * out_columns + d].lane[lane] = to_float(out[d]);
    w.largest[group].lane[lane] = lse * kLog2E;
    w.sum[group].lane[lane] = 1.f;
  }
}

template <typename Out>
void finish(const PagedAttentionParams& p, const Task& task, int64_t out_columns, const Workspace& w) {
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t group = row / kLanes, lane = row % kLanes;
    const RowAddress at = address(p, task, row);
    const float sum = w.sum[group].lane[lane], inverse = sum == 0.f ? 0.f : 1.f / sum;
    Out* out = static_cast<Out*>(p.out.data) + at.element(p.out);
    for (int64_t d = 0; d < width(p); ++d)
      out[d] = from_float<Out>(w.out[group * out_columns + d].lane[lane] * inverse);
    p.lse[at.token * p.query_heads + at.head] =
        sum == 0.f ? -kInfinity : (w.largest[group].lane[lane] + std::log2(sum)) * kLn2;
  }
}

template <typename S, int kRows>
INFERIX_INLINE void attend(const PagedAttentionParams& p, const Task& task, Workspace& w) {
  const int64_t D = width(p), out_columns = (D + kRows - 1) / kRows * kRows;
  with_float_type(p.q_dtype, [&](auto q) {
    with_float_type(p.out_dtype, [&](auto out) { begin<decltype(q), decltype(out)>(p, task, out_columns, w); });
  });
  Column scores[kKeys];
  for (int64_t i = p.page_indptr[task.segment]; i < p.page_indptr[task.segment + 1]; ++i) {
    const Location page = locate(p.pools, p.entries.ids[i]);
    const Tile keys = tile_of(page.pool->k, p.shape, page.page, task.head);
    const Tile values = tile_of(page.pool->v, p.shape, page.page, task.head);
    for (int64_t first = 0; first < p.entries.lens[i]; first += kKeys) {
      const int64_t count = std::min<int64_t>(kKeys, p.entries.lens[i] - first);
      const float *k = floats_of(keys, first, count, w.k), *v = floats_of(values, first, count, w.v);
      for (size_t group = 0; group < w.sum.size(); ++group) {
        score_keys<S, kRows>(k, count, D, &w.q[group * D], scores);
        const Column shrink = soften<S>(scores, count, w.largest[group], w.sum[group]);
        add_values<S, kRows>(v, count, D, scores, shrink, &w.out[group * out_columns]);
      }
    }
  }
  with_float_type(p.out_dtype, [&](auto out) { finish<decltype(out)>(p, task, out_columns, w); });
}

using Attend = void (*)(const PagedAttentionParams&, const Task&, Workspace&);

// kRows * kParts sums must fit the registers beside a column: 8 of 32 zmm (more would wait for loads), 8 of 16 ymm or
// xmm, 16 of 32 on Arm.
#if defined(__aarch64__)
constexpr int kPortableRows = 4;
#else
constexpr int kPortableRows = 2;
#endif
void attend_portable(const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<4>, kPortableRows>(p, task, w);
}

#if defined(__x86_64__)
INFERIX_V3 void attend_v3(const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<8>, 4>(p, task, w);
}

INFERIX_V4 void attend_v4(const PagedAttentionParams& p, const Task& task, Workspace& w) {
  attend<Simd<16>, 8>(p, task, w);
}

Attend best_attend() { return best<Attend>(attend_portable, attend_v3, attend_v4); }
#else
Attend best_attend() { return attend_portable; }
#endif

void check_indptr(const char* name, const int32_t* indptr, int64_t segments, int64_t end) {
  bool rises = indptr[0] == 0 && indptr[segments] == end;
  for (int64_t s = 0; s < segments; ++s) rises = rises && indptr[s] <= indptr[s + 1];
  if (!rises)
    throw std::invalid_argument(std::string("plan.") + name + " must rise from 0 to " + std::to_string(end) +
                                ", got " + std::to_string(indptr[0]) + " ... " + std::to_string(indptr[segments]));
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
  const float a = p.lse_a[row], b = p.lse_b[row], highest = std::max(a, b);
  // -inf on both sides: any finite number in the maximum's place makes both weights 0.
  const float base = highest == -kInfinity ? 0.f : highest;
  const float weight_a = std::exp(a - base), weight_b = std::exp(b - base), total = weight_a + weight_b;
  p.lse[row] = base + std::log(total);
  const In *x = static_cast<const In*>(p.out_a) + row * p.D, *y = static_cast<const In*>(p.out_b) + row * p.D;
  Out* out = static_cast<Out*>(p.out) + row * p.D;
  const float share_a = weight_a / total, share_b = weight_b / total;
  // A side that saw no key contributes nothing, whatever its out holds: 0 * NaN is NaN, so it is chosen away.
  for (int64_t d = 0; d < p.D; ++d)
    out[d] = from_float<Out>((weight_a > 0.f ? to_float(x[d]) * share_a : 0.f) +
                             (weight_b > 0.f ? to_float(y[d]) * share_b : 0.f));
}

}  // namespace

void paged_attention_cpu(const PagedAttentionParams& p, int threads) {
  check_indptr("q_indptr", p.q_indptr, p.segments, p.T);
  check_indptr("page_indptr", p.page_indptr, p.segments, p.entries.n);
  entry_starts("plan.page_ids", "plan.page_lens", p.entries, total_pages(p.pools), p.shape.page_size, -1, false);
  const std::vector<Task> tasks = split(p);
  const Attend attend_task = best_attend();
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    thread_local Workspace workspace;
    attend_task(p, tasks[i], workspace);
  });
}

void merge_attention_cpu(const MergeAttentionParams& p, int threads) {
  constexpr int64_t kRowsPerChunk = 256;
  with_float_type(p.in_dtype, [&](auto in) {
    with_float_type(p.out_dtype, [&](auto out) {
      parallel_for(threads, (p.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
        const int64_t end = std::min(p.rows, (chunk + 1) * kRowsPerChunk);
        for (int64_t row = chunk * kRowsPerChunk; row < end; ++row) merge_row<decltype(in), decltype(out)>(p, row);
      });
    });
  });
}

}  // namespace inferix
