// One side of a (page, head) tile, and what its codec makes of floats. The rule is reference.encode.
#pragma once
#include <vector>

#include "../kv_pages.h"
#include "simd.h"

namespace inferix {

// Aligned floats that a thread keeps between tiles.
class Buffer {
 public:
  float* floats(int64_t count) {
    const size_t columns = static_cast<size_t>(count / kLanes + 1);  // at least one: no null pointer for no floats
    if (columns > columns_.size()) columns_.resize(columns);
    return columns_.data()->lane;
  }

 private:
  std::vector<Column> columns_;
};

// Addresses of one tile; what lies there is written at Plane.
struct Tile {
  Codec codec;
  int64_t page_size, width, row;  // row: bytes from one token's codes to the next, unless they lie transposed
  char *codes, *scales, *offsets;
};

inline Tile tile_of(const Plane& plane, const PageShape& s, int64_t page, int64_t head) {
  const Codec codec = plane.codec;
  const int64_t index = page * s.H + head, scales = is_by_token(codec) ? s.page_size : plane.width;
  const auto at = [](void* base, int64_t count, int64_t bytes) { return static_cast<char*>(base) + count * bytes; };
  const int64_t element = element_bytes(codec);
  return {codec, s.page_size, plane.width, plane.row_stride * element,
          at(plane.codes, page * plane.page_stride + head * plane.head_stride, element),
          at(plane.scales, index, scales * scale_bytes(codec)),
          at(plane.offsets, index, is_packed(codec) ? scales * 2 : 0)};
}

// Tiles that are read and written next, asked for while this one is computed: half of a tile's time is otherwise spent
// waiting for them.
struct Ahead {
  const char *from = nullptr, *to = nullptr;
  int64_t from_step = 0, to_step = 0;  // bytes for each token
  INFERIX_INLINE void fetch(int64_t token) const {
    for (int64_t i = 0; i < from_step; i += 64) __builtin_prefetch(from + token * from_step + i, 0, 2);
    for (int64_t i = 0; i < to_step; i += 64) __builtin_prefetch(to + token * to_step + i, 1, 2);
  }
};

// Codes and scales of x [length, width], rows `stride` apart, to slots 0 : length. Of a transposed tile the other slots
// are filled too, with code 0.
void encode(Isa isa, const Tile& to, const float* x, int64_t stride, int64_t length, const Ahead& ahead = {});

// Tokens first : first + count as [count, width], rows `stride` apart.
void decode(Isa isa, const Tile& from, int64_t first, int64_t count, float* to, int64_t stride);

// [count, width] of one float type as the other; strides in elements.
void to_floats(Isa isa, DType dtype, const void* from, int64_t from_stride, int64_t count, int64_t width, float* to,
               int64_t stride);
void from_floats(Isa isa, DType dtype, const float* from, int64_t stride, int64_t count, int64_t width, void* to,
                 int64_t to_stride);

// As decode, dense, but float32 tokens that lie so stay where they are.
inline const float* floats_of(Isa isa, const Tile& from, int64_t first, int64_t count, Buffer& buffer) {
  if (from.codec == Codec::f32 && from.row == row_bytes(from.codec, from.width))
    return reinterpret_cast<const float*>(from.codes + first * from.row);
  float* to = buffer.floats(count * from.width);
  decode(isa, from, first, count, to, from.width);
  return to;
}

}  // namespace inferix
