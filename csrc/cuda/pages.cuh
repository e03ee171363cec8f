// (page, head) tiles on a GPU: what a thread block reads as octets, eight channels of a token in float32, and what it
// writes by a codec. The rule is reference.encode; it is the code of csrc/cpu in another order of loops.
#pragma once
#include "../kv_pages.h"
#include "elements.cuh"

namespace inferix {

using sm90::block_index, sm90::block_index_y, sm90::div_rn, sm90::shfl_xor, sm90::sync_threads, sm90::thread_index;

constexpr int kPageThreads = 256, kPageWarps = kPageThreads / kWarp;
constexpr int kOctet = 8;
constexpr int kStagedTokens = 64;  // of a transposed tile at a time
constexpr int kMaxWidth = 640;     // of channels: what the shared arrays hold

struct alignas(16) Chunk {
  uint32_t word[4];
};
struct Octet {
  float x[kOctet];
};

INFERIX_DEVICE bool is_aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// kBytes bytes, 16 or 4 at a time if both addresses allow.
template <int kBytes>
INFERIX_DEVICE void copy_bytes(const void* from, void* to) {
  if (kBytes % 16 == 0 && is_aligned(from, 16) && is_aligned(to, 16)) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) static_cast<Chunk*>(to)[i] = static_cast<const Chunk*>(from)[i];
  } else if (kBytes % 4 == 0 && is_aligned(from, 4) && is_aligned(to, 4)) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
  }
}

// kCount elements of which the first `count` exist; the others are left alone. Elements of 16 bytes together, or one by
// one at a ragged edge.
template <int kCount, typename X>
INFERIX_DEVICE void copy_some(const X* from, X* to, int count) {
  if (count == kCount) return copy_bytes<kCount * sizeof(X)>(from, to);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < count) to[i] = from[i];
}

template <typename X>
INFERIX_DEVICE Octet read_octet(const X* from, int count) {
  alignas(16) X raw[kOctet] = {};
  copy_some<kOctet>(from, raw, count);
  Octet octet;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) octet.x[i] = to_float(raw[i]);
  return octet;
}
template <typename X>
INFERIX_DEVICE void write_octet(X* to, const Octet& octet, int count) {
  alignas(16) X raw[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) raw[i] = from_float<X>(octet.x[i]);
  copy_some<kOctet>(raw, to, count);
}

// Of elements of any float type.
INFERIX_DEVICE Octet read_octet(const void* from, DType dtype, int64_t at, int count) {
  if (dtype == DType::f32) return read_octet(static_cast<const float*>(from) + at, count);
  if (dtype == DType::bf16) return read_octet(static_cast<const Bf16*>(from) + at, count);
  return read_octet(static_cast<const Half*>(from) + at, count);
}
INFERIX_DEVICE void write_octet(void* to, DType dtype, int64_t at, const Octet& octet, int count) {
  if (dtype == DType::f32) write_octet(static_cast<float*>(to) + at, octet, count);
  else if (dtype == DType::bf16) write_octet(static_cast<Bf16*>(to) + at, octet, count);
  else write_octet(static_cast<Half*>(to) + at, octet, count);
}

// One side of a tile.
struct Tile {
  Codec codec;
  int page_size, width;
  uint8_t *codes, *scales, *offsets;

  INFERIX_DEVICE Tile(const Plane& plane, const PageShape& s, int64_t page, int64_t head)
      : codec(plane.codec), page_size(int(s.page_size)), width(int(plane.width)) {
    const int64_t index = page * s.H + head;
    codes = static_cast<uint8_t*>(plane.codes) + index * page_size * row_bytes();
    scales = static_cast<uint8_t*>(plane.scales) + index * scale_count() * scale_bytes();
    offsets = static_cast<uint8_t*>(plane.offsets) + (is_packed() ? index * scale_count() * 2 : 0);
  }
  INFERIX_DEVICE bool is_float() const { return inferix::is_float(codec); }
  INFERIX_DEVICE bool is_packed() const { return inferix::is_packed(codec); }
  INFERIX_DEVICE bool is_by_token() const { return inferix::is_by_token(codec); }
  INFERIX_DEVICE bool is_e4m3() const { return inferix::is_e4m3(codec); }
  INFERIX_DEVICE bool is_transposed() const { return inferix::is_transposed(codec); }
  INFERIX_DEVICE int row_bytes() const { return inferix::row_bytes(codec, width); }
  INFERIX_DEVICE int scale_count() const { return is_by_token() ? page_size : width; }
  INFERIX_DEVICE int scale_bytes() const { return inferix::scale_bytes(codec); }
  INFERIX_DEVICE float top() const { return is_e4m3() ? kE4m3Max : kInt8Max; }

