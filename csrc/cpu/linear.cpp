// linear on the CPU: sums of sixteen rows of one matrix, read where they lie, with sixteen rows of the other, which are
// packed side by side, for the lanes of a register or the columns of a tile register; then linear_finish.h. x is
// packed, or the weight where that costs less. A task packs its share of the rows, as much as stays in L2, where it
// multiplies it; meanwhile it asks for the rows that come next.
//
// Sums of int8 products are exact and scaled afterwards, so that they give the bits of the formula with every
// instruction set.
#include "../linear.h"

#include <algorithm>
#include <string>

#include "amx.h"
#include "linear_finish.h"
#include "linear_pack.h"
#include "parallel.h"
#include "products.h"

namespace inferix {
namespace {

constexpr int64_t kLeastRows = 64;  // read in place by a task
constexpr int64_t kShareBytes = 1 << 19;  // of packed rows that a task reads again and again: they should stay in L2
constexpr int64_t kLeastShare = 128;  // packed rows
constexpr int64_t kStreamBytes = 1 << 21;  // a result of more does not stay in L2: it is written past the caches
// With tile registers longer rows are multiplied panel by panel of their columns, as many rows as have sums in L2.
constexpr int64_t kWholePanel = 2048, kPanel = 1152, kPanelRows = 512;  // bytes, bytes, rows read in place
// float32 holds the sum of this many products of int8 codes exactly: for instruction sets without integer dot products.
constexpr int64_t kExactTerms = 1024;

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

// Sums of sixteen rows with kGroups groups.
template <typename S, typename Registers>
INFERIX_INLINE void multiply_groups(const Call& c, const InPlaceRows& w, const Column* columns,
                                    Column (*sums)[kLanes]) {
  constexpr int kGroups = Registers::kGroups;
  const Column* x[kGroups];
  for (int i = 0; i < kGroups; ++i) x[i] = columns + i * c.row_words;
  const auto with = [&](auto words) INFERIX_INLINE_LAMBDA {
    products<S, decltype(words), Registers, true>(w, x, c.row_words, stored_in<S>(sums));
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
}

// Sums of `half` of 32 rows of x, which are packed, with 32 of the weight, side by side for each row of x.
template <typename S>
INFERIX_INLINE void turn(const Column* squares, int half, Column* turned) {
  for (int i = half; i < 4; i += 2)
    S::transpose(squares[i * kLanes].lane, kLanes, turned[i * kLanes].lane, kLanes);
}

template <typename S, typename Registers>
INFERIX_INLINE void multiply(const Call& c, const Task& task, const Task& next) {
  constexpr int kGroups = Registers::kGroups;
  const int64_t words = c.row_words, pairs = (task.end_group - task.first_group + 1) / 2;
  const Column* columns = pack<S>(c, task, 0, words);
  thread_local Buffer rooms[2];
  alignas(64) Column squares[4][kLanes], turned[4][kLanes];
  // Beside the products of the first sixteen rows the next 32 are asked for; beside those of the others, at last, what
  // the next task packs.
  const int64_t steps = words * kLanes / Registers::kRows;  // of sixteen rows with a pair
  const int64_t calls = (task.end - task.first + 2 * kLanes - 1) / (2 * kLanes) * pairs;
  const auto per_step = [steps](const Lines& lines, int64_t calls) {
    return (lines.bytes() + calls * steps - 1) / (calls * steps);
  };
  const Lines later = lines_of(c, c.packed, next.first_group * kLanes, next.end_group * kLanes, 0, words);
  const int64_t later_step = per_step(later, calls);
  int64_t later_call = later_step ? (later.bytes() - 1) / (steps * later_step) + 1 - calls : 0;
  for (int64_t n = task.first; n < task.end; n += 2 * kLanes) {
    alignas(64) int32_t start[2][kLanes];
    InPlaceRows rows[2] = {in_place_rows<S>(c, n, 0, words, rooms[0], start[0]), {}};
    const int halves = n + kLanes < task.end ? 2 : 1;
    if (halves == 2) rows[1] = in_place_rows<S>(c, n + kLanes, 0, words, rooms[1], start[1]);
    const Lines soon = lines_of(c, c.in_place, n + 2 * kLanes, std::min(n + 4 * kLanes, task.end), 0, words);
    rows[0].ahead_step = per_step(soon, pairs);
    for (int64_t pair = 0; pair < pairs; ++pair, ++later_call) {
      const int64_t group = task.first_group + 2 * pair;
      const Column* x = columns + 2 * pair * words;
      rows[0].ahead = soon.row + pair * steps * rows[0].ahead_step;
      rows[1].ahead = later.row + std::max<int64_t>(0, later_call) * steps * later_step;
      rows[1].ahead_step = later_call < 0 ? 0 : later_step;
      for (int half = 0; half < halves; ++half) {
        if (kGroups == 2 && group + 1 < task.end_group)
          multiply_groups<S, Registers>(c, rows[half], x, squares + 2 * half);
        else
          for (int i = 0; i < 2 && group + i < task.end_group; ++i)
            multiply_groups<S, Block<Registers::kRows * kGroups, 1>>(c, rows[half], x + i * words,
                                                                     squares + 2 * half + i);
      }
      for (int half = 0; half < 2; ++half) {
        if (!c.packs_weight && group + half >= c.groups) continue;
        if (!c.packs_weight) turn<S>(squares[0], half, turned[0]);
        c.level.finish(c, c.packs_weight ? squares[0] : turned[0], n, group * kLanes, half, 0, kLanes);
      }
    }
  }
}

#if defined(__x86_64__)
// Sums of one block of 32 rows that wait to be finished: squares of two times two blocks of sixteen, one after the
// other along the packed rows.
struct Unfinished {
  const Column* squares = nullptr;
  int64_t row = 0, packed_row = 0, next = 0, count = 0;  // in rows of the result, 32 wide
};

// The next `count` rows, a power of two; `turned` has room for what is turned, 4 * kLanes.
template <typename S>
INFERIX_INLINE void finish_next(const Call& c, Unfinished& u, int count, Column* turned) {
  const Column* squares = u.squares + u.next / 32 * 4 * kLanes;
  const int half = u.next / kLanes % 2, first = u.next % kLanes;
  const int64_t packed_row = u.packed_row + u.next / 32 * 32;
  u.next += count;
  if (!c.packs_weight && packed_row + half * kLanes >= c.packed.rows) return;
  if (first == 0 && !c.packs_weight) turn<S>(squares, half, turned);
  c.level.finish(c, c.packs_weight ? squares : turned, u.row, packed_row, half, first, count);
}

// The same in tile registers. What follows the products of one block of rows is done little by little, while the tile
// registers multiply the next. A chunk of its 32 rows stays in the L1 cache while the packed rows stream past it from
// L2. Where there are several panels, sums of all rows wait in L2 for the next one.
template <typename S, typename Product>
INFERIX_INLINE void multiply_tiles(const Call& c, const Task& task, const Task& next) {
  constexpr int64_t kChunk = 8;  // steps: 64 bytes of each row
  thread_local Buffer rooms[2], sums;
  const int64_t pairs = (task.end_group - task.first_group + 1) / 2, height = 2 * kLanes;
  const int64_t blocks = (task.end - task.first + height - 1) / height;
  const int64_t panels = (c.row_words + c.panel_words - 1) / c.panel_words;
  const int64_t kept = panels == 1 ? 2 : blocks;  // of sums: this block's and the one's before, or all
  Column* const all = reinterpret_cast<Column*>(sums.floats(std::min(kept, blocks) * pairs * 4 * kLanes * kLanes));
  Unfinished before;
  alignas(64) Column turned[4 * kLanes];
  const Tiles tiles;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * c.panel_words, words = std::min(c.panel_words, c.row_words - first);
    const int64_t steps = words / kLanes, chunks = (steps + kChunk - 1) / kChunk;
    const bool last = panel + 1 == panels;
    int finished = 1;  // rows at each step
    while (finished < kLanes && finished * steps < 2 * kLanes) finished *= 2;
    const Column* columns = pack<S>(c, task, first, words);
    const Task& then = last ? next : task;
    Lines later = lines_of(c, c.packed, then.first_group * kLanes, then.end_group * kLanes,
                           last ? 0 : first + words, std::min(c.panel_words, c.row_words - (last ? 0 : first + words)));
    const int64_t later_lines = (later.bytes() / 64 + blocks * pairs * steps - 1) / (blocks * pairs * steps);
    int64_t later_step = later_lines ? later.bytes() / 64 / later_lines - blocks * pairs * steps : 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t n = task.first + block * height;
      const InPlaceRows w0 = in_place_rows<S>(c, n, first, words, rooms[0], nullptr);
      const InPlaceRows w1 =
          n + kLanes < c.in_place.rows ? in_place_rows<S>(c, n + kLanes, first, words, rooms[1], nullptr) : w0;
      Column* squares = all + block % kept * pairs * 4 * kLanes;
      Lines soon = lines_of(c, c.in_place, n + height, std::min(n + 2 * height, task.end), first, words);
      const int64_t soon_lines = (soon.bytes() / 64 + steps * pairs - 1) / (steps * pairs);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = steps * chunk / chunks, stop = steps * (chunk + 1) / chunks;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const Column *x0 = columns + 2 * pair * words,
                       *x1 = task.first_group + 2 * pair + 1 < task.end_group ? x0 + words : x0;
          Column* square = squares + pair * 4 * kLanes;
          if (panel == 0 && chunk == 0) {
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
            soon.fetch(soon_lines);
            if (later_step++ >= 0) later.fetch(later_lines);
            if (before.next < before.count) finish_next<S>(c, before, finished, turned);
          }
          tile_store<0>(square, 64), tile_store<1>(square + kLanes, 64);
          tile_store<2>(square + 2 * kLanes, 64), tile_store<3>(square + 3 * kLanes, 64);
        }
      }
      while (before.next < before.count) finish_next<S>(c, before, kLanes, turned);
      if (last) before = {squares, n, task.first_group * kLanes, 0, pairs * 2 * kLanes};
    }
  }
  while (before.next < before.count) finish_next<S>(c, before, kLanes, turned);
}
#endif

