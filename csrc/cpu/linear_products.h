// Sums of products of the rows of two matrices, in words of 32 bits: a float, two bfloat16 numbers or four bytes.
// Sixteen rows of one are packed side by side in the lanes of a register; a word of the other is multiplied with all of
// them at once.
#pragma once
#include "simd.h"

namespace inferix {

typedef int32_t __attribute__((may_alias)) Word;

// sum += column . word, and what is read for a word.
template <typename S>
struct FloatWords {
  static constexpr bool kIntegers = false;
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

struct Bf16Words : WideWords {
  static constexpr bool kIntegers = false;
  using Sum = Lanes;
  INFERIX_INLINE static void add(Sum& sum, const Lanes& column, const Lanes& word) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(column), "v"(word));
  }
};

// Unsigned packed bytes with signed ones.
struct Int8Words : WideWords {
  static constexpr bool kIntegers = true;
  using Sum = Simd<16>::IntLanes;
  INFERIX_INLINE static Sum broadcast_int(const int32_t& x) {
    return (Sum)broadcast(reinterpret_cast<const char*>(&x));
  }
  INFERIX_INLINE static void add(Sum& sum, const Lanes& column, const Lanes& word) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(column), "v"(word));
  }
};
#endif

// Sixteen rows as words, `stride` bytes apart.
struct InPlaceRows {
  const char* rows;
  int64_t stride;
  int32_t start[kLanes];  // of integer sums: takes off what the zero point of packed bytes adds
};

// sums[group][row].lane[j] of sixteen rows with the sixteen packed rows j of each of kGroups groups, integers where the
// words are bytes. kRows * kGroups registers hold sums: as a word is read once for all groups, and a register of packed
// words once for kRows rows, loads, of which a CPU does two in a cycle, keep up with two products.
template <typename S, typename Words, int kRows, int kGroups>
INFERIX_INLINE void products(const InPlaceRows& w, const Column* const* packed, int64_t words, Column (*sums)[kLanes]) {
  using Lanes = typename S::Lanes;
  static_assert(kRows <= 8 && kLanes % kRows == 0);
  for (int64_t first = 0; first < kLanes; first += kRows) {
    typename Words::Sum sum[kGroups][kRows][S::kParts];
    const auto each = [](const auto& function) INFERIX_INLINE_LAMBDA {
      unroll<kGroups * kRows * S::kParts>([&](auto i) INFERIX_INLINE_LAMBDA {
        constexpr int n = i;
        function(n / S::kParts / kRows, n / S::kParts % kRows, n % S::kParts);
      });
    };
    each([&](int group, int row, int part) INFERIX_INLINE_LAMBDA {
      if constexpr (Words::kIntegers)
        sum[group][row][part] = Words::broadcast_int(w.start[first + row]);
      else
        sum[group][row][part] = Lanes{};
    });
    const int64_t stride = w.stride, three = 3 * stride;  // two pointers and the strides 1, 2 and 3 reach eight rows
    const char *row0 = w.rows + first * stride, *row4 = row0 + 4 * stride;
    for (int64_t n = 0; n < words; ++n) {
      Lanes columns[kGroups][S::kParts];
      unroll<kGroups * S::kParts>([&](auto i) INFERIX_INLINE_LAMBDA {
        columns[i / S::kParts][i % S::kParts] = S::part(packed[i / S::kParts][n], i % S::kParts);
      });
      unroll<kRows>([&](auto row) INFERIX_INLINE_LAMBDA {
        const char* base = (row < 4 ? row0 : row4) + n * 4;
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
             INFERIX_INLINE_LAMBDA { S::part(sums[group][first + row], part) = (Lanes)sum[group][row][part]; });
  }
}

}  // namespace inferix