  INFERIX_DEVICE DType float_type() const {
    return codec == Codec::f32 ? DType::f32 : codec == Codec::bf16 ? DType::bf16 : DType::f16;
  }
  INFERIX_DEVICE float& scale(int i) const { return reinterpret_cast<float*>(scales)[i]; }
  INFERIX_DEVICE Half& half_scale(int i) const { return reinterpret_cast<Half*>(scales)[i]; }
  INFERIX_DEVICE Half& half_offset(int i) const { return reinterpret_cast<Half*>(offsets)[i]; }

  // Channels d .. d + count - 1 of token t.
  INFERIX_DEVICE Octet read(int t, int d, int count) const {
    if (is_float()) return read_octet(codes, float_type(), int64_t(t) * width + d, count);
    Octet octet = {};
    alignas(16) uint8_t raw[kOctet] = {};
    if (is_packed()) copy_some<kOctet / 2>(codes + int64_t(t) * row_bytes() + d / 2, raw, count / 2);
    else if (!is_transposed()) copy_some<kOctet>(codes + int64_t(t) * width + d, raw, count);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i >= count) continue;
      const int at = is_by_token() ? t : d + i;
      if (is_packed()) {
        const int code = i % 2 ? raw[i / 2] >> 4 : raw[i / 2] & 15;
        octet.x[i] = float(code) * to_float(half_scale(at)) + to_float(half_offset(at));
      } else {
        const uint8_t code = is_transposed() ? codes[int64_t(d + i) * page_size + t] : raw[i];
        octet.x[i] = (is_e4m3() ? e4m3_value(code) : float(int8_t(code))) * scale(at);
      }
    }
    return octet;
  }
};

// The parameters of numbers that share a scale: x = code * scale + offset.
struct QParams {
  float offset, scale;
};
INFERIX_DEVICE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
// One number that is not finite makes all numbers that share its scale NaN: the scale is NaN.
INFERIX_DEVICE bool is_finite(float x) { return (sm90::bits_of(x) & 0x7fffffffu) < 0x7f800000u; }
INFERIX_DEVICE QParams nan_qparams() { return {0.f, sm90::float_of(0x7fc00000u)}; }
INFERIX_DEVICE QParams qparams_of_8_bits(float amax, float top) {
  return is_finite(amax) ? QParams{0.f, div_rn(amax < kAmaxFloor ? kAmaxFloor : amax, top)} : nan_qparams();
}
INFERIX_DEVICE QParams qparams_of_4_bits(float low, float high) {
  if (!is_finite(low) || !is_finite(high)) return nan_qparams();
  const float offset = to_float(from_float<Half>(clamp(low, -kHalfMax, kHalfMax))) + 0.f;  // -0 becomes 0
  const float step = div_rn((high > kHalfMax ? kHalfMax : high) - offset, kU4Max);
  return {offset, to_float(from_float<Half>(step < kStepFloor ? kStepFloor : step))};
}
INFERIX_DEVICE uint8_t code_of(const Tile& to, float x, QParams qparams) {
  if (!is_finite(qparams.scale)) return 0;
  if (to.is_packed()) return uint8_t(clamp(sm90::rint(div_rn(x - qparams.offset, qparams.scale)), 0.f, kU4Max));
  const float y = clamp(div_rn(x, qparams.scale), -to.top(), to.top());
  return to.is_e4m3() ? e4m3_code(y) : uint8_t(int8_t(sm90::rint(y)));
}
INFERIX_DEVICE void store_qparams(const Tile& to, int i, QParams qparams) {
  if (to.is_packed()) {
    to.half_scale(i) = from_float<Half>(qparams.scale);
    to.half_offset(i) = from_float<Half>(qparams.offset);
  } else {
    to.scale(i) = qparams.scale;
  }
}

