// Whole (page, head) tiles, and the checks of page lists: shared by the CPU kernels.
#pragma once
#include <vector>

#include "codecs.h"

namespace inferix {

// Checks a page list and returns where each entry's tokens start: [n + 1]. tokens < 0: any number of them.
// `ids` and `lens` name the list's fields in messages; written lists must not name a page twice.
std::vector<int64_t> entry_starts(const char* ids, const char* lens, const PageList& list, int64_t num_pages,
                                  int64_t page_size, int64_t tokens, bool written);

int64_t total_pages(const Pools& pools);

struct Location {
  const Pool* pool;
  int64_t page;
};

inline Location locate(const Pools& pools, int64_t page) {
  const Pool* pool = pools.pool;
  for (; page >= pool->pages; ++pool) page -= pool->pages;
  return {pool, page};
}

// x [length, width], rows `stride` apart, fills slots 0 : length. The others store what a token of zeros would.
void write_tile(Isa isa, const Tile& tile, const float* x, int64_t stride, int64_t length, const Ahead& ahead = {});

// Bit for bit between tiles of one codec; slots past length as write_tile leaves them.
void copy_tile(const Tile& from, const Tile& to, int64_t length);

}  // namespace inferix
