// The micro-kernels: attention of sixteen query rows to a tile of keys.
//
// Sixteen query rows lie side by side in the lanes of a vector register. Keys and values are then read in the order
// they are stored, one scalar at a time, broadcast to all sixteen rows; the softmax over keys needs no sum across a
// register; and what a row gets does not depend on its neighbours. The scalar is a word of 32 bits: a float32, two
// bfloat16 or four int8 numbers, multiplied with as many of each row and summed by one instruction that reads it from
// memory.
#pragma once
#include <cstring>

#include "simd.h"

namespace inferix {

// The low byte of a query counts in steps of one 254th of the high one's: between -127 and 127 for what it rounded off.
constexpr float kLowSteps = 254.f;
constexpr int64_t kMostTwoTerms = 512;

// Keys whose scores are held at once. A tile has that many at most.
constexpr int64_t kTileKeys = 64;

typedef float __attribute__((may_alias)) FloatWord;
typedef int32_t __attribute__((may_alias)) IntWord;

// How words are multiplied and summed: add(sum, column, word). kElements numbers to a word.
template <typename S>
struct Floats {
  static constexpr int kElements = 1;
  using Sum = typename S::Lanes;
  INFERIX_INLINE static void add(Sum& sum, const typename S::Lanes& column, const char* word) {
    sum += column * *reinterpret_cast<const FloatWord*>(word);
  }
};

#if defined(__x86_64__)
// In assembly, since the builtins can not be named in templates that are compiled for older CPUs too.
struct Bf16Pairs {
  static constexpr int kElements = 2;
  using Sum = Simd<16>::Lanes;
  INFERIX_INLINE static void add(Sum& sum, const Simd<16>::Lanes& column, const char* word) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(column), "m"(*reinterpret_cast<const IntWord*>(word)));
  }
};

// Four unsigned bytes of each row with four signed ones.
struct Int8Quads {
  static constexpr int kElements = 4;
  using Sum = Simd<16>::IntLanes;
  INFERIX_INLINE static void add(Sum& sum, const Simd<16>::Lanes& column, const char* word) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(column), "m"(*reinterpret_cast<const IntWord*>(word)));
  }
};
#endif

// Queries are stored as unsigned bytes with a zero point of 128: sums of int8 products begin with what corrects that.
template <typename S>
INFERIX_INLINE int32_t zero_point_compensation(const char* codes, int64_t count) {
  int32_t sum = 0;
  int64_t i = 0;
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16) {
    typedef int32_t Block __attribute__((vector_size(64), aligned(1), may_alias));
    const Simd<16>::IntLanes ones = Simd<16>::IntLanes{} + 0x01010101;
    Simd<16>::IntLanes sums = {};
    for (; i + 64 <= count; i += 64)
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(ones), "m"(*reinterpret_cast<const Block*>(codes + i)));
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  }
#endif
  for (; i < count; ++i) sum += static_cast<int8_t>(codes[i]);
  return -128 * sum;
}

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
  const float* scales;           // [width]  int8, else null
};

// The online softmax so far of sixteen rows.
struct OnlineSoftmax {
  Column base;  // scores are exponentiated relative to it, in units of log 2
  Column sum;   // of 2^(score - base)
};

// A row's base is raised to its largest score only when that exceeds it by more than 8, a factor of 2^8: seldom, so
// that sums are seldom rescaled.
constexpr float kHeadroom = 8.f;

template <typename S, typename A, int kBlock>
struct MicroKernels {
  using Lanes = typename S::Lanes;
  using Sum = typename A::Sum;
  static constexpr bool kInteger = A::kElements == 4;

  // An accumulator for each row of a block, in registers.
  struct Sums {
    Sum of[kBlock * S::kParts];
  };
  // function(index into Sums, row of the block, part of the register)
  template <typename Function>
  INFERIX_INLINE static void each(const Function& function) {
    unroll<kBlock * S::kParts>([&](auto n) INFERIX_INLINE_LAMBDA { function(n, n / S::kParts, n % S::kParts); });
  }

