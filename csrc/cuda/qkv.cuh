// qkv_prologue on a GPU: first the statistics that the norms need of each token, then one thread block per entry of the
// page list and head, of q, k and v: bias, norm, rotation and mean in registers, q to its tensor, k and v to their
// tiles. q and k are read twice, the second time from L2. Compiled for the CPU too.
#pragma once
#include "../qkv.h"
#include "pages.cuh"

namespace inferix {

// Of a group of a token's channels that are normalised together.
struct Moments {
  float mean, inverse;  // mean is 0 for an RMS norm; inverse = 1 / sqrt(mean square + eps)
};

// The q or the k part of qkv's columns, and its norm.
struct Part {
  const float *weight, *norm_bias;
  int column, size, group_size;  // group_size 0: no norm
  int first_group;               // among a token's moments
  INFERIX_DEVICE int groups() const { return group_size ? size / group_size : 0; }
};

INFERIX_DEVICE Part part_of(const QkvPrologueParams& p, bool q) {
  const int D = int(p.pages.k.width), q_size = int(p.query_heads) * D;
  const int q_group = p.norm_q ? int(p.norm_q_size) : 0;
  if (q) return {p.norm_q, p.norm_q_bias, 0, q_size, q_group, 0};
  return {p.norm_k, p.norm_k_bias, q_size, int(p.shape.H) * D, p.norm_k ? int(p.norm_k_size) : 0,
          q_group ? q_size / q_group : 0};
}
INFERIX_DEVICE int moments_per_token(const QkvPrologueParams& p) {
  return part_of(p, true).groups() + part_of(p, false).groups();
}

INFERIX_DEVICE Octet read_biased(const QkvPrologueParams& p, int64_t token, int column, int count) {
  Octet x = read_octet(p.qkv, p.dtype, token * p.qkv_stride + column, count);
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i)
      if (i < count) x.x[i] += p.bias[column + i];
  }
  return x;
}

INFERIX_DEVICE float warp_sum(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += shfl_xor(x, distance);
  return x;
}

// A warp per group of a token.
INFERIX_KERNEL(kPageThreads) qkv_moments_kernel(INFERIX_GRID_CONSTANT QkvPrologueParams p) {
  const int lane = thread_index() % kWarp, groups = moments_per_token(p);
  const int64_t index = int64_t(block_index()) * kPageWarps + thread_index() / kWarp;
  if (index >= p.T * groups) return;
  const int64_t token = index / groups;
  const Part q = part_of(p, true), k = part_of(p, false);
  const bool is_q = index % groups < q.groups();
  const Part part = is_q ? q : k;
  const int size = part.group_size, column = part.column + int(index % groups - part.first_group) * size;
  const auto sum = [&](float mean, bool square) {
    float total = 0.f;
    for (int d = lane * kOctet; d < size; d += kWarp * kOctet) {
      const int count = count_at(d, size);
      const Octet x = read_biased(p, token, column + d, count);
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < count) total += square ? (x.x[i] - mean) * (x.x[i] - mean) : x.x[i];
    }
    return div_rn(warp_sum(total), float(size));
  };
  const float mean = part.norm_bias ? sum(0.f, false) : 0.f;
  const float inverse = div_rn(1.f, sm90::sqrt_rn(sum(mean, true) + p.eps));
  if (lane == 0) static_cast<Moments*>(p.workspace)[index] = {mean, inverse};
}

// A head of q or k, ready: a source of octets.
struct PreparedRows {
  const QkvPrologueParams& p;
  Part part;
  int64_t first;
  int head;
  const float* mean;  // of the keys, or null

  INFERIX_DEVICE Octet normalised(int64_t token, int d, int count) const {
    const int D = int(p.pages.k.width), channel = head * D + d;
    Octet x = read_biased(p, token, part.column + channel, count);
    if (!part.group_size) return x;
    const Moments moments = static_cast<const Moments*>(
        p.workspace)[token * moments_per_token(p) + part.first_group + channel / part.group_size];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i >= count) continue;
      const int at = (channel + i) % part.group_size;
      x.x[i] = (x.x[i] - moments.mean) * moments.inverse * part.weight[at];
      if (part.norm_bias) x.x[i] += part.norm_bias[at];
    }
    return x;
  }

  INFERIX_DEVICE Octet operator()(int t, int d, int count) const {
    const int64_t token = first + t;
    Octet x = normalised(token, d, count);
    if (p.rope) rotate(x, token, d, count);
    if (mean) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i)
        if (i < count) x.x[i] -= mean[d + i];
    }
    return x;
  }

  INFERIX_DEVICE void rotate(Octet& x, int64_t token, int d, int count) const {
    const float* rope = p.rope + token * p.rope_pairs * 2;
    const int pairs = int(p.rope_pairs);
    if (p.interleaved) {
#pragma unroll
      for (int i = 0; i < kOctet; i += 2) {
        if (i + 1 >= count || d + i >= 2 * pairs) continue;
        const float cos = rope[d + i], sin = rope[d + i + 1], a = x.x[i], b = x.x[i + 1];
        x.x[i] = a * cos - b * sin;
        x.x[i + 1] = a * sin + b * cos;
      }
      return;
    }
    for (int i = 0; i < kOctet; ++i) {
      const int channel = d + i;
      if (i >= count || channel >= 2 * pairs) continue;
      const bool low = channel < pairs;
      const int j = low ? channel : channel - pairs;
      const float other = normalised(token, low ? channel + pairs : j, 1).x[0];
      const float cos = rope[2 * j], sin = rope[2 * j + 1];
      x.x[i] = low ? x.x[i] * cos - other * sin : other * sin + x.x[i] * cos;
    }
  }
};

struct ValueRows {
  const QkvPrologueParams& p;
  int column;
  int64_t first;
  INFERIX_DEVICE Octet operator()(int t, int d, int count) const { return read_biased(p, first + t, column + d, count); }
};

INFERIX_KERNEL(kPageThreads) qkv_prologue_kernel(INFERIX_GRID_CONSTANT QkvPrologueParams p) {
  PageSharedStorage& shared = page_shared_storage();
  const int D = int(p.pages.k.width), H = int(p.shape.H), query_heads = int(p.query_heads);
  const Entry e = entry_at(p.where, block_index(), 0, p.pages.pages, p.shape.page_size);
  const int64_t first = first_token(p.where, block_index(), shared.total);
  if (!e.valid || first + e.length > p.T) return;
  const int y = block_index_y();
  if (y < query_heads) {
    const PreparedRows q{p, part_of(p, true), first, y, nullptr};
    const int octets = octets_of(D);
    for (int i = thread_index(); i < e.length * octets; i += kPageThreads) {
      const int t = i / octets, d = i % octets * kOctet, count = count_at(d, D);
      write_octet(p.q, p.dtype, ((first + t) * query_heads + y) * D + d, q(t, d, count), count);
    }
  } else if (y < query_heads + H) {
    const int head = y - query_heads;
    const PreparedRows k{p, part_of(p, false), first, head, p.k_mean ? p.k_mean + head * D : nullptr};
    write_tile(Tile(p.pages.k, p.shape, e.page, head), e.length, k, shared.channels);
  } else {
    const int head = y - query_heads - H;
    const ValueRows v{p, (query_heads + H + head) * D, first};
    write_tile(Tile(p.pages.v, p.shape, e.page, head), e.length, v, shared.channels);
  }
}

}  // namespace inferix
