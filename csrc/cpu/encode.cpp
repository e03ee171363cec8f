// From floats to codes and scales. The rule is reference.encode; the results are equal to its bits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "codes.h"

namespace inferix {
namespace {

// a / b as far as its code goes, but for the sign of 0; inverse is 1 / b. A division takes four times as long.
//
// One step of Newton with an exact remainder gives the rounded quotient, except where a / b lies within 2^-22 units in
// the last place of the middle between two floats. Where it matters which of the two, one of them being halfway between
// two codes, all such a and b were enumerated: none comes out wrong (tests/ops/test_kv_pages.py has them). With a b of
// 11 bits, as of 4-bit codes, no quotient lies so close. Quotients too small for an exact remainder are far below half
// a code, and taken as 0: GELU leaves many of them, and with their denormal remainders a row takes seven times as long.
template <bool kFma>
INFERIX_INLINE float quotient(float a, float b, float inverse) {
  if constexpr (!kFma) return a / b;
  a = std::abs(a) < 0x1p-100f ? 0.f : a;
  const float q = a * inverse;
  return __builtin_fmaf(__builtin_fmaf(-q, b, a), inverse, q);
}

constexpr int32_t kInfinityBits = 0x7f800000;  // a magnitude of as much or more is no finite number
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Largest magnitudes, as bits, to scales and their inverses. All that shares a scale with what is not finite is NaN.
INFERIX_INLINE void scales_of(const int32_t* __restrict largest, int64_t count, float top, float* __restrict scales,
                              float* __restrict inverse) {
  for (int64_t i = 0; i < count; ++i) {
    const float scale = std::max(float_of(static_cast<uint32_t>(largest[i])), kAmaxFloor) / top;
    scales[i] = largest[i] >= kInfinityBits ? kNaN : scale;
    inverse[i] = 1.f / scales[i];
  }
}

// One scale per token.
template <typename Code, bool kFma>
INFERIX_INLINE void encode_tokens(const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  const int64_t width = to.width;  // a local: codes may alias `to`
  float* scales = reinterpret_cast<float*>(to.scales);
  float* inverse = thread_buffers().floats.floats(2 * length);
  int32_t* largest = reinterpret_cast<int32_t*>(inverse + length);
  for (int64_t t = 0; t < length; ++t) {
    const float* row = x + t * stride;
    int32_t most = 0;
    for (int64_t d = 0; d < width; ++d) most = std::max(most, magnitude(row[d]));
    largest[t] = most;
  }
  scales_of(largest, length, Code::kTop, scales, inverse);
  for (int64_t t = 0; t < length; ++t) {
    ahead.fetch(t);
    const float* __restrict row = x + t * stride;
    auto* __restrict codes = reinterpret_cast<typename Code::Stored*>(to.codes) + t * width;
    const float scale = scales[t], multiplier = inverse[t];
    for (int64_t d = 0; d < width; ++d) codes[d] = Code::encode(quotient<kFma>(row[d], scale, multiplier), row[d]);
  }
}

// One scale per channel; codes [length, width].
template <typename Code, bool kFma>
INFERIX_INLINE void encode_channels(const Tile& to, const float* x, int64_t stride, int64_t length,
                                    const Ahead& ahead, typename Code::Stored* codes) {
  const int64_t width = to.width;
  float* __restrict scales = reinterpret_cast<float*>(to.scales);
  float* __restrict inverse = thread_buffers().floats.floats(2 * width);
  int32_t* __restrict largest = reinterpret_cast<int32_t*>(inverse + width);
  std::fill_n(largest, width, 0);
  for (int64_t t = 0; t < length; ++t) {
    const float* __restrict row = x + t * stride;
    for (int64_t d = 0; d < width; ++d) largest[d] = std::max(largest[d], magnitude(row[d]));
  }
  scales_of(largest, width, Code::kTop, scales, inverse);
  for (int64_t t = 0; t < length; ++t) {
    ahead.fetch(t);
    const float* __restrict row = x + t * stride;
    auto* __restrict to_row = codes + t * width;
    for (int64_t d = 0; d < width; ++d)
      to_row[d] = Code::encode(quotient<kFma>(row[d], scales[d], inverse[d]), row[d]);
  }
}

// What is subtracted from, and what divides, the numbers that share a scale.
struct U4Rows {
  float *low, *high, *offset, *scale, *inverse;  // [count]
  U4Rows(float* room, int64_t count)
      : low(room), high(low + count), offset(high + count), scale(offset + count), inverse(scale + count) {}
};

// All that shares a scale with what is not finite is NaN: its scale is, and its codes are 0, as nothing lies above an
// offset of infinity.
inline void u4_not_finite(const U4Rows& rows, int64_t count, const Tile& to) {
  constexpr float kMost = std::numeric_limits<float>::max(), kInf = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    if (rows.low[i] >= -kMost && rows.high[i] <= kMost) continue;
    reinterpret_cast<uint16_t*>(to.offsets)[i] = 0;
    reinterpret_cast<uint16_t*>(to.scales)[i] = from_float<Half>(kNaN).bits;
    rows.offset[i] = kInf, rows.scale[i] = rows.inverse[i] = 1.f;
  }
}

// From low and high to the others, rounded to float16 as they are stored. Returns whether that rounding moved the
// bounds so far that a code could lie outside of [0, 15], or one of them is not finite: seldom.
INFERIX_INLINE bool u4_scales(const U4Rows& rows, int64_t count, const Tile& to) {
  float *__restrict low = rows.low, *__restrict high = rows.high, *__restrict offset = rows.offset,
        *__restrict scale = rows.scale, *__restrict inverse = rows.inverse;
  uint16_t* __restrict stored_offset = reinterpret_cast<uint16_t*>(to.offsets);
  uint16_t* __restrict stored_scale = reinterpret_cast<uint16_t*>(to.scales);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = from_float<Half>(std::min(std::max(low[i], -kHalfMax), kHalfMax)).bits;
    stored_offset[i] = bits == 0x8000 ? 0 : bits;  // -0 becomes 0
  }
  for (int64_t i = 0; i < count; ++i) offset[i] = to_float(Half{stored_offset[i]});
  for (int64_t i = 0; i < count; ++i) {
    const float step = std::max((std::min(high[i], kHalfMax) - offset[i]) / kU4Max, kStepFloor);
    stored_scale[i] = from_float<Half>(step).bits;
  }
  int32_t inside = 1;
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = to_float(Half{stored_scale[i]});
    inverse[i] = 1.f / scale[i];
    inside &= low[i] - offset[i] >= -0.25f * scale[i];
    inside &= high[i] - offset[i] <= (kU4Max + 0.25f) * scale[i];
  }
  if (!inside) u4_not_finite(rows, count, to);
  return !inside;
}

