// kv_append, kv_commit and kv_gather on a GPU: one thread block per entry of the page list and KV head. Compiled
// for the CPU too.
//
// The numbers of a page list are not checked on the host, which would have to wait for the device: an entry that does
// not fit its pool is skipped.
#pragma once
#include "pages.cuh"

namespace inferix {

// Sources of octets other than a Tile: rows of a [T, H, D] tensor, and a tile less its mean.
struct TensorRows {
  const Rows& x;
  DType dtype;
  int64_t first, head;
  INFERIX_DEVICE int64_t at(int t, int d) const { return (first + t) * x.token_stride + head * x.head_stride + d; }
  INFERIX_DEVICE Octet operator()(int t, int d, int count) const {
    return read_octet(x.data, dtype, at(t, d), count);
  }
};

struct TileRows {
  Tile tile;
  const float* mean;  // [width], subtracted; or null
  INFERIX_DEVICE Octet operator()(int t, int d, int count) const {
    Octet x = tile.read(t, d, count);
    if (mean)
      for (int i = 0; i < count; ++i) x.x[i] -= mean[d + i];
    return x;
  }
};

INFERIX_KERNEL(kPageThreads) kv_append_kernel(INFERIX_GRID_CONSTANT KvAppendParams p) {
  PageSharedStorage& shared = page_shared_storage();
  const Entry e = entry_at(p.where, block_index(), block_index_y(), p.pages.pages, p.shape.page_size);
  const int64_t first = first_token(p.where, block_index(), shared.total);
  if (!e.valid || first + e.length > p.T) return;
  const TensorRows k{p.k, p.x_dtype, first, e.head}, v{p.v, p.x_dtype, first, e.head};
  write_tile(Tile(p.pages.k, p.shape, e.page, e.head), e.length, k, shared.channels);
  write_tile(Tile(p.pages.v, p.shape, e.page, e.head), e.length, v, shared.channels);
}

INFERIX_KERNEL(kPageThreads) kv_commit_kernel(INFERIX_GRID_CONSTANT KvCommitParams p) {
  PageSharedStorage& shared = page_shared_storage();
  const Entry from = entry_at(p.source_list, block_index(), block_index_y(), p.source.pages, p.shape.page_size);
  const Entry to = entry_at(p.target_list, block_index(), block_index_y(), p.target.pages, p.shape.page_size);
  if (!from.valid || !to.valid || from.length != to.length) return;
  const Tile from_k(p.source.k, p.shape, from.page, from.head), to_k(p.target.k, p.shape, to.page, to.head);
  const Tile from_v(p.source.v, p.shape, from.page, from.head), to_v(p.target.v, p.shape, to.page, to.head);
  if (from_k.codec == to_k.codec && from_v.codec == to_v.codec && !p.k_mean) {
    copy_tile(from_k, to_k, to.length);
    copy_tile(from_v, to_v, to.length);
  } else {
    const float* mean = p.k_mean ? p.k_mean + to.head * to_k.width : nullptr;
    write_tile(to_k, to.length, TileRows{from_k, mean}, shared.channels);
    write_tile(to_v, to.length, TileRows{from_v, nullptr}, shared.channels);
  }
}

INFERIX_DEVICE void gather_tile(const Tile& from, int length, const TensorRows& to) {
  const int octets = octets_of(from.width);
  for (int i = thread_index(); i < length * octets; i += kPageThreads) {
    const int t = i / octets, d = i % octets * kOctet, count = count_at(d, from.width);
    write_octet(to.x.data, to.dtype, to.at(t, d), from.read(t, d, count), count);
  }
}

INFERIX_KERNEL(kPageThreads) kv_gather_kernel(INFERIX_GRID_CONSTANT KvGatherParams p) {
  PageSharedStorage& shared = page_shared_storage();
  int64_t total_pages = 0;
  for (int i = 0; i < p.pools.count; ++i) total_pages += p.pools.pool[i].pages;
  Entry e = entry_at(p.where, block_index(), block_index_y(), total_pages, p.shape.page_size);
  const int64_t first = first_token(p.where, block_index(), shared.total);
  if (!e.valid || first + e.length > p.T) return;
  int i = 0;
  for (; e.page >= p.pools.pool[i].pages; ++i) e.page -= p.pools.pool[i].pages;
  const Pool& pool = p.pools.pool[i];
  gather_tile(Tile(pool.k, p.shape, e.page, e.head), e.length, {p.k, p.out_dtype, first, e.head});
  gather_tile(Tile(pool.v, p.shape, e.page, e.head), e.length, {p.v, p.out_dtype, first, e.head});
}

}  // namespace inferix
