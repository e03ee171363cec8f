// kv_append, kv_commit and kv_gather on the CPU: one task per entry of the page list and head.
#include "../kv_pages.h"

#include <algorithm>
#include <string>

#include "pages.h"
#include "parallel.h"

namespace inferix {
namespace {

char* row_of(const Rows& rows, DType dtype, int64_t token, int64_t head) {
  return static_cast<char*>(rows.data) + (token * rows.token_stride + head * rows.head_stride) * element_bytes(dtype);
}

// Decoded tokens, the keys or the values at a time; each thread keeps its own.
Buffer& buffer() {
  thread_local Buffer mine;
  return mine;
}

// start: null, or the slot of the first token, a float's; the others keep what they hold.
void append(Isa isa, const Rows& rows, DType dtype, int64_t first, int64_t head, int64_t length, const int32_t* start,
            Tile to) {
  const char* from = row_of(rows, dtype, first, head);
  const float* x = reinterpret_cast<const float*>(from);
  int64_t stride = rows.token_stride;
  if (dtype != DType::f32) {
    float* converted = buffer().floats(length * to.width);
    to_floats(isa, dtype, from, stride, length, to.width, converted, to.width);
    x = converted, stride = to.width;
  }
  if (!start) return write_tile(isa, to, x, stride, length);
  to.codes += *start * to.row;
  encode(isa, to, x, stride, length);
}

void gather(Isa isa, const Tile& from, int64_t length, const Rows& rows, DType dtype, int64_t first, int64_t head) {
  char* to = row_of(rows, dtype, first, head);
  if (dtype == DType::f32) return decode(isa, from, 0, length, reinterpret_cast<float*>(to), rows.token_stride);
  from_floats(isa, dtype, floats_of(isa, from, 0, length, buffer()), from.width, length, from.width, to,
              rows.token_stride);
}

// x may be `to`.
void subtract(const float* x, const float* mean, int64_t length, int64_t width, float* to) {
  for (int64_t t = 0; t < length; ++t)
    for (int64_t d = 0; d < width; ++d) to[t * width + d] = x[t * width + d] - mean[d];
}

// One side of an entry and head on its way to another pool.
struct Move {
  Tile from, to;
  int64_t length;
  const float* mean;  // [width], subtracted; or null

  Move(const KvCommitParams& p, int64_t index) {
    const int64_t entry = index / 2 / p.shape.H, head = index / 2 % p.shape.H;
    const bool keys = index % 2 == 0;
    from = tile_of(keys ? p.source.k : p.source.v, p.shape, p.source_list.ids[entry], head);
    to = tile_of(keys ? p.target.k : p.target.v, p.shape, p.target_list.ids[entry], head);
    length = p.source_list.lens[entry];
    mean = keys && p.k_mean ? p.k_mean + head * from.width : nullptr;
  }

  // All codes of this move, while `tokens` tokens of another are computed.
  Ahead ahead(int64_t tokens) const {
    const int64_t rows = tokens ? from.page_size : 0, share = std::max<int64_t>(tokens, 1);
    return {from.codes, to.codes, rows * row_bytes(from.codec, from.width) / share,
            rows * row_bytes(to.codec, to.width) / share};
  }
};

void convert(Isa isa, const Move& move, const Ahead& ahead) {
  const float* x = floats_of(isa, move.from, 0, move.length, buffer());
  if (move.mean) {
    float* less = buffer().floats(move.length * move.from.width);
    subtract(x, move.mean, move.length, move.from.width, less);
    x = less;
  }
  write_tile(isa, move.to, x, move.from.width, move.length, ahead);
}

}  // namespace

void kv_append_cpu(const KvAppendParams& p, const Cpu& cpu) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, p.pages.pages, s.page_size, p.T, true);
  parallel_for(cpu.threads, p.where.n * s.H, [&](int64_t task) {
    const int64_t entry = task / s.H, head = task % s.H, page = p.where.ids[entry], length = p.where.lens[entry];
    const int32_t* start = p.where.starts ? p.where.starts + entry : nullptr;
    append(cpu.isa, p.k, p.x_dtype, starts[entry], head, length, start, tile_of(p.pages.k, s, page, head));
    append(cpu.isa, p.v, p.x_dtype, starts[entry], head, length, start, tile_of(p.pages.v, s, page, head));
  });
}

void kv_commit_cpu(const KvCommitParams& p, const Cpu& cpu) {
  const PageShape& s = p.shape;
  entry_starts("source_list.ids", "source_list.lens", p.source_list, p.source.pages, s.page_size, -1, false);
  entry_starts("target_list.ids", "target_list.lens", p.target_list, p.target.pages, s.page_size, -1, true);
  for (int64_t i = 0; i < p.source_list.n; ++i) {
    if (p.source_list.lens[i] != p.target_list.lens[i])
      throw std::invalid_argument("target_list.lens must equal source_list.lens, got " +
                                  std::to_string(p.target_list.lens[i]) + " and " +
                                  std::to_string(p.source_list.lens[i]) + " for page " + std::to_string(i));
  }
  const bool verbatim = p.source.k.codec == p.target.k.codec && p.source.v.codec == p.target.v.codec && !p.k_mean;
  // Runs of tiles, so that a thread knows what it reads next; four for each thread even out their speed.
  const int64_t moves = 2 * p.source_list.n * s.H, shares = 4 * std::max(cpu.threads, 1);
  const int64_t run = std::clamp<int64_t>(moves / shares, 1, 32);
  parallel_for(cpu.threads, (moves + run - 1) / run, [&](int64_t task) {
    const int64_t end = std::min(moves, (task + 1) * run);
    for (int64_t i = task * run; i < end; ++i) {
      const Move move(p, i);
      if (verbatim) {
        copy_tile(move.from, move.to, move.length);
      } else {
        convert(cpu.isa, move, i + 1 < end ? Move(p, i + 1).ahead(move.length) : Ahead{});
      }
    }
  });
}

void kv_gather_cpu(const KvGatherParams& p, const Cpu& cpu) {
  const PageShape& s = p.shape;
  const auto starts = entry_starts("where.ids", "where.lens", p.where, total_pages(p.pools), s.page_size, p.T, false);
  parallel_for(cpu.threads, p.where.n * s.H, [&](int64_t task) {
    const int64_t entry = task / s.H, head = task % s.H, length = p.where.lens[entry];
    const Location at = locate(p.pools, p.where.ids[entry]);
    gather(cpu.isa, tile_of(at.pool->k, s, at.page, head), length, p.k, p.out_dtype, starts[entry], head);
    gather(cpu.isa, tile_of(at.pool->v, s, at.page, head), length, p.v, p.out_dtype, starts[entry], head);
  });
}

}  // namespace inferix