// (x - offset) / scale. If kHold is set, held to [0, 15] before the division: neither bound is moved by its rounding,
// 15 * scale is exact.
template <bool kFma, bool kHold>
INFERIX_INLINE uint8_t u4_code(float x, float offset, float scale, float inverse) {
  float above = x - offset;
  if constexpr (kHold) {
    const float most = kU4Max * scale;
    above = above > 0.f ? above : 0.f;  // of a NaN too
    above = above < most ? above : most;
  }
  return static_cast<uint8_t>(rounded(quotient<kFma>(above, scale, inverse)));
}

// Signed integers in the order of the floats, -0 below 0, and back.
INFERIX_INLINE int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

template <bool kFma, bool kHold>
INFERIX_INLINE void store_u4_tokens(const Tile& to, const float* x, int64_t stride, int64_t length, const U4Rows& rows,
                                    const Ahead& ahead) {
  const int64_t width = to.width;
  uint8_t* codes = thread_buffers().codes(length * width);
  for (int64_t t = 0; t < length; ++t) {
    ahead.fetch(t);
    const float* __restrict row = x + t * stride;
    const float offset = rows.offset[t], scale = rows.scale[t], inverse = rows.inverse[t];
    uint8_t* __restrict row_codes = codes + t * width;
    for (int64_t d = 0; d < width; ++d) row_codes[d] = u4_code<kFma, kHold>(row[d], offset, scale, inverse);
  }
  pack(codes, reinterpret_cast<uint8_t*>(to.codes), length * width);
}

template <bool kFma, bool kHold>
INFERIX_INLINE void store_u4_channels(const Tile& to, const float* x, int64_t stride, int64_t length,
                                      const U4Rows& rows, const Ahead& ahead) {
  const int64_t width = to.width;
  const float *__restrict offset = rows.offset, *__restrict scale = rows.scale, *__restrict inverse = rows.inverse;
  uint8_t* codes = thread_buffers().codes(length * width);
  for (int64_t t = 0; t < length; ++t) {
    ahead.fetch(t);
    const float* __restrict row = x + t * stride;
    uint8_t* __restrict row_codes = codes + t * width;
    for (int64_t d = 0; d < width; ++d) row_codes[d] = u4_code<kFma, kHold>(row[d], offset[d], scale[d], inverse[d]);
  }
  pack(codes, reinterpret_cast<uint8_t*>(to.codes), length * width);
}

template <bool kFma>
INFERIX_INLINE void encode_u4_tokens(const Tile& to, const float* x, int64_t stride, int64_t length,
                                     const Ahead& ahead) {
  const int64_t width = to.width;
  const U4Rows rows(thread_buffers().floats.floats(5 * length), length);
  for (int64_t t = 0; t < length; ++t) {
    const float* row = x + t * stride;
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t d = 0; d < width; ++d) {
      const int32_t value = ordered(static_cast<int32_t>(bits_of(row[d])));
      low = std::min(low, value), high = std::max(high, value);
    }
    rows.low[t] = float_of(static_cast<uint32_t>(ordered(low)));
    rows.high[t] = float_of(static_cast<uint32_t>(ordered(high)));
  }
  if (u4_scales(rows, length, to))
    store_u4_tokens<kFma, true>(to, x, stride, length, rows, ahead);
  else
    store_u4_tokens<kFma, false>(to, x, stride, length, rows, ahead);
}

