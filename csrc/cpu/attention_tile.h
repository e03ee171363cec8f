// The micro-kernels: attention of sixteen query rows to a tile of keys.
//
// Sixteen query rows lie side by side in the lanes of a vector register. Keys and values are then read in the order
// they are stored, one word at a time, broadcast to all sixteen rows (products.h); the softmax over keys needs no sum
// across a register; and what a row gets does not depend on its neighbours.
#pragma once
#include "products.h"

namespace inferix {

// The low byte of a query counts in steps of one 254th of the high one's: between -127 and 127 for what it rounded off.
constexpr float kLowSteps = 254.f;
constexpr int64_t kMostTwoTerms = 512;

// Keys whose scores are held at once. A tile has that many at most.
constexpr int64_t kTileKeys = 64;

// A tile of keys, in words: a row for each key. Their number is a multiple of the block; those past the last key have a
// bias of -inf.
struct TileKeys {
  const char* rows;
  int64_t stride, words, count;  // in bytes; words of a row; rows
  const float *bias, *scales;    // [count]  added to scores; int8: multiplies them, else null
  const int32_t* compensation;   // [count]  int8: of the queries' zero point
  // For tile registers [count, or 1 if all are the same]: bias, for each of sixteen queries; and whether all are not.
  const Column* columns = nullptr;
  int64_t column_stride = 0;
};

// A tile of values, in words: word (step, channel) holds kElements keys' numbers of one channel. For tile registers
// they are transposed: rows are channels, and a step is sixteen words.
struct TileValues {
  const char* rows;
  int64_t stride, steps, width;  // in bytes; rows; channels, a multiple of the block
  const float* scales;  // [width]  int8, else null
};

// The online softmax so far of sixteen rows.
struct OnlineSoftmax {
  Column base;  // scores are exponentiated relative to it, in units of log 2
  Column sum;  // of 2^(score - base)
};

// A row's base is raised to its largest score only when that exceeds it by more than 8, a factor of 2^8: seldom, so
// that sums are seldom rescaled.
constexpr float kHeadroom = 8.f;

template <typename S, typename Words>
struct MicroKernels {
  using Lanes = typename S::Lanes;
  static constexpr bool kInteger = Words::kElements == 4;

  // scores[group][key] = k[key] . q[group] + bias for sixteen queries of each group; row_max[group]: the largest of
  // each. kTerms: the low bytes of int8 queries follow the high ones. Sums stay below 2^31 up to kMostTwoTerms
  // channels.
  template <typename Registers, int kTerms = 1>
  INFERIX_INLINE static void qk_product(const TileKeys& k, const Column* const* q, const Column* q_scale,
                                        Column (*scores)[kTileKeys], Column* row_max) {
    constexpr int kGroups = Registers::kGroups;
    const Column* low[kGroups];
    for (int group = 0; group < kGroups; ++group) {
      low[group] = q[group] + k.words;
      for (int part = 0; part < S::kParts; ++part) S::part(row_max[group], part) = Lanes{} - __builtin_inff();
    }
    for (int64_t first = 0; first < k.count; first += kLanes) {
      const InPlaceRows rows{k.rows + first * k.stride, k.stride, 4, kInteger ? k.compensation + first : nullptr};
      const auto finish = [&](int group, int key, int part, const auto& sum) INFERIX_INLINE_LAMBDA {
        Lanes score;
        if constexpr (kInteger)
          score = __builtin_convertvector(sum, Lanes) * (S::part(q_scale[group], part) * k.scales[first + key]) +
                  k.bias[first + key];
        else
          score = sum + k.bias[first + key];
        S::part(scores[group][first + key], part) = score;
        S::part(row_max[group], part) = S::max(score, S::part(row_max[group], part));
      };
      if constexpr (kTerms == 2) {
        alignas(64) Column high[kGroups][kLanes];
        products<S, Words, Registers>(
            rows, q, k.words, [&](int group, int key, int part, const auto& sum) INFERIX_INLINE_LAMBDA {
              S::part(high[group][key], part) = (Lanes)(sum * static_cast<int32_t>(kLowSteps));
            });
        products<S, Words, Registers>(
            rows, low, k.words, [&](int group, int key, int part, const auto& sum) INFERIX_INLINE_LAMBDA {
              finish(group, key, part, sum + (typename S::IntLanes)S::part(high[group][key], part));
            });
      } else {
        products<S, Words, Registers>(rows, q, k.words, finish);
      }
    }
  }

