// Attention in Intel's tile registers: products of 64 keys with 32 query rows, all operands bfloat16, sums float32.
//
// Queries, scores and sums are the columns of attention_tile.h. Sixteen of their words are a tile b; a tile a is
// sixteen keys as they lie, or sixteen channels of the values, which are transposed once for all rows of a task. Four
// sums are multiplied in turn: a product takes 52 cycles and another can begin after 16. That each operand then meets
// two others also halves what is loaded.
#pragma once
#if defined(__x86_64__)
#include "amx.h"
#include "attention_tile.h"

namespace inferix {

// A tile that is not needed again soon: the L1 cache keeps what it holds.
template <int kTile>
INFERIX_INLINE void tile_load_once(const void* rows, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// Groups of sixteen query rows that are multiplied at once.
constexpr int64_t kPair = 2;

// to[i][row] = from[i][row] + a[row] . b[i], for both groups i.
struct TileProduct {
  const char* a;
  int64_t stride, steps, rows;  // in bytes; of sixteen words; a multiple of 32
  const Column *b[kPair], *from[kPair];
  int64_t from_stride;  // in columns: 0 where all rows begin with the same one
  Column* to[kPair];

  int64_t multiplications() const { return rows / 32 * steps * 4; }
};

// 2^x as Simd::exp2_approx<3>, at least 2^-126. Without that bound results would be denormal, which takes 80 ns.
INFERIX_INLINE Simd<16>::Lanes amx_exp2(const Simd<16>::Lanes& x_in) {
  using S = Simd<16>;
  const S::Lanes lowest = S::Lanes{} - 126.f;
  const S::Lanes x = S::max(lowest, x_in);  // this way round a NaN passes
  S::Lanes f, result;
  asm("vreduceps $1, %1, %0" : "=v"(f) : "v"(x));  // x - floor(x)
  // Least relative error over [0, 1], degree 3: 7.5e-5.
  S::Lanes p = f * 7.80245233e-2f + 2.26067159e-1f;
  p = p * f + 6.95833537e-1f;
  p = p * f + 9.99925219e-1f;
  asm("vscalefps %2, %1, %0" : "=v"(result) : "v"(p), "v"(x));  // p * 2^floor(x)
  return result;
}

// As Simd::bf16_pair, in one instruction after rounding.
INFERIX_INLINE Simd<16>::Lanes amx_bf16_pair(const Simd<16>::Lanes& low, const Simd<16>::Lanes& high) {
  typedef uint16_t Halves __attribute__((vector_size(64), may_alias));
  const Halves a = (Halves)((Simd<16>::IntLanes)low + 0x8000), b = (Halves)((Simd<16>::IntLanes)high + 0x8000);
  return (Simd<16>::Lanes)INFERIX_SHUFFLE(Halves, a, b, 1, 33, 3, 35, 5, 37, 7, 39, 9, 41, 11, 43, 13, 45, 15, 47, 17,
                                          49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63);
}

// Scores of both groups become weights, in words of two, four keys at a time; and what is the largest of each row.
struct PairExponentials {
  const Column* scores;    // [kPair][count]
  Column* weights;         // [kPair][count / 2]
  OnlineSoftmax* running;  // [kPair]
  Column* row_max;         // [kPair]  -inf at first
  int64_t left, second;    // steps that are left; so many when the second group begins

  PairExponentials(const Column* from, Column* to, OnlineSoftmax* groups, Column* largest, int64_t count)
      : scores(from), weights(to), running(groups), row_max(largest), left(kPair * count / 4), second(count / 4) {}

  INFERIX_INLINE void step() {
    using S = Simd<16>;
    const S::Lanes base = S::part(running->base, 0);
    S::Lanes score[4], weight[4];
    unroll<4>([&](auto i) INFERIX_INLINE_LAMBDA { score[i] = S::part(scores[i], 0); });
    unroll<4>([&](auto i) INFERIX_INLINE_LAMBDA { weight[i] = amx_exp2(score[i] - base); });
    S::part(*row_max, 0) = S::max(S::max(S::max(score[0], score[1]), S::max(score[2], score[3])), S::part(*row_max, 0));
    S::part(running->sum, 0) += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    S::part(weights[0], 0) = amx_bf16_pair(weight[0], weight[1]);
    S::part(weights[1], 0) = amx_bf16_pair(weight[2], weight[3]);
    scores += 4, weights += 2, --left;
    running += left == second, row_max += left == second;
  }
};

// Products, one after the other, and exponentials in between: a step after every kEvery multiplications. Sums are
// stored only when their registers are needed again: a store that waits for a product keeps all that comes after it
// waiting.
class TileProducts {
 public:
  template <int kEvery>
  INFERIX_INLINE void run(const TileProduct& p, PairExponentials& exponentials) {
    for (int64_t row = 0; row < p.rows; row += 32) {
      const Column *const from0 = p.from[0] + row * p.from_stride, *const from1 = p.from[1] + row * p.from_stride;
      Column *const to0 = p.to[0] + row, *const to1 = p.to[1] + row;
      const char* a = p.a + row * p.stride;
      multiply<kEvery>(a, p, 0, exponentials, [&](auto tile) INFERIX_INLINE_LAMBDA {
        constexpr int kTile = tile;
        if (sums_[kTile]) tile_store<kTile>(sums_[kTile], 64);
        tile_load<kTile>((kTile % 2 ? from1 : from0) + kTile / 2 * 16 * p.from_stride, 64 * p.from_stride);
        sums_[kTile] = (kTile % 2 ? to1 : to0) + kTile / 2 * 16;
      });
      for (int64_t step = 1; step < p.steps; ++step)
        multiply<kEvery>(a + step * 64, p, step * 16, exponentials, [](auto) INFERIX_INLINE_LAMBDA {});
    }
  }

  INFERIX_INLINE void store() {
    unroll<4>([&](auto i) INFERIX_INLINE_LAMBDA {
      if (sums_[i]) tile_store<i>(sums_[i], 64);
      sums_[i] = nullptr;
    });
  }

 private:
  // Sums in tiles 0 to 3 += tiles 4 and 5, of a, times 6 and 7, of both groups. begin(tile): before it is first added
  // to.
  template <int kEvery, typename Begin>
  INFERIX_INLINE void multiply(const char* a, const TileProduct& p, int64_t word, PairExponentials& exponentials,
                               const Begin& begin) {
    const auto between = [&](auto i) INFERIX_INLINE_LAMBDA {
      if (i % kEvery == kEvery - 1 && exponentials.left > 0) exponentials.step();
    };
    begin(std::integral_constant<int, 0>{});
    tile_load_once<4>(a, p.stride), tile_load<6>(p.b[0] + word, 64);
    Bf16Numbers::multiply_add<0, 4, 6>();
    between(std::integral_constant<int, 0>{});
    begin(std::integral_constant<int, 1>{});
    tile_load<7>(p.b[1] + word, 64);
    Bf16Numbers::multiply_add<1, 4, 7>();
    between(std::integral_constant<int, 1>{});
    begin(std::integral_constant<int, 2>{});
    tile_load_once<5>(a + 16 * p.stride, p.stride);
    Bf16Numbers::multiply_add<2, 5, 6>();
    between(std::integral_constant<int, 2>{});
    begin(std::integral_constant<int, 3>{});
    Bf16Numbers::multiply_add<3, 5, 7>();
    between(std::integral_constant<int, 3>{});
  }
  Column* sums_[4] = {};  // where the sums in tiles 0 to 3 belong
};

}  // namespace inferix
#endif
