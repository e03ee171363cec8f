#include "pages.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "elements.h"

namespace inferix {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string entry(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// "where.ids" -> "where.starts"
std::string starts_name(const std::string& ids) { return ids.substr(0, ids.size() - 3) + "starts"; }

// Scales and offsets of the slots past length, where they are kept by token.
void fill_scales(const Tile& tile, int64_t length) {
  if (!is_by_token(tile.codec)) return;
  const int64_t end = tile.page_size;
  if (is_packed(tile.codec)) {
    Half *scales = reinterpret_cast<Half*>(tile.scales), *offsets = reinterpret_cast<Half*>(tile.offsets);
    std::fill(scales + length, scales + end, from_float<Half>(kStepFloor));
    std::fill(offsets + length, offsets + end, Half{0});
  } else {
    float* scales = reinterpret_cast<float*>(tile.scales);
    std::fill(scales + length, scales + end, kAmaxFloor / (tile.codec == Codec::i8_token ? kInt8Max : kE4m3Max));
  }
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
    if (list.starts && (list.starts[i] < 0 || list.starts[i] > page_size - length))
      refuse(entry(starts_name(ids).c_str(), i) + " must be in [0, " + std::to_string(page_size - length) + "], got " +
             std::to_string(list.starts[i]));
    starts[i + 1] = starts[i] + length;
  }
  if (tokens >= 0 && starts[list.n] != tokens)
    refuse(std::string(lens) + " must sum to T=" + std::to_string(tokens) + ", got " + std::to_string(starts[list.n]));
  if (written) {
    std::vector<int32_t> sorted;
    for (int64_t i = 0; i < list.n; ++i)
      if (!list.starts || list.lens[i] > 0) sorted.push_back(list.ids[i]);  // no tokens within a page: nothing written
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

namespace {

// Slots length and up of codes that do not lie transposed.
void clear_codes(const Tile& tile, int64_t length) {
  const int64_t bytes = row_bytes(tile.codec, tile.width);
  if (tile.row == bytes) {
    std::memset(tile.codes + length * bytes, 0, (tile.page_size - length) * bytes);
  } else {
    for (int64_t t = length; t < tile.page_size; ++t) std::memset(tile.codes + t * tile.row, 0, bytes);
  }
}

}  // namespace

void write_tile(Isa isa, const Tile& tile, const float* x, int64_t stride, int64_t length, const Ahead& ahead) {
  encode(isa, tile, x, stride, length, ahead);
  if (!is_transposed(tile.codec)) clear_codes(tile, length);
  fill_scales(tile, length);
}

void copy_tile(const Tile& from, const Tile& to, int64_t length) {
  const int64_t page_size = to.page_size;
  if (is_transposed(to.codec) && length < page_size) {
    for (int64_t i = 0; i < to.width * page_size; i += page_size) {
      std::memcpy(to.codes + i, from.codes + i, length);
      std::memset(to.codes + i + length, 0, page_size - length);
    }
  } else {
    const int64_t bytes = row_bytes(to.codec, to.width);
    if (is_transposed(to.codec) || (from.row == bytes && to.row == bytes)) {  // transposed: whole pages get here
      std::memcpy(to.codes, from.codes, length * bytes);
    } else {
      for (int64_t t = 0; t < length; ++t) std::memcpy(to.codes + t * to.row, from.codes + t * from.row, bytes);
    }
    if (length < page_size) clear_codes(to, length);
  }
  if (is_float(to.codec)) return;
  const int64_t scales = scale_bytes(to.codec) * (is_by_token(to.codec) ? length : to.width);
  std::memcpy(to.scales, from.scales, scales);
  if (is_packed(to.codec)) std::memcpy(to.offsets, from.offsets, scales);
  fill_scales(to, length);
}

}  // namespace inferix
