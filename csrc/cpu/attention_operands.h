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
// allows it.
enum Arithmetic { kFloats, kBf16, kInt8, kArithmetics };

inline Arithmetic arithmetic_of(Codec codec, Isa isa, Precision precision) {
  if (codec == Codec::f32 || codec == Codec::f16) return kFloats;
  const bool int8 = codec == Codec::i8_token || codec == Codec::i8_channel;
  if (int8 && precision != Precision::exact && isa >= Isa::avx512_vnni) return kInt8;
  return isa >= Isa::avx512_bf16 ? kBf16 : kFloats;
}

// Terms of a query in bytes: x = scale * (high + low / kLowSteps), of which the second is left out in 8 bits.
inline int64_t terms_of(Arithmetic arithmetic, Precision precision) {
  return arithmetic == kInt8 && precision == Precision::automatic ? 2 : 1;
}

constexpr int64_t kElements[kArithmetics] = {1, 2, 4};  // of a word

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline int64_t words_of(int64_t D, Arithmetic arithmetic) {
  return round_up(D, kElements[arithmetic]) / kElements[arithmetic];
}

// A thread's buffers for a task; kept between calls, since a task is short.
struct Workspace {
  std::vector<Column> q[kArithmetics];  // [variants][groups][terms][words of a row]; none if no pool wants it
  std::vector<Column> q_scale;          // [variants][groups]  of kInt8, with the scale of scores
  std::vector<Column> out;              // [groups][D rounded up to 16]
  std::vector<OnlineSoftmax> running;   // [groups]
  float max_bias;                       // of the list: the others are relative to it
  Buffer row, k, v, floats, halves;
  alignas(64) float bias[kTileKeys], k_scales[kTileKeys];
  alignas(64) int32_t compensation[kTileKeys];
  Buffer v_scales;
};

// x[D], zeros up to a whole word, as the words of one arithmetic, for bytes those of one term after the other; bytes are
// 128 more than what they stand for. Returns the scale of the last term's bytes.
INFERIX_INLINE float to_words(Arithmetic arithmetic, const float* x, int64_t D, int64_t terms, int32_t* words) {
  if (arithmetic == kFloats) {
    std::memcpy(words, x, D * 4);
  } else if (arithmetic == kBf16) {
    for (int64_t n = 0; n < (D + 1) / 2; ++n)
      words[n] = from_float<Bf16>(x[2 * n]).bits | from_float<Bf16>(x[2 * n + 1]).bits << 16;
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

// Tokens first : first + count of a tile of keys.
template <typename S>
INFERIX_INLINE TileKeys pack_keys(Isa isa, Arithmetic arithmetic, const Tile& tile, int64_t first, int64_t count,
                                  float bias, int64_t block, Workspace& w) {
  const int64_t D = tile.width, rows = round_up(count, block), words = words_of(D, arithmetic);
  const bool in_place = count == rows && D % kElements[arithmetic] == 0;
  std::fill_n(w.bias, count, bias);
  std::fill(w.bias + count, w.bias + rows, -kInfinity);
  TileKeys keys{nullptr, words * 4, words, rows, w.bias, nullptr, nullptr};
  const int64_t bytes = row_bytes(tile.codec, D);
  const char* codes = tile.codes + first * tile.row;
  const bool stored =
      tile.codec == Codec::f32 || (tile.codec == Codec::bf16 && arithmetic == kBf16) || arithmetic == kInt8;
  char* to = reinterpret_cast<char*>(w.k.floats(rows * words));
  if (stored && in_place) {
    keys.rows = codes, keys.stride = tile.row;
  } else if (stored) {
    copy_rows(codes, tile.row, bytes, count, to, words * 4, rows);
    keys.rows = to;
  } else {
    const float* x = floats_of(isa, tile, first, count, w.floats);
    if (arithmetic == kFloats) {
      copy_rows(reinterpret_cast<const char*>(x), D * 4, D * 4, count, to, D * 4, rows);
    } else {
      from_floats(isa, DType::bf16, x, D, count, D, to, words * 2);
      for (int64_t t = 0; t < count && D % 2; ++t) std::memset(to + t * words * 4 + D * 2, 0, 2);
      std::memset(to + count * words * 4, 0, (rows - count) * words * 4);
    }
    keys.rows = to;
  }
  if (arithmetic == kInt8) {
    std::fill(w.k_scales + count, w.k_scales + rows, 0.f);
    std::memcpy(w.k_scales, reinterpret_cast<const float*>(tile.scales) + first, count * 4);
    for (int64_t t = 0; t < rows; ++t)
      w.compensation[t] = zero_point_compensation<S>(keys.rows + t * keys.stride, keys.stride);
    keys.scales = w.k_scales, keys.compensation = w.compensation;
  }
  return keys;
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

INFERIX_INLINE TileValues pack_values(Isa isa, Arithmetic arithmetic, const Tile& tile, int64_t first, int64_t count,
                                      Workspace& w) {
  const int64_t D = tile.width, columns = round_up(D, kLanes);
  const int64_t steps = words_of(count, arithmetic);
  const char* codes = tile.codes + first * tile.row;
  TileValues values{nullptr, columns * 4, steps, columns, nullptr};
  if (tile.codec == Codec::f32 && D == columns) {
    values.rows = codes, values.stride = tile.row;
    return values;
  }
  float* to = w.v.floats(steps * columns);
  values.rows = reinterpret_cast<const char*>(to);
  if (arithmetic == kInt8) {
    const auto row = [&](int64_t t) { return reinterpret_cast<const uint8_t*>(codes) + t * D; };
    interleave<uint8_t, 4>(count, D, columns, row, reinterpret_cast<uint32_t*>(to));
    float* scales = w.v_scales.floats(columns);
    std::memcpy(scales, tile.scales, D * 4);
    std::fill(scales + D, scales + columns, 0.f);
    values.scales = scales;
  } else if (tile.codec == Codec::bf16 && arithmetic == kBf16) {
    const auto row = [&](int64_t t) { return reinterpret_cast<const Pair*>(codes + t * tile.row); };
    interleave<Pair, 2>(count, D, columns, row, reinterpret_cast<uint32_t*>(to));
  } else {
    const float* x = floats_of(isa, tile, first, count, w.floats);
    if (arithmetic == kFloats) {
      copy_rows(reinterpret_cast<const char*>(x), D * 4, D * 4, count, reinterpret_cast<char*>(to), columns * 4, count);
    } else {
      Pair* halves = reinterpret_cast<Pair*>(w.halves.floats(count * D));
      from_floats(isa, DType::bf16, x, D, count, D, halves, D);
      const auto row = [&](int64_t t) { return halves + t * D; };
      interleave<Pair, 2>(count, D, columns, row, reinterpret_cast<uint32_t*>(to));
    }
  }
  return values;
}

}  // namespace inferix
