// What follows the products of a linear layer: scales, bias, activation, gate, residual, and the result's type.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../linear.h"
#include "linear_activation.h"
#include "elements.h"

namespace inferix {

constexpr int64_t kFinished = 2 * kLanes;  // columns of the result that are made at once: a line of 16-bit numbers

#if defined(__x86_64__)
// 64 bytes to `at`, or past the caches to where a line begins.
INFERIX_INLINE void store_line(const Simd<16>::IntLanes& line, char* at, bool past) {
  if (past)
    asm volatile("vmovntdq %1, %0" : "=m"(*reinterpret_cast<Column*>(at)) : "v"(line));
  else
    __builtin_memcpy(at, &line, sizeof line);
}

// from_float<Bf16> of sixteen numbers, in the low half of each word.
INFERIX_INLINE Simd<16>::UnsignedLanes bf16_words(const Simd<16>::Lanes& x) {
  using Unsigned = Simd<16>::UnsignedLanes;
  const Unsigned bits = (Unsigned)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? Unsigned{} + 0x7fc0 : rounded;
}
#endif

// kFinished numbers of a row to where the result has them.
template <typename S, typename T>
INFERIX_INLINE void store_row(const float* y, T* to, bool past) {
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16) {
    using Lanes = Simd<16>::Lanes;
    using Line = Simd<16>::IntLanes;
    const Lanes& left = *reinterpret_cast<const Lanes*>(y);
    const Lanes& right = *reinterpret_cast<const Lanes*>(y + kLanes);
    char* at = reinterpret_cast<char*>(to);
    if constexpr (sizeof(T) == 4) return store_line((Line)left, at, past), store_line((Line)right, at + 64, past);
    if constexpr (std::is_same_v<T, Bf16>) {
      typedef uint16_t Halves __attribute__((vector_size(64)));
      const Halves low = (Halves)bf16_words(left), high = (Halves)bf16_words(right);
      const Halves both = INFERIX_SHUFFLE(Halves, low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                          32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
      return store_line((Line)both, at, past);
    }
  }
#endif
  for (int64_t n = 0; n < kFinished; ++n) to[n] = from_float<T>(y[n]);
}

// Sums of row m of x with up to kFinished rows n0 ... of the weight become the result there; kWhole: with as many.
// past: past the caches, if it lies in whole lines.
template <typename S, bool kWhole>
INFERIX_INLINE void finish_row(const LinearParams& p, const Column& left, const Column& right, bool integers, int64_t m,
                               int64_t n0, bool past) {
  using Lanes = typename S::Lanes;
  constexpr int kParts = 2 * S::kParts;
  const int64_t columns = kWhole ? kFinished : std::min<int64_t>(kFinished, p.N - n0);
  alignas(64) float y[kFinished], room[kFinished];
  const auto each = [&y](const float* with, const auto& function) INFERIX_INLINE_LAMBDA {
    unroll<kParts>([&](auto part) INFERIX_INLINE_LAMBDA {
      Lanes other;
      __builtin_memcpy(&other, with + part * S::kWidth, sizeof other);
      Lanes& own = *reinterpret_cast<Lanes*>(y + part * S::kWidth);
      own = function(own, other, part);
    });
  };
  const auto given = [&room, columns](const float* from) INFERIX_INLINE_LAMBDA -> const float* {
    if (kWhole) return from;
    std::fill_n(std::copy_n(from, columns, room), kFinished - columns, 0.f);
    return room;
  };
  const float x_scale = p.x_scales[m];
  each(given(p.weight_scales + n0), [&](const Lanes&, const Lanes& scale, auto part) INFERIX_INLINE_LAMBDA {
    const Lanes sum = S::part(part < S::kParts ? left : right, part % S::kParts);
    return (integers ? __builtin_convertvector((typename S::IntLanes)sum, Lanes) : sum) * (scale * x_scale);
  });
  if (p.bias)
    each(given(p.bias + n0), [](const Lanes& x, const Lanes& bias, int) INFERIX_INLINE_LAMBDA { return x + bias; });
  with_activation<S>(p.activation, [&](auto activate) INFERIX_INLINE_LAMBDA {
    each(y, [&](const Lanes& x, const Lanes&, int) INFERIX_INLINE_LAMBDA { return activate(x); });
  });
  if (p.gate.data)
    each(given(p.gate.row(m, p.M, p.N) + n0),
         [](const Lanes& x, const Lanes& gate, int) INFERIX_INLINE_LAMBDA { return x * gate; });
  if (p.residual)
    with_float_type(p.residual_dtype, [&](auto type) INFERIX_INLINE_LAMBDA {
      const auto* from = static_cast<const decltype(type)*>(p.residual) + m * p.N + n0;
      for (int64_t n = 0; n < columns; ++n) y[n] += to_float(from[n]);
    });
  with_float_type(p.out_dtype, [&](auto type) INFERIX_INLINE_LAMBDA {
    using T = decltype(type);
    T* to = static_cast<T*>(p.out) + m * p.N + n0;
    if constexpr (kWhole)
      store_row<S>(y, to, past && reinterpret_cast<uintptr_t>(to) % 64 == 0);
    else
      for (int64_t n = 0; n < columns; ++n) to[n] = from_float<T>(y[n]);
  });
}

}  // namespace inferix
