// Softcap, ALiBi and windows: what happens to a tile's scores between the product with keys and the softmax.
#pragma once
#include <algorithm>

#include "../attention.h"
#include "attention_tile.h"

namespace inferix {

// The base of a row that has seen hidden keys alone. Lower than any score, and finite: -inf - -inf would be NaN.
constexpr float kNothing = -1e38f;

// How the positions of a tile's keys lie to the window of a run of queries.
enum class View { none, some, all };

struct Window {
  int64_t left, right;  // in tokens

  // first .. last: queries of the segment. position: of the first of `count` keys.
  View of(int64_t first, int64_t last, int64_t position, int64_t count) const {
    const int64_t end = position + count - 1;
    if (end < first - left || position > last + right) return View::none;
    return position >= last - left && end <= first + right ? View::all : View::some;
  }
};

// Sixteen rows: row r is at position at[r] and sees positions low[r] to high[r]; slope[r] in units of log 2.
struct LimitedRows {
  alignas(4 * kLanes) int32_t at[kLanes], low[kLanes], high[kLanes];
  Column slope;
  // first_row of a segment whose queries have `group` rows each. slopes: of the heads that read this KV head; or null.
  LimitedRows(const Window& window, int64_t first_row, int64_t group, const float* slopes, float log2_e) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t query = (first_row + lane) / group;
      at[lane] = static_cast<int32_t>(query);
      low[lane] = static_cast<int32_t>(query - window.left), high[lane] = static_cast<int32_t>(query + window.right);
      slope.lane[lane] = slopes ? slopes[(first_row + lane) % group] * log2_e : 0.f;
    }
  }
};

// cap * tanh(x / cap), within 4e-7 of cap and, near 0, of itself. x may be infinite or NaN.
template <typename S>
INFERIX_INLINE typename S::Lanes soft_cap(const typename S::Lanes& x, float cap) {
  using Lanes = typename S::Lanes;
  constexpr float kTwiceLog2E = 2.88539008f, kSaturated = 10.f;
  Lanes y = x * (1.f / cap);
  y = y > kSaturated ? Lanes{} + kSaturated : y < -kSaturated ? Lanes{} - kSaturated : y;  // a NaN is neither
  const Lanes power = S::exp2(y * kTwiceLog2E), far = 1.f - 2.f / (power + 1.f);
  const Lanes square = y * y;
  Lanes near = square * -5.3968254e-2f + 1.3333333e-1f;
  near = near * square - 3.3333333e-1f;
  near = (near * square + 1.f) * y;
  return (square < 0.01f ? near : far) * cap;
}

// What cap and rows leave of the scores of `count` keys, the first at `position`; bias is added to them after the cap.
// rows: null where all keys are seen, as they are. Returns the largest score of each row, kNothing at least.
template <typename S>
INFERIX_INLINE Column limit_scores(Column* scores, int64_t count, float cap, float bias, const LimitedRows* rows,
                                   int64_t position) {
  using Lanes = typename S::Lanes;
  using IntLanes = typename S::IntLanes;
  Column row_max;
  for (int part = 0; part < S::kParts; ++part) {
    const auto ints = [part](const int32_t* x) INFERIX_INLINE_LAMBDA {
      return *reinterpret_cast<const IntLanes*>(x + part * S::kWidth);
    };
    Lanes largest = Lanes{} + kNothing;
    for (int64_t key = 0; key < count; ++key) {
      Lanes score = S::part(scores[key], part);
      if (cap != 0.f) score = soft_cap<S>(score, cap) + bias;
      if (rows) {
        const IntLanes at = IntLanes{} + static_cast<int32_t>(position + key), mine = ints(rows->at),
                       low = ints(rows->low), high = ints(rows->high);
        const IntLanes distance = at > mine ? at - mine : mine - at;
        score -= S::part(rows->slope, part) * __builtin_convertvector(distance, Lanes);
        score = (at >= low) & (at <= high) ? score : Lanes{} - __builtin_inff();
      }
      S::part(scores[key], part) = score;
      largest = S::max(score, largest);
    }
    S::part(row_max, part) = largest;
  }
  return row_max;
}

// Before a tile of which a row may see nothing: lifts bases of -inf.
template <typename S>
INFERIX_INLINE void floor_base(OnlineSoftmax& running) {
  for (int part = 0; part < S::kParts; ++part)
    S::part(running.base, part) = S::max(S::part(running.base, part), typename S::Lanes{} + kNothing);
}

}  // namespace inferix
