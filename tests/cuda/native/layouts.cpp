// csrc/cuda/layouts.h and work.h against brute force: where TMA writes, where wgmma reads, how work is divided.
#include "machine.h"

#include "../../../csrc/cuda/work.h"

using namespace inferix;
using namespace inferix::sm90;

namespace {

std::mt19937 rng;
int between(int low, int high) { return low + int(rng() % (high - low + 1)); }
void check(bool good, const char* what) {
  if (!good) fail(what);
}

// A tile in shared memory, element (row, column) holding a number of its own, is read back through descriptors.
void descriptors(Type type, int rows, int columns, bool k_major_operand) {
  const int size = bytes_of(type), width = columns * size, depth = kWgmmaKBytes / size;
  char* tile = at_shared(4096 + 8192);
  check(shared_address(tile) % 1024 == 0, "the tile is aligned");
  std::vector<float> want(rows * columns);
  std::vector<bool> taken(rows * width);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) {
      const float x = float(between(-8, 8));
      const uint32_t at = tile_offset(r, c * size, rows, width);
      check(at + size <= uint32_t(rows * width) && !taken[at], "tile_offset is one to one");
      taken[at] = true;
      // What TMA does with this element: panels of at most 128 bytes, each swizzled by address.
      const int wide = width < 128 ? width : 128, byte = c * size;
      const uint32_t linear = shared_address(tile) + byte / wide * rows * wide + r * wide + byte % wide;
      check(apply_swizzle(linear, wide) == shared_address(tile) + at, "tile_offset is TMA's swizzle");
      uint16_t bits = from_float<Bf16>(x).bits;
      if (type == Type::e4m3) bits = uint16_t(e4m3_bits(x));
      if (type == Type::s8) bits = uint8_t(int8_t(x));
      std::memcpy(tile + at, &bits, size);
      want[r * columns + c] = x;
    }
  if (k_major_operand) {
    for (int step = 0; step < columns / depth; ++step) {
      const uint64_t d = k_major_descriptor(shared_address(tile) / kChunk, swizzle_bytes(width)) +
                         k_major_offset(step, rows, width) / kChunk;
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < depth; ++k)
          check(element(d, true, r, k, type) == want[r * columns + step * depth + k], "K-major descriptor");
    }
  } else {
    for (int step = 0; step < rows / depth; ++step) {
      const uint64_t d = mn_major_descriptor(shared_address(tile) / kChunk, rows) + mn_major_offset(step) / kChunk;
      for (int n = 0; n < columns; ++n)
        for (int k = 0; k < depth; ++k)
          check(element(d, false, n, k, type) == want[(step * depth + k) * columns + n], "MN-major descriptor");
    }
  }
}

void fragments() {
  std::vector<int> seen(kWgmmaM * kBlockN);
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 64; ++i) ++seen[accumulator_row(t, i) * kBlockN + accumulator_column(t, i)];
  for (const int n : seen) check(n == 1, "accumulators cover the tile once");
  for (const bool eight_bit : {false, true}) {
    const int depth = eight_bit ? 32 : 16, per = eight_bit ? 4 : 2;
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < 32; ++i)
        check(key_of(t, i, eight_bit) == key_of(t, 0, eight_bit) + key_of(0, i, eight_bit), "key_of is a sum");
      for (int step = 0; step < kBlockN / depth; ++step)
        for (int r = 0; r < 4; ++r)
          for (int n = 0; n < per; ++n) {
            const int i = eight_bit ? a_fragment_source_8(r, n, step) : a_fragment_source_16(r, n, step);
            // PTX: register r is of row g or g + 8 by its low bit; its high bit is worth half the depth.
            const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8, k = r / 2 * depth / 2 + t % 4 * per + n;
            const int key = i / 32 * kUnitKeys + key_of(t, i, eight_bit);
            check(accumulator_row(t, i) == row, "a weight is of its row");
            check(key == step * depth + k, "a weight is of its key");
          }
    }
  }
}

void boxes() {
  for (const int D : {64, 128}) {
    const TensorBox box = box_of_8_bit_keys(640, D);
    int row = 0;
    for (uint32_t a = 0; a < box.box[4]; ++a)
      for (uint32_t j = 0; j < box.box[3]; ++j)
        for (uint32_t c = 0; c < box.box[2]; ++c)
          for (uint32_t b = 0; b < box.box[1]; ++b, ++row) {
            const uint64_t from = b * box.stride[0] + c * box.stride[1] + j * box.stride[2] + a * box.stride[3];
            check(from == uint64_t(key_of_column_8(row)) * D, "8-bit keys arrive in the order of key_of_column_8");
          }
    check(row == kUnitKeys && box.box[0] == uint32_t(D), "a box is a unit");
    std::vector<bool> taken(kUnitKeys);
    for (int column = 0; column < kUnitKeys; ++column) taken[key_of_column_8(column)] = true;
    for (const bool x : taken) check(x, "key_of_column_8 is a permutation");
    const TensorBox values = box_of_8_bit_values(640, D, 192);
    row = 0;
    for (uint32_t a = 0; a < values.box[4]; ++a)
      for (uint32_t j = 0; j < values.box[3]; ++j)
        for (uint32_t c = 0; c < values.box[2]; ++c)
          for (uint32_t b = 0; b < values.box[1]; ++b, ++row)
            check(b * values.stride[0] + c * values.stride[1] + j * values.stride[2] + a * values.stride[3] ==
                      uint64_t(key_of_column_8(row)) * 192,
                  "8-bit values arrive in the order of channel_of");
    check(row == D && values.box[0] == uint32_t(kUnitKeys), "a box is a unit");
    for (int t = 0; t < kWarpgroup; ++t)
      for (int i = 0; i < D / 2; ++i) {
        check(channel_of(t, i, true) == channel_of(t, 0, true) + channel_of(0, i, true), "channel_of is a sum");
        check(channel_of(t, i, true) == key_of_column_8(accumulator_column(t, i)), "a sum is of its channel");
        // Eight sums of a thread are of four neighbours, by pairs, in its two rows.
        check(channel_of(0, i, true) == i / 8 * 16 + i % 8 / 4 * 2 + i % 2, "neighbours lie together");
      }
    for (const TensorBox& any : {box, values, box_of_16_bit_rows(640, D), box_of_transposed_values(640, D, 192)})
      for (int d = 0; d + 1 < any.rank; ++d) check(any.stride[d] % 16 == 0, "strides are multiples of 16 bytes");
  }
}

