// linear on the CPU: sums of sixteen rows of one matrix, read where they lie, with sixteen rows of the other, which are
// packed side by side, for the lanes of a register or the columns of a tile register; then linear_finish.h. x is
// packed, or the weight where that costs less.
//
// Sums of int8 products are exact and scaled afterwards, so that they give the bits of the formula with every
// instruction set.
#include "../linear.h"

#include <algorithm>
#include <string>

#include "amx.h"
#include "codes.h"
#include "linear_finish.h"
#include "parallel.h"
#include "products.h"

namespace inferix {
namespace {

constexpr int64_t kLeastRows = 64, kMostRows = 512;  // read in place by a task
constexpr int64_t kShareBytes = 1 << 19;  // of packed rows that a task reads again and again: they should stay in L2
constexpr int64_t kLeastShare = 128;  // packed rows
// float32 holds the sum of this many products of int8 codes exactly: for instruction sets without integer dot products.
constexpr int64_t kExactTerms = 1024;

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// How codes are multiplied.
enum class Words { floats, bf16, int8 };

Words words_of(Codec codec, Isa isa) {
  if (codec == Codec::i8_token) return isa >= Isa::avx512_vnni ? Words::int8 : Words::floats;
  return isa >= Isa::avx512_bf16 ? Words::bf16 : Words::floats;  // e4m3 is exact in bfloat16
}

struct Call;

// For one generation of CPUs.
struct Level {
  void (*pack)(const Call&, int64_t group);
  // Rows first ... end with these groups of packed rows.
  void (*multiply)(const Call&, int64_t first, int64_t end, int64_t first_group, int64_t end_group);
  void (*finish)(const Call&, const Column* sums, int64_t row, int64_t packed_row);
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
  int64_t row_words;  // to a row of either matrix, with zeros up to whole registers
  bool packs_weight;
  Matrix in_place, packed;
  int64_t groups;  // of sixteen packed rows
  Column* columns;  // [groups][row_words]
  bool has_zero_point() const { return words == Words::int8 && isa < Isa::amx; }  // packed bytes are 128 more
};

// A row of K codes as words, zeros past them.
INFERIX_INLINE void row_to_words(const Call& c, const char* codes, int32_t* words) {
  const int64_t K = c.p.K;
  if (c.words == Words::int8) {
    std::memcpy(words, codes, K);
    std::memset(reinterpret_cast<char*>(words) + K, 0, c.row_words * 4 - K);
    return;
  }
  thread_local Buffer buffer;
  float one = 1.f, *x = buffer.floats(K);
  decode(c.isa, Tile{c.p.codec, 1, K, K, const_cast<char*>(codes), reinterpret_cast<char*>(&one), nullptr}, 0, 1, x, K);
  const int64_t used = K / (c.words == Words::bf16 ? 2 : 1);  // whole words
  std::fill(words + used, words + c.row_words, 0);
  from_floats(c.isa, c.words == Words::bf16 ? DType::bf16 : DType::f32, x, K, 1, K, words, K);
}

// Sixteen rows of a matrix as words, `stride` bytes apart: where they lie, or in `room`, for what lies past the last
// row must not be read. Rows that there are none of are zeros.
INFERIX_INLINE const char* words_of_rows(const Call& c, const Matrix& matrix, int64_t first, Buffer& room,
                                         int64_t* stride) {
  const int64_t K = c.p.K;
  const char* codes = matrix.codes + first * K;
  *stride = K;
  if (c.words == Words::int8 && (first + kLanes - 1) * K + c.row_words * 4 <= matrix.rows * K) return codes;
  int32_t* words = reinterpret_cast<int32_t*>(room.floats(kLanes * c.row_words));
  for (int64_t i = 0; i < kLanes; ++i) {
    if (first + i < matrix.rows)
      row_to_words(c, codes + i * K, words + i * c.row_words);
    else
      std::fill_n(words + i * c.row_words, c.row_words, 0);
  }
  *stride = c.row_words * 4;
  return reinterpret_cast<const char*>(words);
}

// Sixteen rows side by side.
template <typename S>
INFERIX_INLINE void pack(const Call& c, int64_t group) {
  thread_local Buffer room;
  const int64_t K = c.p.K, words = c.row_words;
  int64_t stride;
  const char* from = words_of_rows(c, c.packed, group * kLanes, room, &stride);
  Column* to = c.columns + group * words;
  for (int64_t n = 0; n < words; n += kLanes) {
    S::transpose_bytes(from + n * 4, stride, to + n);
    for (int64_t i = n; i < n + kLanes && (c.has_zero_point() || n + kLanes > K / 4); ++i) {
      // 128 more, by flipping the sign; but what lies past K is zeros, whatever it is multiplied with.
      const int64_t bytes = c.words == Words::int8 ? std::max<int64_t>(0, std::min<int64_t>(K - i * 4, 4)) : 4;
      const uint32_t kept = bytes == 0 ? 0 : 0xffffffff >> (32 - 8 * bytes),
                     signs = c.has_zero_point() ? 0x80808080 : 0;
      for (int part = 0; part < S::kParts; ++part)
        S::part(to[i], part) = (typename S::Lanes)(((typename S::UnsignedLanes)S::part(to[i], part) ^ signs) & kept);
    }
  }
}

// Rows first ... of the matrix that is not packed; `start` has room for sixteen.
template <typename S>
INFERIX_INLINE InPlaceRows in_place_rows(const Call& c, int64_t first, Buffer& room, int32_t* start) {
  InPlaceRows rows{};
  rows.rows = words_of_rows(c, c.in_place, first, room, &rows.stride);
  for (int64_t i = 0; c.has_zero_point() && i < kLanes; ++i)
    start[i] = zero_point_compensation<S>(rows.rows + i * rows.stride, c.p.K);
  if (c.has_zero_point()) rows.start = start;
  return rows;
}

// For `products`: sums[group][row].
template <typename S>
INFERIX_INLINE auto stored_in(Column (*sums)[kLanes]) {
  return [sums](int group, int row, int part, const auto& sum)
             INFERIX_INLINE_LAMBDA { S::part(sums[group][row], part) = (typename S::Lanes)sum; };
}

// int8 codes as floats: as many at once as float32 sums exactly.
template <typename S, typename Registers>
INFERIX_INLINE void exact_products(InPlaceRows w, const Column* const* x, int64_t words, Column (*sums)[kLanes]) {
  constexpr int kGroups = Registers::kGroups;
  int32_t whole[kGroups * kLanes * kLanes] = {};
  float* part = sums[0][0].lane;
  for (int64_t k = 0; k < words; k += kExactTerms, w.rows += kExactTerms * 4) {
    const Column* x_k[kGroups];
    for (int group = 0; group < kGroups; ++group) x_k[group] = x[group] + k;
    products<S, FloatWords<S>, Registers>(w, x_k, std::min(kExactTerms, words - k), stored_in<S>(sums));
    for (int i = 0; i < kGroups * kLanes * kLanes; ++i) whole[i] += static_cast<int32_t>(part[i]);
  }
  for (int i = 0; i < kGroups * kLanes * kLanes; ++i) part[i] = float(whole[i]);
}

template <typename S, typename Registers>
INFERIX_INLINE void multiply_groups(const Call& c, const InPlaceRows& w, int64_t group, int64_t n) {
  constexpr int kGroups = Registers::kGroups;
  alignas(64) Column sums[kGroups][kLanes];
  const Column* x[kGroups];
  for (int i = 0; i < kGroups; ++i) x[i] = c.columns + (group + i) * c.row_words;
  const auto with = [&](auto words) INFERIX_INLINE_LAMBDA {
    products<S, decltype(words), Registers>(w, x, c.row_words, stored_in<S>(sums));
  };
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16) {
    if (c.words == Words::int8) with(Int8Words{});
    if (c.words == Words::bf16) with(Bf16Words{});
  }
#endif
  if (c.words == Words::floats) {
    if (c.p.codec == Codec::i8_token && c.p.K > kExactTerms)
      exact_products<S, Registers>(w, x, c.row_words, sums);
    else
      with(FloatWords<S>{});
  }
  for (int i = 0; i < kGroups; ++i) c.level.finish(c, sums[i], n, (group + i) * kLanes);
}

template <typename S, typename Registers>
INFERIX_INLINE void multiply(const Call& c, int64_t first, int64_t end, int64_t first_group, int64_t end_group) {
  constexpr int kGroups = Registers::kGroups;
  thread_local Buffer room;
  for (int64_t n = first; n < end; n += kLanes) {
    int32_t start[kLanes];
    const InPlaceRows rows = in_place_rows<S>(c, n, room, start);
    int64_t group = first_group;
    for (; group + kGroups <= end_group; group += kGroups) multiply_groups<S, Registers>(c, rows, group, n);
    for (; group < end_group; ++group) multiply_groups<S, Block<Registers::kRows * kGroups, 1>>(c, rows, group, n);
  }
}

#if defined(__x86_64__)
// Sums of one block of rows that wait to be finished: squares of two times two blocks of sixteen, one after the other
// along the packed rows.
struct Unfinished {
  const Column* squares = nullptr;
  int64_t row = 0, first_packed = 0, next = 0, count = 0;  // in blocks
};

inline void finish_next(const Call& c, Unfinished& u) {
  const int64_t block = u.next++, packed_row = u.first_packed + (block / 4 * 2 + block % 2) * kLanes;
  c.level.finish(c, u.squares + block * kLanes, u.row + block / 2 % 2 * kLanes, packed_row);
}

// The same in tile registers. What follows the products of one block of rows is done little by little, while the tile
// registers multiply the next. A chunk of its 32 rows stays in the L1 cache while the packed rows stream past it from
// L2.
template <typename S, typename Product>
INFERIX_INLINE void multiply_tiles(const Call& c, int64_t first, int64_t end, int64_t first_group, int64_t end_group) {
  constexpr int64_t kChunk = 8;  // steps: 64 bytes of each row
  thread_local Buffer rooms[2], sums[2];  // of this block of rows, and of the one before
  const int64_t steps = c.row_words / kLanes, chunks = (steps + kChunk - 1) / kChunk;
  const int64_t pairs = (end_group - first_group + 1) / 2, blocks = pairs * 4;
  Unfinished before;
  const Tiles tiles;
  for (int64_t n = first; n < end; n += 2 * kLanes) {
    const InPlaceRows w0 = in_place_rows<S>(c, n, rooms[0], nullptr);
    const InPlaceRows w1 = n + kLanes < c.in_place.rows ? in_place_rows<S>(c, n + kLanes, rooms[1], nullptr) : w0;
    Column* squares = reinterpret_cast<Column*>(sums[n / (2 * kLanes) % 2].floats(blocks * kLanes * kLanes));
    const char* ahead = w0.rows + 2 * kLanes * w0.stride;
    const int64_t lines =
        n + 2 * kLanes < end ? (2 * kLanes * w0.stride / 64 + steps * pairs - 1) / (steps * pairs) : 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = steps * chunk / chunks, stop = steps * (chunk + 1) / chunks;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t group = first_group + 2 * pair;
        const Column *x0 = c.columns + group * c.row_words, *x1 = group + 1 < c.groups ? x0 + c.row_words : x0;
        Column* square = squares + pair * 4 * kLanes;
        if (chunk == 0) {
          tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        } else {
          tile_load<0>(square, 64), tile_load<1>(square + kLanes, 64);
          tile_load<2>(square + 2 * kLanes, 64), tile_load<3>(square + 3 * kLanes, 64);
        }
        for (int64_t i = begin; i < stop; ++i) {
          tile_load<4>(w0.rows + i * 64, w0.stride), tile_load<6>(x0 + i * kLanes, 64);
          tile_load<7>(x1 + i * kLanes, 64), tile_load<5>(w1.rows + i * 64, w1.stride);
          Product::template multiply_add<0, 4, 6>(), Product::template multiply_add<1, 4, 7>();
          Product::template multiply_add<2, 5, 6>(), Product::template multiply_add<3, 5, 7>();
          for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
          // Of what is to be finished as much as of this block has passed.
          const int64_t passed = (chunk * pairs + pair) * kChunk + i - begin;
          if (before.next < before.count && before.next * chunks * pairs * kChunk <= passed * blocks)
            finish_next(c, before);
        }
        tile_store<0>(square, 64), tile_store<1>(square + kLanes, 64);
        tile_store<2>(square + 2 * kLanes, 64), tile_store<3>(square + 3 * kLanes, 64);
      }
    }
    while (before.next < before.count) finish_next(c, before);
    before = {squares, n, first_group * kLanes, 0, blocks};
  }
  while (before.next < before.count) finish_next(c, before);
}
#endif

