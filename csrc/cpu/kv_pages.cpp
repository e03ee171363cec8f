// kv_append, kv_commit and kv_gather on the CPU: one task per entry of the page list and head.
#include "../kv_pages.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pages.h"
#include "parallel.h"

namespace inferix {
namespace {

// [count, D] floats of a [T, H, D] tensor's rows, for one head.
template <typename T>
void load_rows(const Rows& rows, int64_t first, int64_t head, int64_t count, int64_t D, float* to) {
  const T* from = static_cast<const T*>(rows.data) + first * rows.token_stride + head * rows.head_stride;
  for (int64_t t = 0; t < count; ++t, from += rows.token_stride, to += D)
    for (int64_t d = 0; d < D; ++d) to[d] = to_float(from[d]);
}

template <typename T>
void store_rows(const Rows& rows, int64_t first, int64_t head, int64_t count, int64_t D, const float* from) {
  T* to = static_cast<T*>(rows.data) + first * rows.token_stride + head * rows.head_stride;
  for (int64_t t = 0; t < count; ++t, to += rows.token_stride, from += D)
    for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(from[d]);
}

int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1; }

void copy_slots(const void* from, int64_t from_offset, void* to, int64_t to_offset, int64_t length, int64_t page_size,
                int64_t slot_bytes) {
  const char* source = static_cast<const char*>(from) + from_offset;
  char* target = static_cast<char*>(to) + to_offset;
  std::memcpy(target, source, length * slot_bytes);
  std::memset(target + length * slot_bytes, 0, (page_size - length) * slot_bytes);
}

// Bit for bit; slots past length as write_tile leaves them.
void copy_tile(const Tile& source, const Tile& target, const PageShape& s, int64_t length) {
  const int64_t size = element_size(source.pool->dtype);
  const int64_t from = tile_offset(source, s) * size, to = tile_offset(target, s) * size;
  copy_slots(source.pool->k, from, target.pool->k, to, length, s.page_size, s.D * size);
  copy_slots(source.pool->v, from, target.pool->v, to, length, s.page_size, s.D * size);
  if (source.pool->dtype != DType::i8) return;
  float* scales = tile_k_scales(target, s);
  std::copy_n(tile_k_scales(source, s), length, scales);
  std::fill(scales + length, scales + s.page_size, int8_scale(0));
  std::copy_n(tile_v_scales(source, s), s.D, tile_v_scales(target, s));
}

// Room for one tile of keys and one of values.
struct TileBuffer {
  explicit TileBuffer(const PageShape& s) : data(2 * s.page_size * s.D), v(data.data() + s.page_size * s.D) {}
  std::vector<float> data;
  float *k = data.data(), *v;
};

}  // namespace

void kv_append_cpu(const KvAppendParams& p, int threads) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, p.pages.pages, s.page_size, p.T, true);
  with_float_type("k", p.x_dtype, [&](auto type) {
    using X = decltype(type);
    parallel_for(threads, p.where.n * s.H, [&](int64_t task) {
      const int64_t entry = task / s.H, head = task % s.H, length = p.where.lens[entry];
      TileBuffer tile(s);
      load_rows<X>(p.k, starts[entry], head, length, s.D, tile.k);
      load_rows<X>(p.v, starts[entry], head, length, s.D, tile.v);
      write_tile({&p.pages, p.where.ids[entry], head}, s, length, tile.k, tile.v, s.D);
    });
  });
}

void kv_commit_cpu(const KvCommitParams& p, int threads) {
  const PageShape& s = p.shape;
  entry_starts("source_list.ids", "source_list.lens", p.source_list, p.source.pages, s.page_size, -1, false);
  entry_starts("target_list.ids", "target_list.lens", p.target_list, p.target.pages, s.page_size, -1, true);
  for (int64_t i = 0; i < p.source_list.n; ++i) {
    if (p.source_list.lens[i] != p.target_list.lens[i])
      throw std::invalid_argument("target_list.lens must equal source_list.lens, got " +
                                  std::to_string(p.target_list.lens[i]) + " and " +
                                  std::to_string(p.source_list.lens[i]) + " for page " + std::to_string(i));
  }
  const bool verbatim = p.source.dtype == p.target.dtype && !p.k_mean;
  parallel_for(threads, p.source_list.n * s.H, [&](int64_t task) {
    const int64_t entry = task / s.H, head = task % s.H, length = p.source_list.lens[entry];
    const Tile source{&p.source, p.source_list.ids[entry], head}, target{&p.target, p.target_list.ids[entry], head};
    if (verbatim) return copy_tile(source, target, s, length);
    TileBuffer tile(s);
    read_tile(source, s, 0, length, tile.k, tile.v);
    if (p.k_mean) {
      for (int64_t t = 0; t < length; ++t)
        for (int64_t d = 0; d < s.D; ++d) tile.k[t * s.D + d] -= p.k_mean[head * s.D + d];
    }
    write_tile(target, s, length, tile.k, tile.v, s.D);
  });
}

void kv_gather_cpu(const KvGatherParams& p, int threads) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, total_pages(p.pools), s.page_size, p.T, false);
  with_float_type("out", p.out_dtype, [&](auto type) {
    using X = decltype(type);
    parallel_for(threads, p.where.n * s.H, [&](int64_t task) {
      const int64_t entry = task / s.H, head = task % s.H, length = p.where.lens[entry];
      TileBuffer tile(s);
      read_tile(locate(p.pools, p.where.ids[entry], head), s, 0, length, tile.k, tile.v);
      store_rows<X>(p.k, starts[entry], head, length, s.D, tile.k);
      store_rows<X>(p.v, starts[entry], head, length, s.D, tile.v);
    });
  });
}

}  // namespace inferix
