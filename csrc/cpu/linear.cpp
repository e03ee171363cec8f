// linear on the CPU: sums of sixteen rows of the weight with sixteen rows of x, which lie side by side in the lanes of a
// register as the queries of attention do, or in the columns of a tile register; then linear_finish.h.
//
// Sums of int8 products are exact and scaled afterwards, so that they give the bits of the formula with every instruction
// set.
#include "../linear.h"

#include <algorithm>
#include <string>

#include "amx.h"
#include "attention_tile.h"
#include "codes.h"
#include "linear_finish.h"
#include "linear_products.h"
#include "parallel.h"

namespace inferix {
namespace {

constexpr int64_t kLeastColumns = 64, kMostColumns = 512;  // of the result in a task, rows of the weight
constexpr int64_t kShareBytes = 1 << 19;  // of x that a task reads again and again: it should stay in the L2 cache
constexpr int64_t kLeastShare = 128;      // rows
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
  void (*pack_x)(const Call&, int64_t group);
  // Columns first ... end of the result, rows of these groups.
  void (*multiply)(const Call&, int64_t first_group, int64_t end_group, int64_t first, int64_t end);
  void (*finish)(const Call&, const Column* sums, int64_t m0, int64_t n0);
};

struct Call {
  LinearParams p;
  Level level;
  Isa isa;
  Words words;
  int64_t row_words;  // to a row of x or of the weight, with zeros up to whole registers
  int64_t groups;     // of sixteen rows of x
  Column* x;          // [groups][row_words]
  bool unsigned_x() const { return words == Words::int8 && isa < Isa::amx; }
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

// Sixteen rows of x, or as many as there are, side by side.
template <typename S>
INFERIX_INLINE void pack_x(const Call& c, int64_t group) {
  const int64_t first = group * kLanes, K = c.p.K, words = c.row_words;
  const char* from = static_cast<const char*>(c.p.x) + first * K;
  int64_t stride = K;
  if (c.words != Words::int8 || K != words * 4 || first + kLanes > c.p.M) {
    thread_local Buffer buffer;
    int32_t* rows = reinterpret_cast<int32_t*>(buffer.floats(kLanes * words));
    for (int64_t m = 0; m < kLanes; ++m) {
      if (first + m < c.p.M)
        row_to_words(c, from + m * K, rows + m * words);
      else
        std::fill_n(rows + m * words, words, 0);
    }
    from = reinterpret_cast<const char*>(rows), stride = words * 4;
  }
  Column* to = c.x + group * words;
  for (int64_t n = 0; n < words; n += kLanes) {
    S::transpose(reinterpret_cast<const float*>(from) + n, stride / 4, to[n].lane, kLanes);
    for (int64_t i = n; c.unsigned_x() && i < n + kLanes; ++i) {
      // 128 more, by flipping the sign; but zeros past K stay: what they are multiplied with is of another row.
      const int64_t bytes = std::min<int64_t>(K - i * 4, 4);
      const uint32_t signs = bytes <= 0 ? 0 : 0x80808080 & (0xffffffff >> (32 - 8 * bytes));
      for (int part = 0; part < S::kParts; ++part)
        S::part(to[i], part) = (typename S::Lanes)((typename S::UnsignedLanes)S::part(to[i], part) ^ signs);
    }
  }
}

// Rows n ... n + 15 where they lie, or packed into `room`: what lies past the last row must not be read.
template <typename S>
INFERIX_INLINE WeightRows weight_rows(const Call& c, int64_t n, Buffer& room) {
  const int64_t K = c.p.K, stride = c.row_words * 4;
  const char* codes = static_cast<const char*>(c.p.weight) + n * K;
  WeightRows w{codes, K, {}};
  if (c.words != Words::int8 || (n + kLanes - 1) * K + stride > c.p.N * K) {
    int32_t* words = reinterpret_cast<int32_t*>(room.floats(kLanes * c.row_words));
    for (int64_t i = 0; i < kLanes; ++i) {
      if (n + i < c.p.N)
        row_to_words(c, codes + i * K, words + i * c.row_words);
      else
        std::fill_n(words + i * c.row_words, c.row_words, 0);
    }
    w.rows = reinterpret_cast<const char*>(words), w.stride = stride;
  }
  for (int64_t i = 0; c.unsigned_x() && i < kLanes; ++i)
    w.start[i] = zero_point_compensation<S>(w.rows + i * w.stride, K);
  return w;
}

// int8 codes as floats: as many at once as float32 sums exactly.
template <typename S, int kRows, int kGroups>
INFERIX_INLINE void exact_products(WeightRows w, const Column* const* x, int64_t words, Column (*sums)[kLanes]) {
  int32_t whole[kGroups * kLanes * kLanes] = {};
  float* part = sums[0][0].lane;
  for (int64_t k = 0; k < words; k += kExactTerms, w.rows += kExactTerms * 4) {
    const Column* x_k[kGroups];
    for (int group = 0; group < kGroups; ++group) x_k[group] = x[group] + k;
    products<S, FloatWords<S>, kRows, kGroups>(w, x_k, std::min(kExactTerms, words - k), sums);
    for (int i = 0; i < kGroups * kLanes * kLanes; ++i) whole[i] += static_cast<int32_t>(part[i]);
  }
  for (int i = 0; i < kGroups * kLanes * kLanes; ++i) part[i] = float(whole[i]);
}

template <typename S, int kRows, int kGroups>
INFERIX_INLINE void multiply_groups(const Call& c, const WeightRows& w, int64_t group, int64_t n) {
  alignas(64) Column sums[kGroups][kLanes];
  const Column* x[kGroups];
  for (int i = 0; i < kGroups; ++i) x[i] = c.x + (group + i) * c.row_words;
  const auto with = [&](auto words) INFERIX_INLINE_LAMBDA {
    products<S, decltype(words), kRows, kGroups>(w, x, c.row_words, sums);
  };
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16)
    if (c.words == Words::int8) with(Int8Words{});
    else if (c.words == Words::bf16) with(Bf16Words{});
#endif
  if (c.words == Words::floats) {
    if (c.p.codec == Codec::i8_token && c.p.K > kExactTerms)
      exact_products<S, kRows, kGroups>(w, x, c.row_words, sums);
    else
      with(FloatWords<S>{});
  }
  for (int i = 0; i < kGroups; ++i) c.level.finish(c, sums[i], (group + i) * kLanes, n);
}

// Columns first ... end of the result, for x's groups, kGroups at a time.
template <typename S, int kRows, int kGroups>
INFERIX_INLINE void multiply(const Call& c, int64_t first_group, int64_t end_group, int64_t first, int64_t end) {
  thread_local Buffer room;
  for (int64_t n = first; n < end; n += kLanes) {
    const WeightRows w = weight_rows<S>(c, n, room);
    int64_t group = first_group;
    for (; group + kGroups <= end_group; group += kGroups) multiply_groups<S, kRows, kGroups>(c, w, group, n);
    for (; group < end_group; ++group) multiply_groups<S, kRows, 1>(c, w, group, n);
  }
}

#if defined(__x86_64__)
// Sums of one block of columns that wait to be finished: squares of two times two blocks of sixteen, a square after the
// other along x.
struct Unfinished {
  const Column* squares = nullptr;
  int64_t first_row = 0, column = 0, next = 0, count = 0;  // in blocks
};

inline void finish_next(const Call& c, Unfinished& f) {
  const int64_t block = f.next++, m = f.first_row + block / 4 * 2 * kLanes + block % 2 * kLanes;
  c.level.finish(c, f.squares + block * kLanes, m, f.column + block / 2 % 2 * kLanes);
}

// The same in tile registers. What follows the products of one block of columns is done little by little, while the tile
// registers multiply the next. A chunk of 32 rows of the weight stays in the L1 cache while x streams past it from L2.
template <typename S, typename Product>
INFERIX_INLINE void multiply_tiles(const Call& c, int64_t first_group, int64_t end_group, int64_t first, int64_t end) {
  constexpr int64_t kChunk = 8;  // steps: 64 bytes of each row
  thread_local Buffer rooms[2], sums[2];  // of this block of columns, and of the one before
  const int64_t steps = c.row_words / kLanes, chunks = (steps + kChunk - 1) / kChunk;
  const int64_t pairs = (end_group - first_group + 1) / 2, blocks = pairs * 4;
  Unfinished before;
  const Tiles tiles;
  for (int64_t n = first; n < end; n += 2 * kLanes) {
    const WeightRows w0 = weight_rows<S>(c, n, rooms[0]);
    const WeightRows w1 = n + kLanes < c.p.N ? weight_rows<S>(c, n + kLanes, rooms[1]) : w0;
    Column* squares = reinterpret_cast<Column*>(sums[n / (2 * kLanes) % 2].floats(blocks * kLanes * kLanes));
    const char* ahead = w0.rows + 2 * kLanes * w0.stride;
    const int64_t lines = n + 2 * kLanes < end ? (2 * kLanes * w0.stride / 64 + steps * pairs - 1) / (steps * pairs) : 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = steps * chunk / chunks, stop = steps * (chunk + 1) / chunks;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t group = first_group + 2 * pair;
        const Column *x0 = c.x + group * c.row_words, *x1 = group + 1 < c.groups ? x0 + c.row_words : x0;
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
    before = {squares, first_group * kLanes, n, 0, blocks};
  }
  while (before.next < before.count) finish_next(c, before);
}
#endif

// sums[n].lane[m] of rows n0 ... of the weight and m0 ... of x become the result there, if it has such.
template <typename S>
INFERIX_INLINE void finish(const Call& c, const Column* sums, int64_t m0, int64_t n0) {
  const bool integers = c.words == Words::int8;
  if (m0 + kLanes <= c.p.M && n0 + kLanes <= c.p.N) return finish_block<S, true>(c.p, integers, sums, m0, n0);
  if (m0 < c.p.M && n0 < c.p.N) finish_block<S, false>(c.p, integers, sums, m0, n0);
}

#define INFERIX_LEVEL(level, target, width, rows, groups)                                                                  \
  target void pack_x_##level(const Call& c, int64_t group) { pack_x<Simd<width>>(c, group); }                       \
  target void multiply_##level(const Call& c, int64_t first_group, int64_t end_group, int64_t first, int64_t end) { \
    multiply<Simd<width>, rows, groups>(c, first_group, end_group, first, end);                                            \
  }                                                                                                                 \
  target void finish_##level(const Call& c, const Column* sums, int64_t m0, int64_t n0) {                           \
    finish<Simd<width>>(c, sums, m0, n0);                                                                           \
  }                                                                                                                 \
  constexpr Level level{pack_x_##level, multiply_##level, finish_##level};

INFERIX_LEVEL(portable, , 4, 2, 1)
#if defined(__x86_64__)
INFERIX_LEVEL(v3, INFERIX_V3, 8, 4, 1)
INFERIX_LEVEL(v4, INFERIX_V4, 16, 8, 2)

INFERIX_V4 void multiply_amx(const Call& c, int64_t first_group, int64_t end_group, int64_t first, int64_t end) {
  if (c.words == Words::int8)
    multiply_tiles<Simd<16>, SignedBytes>(c, first_group, end_group, first, end);
  else
    multiply_tiles<Simd<16>, Bf16Numbers>(c, first_group, end_group, first, end);
}
constexpr Level amx{pack_x_v4, multiply_amx, finish_v4};

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
  thread_local Buffer packed;  // this thread's, shared with those that help it
  const Words words = words_of(p.codec, cpu.isa);
  const int64_t elements = words == Words::int8 ? 4 : words == Words::bf16 ? 2 : 1;
  const int64_t row_words = round_up(p.K, elements * kLanes) / elements, groups = round_up(p.M, kLanes) / kLanes;
  float* room = packed.floats(groups * row_words * kLanes);
  const Call call{p, level_of(cpu.isa), cpu.isa, words, row_words, groups, reinterpret_cast<Column*>(room)};
  parallel_for(cpu.threads, groups, [&](int64_t group) { call.level.pack_x(call, group); });

  const int64_t most = std::max(kLeastShare, kShareBytes / (row_words * 4));
  const int64_t shares = round_up(p.M, most) / most, share = round_up(round_up(p.M, shares) / shares, 2 * kLanes) / kLanes;
  // Where there are enough columns for all threads, a task takes more of them.
  const int64_t even = round_up(round_up(p.N, 4 * cpu.threads) / (4 * cpu.threads), 2 * kLanes);
  const int64_t width = std::min(kMostColumns, std::max(kLeastColumns, even)), tiles = (p.N + width - 1) / width;
  parallel_for(cpu.threads, shares * tiles, [&](int64_t task) {
    const int64_t group = task / tiles * share, column = task % tiles * width;
    call.level.multiply(call, group, std::min(groups, group + share), column, std::min(p.N, column + width));
  });
}

}  // namespace inferix
