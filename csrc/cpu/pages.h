// Reading and writing one (page, head) tile of a pool, and the checks of page lists: shared by the CPU kernels.
#pragma once
#include <vector>

#include "../kv_pages.h"
#include "elements.h"

namespace inferix {

// Checks a page list and returns where each entry's tokens start: [n + 1]. tokens < 0: any number of them.
// `ids` and `lens` name the list's fields in messages; written lists must not name a page twice.
std::vector<int64_t> entry_starts(const char* ids, const char* lens, const PageList& list, int64_t num_pages,
                                  int64_t page_size, int64_t tokens, bool written);

int64_t total_pages(const Pools& pools);

struct Tile {
  const Pool* pool;
  int64_t page, head;
};

inline Tile locate(const Pools& pools, int64_t page, int64_t head) {
  const Pool* pool = pools.pool;
  for (; page >= pool->pages; ++pool) page -= pool->pages;
  return {pool, page, head};
}

inline int64_t tile_offset(const Tile& tile, const PageShape& s) {
  return (tile.page * s.H + tile.head) * s.page_size * s.D;
}

inline float* tile_k_scales(const Tile& tile, const PageShape& s) {
  return tile.pool->k_scales + (tile.page * s.H + tile.head) * s.page_size;
}

inline float* tile_v_scales(const Tile& tile, const PageShape& s) {
  return tile.pool->v_scales + (tile.page * s.H + tile.head) * s.D;
}

// Tokens first : first + count of a tile as floats, k and v each [count, D].
void read_tile(const Tile& tile, const PageShape& shape, int64_t first, int64_t count, float* k, float* v);

// k and v, each [length, D] with rows `stride` apart, fill slots 0 : length. The other slots store what a token of
// zeros would.
void write_tile(const Tile& tile, const PageShape& shape, int64_t length, const float* k, const float* v,
                int64_t stride);

}  // namespace inferix