  // sums.of[row] += the words at at(row) + n * step, n < count, times columns[n]
  template <typename At>
  INFERIX_INLINE static void multiply_add(const At& at, int64_t step, const Column* columns, int64_t count,
                                          Sums& sums) {
    for (int64_t n = 0; n < count; ++n)
      each([&](auto j, int row, int part) INFERIX_INLINE_LAMBDA {
        A::add(sums.of[j], S::part(columns[n], part), at(row) + n * step);
      });
  }

  // scores[key] = k[key] . q + bias for each of sixteen queries; returns the largest of each.
  // kTwoTerms: the low bytes of int8 queries follow the high ones. A kernel of its own, for the registers. Sums stay
  // below 2^31 up to kMostTwoTerms channels.
  template <bool kTwoTerms = false>
  INFERIX_INLINE static Column qk_product(const TileKeys& k, const Column* q, const Column& q_scale, Column* scores) {
    Column row_max;
    for (int part = 0; part < S::kParts; ++part) S::part(row_max, part) = Lanes{} - __builtin_inff();
    for (int64_t first = 0; first < k.count; first += kBlock) {
      Sums sums;
      each([&](auto j, int row, int) INFERIX_INLINE_LAMBDA {
        if constexpr (kInteger)
          sums.of[j] = Sum{} + k.compensation[first + row];
        else
          sums.of[j] = Sum{} + k.bias[first + row];
      });
      // Four pointers and the strides 1, 2 and 3 reach sixteen rows.
      const int64_t stride = k.stride, three = 3 * stride;
      const char *row0 = k.rows + first * stride, *row4 = row0 + 4 * stride, *row8 = row4 + 4 * stride,
                 *row12 = row8 + 4 * stride;
      const auto at = [&](int row) INFERIX_INLINE_LAMBDA {
        const char* base = row < 4 ? row0 : row < 8 ? row4 : row < 12 ? row8 : row12;
        return base + (row % 4 == 0 ? 0 : row % 4 == 1 ? stride : row % 4 == 2 ? 2 * stride : three);
      };
      multiply_add(at, 4, q, k.words, sums);
      if constexpr (kInteger && kTwoTerms) {
        each([&](auto j, int row, int) INFERIX_INLINE_LAMBDA {
          sums.of[j] = sums.of[j] * static_cast<int32_t>(kLowSteps) + k.compensation[first + row];
        });
        multiply_add(at, 4, q + k.words, k.words, sums);
      }
      each([&](auto j, int row, int part) INFERIX_INLINE_LAMBDA {
        Lanes result;
        if constexpr (kInteger) {
          result = __builtin_convertvector(sums.of[j], Lanes) * (S::part(q_scale, part) * k.scales[first + row]) +
                   k.bias[first + row];
        } else {
          result = sums.of[j];
        }
        S::part(scores[first + row], part) = result;
        S::part(row_max, part) = S::max(result, S::part(row_max, part));
      });
    }
    return row_max;
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
        for (int64_t key = 0; key < count; key += A::kElements) {
          if constexpr (A::kElements == 2) {
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

  // out[d] += factor * scales[d] * sum over keys of weights[key] * v[key][d]
  INFERIX_INLINE static void pv_product(const TileValues& v, const Column* weights, const Column& factor, Column* out) {
    for (int64_t first = 0; first < v.width; first += kBlock) {
      Sums sums;
      each([&](auto j, int row, int part) INFERIX_INLINE_LAMBDA {
        if constexpr (kInteger)
          sums.of[j] = Sum{};
        else
          sums.of[j] = S::part(out[first + row], part);
      });
      const char* base = v.rows + first * 4;
      multiply_add([base](int row) INFERIX_INLINE_LAMBDA { return base + row * 4; }, v.stride, weights, v.steps, sums);
      each([&](auto j, int row, int part) INFERIX_INLINE_LAMBDA {
        if constexpr (kInteger)
          S::part(out[first + row], part) += __builtin_convertvector(sums.of[j], Lanes) *
                                             (S::part(factor, part) * v.scales[first + row]);
        else
          S::part(out[first + row], part) = sums.of[j];
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
