// What linear.cpp multiplies: rows of x and of the weight as words, where they lie or packed side by side, and the
// memory that is asked for ahead of them.
#pragma once
#include <algorithm>
#include <cstring>

#include "../linear.h"
#include "codes.h"
#include "products.h"

namespace inferix {
namespace {

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// How codes are multiplied.
enum class Words { floats, bf16, int8 };

Words words_of(Codec codec, Isa isa) {
  if (codec == Codec::i8_token) return isa >= Isa::avx512_vnni ? Words::int8 : Words::floats;
  return isa >= Isa::avx512_bf16 ? Words::bf16 : Words::floats;  // e4m3 is exact in bfloat16
}

struct Call;

// Rows first ... end of the matrix that is read in place, with groups first_group ... end_group of the other.
struct Task {
  int64_t first, end, first_group, end_group;
};

// For one generation of CPUs.
struct Level {
  void (*multiply)(const Call&, const Task& task, const Task& next);
  // The results of `count` of sixteen rows of x, from `first` on, with 32 rows of the weight. squares[rows 0 or 16]
  // [packed rows 0 or 16] are the sums of 32 rows with 32 packed ones, as `turn` leaves them; half: of the rows of x.
  void (*finish)(const Call&, const Column* squares, int64_t row, int64_t packed_row, int half, int first, int count);
};

struct Matrix {
  const char* codes;  // [rows, K]
  int64_t rows;
};

struct Call {
  LinearParams p;
  Level level;
  Isa isa;
  Words words;
  int64_t row_words;    // to a row of either matrix, with zeros up to whole registers
  int64_t panel_words;  // that are packed at once
  bool packs_weight, streams;  // streams: the result goes past the caches
  Matrix in_place, packed;
  int64_t groups;  // of sixteen packed rows
  bool has_zero_point() const { return words == Words::int8 && isa < Isa::amx; }  // packed bytes are 128 more
};

// Words first ... of a row of K codes, zeros past them.
INFERIX_INLINE void row_to_words(const Call& c, const char* codes, int64_t first, int64_t count, int32_t* words) {
  const int64_t K = c.p.K;
  if (c.words == Words::int8) {
    const int64_t bytes = std::min(K - first * 4, count * 4);
    std::memcpy(words, codes + first * 4, bytes);
    std::memset(reinterpret_cast<char*>(words) + bytes, 0, count * 4 - bytes);
    return;
  }
  thread_local Buffer buffer;  // the whole row: these have one panel
  float one = 1.f, *x = buffer.floats(K);
  decode(c.isa, Tile{c.p.codec, 1, K, K, const_cast<char*>(codes), reinterpret_cast<char*>(&one), nullptr}, 0, 1, x, K);
  const int64_t used = K / (c.words == Words::bf16 ? 2 : 1);  // whole words
  std::fill(words + used, words + count, 0);
  from_floats(c.isa, c.words == Words::bf16 ? DType::bf16 : DType::f32, x, K, 1, K, words, K);
}

// A panel of sixteen rows of a matrix, `stride` bytes apart: where they lie, or in `room`, for what lies past the last
// row must not be read. Rows that there are none of are zeros.
INFERIX_INLINE const char* words_of_rows(const Call& c, const Matrix& matrix, int64_t row, int64_t first, int64_t count,
                                         Buffer& room, int64_t* stride) {
  const int64_t K = c.p.K;
  const char* codes = matrix.codes + row * K;
  *stride = K;
  if (c.words == Words::int8 && (row + kLanes - 1) * K + (first + count) * 4 <= matrix.rows * K)
    return codes + first * 4;
  int32_t* words = reinterpret_cast<int32_t*>(room.floats(kLanes * count));
  for (int64_t i = 0; i < kLanes; ++i) {
    if (row + i < matrix.rows)
      row_to_words(c, codes + i * K, first, count, words + i * count);
    else
      std::fill_n(words + i * count, count, 0);
  }
  *stride = count * 4;
  return reinterpret_cast<const char*>(words);
}

// A panel of groups of sixteen rows side by side: [group][count].
template <typename S>
INFERIX_INLINE const Column* pack(const Call& c, const Task& task, int64_t first, int64_t count) {
  thread_local Buffer room, packed;
  const int64_t K = c.p.K;
  const int64_t groups = task.end_group - task.first_group;
  Column* const columns = reinterpret_cast<Column*>(packed.floats(groups * count * kLanes));
  for (int64_t group = task.first_group; group < task.end_group; ++group) {
    int64_t stride;
    const char* from = words_of_rows(c, c.packed, group * kLanes, first, count, room, &stride);
    Column* to = columns + (group - task.first_group) * count;
    for (int64_t n = 0; n < count; n += kLanes) {
      S::transpose_bytes(from + n * 4, stride, to + n);
      for (int64_t i = n; i < n + kLanes && (c.has_zero_point() || first + n + kLanes > K / 4); ++i) {
        // 128 more, by flipping the sign; but what lies past K is zeros, whatever it is multiplied with.
        const int64_t bytes =
            c.words == Words::int8 ? std::max<int64_t>(0, std::min<int64_t>(K - (first + i) * 4, 4)) : 4;
        const uint32_t kept = bytes == 0 ? 0 : 0xffffffff >> (32 - 8 * bytes),
                       signs = c.has_zero_point() ? 0x80808080 : 0;
        for (int part = 0; part < S::kParts; ++part)
          S::part(to[i], part) = (typename S::Lanes)(((typename S::UnsignedLanes)S::part(to[i], part) ^ signs) & kept);
      }
    }
  }
  return columns;
}

// Memory that is read next and asked for little by little: rows of `width` bytes.
struct Lines {
  const char* row = nullptr;
  int64_t rows = 0, width = 0, stride = 0, at = 0;
  int64_t bytes() const { return rows * width; }
  INFERIX_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + at, 0, 2);
      at += 64;
      if (at >= width) at = 0, row += stride, --rows;
    }
  }
};

// A panel of rows of a matrix: of whole rows one piece, and nothing of rows that there are none of.
inline Lines lines_of(const Call& c, const Matrix& matrix, int64_t row, int64_t end, int64_t first, int64_t count) {
  const int64_t K = c.p.K, rows = std::max<int64_t>(0, std::min(end, matrix.rows) - row);
  const char* from = matrix.codes + row * K + first * 4;
  if (count >= c.row_words) return {from, rows > 0, rows * K, 0};
  return {from, rows, std::min(count * 4, K - first * 4), K};
}

// Sixteen rows of the matrix that is not packed; `start` has room for sixteen.
template <typename S>
INFERIX_INLINE InPlaceRows in_place_rows(const Call& c, int64_t row, int64_t first, int64_t count, Buffer& room,
                                         int32_t* start) {
  InPlaceRows rows{};
  rows.rows = words_of_rows(c, c.in_place, row, first, count, room, &rows.stride);
  for (int64_t i = 0; c.has_zero_point() && i < kLanes; ++i)
    start[i] = zero_point_compensation<S>(rows.rows + i * rows.stride, c.p.K);
  if (c.has_zero_point()) rows.start = start;
  return rows;
}

}  // namespace
}  // namespace inferix
