// Packs the operands of attention's micro-kernels: queries, keys and values as words. Included by attention.cpp alone.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "../attention.h"
#include "attention_tile.h"
#include "codes.h"

namespace inferix {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What words hold. Products are taken in the precision of the page, where the CPU has the instructions and the call
// allows it. kTiles: bfloat16 in tile registers, as fast as the exponentials between the products are; so pages of
// bytes are multiplied so too.
enum Arithmetic { kFloats, kBf16, kTiles, kInt8, kArithmetics };

inline Arithmetic arithmetic_of(Codec codec, Isa isa, Precision precision) {
  if (codec == Codec::f32 || codec == Codec::f16) return kFloats;
  if (isa >= Isa::amx) return kTiles;
  const bool int8 = codec == Codec::i8_token || codec == Codec::i8_channel;
  if (int8 && precision != Precision::exact && isa >= Isa::avx512_vnni) return kInt8;
  return isa >= Isa::avx512_bf16 ? kBf16 : kFloats;
}

// Terms of a query in bytes: x = scale * (high + low / kLowSteps), of which the second is left out in 8 bits.
inline int64_t terms_of(Arithmetic arithmetic, Precision precision) {
  return arithmetic == kInt8 && precision == Precision::automatic ? 2 : 1;
}

constexpr int64_t kElements[kArithmetics] = {1, 2, 2, 4};  // of a word

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline int64_t words_of(int64_t D, Arithmetic arithmetic) {
  if (arithmetic == kTiles) return round_up(D, 2 * kLanes) / 2;
  return round_up(D, kElements[arithmetic]) / kElements[arithmetic];
}

// Tokens of a page that were packed for all rows of a task.
struct PackedTile {
  TileKeys keys;
  TileValues values;
  Arithmetic k_arithmetic, v_arithmetic;
  float bias;                         // of the page, in units of log 2
  int64_t count, position, variant;  // tokens; the position of the first; of the queries that meet them
  Buffer k, v, v_scales;
  alignas(64) float bias_of[kTileKeys], k_scales[kTileKeys];
  alignas(64) int32_t compensation[kTileKeys];
  Column columns[kTileKeys];
};

constexpr int64_t kNotBegun = -1;

// How far a task has come: it may be stopped before any page of its list, and another thread may go on with it.
struct TaskState {
  std::vector<Column> q[kArithmetics];  // [variants][groups][terms][words of a row]; none if no pool wants it
  std::vector<Column> q_scale;          // [variants][groups]  of kInt8, with the scale of scores
  std::vector<Column> out;              // [groups][D rounded up to 16]
  std::vector<OnlineSoftmax> running;   // [groups]
  float max_bias;                       // of the list: the others are relative to it
  int64_t entry = kNotBegun;            // of the list: the next
};

// A thread's buffers for a task; kept between calls, since a task is short.
struct Workspace : TaskState {
  std::vector<PackedTile> tiles;
  Buffer row, floats, halves, words;
};

// x[D], zeros up to a whole word, as the words of one arithmetic, for bytes those of one term after the other; bytes
// are 128 more than what they stand for. Returns the scale of the last term's bytes.
INFERIX_INLINE float to_words(Arithmetic arithmetic, const float* x, int64_t D, int64_t terms, int32_t* words) {
  if (arithmetic == kFloats) {
    std::memcpy(words, x, D * 4);
  } else if (arithmetic != kInt8) {
    for (int64_t n = 0; n < (D + 1) / 2; ++n)
      words[n] = from_float<Bf16>(x[2 * n]).bits | from_float<Bf16>(x[2 * n + 1]).bits << 16;
    std::fill(words + (D + 1) / 2, words + words_of(D, arithmetic), 0);
  } else {
    int32_t largest = 0;
    for (int64_t d = 0; d < D; ++d) largest = std::max(largest, magnitude(x[d]));
    const float scale = std::max(float_of(static_cast<uint32_t>(largest)), kAmaxFloor) / kInt8Max;
    const float inverse = 1.f / scale;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(words);
    for (int64_t d = 0; d < round_up(D, 4); ++d) {
      const float steps = x[d] * inverse;
      const int32_t high = rounded(steps);
      bytes[d] = static_cast<uint8_t>(high + 128);
      if (terms == 2)
        bytes[round_up(D, 4) + d] = static_cast<uint8_t>(rounded((steps - static_cast<float>(high)) * kLowSteps) + 128);
    }
    // A NaN or an infinity has made every byte meaningless: the scale carries it on.
    if (largest >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    return terms == 2 ? scale / kLowSteps : scale;
  }
  return 1.f;
}

// Rows of `width` bytes of count tokens that lie `from_stride` bytes apart, zeros up to `rows` and `stride`.
inline void copy_rows(const char* from, int64_t from_stride, int64_t width, int64_t count, char* to, int64_t stride,
                      int64_t rows) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t bytes = t < count ? width : 0;
    if (bytes) std::memcpy(to + t * stride, from + t * from_stride, bytes);
    std::memset(to + t * stride + bytes, 0, stride - bytes);
  }
}