// sums[i].lane[j] of rows row + i and packed rows packed_row + j become the result there, if it has such.
template <typename S>
INFERIX_INLINE void finish(const Call& c, const Column* sums, int64_t row, int64_t packed_row) {
  const int64_t m0 = c.packs_weight ? row : packed_row, n0 = c.packs_weight ? packed_row : row;
  const Sums block{sums, c.words == Words::int8, !c.packs_weight};
  if (m0 + kLanes <= c.p.M && n0 + kLanes <= c.p.N) return finish_block<S, true>(c.p, block, m0, n0);
  if (m0 < c.p.M && n0 < c.p.N) finish_block<S, false>(c.p, block, m0, n0);
}

#define INFERIX_LEVEL(level, target, width, Registers)                                                              \
  target void pack_##level(const Call& c, int64_t group) { pack<Simd<width>>(c, group); }                           \
  target void multiply_##level(const Call& c, int64_t first, int64_t end, int64_t first_group, int64_t end_group) { \
    multiply<Simd<width>, Registers>(c, first, end, first_group, end_group);                                        \
  }                                                                                                                 \
  target void finish_##level(const Call& c, const Column* sums, int64_t row, int64_t packed_row) {                  \
    finish<Simd<width>>(c, sums, row, packed_row);                                                                  \
  }                                                                                                                 \
  constexpr Level level{pack_##level, multiply_##level, finish_##level};

INFERIX_LEVEL(portable, , 4, PortableBlock)
#if defined(__x86_64__)
INFERIX_LEVEL(v3, INFERIX_V3, 8, V3Block)
INFERIX_LEVEL(v4, INFERIX_V4, 16, V4Block)

INFERIX_V4 void multiply_amx(const Call& c, int64_t first, int64_t end, int64_t first_group, int64_t end_group) {
  if (c.words == Words::int8)
    multiply_tiles<Simd<16>, SignedBytes>(c, first, end, first_group, end_group);
  else
    multiply_tiles<Simd<16>, Bf16Numbers>(c, first, end, first_group, end_group);
}
constexpr Level amx{pack_v4, multiply_amx, finish_v4};

Level level_of(Isa isa) { return isa >= Isa::amx ? amx : *dispatch(isa, &portable, &v3, &v4); }
#else
Level level_of(Isa) { return portable; }
#endif

}  // namespace

