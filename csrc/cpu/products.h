// Sums of products of the rows of two matrices, in words of 32 bits: a float, two bfloat16 numbers or four bytes.
// Sixteen rows of one are packed side by side in the lanes of a register; a word of the other is multiplied with all of
// them at once.
#pragma once
#include <cstring>

#include "simd.h"

namespace inferix {

typedef int32_t __attribute__((may_alias)) Word;

// sum += column . word, and what is read for a word. kElements numbers to a word.
template <typename S>
struct FloatWords {
  static constexpr int kElements = 1;
  using Sum = typename S::Lanes;
  INFERIX_INLINE static float broadcast(const char* at) {
    float word;
    __builtin_memcpy(&word, at, 4);
    return word;
  }
  INFERIX_INLINE static void add(Sum& sum, const typename S::Lanes& column, float word) { sum += column * word; }
};

#if defined(__x86_64__)
// In assembly, since the builtins can not be named in templates that are compiled for older CPUs too. The word has a
// register of its own, because it is multiplied more than once.
struct WideWords {
  using Lanes = Simd<16>::Lanes;
  INFERIX_INLINE static Lanes broadcast(const char* at) {
    Lanes word;
    asm("vbroadcastss %1, %0" : "=v"(word) : "m"(*reinterpret_cast<const Word*>(at)));
    return word;
  }
};

struct WideFloatWords : WideWords {
  static constexpr int kElements = 1;
  using Sum = Lanes;
  INFERIX_INLINE static void add(Sum& sum, const Lanes& column, const Lanes& word) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(column), "v"(word));
  }
};

struct Bf16Words : WideWords {
  static constexpr int kElements = 2;
  using Sum = Lanes;
  INFERIX_INLINE static void add(Sum& sum, const Lanes& column, const Lanes& word) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(column), "v"(word));
  }
};

// Unsigned packed bytes with signed ones.
struct Int8Words : WideWords {
  static constexpr int kElements = 4;
  using Sum = Simd<16>::IntLanes;
  INFERIX_INLINE static void add(Sum& sum, const Lanes& column, const Lanes& word) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(column), "v"(word));
  }
};
#endif

// Sixteen rows as words: in bytes from a row to the next, and from a word to the next of its row.
struct InPlaceRows {
  const char* rows;
  int64_t stride, step = 4;
  const int32_t* start = nullptr;  // [16] or null: of integer sums
  const char* ahead = nullptr;     // memory to be asked for meanwhile, if `products` is told so,
  int64_t ahead_step = 0;          // so many bytes at each word
};

// Packed bytes are unsigned, with a zero point of 128: sums of products with `count` signed ones begin with what
// corrects that.
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

// Registers that hold sums: as many rows of as many groups as fit beside what is multiplied. With two groups a word is
// read once for both, and a register of packed words once for all rows: loads, of which a CPU does two in a cycle, then
// keep up with two products.
template <int kRegisterRows, int kRegisterGroups>
struct Block {
  static constexpr int kRows = kRegisterRows, kGroups = kRegisterGroups;
};

// Of 16 registers of 128 bits, or on Arm 32; of 16 of 256; of 32 of 512.
#if defined(__aarch64__)
using PortableBlock = Block<4, 1>;
#else
using PortableBlock = Block<2, 1>;
#endif
using V3Block = Block<4, 1>;
using V4Block = Block<8, 2>;

// Of sixteen rows with sixteen packed rows of each group, packed[group][word]: store(group, row, part, sum), sum being
// one register of the sixteen sums of a row. Integers where the words are bytes.
template <typename S, typename Words, typename Registers, bool kAhead = false, typename Store>
INFERIX_INLINE void products(const InPlaceRows& in_place, const Column* const* packed, int64_t words,
                             const Store& store) {
  using Lanes = typename S::Lanes;
  using Sum = typename Words::Sum;
  constexpr int kRows = Registers::kRows, kGroups = Registers::kGroups;
  for (int64_t first = 0; first < kLanes; first += kRows) {
    Sum sum[kGroups][kRows][S::kParts];
    const auto each = [](const auto& function) INFERIX_INLINE_LAMBDA {
      unroll<kGroups * kRows * S::kParts>([&](auto i) INFERIX_INLINE_LAMBDA {
        constexpr int n = i;
        function(n / S::kParts / kRows, n / S::kParts % kRows, n % S::kParts);
      });
    };
    each([&](int group, int row, int part) INFERIX_INLINE_LAMBDA {
      sum[group][row][part] = Sum{};
      if constexpr (Words::kElements == 4)
        if (in_place.start)
          sum[group][row][part] = (Sum)Words::broadcast(reinterpret_cast<const char*>(in_place.start + first + row));
    });
    // A pointer for each four rows, and the strides 1, 2 and 3.
    const int64_t stride = in_place.stride, three = 3 * stride;
    const char* fours[(kRows + 3) / 4];
    for (int i = 0; i < (kRows + 3) / 4; ++i) fours[i] = in_place.rows + (first + 4 * i) * stride;
    const char* ahead = in_place.ahead + first / kRows * words * in_place.ahead_step;
    for (int64_t n = 0, at = 0; n < words; ++n, at += in_place.step) {
      if constexpr (kAhead) __builtin_prefetch(ahead, 0, 2), ahead += in_place.ahead_step;
      Lanes columns[kGroups][S::kParts];
      unroll<kGroups * S::kParts>([&](auto i) INFERIX_INLINE_LAMBDA {
        columns[i / S::kParts][i % S::kParts] = S::part(packed[i / S::kParts][n], i % S::kParts);
      });
      unroll<kRows>([&](auto row) INFERIX_INLINE_LAMBDA {
        const char* base = fours[row / 4] + at;
        const auto word = Words::broadcast(base + (row % 4 == 0   ? 0
                                                   : row % 4 == 1 ? stride
                                                   : row % 4 == 2 ? 2 * stride
                                                                  : three));
        unroll<kGroups * S::kParts>([&](auto i) INFERIX_INLINE_LAMBDA {
          constexpr int group = i / S::kParts, part = i % S::kParts;
          Words::add(sum[group][row][part], columns[group][part], word);
        });
      });
    }
    each([&](int group, int row, int part)
             INFERIX_INLINE_LAMBDA { store(group, first + row, part, sum[group][row][part]); });
  }
}

}  // namespace inferix
