// Sixteen floats side by side, held in as many registers as the instruction set needs: vector types of the compiler.
#pragma once
#include <cstdint>
#include <utility>

#include "../cpu.h"

namespace inferix {

// Everything that handles Lanes is inlined into a function compiled for one instruction set.
#define INFERIX_INLINE [[gnu::always_inline]] inline
#define INFERIX_INLINE_LAMBDA __attribute__((always_inline))

// Elements of two vectors, by constant indices.
#if defined(__clang__) || __GNUC__ >= 12
#define INFERIX_SHUFFLE(Indices, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INFERIX_SHUFFLE(Indices, a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif

// A kernel is compiled for three generations of x86 and dispatched at run time. Elsewhere there is one.
#if defined(__x86_64__)
#define INFERIX_V3 __attribute__((target("arch=x86-64-v3")))
#define INFERIX_V4 __attribute__((target("arch=x86-64-v4")))

template <typename Kernel>
Kernel dispatch(Isa isa, Kernel portable, Kernel v3, Kernel v4) {
  return isa >= Isa::avx512 ? v4 : isa >= Isa::avx2 ? v3 : portable;
}
#endif

// function(0) ... function(kCount - 1), the numbers known to the compiler: an array indexed by them lives in registers.
template <typename Function, int... kIndex>
INFERIX_INLINE void unroll(const Function& function, std::integer_sequence<int, kIndex...>) {
  (function(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, typename Function>
INFERIX_INLINE void unroll(const Function& function) {
  unroll(function, std::make_integer_sequence<int, kCount>{});
}

constexpr int kLanes = 16;

struct alignas(4 * kLanes) Column {
  float lane[kLanes];
};

// The instruction set's view of a column: kParts registers of kWidth floats. A vector type wider than the registers
// would be simpler, but GCC then keeps accumulators in memory, ten times slower.
template <int kRegisterWidth>
struct Simd {
  static constexpr int kWidth = kRegisterWidth, kParts = kLanes / kWidth;
  typedef float Lanes __attribute__((vector_size(4 * kWidth), may_alias));
  typedef int32_t IntLanes __attribute__((vector_size(4 * kWidth), may_alias));
  typedef uint32_t UnsignedLanes __attribute__((vector_size(4 * kWidth), may_alias));

  INFERIX_INLINE static Lanes& part(Column& column, int i) {
    return *reinterpret_cast<Lanes*>(column.lane + i * kWidth);
  }
  INFERIX_INLINE static const Lanes& part(const Column& column, int i) {
    return *reinterpret_cast<const Lanes*>(column.lane + i * kWidth);
  }

  // to[i][j] = from[j][i], sixteen by sixteen; strides in floats.
  INFERIX_INLINE static void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    if constexpr (kWidth == 16) {
      // Four times the first half of the rows is interleaved with the second.
      Lanes a[16], b[16];
      unroll<16>([&](auto i) INFERIX_INLINE_LAMBDA { __builtin_memcpy(&a[i], from + i * from_stride, 64); });
      unroll<4>([&](auto) INFERIX_INLINE_LAMBDA {
        unroll<8>([&](auto i) INFERIX_INLINE_LAMBDA {
          b[2 * i] = INFERIX_SHUFFLE(IntLanes, a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19,
                                          4, 20, 5, 21, 6, 22, 7, 23);
          b[2 * i + 1] = INFERIX_SHUFFLE(IntLanes, a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                              12, 28, 13, 29, 14, 30, 15, 31);
        });
        unroll<16>([&](auto i) INFERIX_INLINE_LAMBDA { a[i] = b[i]; });
      });
      unroll<16>([&](auto i) INFERIX_INLINE_LAMBDA { __builtin_memcpy(to + i * to_stride, &a[i], 64); });
    } else {
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
    }
  }

  // The same of sixteen rows of 64 bytes that lie anywhere, `stride` bytes apart.
  INFERIX_INLINE static void transpose_bytes(const char* from, int64_t stride, Column* to) {
    if (stride % 4 == 0) return transpose(reinterpret_cast<const float*>(from), stride / 4, to[0].lane, kLanes);
    alignas(64) Column rows[16];
    for (int i = 0; i < 16; ++i) __builtin_memcpy(&rows[i], from + i * stride, 64);
    transpose(rows[0].lane, kLanes, to[0].lane, kLanes);
  }

  // a > b ? a : b. One instruction, for which GCC 12 takes two.
  INFERIX_INLINE static Lanes max(const Lanes& a, const Lanes& b) {
#if defined(__x86_64__)
    if constexpr (kWidth == 16) {
      Lanes most;
      asm("vmaxps %2, %1, %0" : "=v"(most) : "v"(a), "v"(b));
      return most;
    }
#endif
    return a > b ? a : b;
  }

  INFERIX_INLINE static Lanes min(const Lanes& a, const Lanes& b) { return a < b ? a : b; }
  INFERIX_INLINE static Lanes all(float x) { return Lanes{} + x; }

  // a * b + c, rounded once where the CPU can and the file's other products may not be.
  INFERIX_INLINE static Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
#if defined(__x86_64__)
    if constexpr (kWidth == 16) {
      Lanes sum = c;
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    }
#endif
    return a * b + c;
  }

  // 1 / x within 2 units in the last place, for x from 2^-100 to 2^100. A division takes four times as long.
  INFERIX_INLINE static Lanes reciprocal(const Lanes& x) {
#if defined(__x86_64__)
    if constexpr (kWidth == 16) {
      Lanes y;  // within 2^-14; one step of Newton squares that
      asm("vrcp14ps %1, %0" : "=v"(y) : "v"(x));
      return fma(fma(-x, y, all(1.f)), y, y);
    }
#endif
    return 1.f / x;
  }

  // 2^x, within 2 units in the last place; 0 below 2^-126, NaN for NaN. x at most 127.
  INFERIX_INLINE static Lanes exp2(const Lanes& x_in) {
    const Lanes lowest = Lanes{} - 127.f;
    const Lanes x = max(lowest, x_in);  // this way round a NaN passes
    const Lanes shifted = x + 12582912.f;           // 1.5 * 2^23: the integer part lands in the low mantissa bits
    const Lanes f = x - (shifted - 12582912.f);     // [-1/2, 1/2]
    // Least relative error over [-1/2, 1/2], degree 6: 2.7e-9.
    Lanes p = fma(f, all(1.5344105e-4f), all(1.3405462e-3f));
    p = fma(p, f, all(9.6185449e-3f));
    p = fma(p, f, all(5.5503126e-2f));
    p = fma(p, f, all(2.4022646e-1f));
    p = fma(p, f, all(6.9314724e-1f));
    p = fma(p, f, all(1.f));
    // 2^n by its exponent field; n = -127 gives the bits of 0. A cast between vector types keeps the bits.
    return p * (Lanes)(((IntLanes)shifted + 127) << 23);
  }

  // The same within 7.5e-5 (degree 3) or 2.6e-6 (degree 4), for numbers that are rounded afterwards; at least 2^-120.
  template <int kDegree>
  INFERIX_INLINE static Lanes exp2_approx(const Lanes& x_in) {
    static_assert(kDegree == 3 || kDegree == 4);
    const Lanes lowest = Lanes{} - 120.f;
    const Lanes x = max(lowest, x_in);
    const Lanes shifted = x + 12582912.f;
    const Lanes f = x - (shifted - 12582912.f);
    Lanes p;
    if constexpr (kDegree == 3) {
      p = f * 5.51716527e-2f + 2.42611121e-1f;
      p = p * f + 6.93260988e-1f;
      p = p * f + 9.99928074e-1f;
    } else {
      p = f * 9.57010002e-3f + 5.59178602e-2f;
      p = p * f + 2.40247449e-1f;
      p = p * f + 6.93121815e-1f;
      p = p * f + 9.99999261e-1f;
    }
    return (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));  // into the exponent: p is near 1
  }

  // Of each two floats a word: two bfloat16 numbers, the first in the low half.
  INFERIX_INLINE static Lanes bf16_pair(const Lanes& low, const Lanes& high) {
    const IntLanes a = (IntLanes)low + 0x8000, b = (IntLanes)high + 0x8000;
    return (Lanes)((IntLanes)((UnsignedLanes)a >> 16) | (b & static_cast<int32_t>(0xffff0000)));
  }
};

}  // namespace inferix