template <typename S>
INFERIX_INLINE void finish(const Call& c, const Column* squares, int64_t row, int64_t packed_row, int half, int first,
                           int count) {
  const auto at = [squares](int of_rows, int of_packed) { return squares + (2 * of_rows + of_packed) * kLanes; };
  const Column *left = c.packs_weight ? at(half, 0) : at(0, half), *right = c.packs_weight ? at(half, 1) : at(1, half);
  const int64_t m0 = (c.packs_weight ? row : packed_row) + half * kLanes, n0 = c.packs_weight ? packed_row : row;
  const int64_t end = std::min<int64_t>(first + count, c.p.M - m0);
  const bool integers = c.words == Words::int8;
  if (n0 + kFinished <= c.p.N)
    for (int64_t i = first; i < end; ++i) finish_row<S, true>(c.p, left[i], right[i], integers, m0 + i, n0, c.streams);
  else if (n0 < c.p.N)
    for (int64_t i = first; i < end; ++i) finish_row<S, false>(c.p, left[i], right[i], integers, m0 + i, n0, false);
}

#define INFERIX_LEVEL(level, target, width, Registers)                                                              \
  target void multiply_##level(const Call& c, const Task& task, const Task& next) {                                 \
    multiply<Simd<width>, Registers>(c, task, next);                                                                \
  }                                                                                                                 \
  target void finish_##level(const Call& c, const Column* squares, int64_t row, int64_t packed_row, int half,       \
                             int first, int count) {                                                                \
    finish<Simd<width>>(c, squares, row, packed_row, half, first, count);                                           \
  }                                                                                                                 \
  constexpr Level level{multiply_##level, finish_##level};

INFERIX_LEVEL(portable, , 4, PortableBlock)
#if defined(__x86_64__)
INFERIX_LEVEL(v3, INFERIX_V3, 8, V3Block)
INFERIX_LEVEL(v4, INFERIX_V4, 16, V4Block)

INFERIX_V4 void multiply_amx(const Call& c, const Task& task, const Task& next) {
  if (c.words == Words::int8)
    multiply_tiles<Simd<16>, SignedBytes>(c, task, next);
  else
    multiply_tiles<Simd<16>, Bf16Numbers>(c, task, next);
}
constexpr Level amx{multiply_amx, finish_v4};

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
  const bool panels = cpu.isa >= Isa::amx && words == Words::int8 && row_words * 4 > kWholePanel;
  const int64_t count = panels ? (row_words * 4 + kPanel - 1) / kPanel : 1;
  const int64_t panel_words = round_up((row_words + count - 1) / count, kLanes);
  const bool streams = p.M * p.N * element_bytes(p.out_dtype) > kStreamBytes;
  const Call call{p,      level_of(cpu.isa), cpu.isa,  words,  row_words, panel_words, packs_weight,
                  streams, in_place,          packed,  groups};

  const int64_t most = std::max(kLeastShare, kShareBytes / (panel_words * 4)), least = (packed.rows + most - 1) / most;
  // Pairs of groups, in about equal shares. Rounded up, fewer shares may hold all of them: none is empty.
  const int64_t share = round_up((groups + least - 1) / least, 2), shares = (groups + share - 1) / share;
  // Where there are enough rows for all threads, a task takes more of them.
  const int64_t wanted = cpu.threads == 1 ? 1 : (4 * cpu.threads + shares - 1) / shares;
  const int64_t even = round_up((in_place.rows + wanted - 1) / wanted, 2 * kLanes);
  const int64_t height = std::min(panels ? kPanelRows : even, std::max(kLeastRows, even));
  const int64_t tiles = (in_place.rows + height - 1) / height;
  const auto task_of = [&](int64_t i) -> Task {
    if (i >= shares * tiles) return {0, 0, 0, 0};
    const int64_t group = i / tiles * share, row = i % tiles * height;
    return {row, std::min(in_place.rows, row + height), group, std::min(groups, group + share)};
  };
  parallel_for(cpu.threads, shares * tiles, [&](int64_t i) {
    call.level.multiply(call, task_of(i), task_of(i + cpu.threads));
#if defined(__x86_64__)
    if (streams) asm volatile("sfence" : : : "memory");  // stores past the caches are ordered by nothing else
#endif
  });
}

}  // namespace inferix