  // Scores become weights, in words of kElements keys. Returns the factor of the tile's sums of int8 values.
  INFERIX_INLINE static Column exponentiate(Column* scores, int64_t count, const Column& row_max,
                                            OnlineSoftmax& running) {
    Column factor;
    for (int part = 0; part < S::kParts; ++part) {
      Lanes& total = S::part(running.sum, part);
      if constexpr (kInteger) {
        const Lanes top = S::part(row_max, part), ratio = S::exp2(top - S::part(running.base, part));
        Lanes sum = {};
        for (int64_t key = 0; key < count; key += 4)
          S::part(scores[key / 4], part) = weight_bytes(scores + key, top, sum);
        total += sum * ratio;
        S::part(factor, part) = ratio * (1.f / 255.f);
      } else {
        const Lanes base = S::part(running.base, part);
        for (int64_t key = 0; key < count; key += Words::kElements) {
          if constexpr (Words::kElements == 2) {
            const Lanes even = S::template exp2_approx<4>(S::part(scores[key], part) - base),
                        odd = S::template exp2_approx<4>(S::part(scores[key + 1], part) - base);
            total += even + odd;
            S::part(scores[key / 2], part) = S::bf16_pair(even, odd);
          } else {
            const Lanes weight = S::exp2(S::part(scores[key], part) - base);
            total += weight;
            S::part(scores[key], part) = weight;
          }
        }
      }
    }
    return factor;
  }

  // out[group][d] += factor[group] * scales[d] * sum over keys of weights[group][key] * v[key][d]
  template <typename Registers>
  INFERIX_INLINE static void pv_product(const TileValues& v, const Column* const* weights, const Column* factor,
                                        Column* const* out) {
    for (int64_t first = 0; first < v.width; first += kLanes) {
      const InPlaceRows channels{v.rows + first * 4, 4, v.stride};
      products<S, Words, Registers>(
          channels, weights, v.steps, [&](int group, int d, int part, const auto& sum) INFERIX_INLINE_LAMBDA {
            Lanes& total = S::part(out[group][first + d], part);
            if constexpr (kInteger)
              total += __builtin_convertvector(sum, Lanes) * (S::part(factor[group], part) * v.scales[first + d]);
            else
              total += sum;
          });
    }
  }

 private:
  // Weights of four keys, in 255ths of the largest, a byte each. In a float of 2^23 and more the last place is worth 1.
  INFERIX_INLINE static Lanes weight_bytes(const Column* scores, const Lanes& top, Lanes& sum) {
    typename S::IntLanes code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Lanes weight = S::template exp2_approx<3>(S::part(scores[i], 0) - top);
      sum += weight;
      code[i] = (typename S::IntLanes)(weight * 255.f + 0x1p23f);
    }
    return (Lanes)((code[0] & 0xff) | code[1] << 8 | code[2] << 16 | code[3] << 24);
  }
};

// Before a tile's weights are summed: raises the base of rows whose scores exceed it, and rescales their sums.
template <typename S>
INFERIX_INLINE void rescale(const Column& row_max, OnlineSoftmax& running, Column* out, int64_t width) {
  Column alpha;
  bool moved = false;
  for (int part = 0; part < S::kParts; ++part) {
    const typename S::Lanes base = S::part(running.base, part), top = S::part(row_max, part);
    const auto exceeded = top > base + kHeadroom;
    S::part(alpha, part) = exceeded ? S::exp2(base - top) : typename S::Lanes{} + 1.f;
    S::part(running.base, part) = exceeded ? top : base;
  }
  for (int lane = 0; lane < kLanes; ++lane) moved |= alpha.lane[lane] != 1.f;
  if (!moved) return;
  for (int part = 0; part < S::kParts; ++part) S::part(running.sum, part) *= S::part(alpha, part);
  for (int64_t d = 0; d < width; ++d)
    for (int part = 0; part < S::kParts; ++part) S::part(out[d], part) *= S::part(alpha, part);
}

}  // namespace inferix