void linear_cpu(const LinearParams& p, const Cpu& cpu) {
  if (p.codec == Codec::i8_token && p.K > kMaxInt8Terms)
    throw std::invalid_argument("x.codes must have at most " + std::to_string(kMaxInt8Terms) + " columns, got " +
                                std::to_string(p.K));
  if (p.M == 0 || p.N == 0 || p.K == 0) {
    if (p.M && p.N) throw std::invalid_argument("x.codes must have at least 1 column, got 0");
    return;
  }
  const Words words = words_of(p.codec, cpu.isa);
  const int64_t elements = words == Words::int8 ? 4 : words == Words::bf16 ? 2 : 1;
  const int64_t row_words = round_up(p.K, elements * kLanes) / elements;
  // Packing sixteen by sixteen words takes about as long as turning as many sums, which a packed weight spares.
  const bool packs_weight = p.N * row_words < p.M * row_words + p.M * p.N;
  const Matrix x{static_cast<const char*>(p.x), p.M}, weight{static_cast<const char*>(p.weight), p.N};
  const Matrix in_place = packs_weight ? x : weight, packed = packs_weight ? weight : x;
  const int64_t groups = round_up(packed.rows, kLanes) / kLanes;
  thread_local Buffer room;  // this thread's, shared with those that help it
  Column* columns = reinterpret_cast<Column*>(room.floats(groups * row_words * kLanes));
  const Call call{p, level_of(cpu.isa), cpu.isa, words, row_words, packs_weight, in_place, packed, groups, columns};
  parallel_for(cpu.threads, groups, [&](int64_t group) { call.level.pack(call, group); });

  const int64_t most = std::max(kLeastShare, kShareBytes / (row_words * 4)), least = (packed.rows + most - 1) / most;
  // Pairs of groups, in about equal shares. Rounded up, fewer shares may hold all of them: none is empty.
  const int64_t share = round_up((groups + least - 1) / least, 2), shares = (groups + share - 1) / share;
  // Where there are enough rows for all threads, a task takes more of them.
  const int64_t tasks = cpu.threads == 1 ? 1 : 4 * cpu.threads;
  const int64_t even = round_up((in_place.rows + tasks - 1) / tasks, 2 * kLanes);
  const int64_t height = std::min(kMostRows, std::max(kLeastRows, even));
  const int64_t tiles = (in_place.rows + height - 1) / height;
  parallel_for(cpu.threads, shares * tiles, [&](int64_t task) {
    const int64_t group = task / tiles * share, row = task % tiles * height;
    call.level.multiply(call, row, std::min(in_place.rows, row + height), group, std::min(groups, group + share));
  });
}

}  // namespace inferix