// Integers in the order of floats that are not NaN; -0 is below 0.
INFERIX_DEVICE int ordered(float x) {
  const int bits = int(sm90::bits_of(x));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
INFERIX_DEVICE float from_ordered(int bits) { return sm90::float_of(uint32_t(bits ^ (bits >> 31 & 0x7fffffff))); }

// An octet's codes.
INFERIX_DEVICE void store_codes(const Tile& to, int t, int d, int count, const uint8_t (&code)[kOctet]) {
  alignas(16) uint8_t packed[kOctet / 2];
#pragma unroll
  for (int i = 0; i < kOctet / 2; ++i) packed[i] = uint8_t(code[2 * i] | code[2 * i + 1] << 4);
  uint8_t* row = to.codes + int64_t(t) * to.row_bytes();
  if (to.is_packed()) copy_some<kOctet / 2>(packed, row + d / 2, count / 2);
  else copy_some<kOctet>(code, row + d, count);
}

// Tokens past `length` are zeros: source(t, d, count) gives the others.
template <typename Source>
INFERIX_DEVICE Octet token(const Source& source, int t, int length, int d, int count) {
  return t < length ? source(t, d, count) : Octet{};
}
INFERIX_DEVICE int octets_of(int width) { return (width + kOctet - 1) / kOctet; }
INFERIX_DEVICE int count_at(int d, int width) { return width - d < kOctet ? width - d : kOctet; }

template <typename Source>
INFERIX_DEVICE void write_floats(const Tile& to, int length, const Source& source) {
  const int octets = octets_of(to.width);
  for (int i = thread_index(); i < to.page_size * octets; i += kPageThreads) {
    const int t = i / octets, d = i % octets * kOctet, count = count_at(d, to.width);
    write_octet(to.codes, to.float_type(), int64_t(t) * to.width + d, token(source, t, length, d, count), count);
  }
}

// The lanes of a row, a power of two, share a token's scale.
template <typename Source>
INFERIX_DEVICE void write_by_token(const Tile& to, int length, const Source& source) {
  const int octets = octets_of(to.width);
  int lanes = 1;
  while (lanes < octets && lanes < kWarp) lanes *= 2;
  const int lane = thread_index() % lanes, rows = kPageThreads / lanes;
  for (int first = 0; first < to.page_size; first += rows) {
    const int t = first + thread_index() / lanes;
    int low = 0x7fffffff, high = int(0x80000000);
    uint32_t largest = 0;
    for (int d = lane * kOctet; d < to.width; d += lanes * kOctet) {
      const int count = count_at(d, to.width);
      const Octet x = token(source, t, length, d, count);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i >= count) continue;
        const int value = ordered(x.x[i]);
        const uint32_t magnitude = sm90::bits_of(x.x[i]) & 0x7fffffff;
        low = value < low ? value : low, high = value > high ? value : high;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const int other_low = shfl_xor(low, distance), other_high = shfl_xor(high, distance);
      const uint32_t other = shfl_xor(largest, distance);
      low = other_low < low ? other_low : low, high = other_high > high ? other_high : high;
      largest = other > largest ? other : largest;
    }
    if (t >= to.page_size) continue;
    const QParams qparams = to.is_packed() ? qparams_of_4_bits(from_ordered(low), from_ordered(high))
                                           : qparams_of_8_bits(sm90::float_of(largest), to.top());
    for (int d = lane * kOctet; d < to.width; d += lanes * kOctet) {
      const int count = count_at(d, to.width);
      const Octet x = token(source, t, length, d, count);
      alignas(16) uint8_t code[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) code[i] = t < length ? code_of(to, x.x[i], qparams) : 0;
      store_codes(to, t, d, count, code);
    }
    if (lane == 0) store_qparams(to, t, qparams);
  }
}

// What the threads of a block share while scales are by channel.
struct ChannelSharedStorage {
  int low[kMaxWidth], high[kMaxWidth];
  unsigned largest[kMaxWidth];
  alignas(16) uint8_t codes[kStagedTokens * kMaxWidth];  // tokens of a transposed tile, staged
};

