#include "pages.h"

#include <algorithm>
#include <string>

namespace inferix {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string entry(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// __restrict below: int8_t is a character type, which may alias anything, and the compiler would not vectorise.
void convert(const float* __restrict from, float* __restrict to, int64_t count) { std::copy_n(from, count, to); }

INFERIX_CLONES void convert(const float* __restrict from, Bf16* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<Bf16>(from[i]);
}

INFERIX_CLONES void convert(const Bf16* __restrict from, float* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

INFERIX_CLONES void scale_key(const int8_t* __restrict codes, float scale, float* __restrict to, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = to_float(codes[d]) * scale;
}

INFERIX_CLONES void scale_value(const int8_t* __restrict codes, const float* __restrict scales, float* __restrict to,
                                int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] = to_float(codes[d]) * scales[d];
}

INFERIX_CLONES float quantize_key(const float* __restrict k, int8_t* __restrict codes, int64_t D) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < D; ++d) largest = max_magnitude(largest, k[d]);
  const float scale = int8_scale(largest);
  for (int64_t d = 0; d < D; ++d) codes[d] = quantized(k[d], scale);
  return scale;
}

INFERIX_CLONES void widen_range(const float* __restrict v, uint32_t* __restrict largest, int64_t D) {
  for (int64_t d = 0; d < D; ++d) largest[d] = max_magnitude(largest[d], v[d]);
}

INFERIX_CLONES void quantize_value(const float* __restrict v, const float* __restrict scales,
                                   int8_t* __restrict codes, int64_t D) {
  for (int64_t d = 0; d < D; ++d) codes[d] = quantized(v[d], scales[d]);
}

template <typename T>
void write_floats(T* to, const float* from, int64_t stride, int64_t length, const PageShape& s) {
  for (int64_t t = 0; t < length; ++t) convert(from + t * stride, to + t * s.D, s.D);
  std::fill(to + length * s.D, to + s.page_size * s.D, T{});
}

void write_int8_keys(int8_t* to, float* scales, const float* k, int64_t stride, int64_t length, const PageShape& s) {
  for (int64_t t = 0; t < length; ++t) scales[t] = quantize_key(k + t * stride, to + t * s.D, s.D);
  std::fill(to + length * s.D, to + s.page_size * s.D, int8_t{0});
  std::fill(scales + length, scales + s.page_size, int8_scale(0));
}

void write_int8_values(int8_t* to, float* scales, const float* v, int64_t stride, int64_t length, const PageShape& s) {
  std::vector<uint32_t> largest(s.D, 0);
  for (int64_t t = 0; t < length; ++t) widen_range(v + t * stride, largest.data(), s.D);
  std::transform(largest.begin(), largest.end(), scales, int8_scale);
  for (int64_t t = 0; t < length; ++t) quantize_value(v + t * stride, scales, to + t * s.D, s.D);
  std::fill(to + length * s.D, to + s.page_size * s.D, int8_t{0});
}

}  // namespace

std::vector<int64_t> entry_starts(const char* ids, const char* lens, const PageList& list, int64_t num_pages,
                                  int64_t page_size, int64_t tokens, bool written) {
  std::vector<int64_t> starts(list.n + 1, 0);
  for (int64_t i = 0; i < list.n; ++i) {
    const int64_t page = list.ids[i], length = list.lens[i];
    if (page < 0 || page >= num_pages)
      refuse(entry(ids, i) + " must be in [0, " + std::to_string(num_pages) + "), got " + std::to_string(page));
    if (length < 0 || length > page_size)
      refuse(entry(lens, i) + " must be in [0, " + std::to_string(page_size) + "], got " + std::to_string(length));
    starts[i + 1] = starts[i] + length;
  }
  if (tokens >= 0 && starts[list.n] != tokens)
    refuse(std::string(lens) + " must sum to T=" + std::to_string(tokens) + ", got " + std::to_string(starts[list.n]));
  if (written) {
    std::vector<int32_t> sorted(list.ids, list.ids + list.n);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end())
      refuse(std::string(ids) + " must name each written page once, got " + std::to_string(*twice) + " twice");
  }
  return starts;
}

int64_t total_pages(const Pools& pools) {
  int64_t total = 0;
  for (int i = 0; i < pools.count; ++i) total += pools.pool[i].pages;
  return total;
}

void read_tile(const Tile& tile, const PageShape& s, int64_t first, int64_t count, float* k, float* v) {
  with_page_type(tile.pool->dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t begin = tile_offset(tile, s) + first * s.D;
    const T* from_k = static_cast<const T*>(tile.pool->k) + begin;
    const T* from_v = static_cast<const T*>(tile.pool->v) + begin;
    if constexpr (std::is_same_v<T, int8_t>) {
      const float *k_scales = tile_k_scales(tile, s) + first, *v_scales = tile_v_scales(tile, s);
      for (int64_t t = 0; t < count; ++t) {
        scale_key(from_k + t * s.D, k_scales[t], k + t * s.D, s.D);
        scale_value(from_v + t * s.D, v_scales, v + t * s.D, s.D);
      }
    } else {
      convert(from_k, k, count * s.D);
      convert(from_v, v, count * s.D);
    }
  });
}

void write_tile(const Tile& tile, const PageShape& s, int64_t length, const float* k, const float* v, int64_t stride) {
  with_page_type(tile.pool->dtype, [&](auto type) {
    using T = decltype(type);
    T* to_k = static_cast<T*>(tile.pool->k) + tile_offset(tile, s);
    T* to_v = static_cast<T*>(tile.pool->v) + tile_offset(tile, s);
    if constexpr (std::is_same_v<T, int8_t>) {
      write_int8_keys(to_k, tile_k_scales(tile, s), k, stride, length, s);
      write_int8_values(to_v, tile_v_scales(tile, s), v, stride, length, s);
    } else {
      write_floats(to_k, k, stride, length, s);
      write_floats(to_v, v, stride, length, s);
    }
  });
}

}  // namespace inferix
