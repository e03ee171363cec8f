// Intel's tile registers: matrices of 16 rows of 64 bytes, multiplied in one instruction. In assembly, since the
// builtins can not be named in functions that are compiled for older CPUs too.
//
// A product is sum[i][j] += a[i][word] . b[word][j], a word being four bytes or two bfloat16 numbers as everywhere
// here: rows of `a` lie as rows of a matrix do, `b` has sixteen columns of words side by side, which are the lanes of a
// Column.
#pragma once
#if defined(__x86_64__)
#include <cstdint>

#include "simd.h"

namespace inferix {

// Tile registers 0 to 7 of this thread, all of full size, for as long as this lives; or none.
class Tiles {
 public:
  explicit Tiles(bool wanted = true) : wanted_(wanted) {
    if (!wanted) return;
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() {
    if (wanted_) asm volatile("tilerelease" : : : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool wanted_;
};

template <int kTile>
INFERIX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Row i is read at rows + i * stride, in bytes.
template <int kTile>
INFERIX_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
INFERIX_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// How words of two tiles are multiplied; sums of bytes are int32, those of bfloat16 numbers float32.
struct SignedBytes {
  template <int kSum, int kA, int kB>
  INFERIX_INLINE static void multiply_add() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

struct Bf16Numbers {
  template <int kSum, int kA, int kB>
  INFERIX_INLINE static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

}  // namespace inferix
#endif