// A random plan's work, divided: each (query tile, key tile) once, partial results where the merge looks for them.
void work_split() {
  const int strips = between(1, 12), blocks = between(1, 40), even = between(0, 1), length = between(1, 30);
  std::vector<int64_t> work_start{0}, range_start;
  std::vector<int32_t> tile_start{0}, key_tiles;
  bool equal = true;
  int first_length = 0;
  for (int s = 0; s < strips; ++s) {
    const int tiles = between(0, 9), keys = even ? length : between(1, 30);
    key_tiles.push_back(keys);
    tile_start.push_back(tile_start.back() + tiles);
    work_start.push_back(work_start.back() + int64_t(tiles) * keys);
    if (tiles) {
      equal = equal && (!first_length || first_length == keys);
      first_length = keys;
    }
  }
  int32_t whole = whole_tiles(tile_start.back(), equal ? first_length : 0, blocks);
  const int64_t total = work_start.back(), whole_work = int64_t(whole) * first_length;
  for (int b = 0; b <= blocks; ++b) range_start.push_back(work_range_start(total, whole_work, b, blocks));
  const WorkTable table{work_start.data(), tile_start.data(), key_tiles.data(), range_start.data(), &whole,
                        strips, blocks};

  std::vector<int> visits(total), merged(total);
  std::map<int, std::pair<int64_t, int>> partials;  // index of a partial result -> where it begins, how long it is
  int64_t most = 0, least = total;
  for (int b = 0; b < blocks; ++b) {
    TileScheduler scheduler(table, b);
    int64_t mine = 0;
    for (WorkItem item; scheduler.next(table, item);) {
      check(item.count > 0 && item.first + item.count <= key_tiles[item.strip], "an item lies in its tile");
      const int64_t at = work_start[item.strip] + int64_t(item.tile) * key_tiles[item.strip] + item.first;
      for (int i = 0; i < item.count; ++i) ++visits[at + i];
      mine += item.count;
      check(item.whole == (item.count == key_tiles[item.strip]), "whole is whole");
      if (item.whole) {
        for (int i = 0; i < item.count; ++i) ++merged[at + i];
        continue;
      }
      check(item.partial >= 0 && item.partial < 2 * blocks, "a partial result has a place");
      check(partials.emplace(item.partial, std::make_pair(at, item.count)).second, "no place is used twice");
    }
    most = std::max(most, mine), least = std::min(least, mine);
  }
  check(most - least <= 1, "all blocks have the same work");
  for (const int n : visits) check(n == 1, "each (query tile, key tile) is visited once");
  for (int b = 0; b < blocks; ++b) {
    const SplitTile split = split_tile(table, b);
    int64_t next = split.blocks ? work_start[split.strip] + int64_t(split.tile) * key_tiles[split.strip] : 0;
    const int64_t end = next + (split.blocks ? key_tiles[split.strip] : 0);
    for (int n = 0; n < split.blocks; ++n) {
      const int index = partial_of(table, b, n);
      if (index < 0) continue;
      check(partials.count(index) && partials[index].first == next, "partial results are merged in order");
      for (int i = 0; i < partials[index].second; ++i) ++merged[next++];
    }
    check(next == end, "all partial results of a tile are merged");
  }
  for (const int n : merged) check(n == 1, "each (query tile, key tile) reaches the result once");
}

// A product and a shift in place of a division.
void divisors() {
  constexpr int kMost = 0x7fffffff;
  for (int value = 1; value < 300; ++value)
    for (const int n : {0, 1, value - 1, value, value + 1, 64 * value - 1, kMost / value * value - 1, kMost - 1, kMost})
      check(Divisor(value).quotient(n) == n / value, "a quotient");
  for (int i = 0; i < 200000; ++i) {
    const int value = between(0, 1) ? between(1, 1000) : 1 + int(rng() % kMost), n = int(rng() & kMost);
    check(Divisor(value).quotient(n) == n / value, "a quotient");
  }
}

}  // namespace

int main() {
  Machine m(kWarpgroup, 0);
  machine = &m;
  for (const int D : {64, 128}) {
    for (const int rows : {kWgmmaM, kBlockN}) {
      descriptors(Type::bf16, rows, D, true);
      descriptors(Type::s8, rows, D, true);
      descriptors(Type::e4m3, rows, D, true);
    }
    descriptors(Type::e4m3, D, kUnitKeys, true);    // transposed values
    descriptors(Type::bf16, kBlockN, D, false);  // values
  }
  fragments();
  divisors();
  boxes();
  for (int seed = 0; seed < 20000; ++seed) {
    rng.seed(seed);
    work_split();
  }
  std::printf("ok\n");
}