// A row of int8 codes as bfloat16 numbers.
template <typename Scale>
INFERIX_INLINE void bytes_to_bf16(const char* codes, int64_t D, const Scale& scale, void* to) {
  const int8_t* __restrict from = reinterpret_cast<const int8_t*>(codes);
  Pair* __restrict halves = static_cast<Pair*>(to);
  for (int64_t d = 0; d < D; ++d) halves[d] = from_float<Bf16>(Int8Code::decode(from[d]) * scale(d)).bits;
}

// Tokens first : first + count of a tile of keys.
template <typename S>
INFERIX_INLINE void pack_keys(Isa isa, const Tile& tile, int64_t first, int64_t count, float bias, Workspace& w,
                              PackedTile& to) {
  const Arithmetic arithmetic = to.k_arithmetic;
  const int64_t D = tile.width, rows = round_up(count, arithmetic == kTiles ? 2 * kLanes : kLanes);
  const int64_t words = words_of(D, arithmetic), bytes = row_bytes(tile.codec, D);
  std::fill_n(to.bias_of, count, bias);
  std::fill(to.bias_of + count, to.bias_of + rows, -kInfinity);
  TileKeys keys{nullptr, words * 4, words, rows, to.bias_of, nullptr, nullptr};
  const char* codes = tile.codes + first * tile.row;
  const bool stored =
      tile.codec == Codec::f32 || (tile.codec == Codec::bf16 && arithmetic != kFloats) || arithmetic == kInt8;
  char* packed = reinterpret_cast<char*>(to.k.floats(rows * words));
  keys.rows = packed;
  // Tile registers read rows by the L1 cache, once for each pair of groups: from a copy, which lies in the L2 cache.
  if (stored && arithmetic != kTiles && count == rows && words * 4 == bytes) {
    keys.rows = codes, keys.stride = tile.row;
  } else if (stored) {
    copy_rows(codes, tile.row, bytes, count, packed, words * 4, rows);
  } else if (arithmetic == kFloats) {
    const float* x = floats_of(isa, tile, first, count, w.floats);
    copy_rows(reinterpret_cast<const char*>(x), D * 4, D * 4, count, packed, D * 4, rows);
  } else {
    if (tile.codec == Codec::i8_token) {
      const float* scales = reinterpret_cast<const float*>(tile.scales) + first;
      for (int64_t t = 0; t < count; ++t)
        bytes_to_bf16(codes + t * D, D, [&](int64_t) { return scales[t]; }, packed + t * words * 4);
    } else {
      const float* x = floats_of(isa, tile, first, count, w.floats);
      from_floats(isa, DType::bf16, x, D, count, D, packed, words * 2);
    }
    for (int64_t t = 0; t < count && D < words * 2; ++t)
      std::memset(packed + t * words * 4 + D * 2, 0, words * 4 - D * 2);
    std::memset(packed + count * words * 4, 0, (rows - count) * words * 4);
  }
  if (arithmetic == kInt8) {
    std::fill(to.k_scales + count, to.k_scales + rows, 0.f);
    std::memcpy(to.k_scales, reinterpret_cast<const float*>(tile.scales) + first, count * 4);
    for (int64_t t = 0; t < rows; ++t)
      to.compensation[t] = zero_point_compensation<S>(keys.rows + t * keys.stride, keys.stride);
    keys.scales = to.k_scales, keys.compensation = to.compensation;
  }
  if (arithmetic == kTiles) {
    keys.columns = to.columns, keys.column_stride = count < rows;
    for (int64_t t = 0; t < (count < rows ? rows : 1); ++t) std::fill_n(to.columns[t].lane, kLanes, to.bias_of[t]);
  }
  to.keys = keys;
}

