// Single codes, rows of them and blocks of bytes: what encode.cpp and decode.cpp are made of. All of it is inlined into
// functions compiled for one instruction set.
#pragma once
#include <cstring>

#include "codecs.h"
#include "elements.h"

namespace inferix {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pairs of bytes are read as 16 bits");
typedef uint16_t __attribute__((may_alias)) Pair;  // of bytes
typedef uint8_t __attribute__((vector_size(16))) Bytes;

struct Int8Code {
  using Stored = int8_t;
  static constexpr float kTop = kInt8Max;
  // A scale rounded down makes the largest quotient an ulp more than 127, never more.
  INFERIX_INLINE static Stored encode(float quotient, float) { return static_cast<Stored>(rounded(quotient)); }
  INFERIX_INLINE static float decode(Stored code) { return float(code); }
};

struct E4m3Code {
  using Stored = uint8_t;
  static constexpr float kTop = kE4m3Max;
  // The sign is x's: a quotient by Newton's step has lost that of -0.
  INFERIX_INLINE static Stored encode(float quotient, float x) { return e4m3_of(quotient, x).bits; }
  INFERIX_INLINE static float decode(Stored code) { return to_float(E4m3{code}); }
};

// Memory that a thread keeps between tiles.
struct ThreadBuffers {
  Buffer floats, bytes;
  uint8_t* codes(int64_t count) { return reinterpret_cast<uint8_t*>(bytes.floats((count + 3) / 4)); }
};

inline ThreadBuffers& thread_buffers() {
  thread_local ThreadBuffers mine;
  return mine;
}

template <typename Stored>
INFERIX_INLINE void store(const float* from, int64_t stride, int64_t count, int64_t width, void* to,
                          int64_t to_stride) {
  for (int64_t t = 0; t < count; ++t) {
    const float* __restrict row = from + t * stride;
    Stored* __restrict to_row = static_cast<Stored*>(to) + t * to_stride;
    for (int64_t d = 0; d < width; ++d) to_row[d] = from_float<Stored>(row[d]);
  }
}

template <typename Stored>
INFERIX_INLINE void load(const void* from, int64_t from_stride, int64_t count, int64_t width, float* to,
                         int64_t stride) {
  for (int64_t t = 0; t < count; ++t) {
    const Stored* __restrict row = static_cast<const Stored*>(from) + t * from_stride;
    float* __restrict to_row = to + t * stride;
    for (int64_t d = 0; d < width; ++d) to_row[d] = to_float(row[d]);
  }
}

// codes[width], one to a byte, to two to a byte.
INFERIX_INLINE void pack(const uint8_t* codes, uint8_t* __restrict to, int64_t width) {
  const Pair* __restrict pairs = reinterpret_cast<const Pair*>(codes);
  for (int64_t j = 0; j < width / 2; ++j) to[j] = static_cast<uint8_t>(pairs[j] | pairs[j] >> 4);
}

INFERIX_INLINE void unpack(const uint8_t* __restrict from, uint8_t* codes, int64_t width) {
  Pair* __restrict pairs = reinterpret_cast<Pair*>(codes);
  for (int64_t j = 0; j < width / 2; ++j) pairs[j] = static_cast<uint16_t>((from[j] | from[j] << 4) & 0x0f0f);
}

// Sixteen rows of sixteen bytes: four times the first half of the rows is interleaved with the second.
INFERIX_INLINE void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  Bytes a[16], b[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&a[i], from + i * from_stride, 16);
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = INFERIX_SHUFFLE(Bytes, a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = INFERIX_SHUFFLE(Bytes, a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                     15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 16; ++i) std::memcpy(to + i * to_stride, &a[i], 16);
}

// to[c][r] = from[r][c]
INFERIX_INLINE void transpose(const uint8_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint8_t* to,
                              int64_t to_stride) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (int64_t r = 0; r < whole_rows; r += 16)
    for (int64_t c = 0; c < whole_columns; c += 16)
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace inferix