// Smallest and largest of each of kCount channels, in registers; both NaN if one of the numbers is not finite, which a
// comparison alone would not tell.
template <int kCount>
INFERIX_INLINE void ranges_of(const float* x, int64_t stride, int64_t length, float* low, float* high) {
  float least[kCount], most[kCount], zero[kCount];
  for (int i = 0; i < kCount; ++i) least[i] = most[i] = x[i], zero[i] = x[i] * 0.f;
  for (int64_t t = 1; t < length; ++t) {
    const float* row = x + t * stride;
    for (int i = 0; i < kCount; ++i) {
      least[i] = row[i] < least[i] ? row[i] : least[i];
      most[i] = row[i] > most[i] ? row[i] : most[i];
      zero[i] += row[i] * 0.f;
    }
  }
  for (int i = 0; i < kCount; ++i) low[i] = least[i] + zero[i], high[i] = most[i] + zero[i];
}

template <bool kFma, int kBlock>
INFERIX_INLINE void encode_u4_channels(const Tile& to, const float* x, int64_t stride, int64_t length,
                                       const Ahead& ahead) {
  const int64_t width = to.width;
  const U4Rows rows(thread_buffers().floats.floats(5 * width), width);
  std::fill_n(rows.low, 2 * width, 0.f);  // of no tokens
  if (length > 0) {
    int64_t d = 0;
    for (; d + kBlock <= width; d += kBlock) ranges_of<kBlock>(x + d, stride, length, rows.low + d, rows.high + d);
    for (; d < width; ++d) ranges_of<1>(x + d, stride, length, rows.low + d, rows.high + d);
  }
  if (u4_scales(rows, width, to))
    store_u4_channels<kFma, true>(to, x, stride, length, rows, ahead);
  else
    store_u4_channels<kFma, false>(to, x, stride, length, rows, ahead);
}

template <bool kFma>
INFERIX_INLINE void encode_transposed(const Tile& to, const float* x, int64_t stride, int64_t length,
                                      const Ahead& ahead) {
  uint8_t* codes = thread_buffers().codes(to.page_size * to.width);
  encode_channels<E4m3Code, kFma>(to, x, stride, length, ahead, codes);
  std::fill(codes + length * to.width, codes + to.page_size * to.width, uint8_t{0});
  transpose(codes, to.width, to.page_size, to.width, reinterpret_cast<uint8_t*>(to.codes), to.page_size);
}

// kBlock: channels whose ranges fit the registers.
template <bool kFma, int kBlock>
INFERIX_INLINE void encode_any(const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  const int64_t row = to.row / element_bytes(to.codec);
  switch (to.codec) {
    case Codec::f32: return store<float>(x, stride, length, to.width, to.codes, row);
    case Codec::bf16: return store<Bf16>(x, stride, length, to.width, to.codes, row);
    case Codec::f16: return store<Half>(x, stride, length, to.width, to.codes, row);
    case Codec::i8_token: return encode_tokens<Int8Code, kFma>(to, x, stride, length, ahead);
    case Codec::i8_channel:
      return encode_channels<Int8Code, kFma>(to, x, stride, length, ahead, reinterpret_cast<int8_t*>(to.codes));
    case Codec::e4m3_token: return encode_tokens<E4m3Code, kFma>(to, x, stride, length, ahead);
    case Codec::e4m3_channel: return encode_transposed<kFma>(to, x, stride, length, ahead);
    case Codec::u4_token: return encode_u4_tokens<kFma>(to, x, stride, length, ahead);
    case Codec::u4_channel: return encode_u4_channels<kFma, kBlock>(to, x, stride, length, ahead);
  }
}

using Encode = void (*)(const Tile&, const float*, int64_t, int64_t, const Ahead&);

#if defined(__x86_64__)
void encode_portable(const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  encode_any<false, 32>(to, x, stride, length, ahead);
}

INFERIX_V3 void encode_v3(const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  encode_any<true, 32>(to, x, stride, length, ahead);
}

INFERIX_V4 void encode_v4(const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  encode_any<true, 64>(to, x, stride, length, ahead);
}

Encode encode_for(Isa isa) { return dispatch<Encode>(isa, encode_portable, encode_v3, encode_v4); }
#else
#if defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif
Encode encode_for(Isa) { return encode_any<kHasFma, 32>; }
#endif

}  // namespace

void encode(Isa isa, const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  encode_for(isa)(to, x, stride, length, ahead);
}

}  // namespace inferix
