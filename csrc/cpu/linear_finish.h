// What follows the products of a linear layer: scales, bias, activation, gate, residual, and the result's type.
#pragma once
#include <algorithm>

#include "../linear.h"
#include "linear_activation.h"
#include "elements.h"

namespace inferix {

// y[m] = function(y[m], m, part) for each part of the columns of `rows` rows.
template <typename S, typename Function>
INFERIX_INLINE void each_row(Column* y, int64_t rows, const Function& function) {
  for (int64_t m = 0; m < rows; ++m)
    for (int part = 0; part < S::kParts; ++part) S::part(y[m], part) = function(S::part(y[m], part), m, part);
}

// Of sixteen rows of x with sixteen of the weight.
struct Sums {
  const Column* columns;  // [16]
  bool integers;          // else float32
  bool transposed;        // a column for each row of the weight, else for each row of x
};

// They become the result at rows m0 ... and columns n0 ...: sixteen by sixteen numbers, kWhole, or as many of them as
// there are.
template <typename S, bool kWhole>
INFERIX_INLINE void finish_block(const LinearParams& p, const Sums& sums, int64_t m0, int64_t n0) {
  using Lanes = typename S::Lanes;
  const int64_t rows = kWhole ? kLanes : std::min<int64_t>(kLanes, p.M - m0);
  const int64_t columns = kWhole ? kLanes : std::min<int64_t>(kLanes, p.N - n0);
  const auto load = [columns](const float* from) INFERIX_INLINE_LAMBDA {
    Column column{};
    for (int64_t n = 0; n < columns; ++n) column.lane[n] = from[n];
    return column;
  };
  alignas(64) Column y[kLanes];
  const Column* rows_of_sums = sums.columns;
  if (sums.transposed) S::transpose(sums.columns[0].lane, kLanes, y[0].lane, kLanes), rows_of_sums = y;
  const Column scales = load(p.weight_scales + n0), bias = p.bias ? load(p.bias + n0) : Column{};
  const bool has_bias = p.bias;
  each_row<S>(y, rows, [&](const Lanes&, int64_t m, int part) INFERIX_INLINE_LAMBDA {
    const Lanes sum = S::part(rows_of_sums[m], part);
    const Lanes value = sums.integers ? __builtin_convertvector((typename S::IntLanes)sum, Lanes) : sum;
    const Lanes scaled = value * (S::part(scales, part) * p.x_scales[m0 + m]);
    return has_bias ? scaled + S::part(bias, part) : scaled;
  });
  with_activation<S>(p.activation, [&](auto activate) INFERIX_INLINE_LAMBDA {
    each_row<S>(y, rows, [&](const Lanes& x, int64_t, int) INFERIX_INLINE_LAMBDA { return activate(x); });
  });
  if (p.gate.data)
    for (int64_t m = 0; m < rows; ++m) {
      const float* gate = p.gate.row(m0 + m, p.M, p.N) + n0;
      for (int64_t n = 0; n < columns; ++n) y[m].lane[n] *= gate[n];
    }
  if (p.residual)
    with_float_type(p.residual_dtype, [&](auto type) INFERIX_INLINE_LAMBDA {
      const auto* from = static_cast<const decltype(type)*>(p.residual) + m0 * p.N + n0;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n) y[m].lane[n] += to_float(from[m * p.N + n]);
    });
  with_float_type(p.out_dtype, [&](auto type) INFERIX_INLINE_LAMBDA {
    auto* to = static_cast<decltype(type)*>(p.out) + m0 * p.N + n0;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n) to[m * p.N + n] = from_float<decltype(type)>(y[m].lane[n]);
  });
}

}  // namespace inferix
