// The tile scheduler: query tiles x key tiles, divided evenly over the thread blocks (stream-K). Compiled for the CPU
// too.
//
// A strip is a (segment, KV head): its query tiles all walk the same key tiles. Work counts (query tile, key tile)
// pairs, strip by strip, query tile by query tile. While all strips are equally long, whole waves of query tiles go to
// the blocks one each, so that blocks at work together read the same keys at the same time and find them in L2. What is
// left, or everything if strips differ, is cut into as many equal ranges as there are blocks (stream-K): a range may
// end in the middle of a query tile, whose partial results are merged afterwards in the order of the blocks. Nothing
// depends on timing, so results are bitwise the same in every run.
//
// Work is counted in 64 bits, that of one strip in 32: 2^31 is a strip of four million queries and as many keys.
#pragma once
#include <cstdint>

#include "layouts.h"

namespace inferix::sm90 {

// Division by a number that is known before the launch, as a product and a shift.
struct Divisor {
  int32_t value;
  uint32_t factor;
  int32_t shift;

  Divisor() = default;
  // factor is 2^shift / value, rounded up by less than value / 2^31 of itself: too little to matter below 2^31.
  explicit Divisor(int32_t value) : value(value), shift(31) {
    while (int64_t(1) << (shift - 31) < value) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + value - 1) / value);
  }
  // n from 0 to 2^31 - 1.
  INFERIX_BOTH int quotient(int n) const { return int(uint64_t(uint32_t(n)) * factor >> shift); }
};

// 64 keys of one page. A key tile is two units of the same variant; the second may be empty.
struct alignas(16) Unit {
  int32_t row;     // (page * H * page_size) + first slot; KV head h is h * page_size further on
  int16_t length;  // valid keys, 0 to 64
  int16_t pool;    // of those that the pass reads
  float bias;      // of the page, in units of log 2
  int32_t variant;
};

struct Range {
  int64_t begin, end;
};

// What prepare_kernel writes for the other kernels. Strip s * H + h.
struct WorkTable {
  int64_t* work_start;     // [strips + 1]  work before each strip
  int32_t* tile_start;     // [strips + 1]  query tiles before each strip
  int32_t* key_tiles;      // [strips]
  int64_t* work_range_start;  // [blocks + 1]  where each block's range begins
  int32_t* whole;          // [1]           query tiles that are handed out whole
  int32_t strips, blocks;
};

struct WorkItem {
  int strip, tile;   // query tile within its strip
  int first, count;  // key tiles
  int partial;       // where its partial result is kept, if it is not whole
  bool whole;        // all key tiles of the query tile
};

// Query tiles that are handed out whole, when all strips have `key_tiles` or, if they differ, key_tiles is 0.
INFERIX_BOTH inline int whole_tiles(int tiles, int key_tiles, int blocks) {
  return key_tiles == 0 ? 0 : tiles / blocks * blocks;
}

// The work that is left is cut evenly.
INFERIX_BOTH inline int64_t work_range_start(int64_t work, int64_t whole_work, int block, int blocks) {
  return whole_work + (work - whole_work) * block / blocks;
}

template <typename T>
INFERIX_BOTH int last_not_above(const T* starts, int n, int64_t x) {
  int low = 0, high = n;  // starts[low] <= x, and x < starts[high]: what is empty lies below what is not
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= x ? low : high) = middle;
  }
  return low;
}

INFERIX_BOTH inline Range work_range(const WorkTable& t, int block) {
  return {t.work_range_start[block], t.work_range_start[block + 1]};
}

// The item that begins at `at` and ends with its query tile, or at `end` if that comes first.
INFERIX_BOTH inline WorkItem item_at(const WorkTable& t, int64_t at, int64_t end, int block) {
  const int strip = last_not_above(t.work_start, t.strips, at), length = t.key_tiles[strip];
  const int within = int(at - t.work_start[strip]);
  const int first = within % length, left = length - first;
  const int count = end - at < left ? int(end - at) : left;
  // A block has at most one item that begins in the middle of a query tile, and at most one more that does not end it.
  return {strip, within / length, first, count, 2 * block + (first == 0), count == length};
}

// The items of one block, in order.
struct TileScheduler {
  int block, tile;  // tile: the next that is handed out whole
  Range left;

  TileScheduler() = default;
  INFERIX_BOTH TileScheduler(const WorkTable& t, int block) : block(block), tile(block), left(work_range(t, block)) {}
  INFERIX_BOTH bool next(const WorkTable& t, WorkItem& item) {
    if (tile < *t.whole) {
      const int strip = last_not_above(t.tile_start, t.strips, tile);
      item = {strip, tile - t.tile_start[strip], 0, t.key_tiles[strip], 0, true};
      tile += t.blocks;
      return true;
    }
    if (left.begin >= left.end) return false;
    item = item_at(t, left.begin, left.end, block);
    left.begin += item.count;
    return true;
  }
};

// The query tile that begins in a block's range and does not end there: `blocks` consecutive blocks have partial
// results of it, except those whose range is empty. 0 if there is none.
struct SplitTile {
  int strip, tile, blocks;
};

INFERIX_BOTH inline SplitTile split_tile(const WorkTable& t, int block) {
  const Range mine = work_range(t, block);
  if (mine.begin >= mine.end) return {0, 0, 0};
  const int strip = last_not_above(t.work_start, t.strips, mine.end - 1), length = t.key_tiles[strip];
  const int tile = int(mine.end - 1 - t.work_start[strip]) / length;
  const int64_t begin = t.work_start[strip] + int64_t(tile) * length, end = begin + length;
  if (begin < mine.begin || end == mine.end) return {strip, tile, 0};
  int more = 1;
  while (work_range(t, block + more).end < end) ++more;
  return {strip, tile, more + 1};
}

// Where the n-th of them stored its partial result; -1 if it has none.
INFERIX_BOTH inline int partial_of(const WorkTable& t, int block, int n) {
  const Range theirs = work_range(t, block + n);
  return theirs.begin < theirs.end ? 2 * (block + n) + (n == 0) : -1;
}

}  // namespace inferix::sm90