template <typename Source>
INFERIX_DEVICE void write_by_channel(const Tile& to, int length, const Source& source, ChannelSharedStorage& shared) {
  const int octets = octets_of(to.width), t0 = thread_index();
  sync_threads();  // the tile before is done
  for (int d = t0; d < to.width; d += kPageThreads) {
    shared.low[d] = length ? 0x7fffffff : 0;  // of no tokens: 0
    shared.high[d] = length ? int(0x80000000) : 0;
    shared.largest[d] = 0;
  }
  sync_threads();
  for (int i = t0; i < length * octets; i += kPageThreads) {
    const int t = i / octets, d = i % octets * kOctet, count = count_at(d, to.width);
    const Octet x = source(t, d, count);
#pragma unroll
    for (int n = 0; n < kOctet; ++n) {
      if (n >= count) continue;
      if (to.is_packed()) {
        sm90::atomic_min(&shared.low[d + n], ordered(x.x[n]));
        sm90::atomic_max(&shared.high[d + n], ordered(x.x[n]));
      } else {
        sm90::atomic_max(&shared.largest[d + n], sm90::bits_of(x.x[n]) & 0x7fffffffu);
      }
    }
  }
  sync_threads();
  const auto qparams_at = [&](int d) {
    return to.is_packed() ? qparams_of_4_bits(from_ordered(shared.low[d]), from_ordered(shared.high[d]))
                          : qparams_of_8_bits(sm90::float_of(shared.largest[d]), to.top());
  };
  for (int d = t0; d < to.width; d += kPageThreads) store_qparams(to, d, qparams_at(d));
  for (int first = 0; first < to.page_size; first += kStagedTokens) {
    const int tokens = to.page_size - first < kStagedTokens ? to.page_size - first : kStagedTokens;
    for (int i = t0; i < tokens * octets; i += kPageThreads) {
      const int t = first + i / octets, d = i % octets * kOctet, count = count_at(d, to.width);
      const Octet x = token(source, t, length, d, count);
      alignas(16) uint8_t code[kOctet] = {};
#pragma unroll
      for (int n = 0; n < kOctet; ++n)
        if (n < count && t < length) code[n] = code_of(to, x.x[n], qparams_at(d + n));
      if (!to.is_transposed()) {
        store_codes(to, t, d, count, code);
        continue;
      }
#pragma unroll
      for (int n = 0; n < kOctet; ++n)
        if (n < count) shared.codes[(d + n) * kStagedTokens + (t - first)] = code[n];
    }
    if (!to.is_transposed()) continue;
    sync_threads();
    // Runs of up to 16 keys of a channel.
    const int runs = (tokens + 15) / 16;
    for (int i = t0; i < to.width * runs; i += kPageThreads) {
      const int d = i / runs, t = i % runs * 16, count = tokens - t < 16 ? tokens - t : 16;
      copy_some<16>(&shared.codes[d * kStagedTokens + t], to.codes + int64_t(d) * to.page_size + first + t, count);
    }
    sync_threads();
  }
}

template <typename Source>
INFERIX_DEVICE void write_tile(const Tile& to, int length, const Source& source, ChannelSharedStorage& shared) {
  if (to.is_float()) write_floats(to, length, source);
  else if (to.is_by_token()) write_by_token(to, length, source);
  else write_by_channel(to, length, source, shared);
}

// Bit for bit between tiles of one codec; slots past length as write_tile leaves them.
INFERIX_DEVICE void copy_tile(const Tile& from, const Tile& to, int length) {
  const int64_t bytes = int64_t(to.page_size) * to.row_bytes();
  if (length == to.page_size && bytes % 16 == 0) {
    for (int64_t i = thread_index() * 16; i < bytes; i += kPageThreads * 16)
      copy_bytes<16>(from.codes + i, to.codes + i);
  } else {
    for (int64_t i = thread_index(); i < bytes; i += kPageThreads) {
      const int t = int(to.is_transposed() ? i % to.page_size : i / to.row_bytes());
      to.codes[i] = t < length ? from.codes[i] : 0;
    }
  }
  if (to.is_float()) return;
  const int valid = to.is_by_token() ? length : to.width;
  for (int i = thread_index(); i < to.scale_count(); i += kPageThreads) {
    if (i >= valid) {
      store_qparams(to, i, to.is_packed() ? QParams{0.f, kStepFloor} : qparams_of_8_bits(0.f, to.top()));
    } else if (to.is_packed()) {
      to.half_scale(i) = from.half_scale(i);
      to.half_offset(i) = from.half_offset(i);
    } else {
      to.scale(i) = from.scale(i);
    }
  }
}

// An entry of a page list, for one head.
struct Entry {
  int64_t page, head;
  int length;
  bool valid;
};

INFERIX_DEVICE Entry entry_at(const PageList& list, int index, int head, int64_t num_pages, int64_t page_size) {
  const int64_t page = list.ids[index], length = list.lens[index];
  return {page, head, int(length), page >= 0 && page < num_pages && length >= 0 && length <= page_size};
}

// Tokens in the entries before one. Each block adds them up for itself: lists are short, and a prefix sum beforehand
// would be a launch of its own.
INFERIX_DEVICE int64_t first_token(const PageList& list, int index, unsigned long long& total) {
  if (thread_index() == 0) total = 0;
  sync_threads();
  unsigned long long mine = 0;
  for (int i = thread_index(); i < index; i += kPageThreads) mine += list.lens[i] > 0 ? list.lens[i] : 0;
  if (mine) sm90::atomic_add(&total, mine);
  sync_threads();
  return int64_t(total);
}

struct PageSharedStorage {
  unsigned long long total;
  ChannelSharedStorage channels;
};
INFERIX_DEVICE PageSharedStorage& page_shared_storage() {
  return *reinterpret_cast<PageSharedStorage*>(sm90::shared_memory());
}

}  // namespace inferix