// Words of kCount rows' elements: [ceil(count / kCount)][stride], rows past count 0.
template <typename Element, int kCount, typename Load>
INFERIX_INLINE void interleave(int64_t count, int64_t width, int64_t stride, const Load& row, uint32_t* to) {
  static constexpr Element zeros[1] = {};
  for (int64_t t = 0; t < count; t += kCount, to += stride) {
    const Element* from[kCount];
    for (int i = 0; i < kCount; ++i) from[i] = t + i < count ? row(t + i) : zeros;
    if (t + kCount <= count) {
      for (int64_t d = 0; d < width; ++d) {
        uint32_t word = 0;
        for (int i = 0; i < kCount; ++i) word |= uint32_t(from[i][d]) << (32 / kCount * i);
        to[d] = word;
      }
    } else {
      for (int64_t d = 0; d < width; ++d) {
        uint32_t word = 0;
        for (int i = 0; t + i < count; ++i) word |= uint32_t(from[i][d]) << (32 / kCount * i);
        to[d] = word;
      }
    }
    std::fill(to + width, to + stride, 0);
  }
}

// to[channel][key pair] = words[key pair][channel]: [columns][kTileKeys / 2] of [kTileKeys / 2][columns]
template <typename S>
INFERIX_INLINE void transpose_words(const float* words, int64_t pairs, int64_t columns, float* to) {
  for (int64_t pair = 0; pair < pairs; pair += kLanes)
    for (int64_t d = 0; d < columns; d += kLanes)
      S::transpose(words + pair * columns + d, columns, to + d * (kTileKeys / 2) + pair, kTileKeys / 2);
}

template <typename S>
INFERIX_INLINE void pack_values(Isa isa, const Tile& tile, int64_t first, int64_t count, Workspace& w, PackedTile& to) {
  const Arithmetic arithmetic = to.v_arithmetic;
  const int64_t D = tile.width, columns = round_up(D, arithmetic == kTiles ? 2 * kLanes : kLanes);
  const int64_t steps = words_of(count, arithmetic);
  const char* codes = tile.codes + first * tile.row;
  TileValues& values = to.values;
  values = {nullptr, columns * 4, steps, columns, nullptr};
  if (tile.codec == Codec::f32 && D == columns) {
    values.rows = codes, values.stride = tile.row;
    return;
  }
  float* packed = to.v.floats(std::max(steps, kTileKeys / 2) * columns);
  values.rows = reinterpret_cast<const char*>(packed);
  float* words = arithmetic == kTiles ? w.words.floats(steps * columns) : packed;
  if (arithmetic == kInt8) {
    const auto row = [&](int64_t t) { return reinterpret_cast<const uint8_t*>(codes) + t * D; };
    interleave<uint8_t, 4>(count, D, columns, row, reinterpret_cast<uint32_t*>(words));
    float* scales = to.v_scales.floats(columns);
    std::memcpy(scales, tile.scales, D * 4);
    std::fill(scales + D, scales + columns, 0.f);
    values.scales = scales;
  } else if (tile.codec == Codec::bf16 && arithmetic != kFloats) {
    const auto row = [&](int64_t t) { return reinterpret_cast<const Pair*>(codes + t * tile.row); };
    interleave<Pair, 2>(count, D, columns, row, reinterpret_cast<uint32_t*>(words));
  } else {
    if (arithmetic == kFloats) {
      const float* x = floats_of(isa, tile, first, count, w.floats);
      copy_rows(reinterpret_cast<const char*>(x), D * 4, D * 4, count, reinterpret_cast<char*>(words), columns * 4,
                count);
    } else {
      Pair* halves = reinterpret_cast<Pair*>(w.halves.floats(count * D));
      if (tile.codec == Codec::i8_channel) {
        const float* scales = reinterpret_cast<const float*>(tile.scales);
        for (int64_t t = 0; t < count; ++t)
          bytes_to_bf16(codes + t * D, D, [&](int64_t d) { return scales[d]; }, halves + t * D);
      } else {
        from_floats(isa, DType::bf16, floats_of(isa, tile, first, count, w.floats), D, count, D, halves, D);
      }
      const auto row = [&](int64_t t) { return halves + t * D; };
      interleave<Pair, 2>(count, D, columns, row, reinterpret_cast<uint32_t*>(words));
    }
  }
  if (arithmetic == kTiles) {
    const int64_t pairs = (count + 1) / 2;
    std::fill(words + pairs * columns, words + steps * columns, 0.f);
    transpose_words<S>(words, steps, columns, packed);
    values.stride = kTileKeys * 2, values.steps = steps / kLanes;
  }
}

}  // namespace inferix
