// kv_append, kv_commit and kv_gather on CUDA: one thread block per entry of the page list and KV head.
//
// Compiled for sm_80 and sm_90a, never run on a GPU. The numbers of a page list are not checked on the host, which
// would wait for the device: an entry that does not fit its pool is skipped.
#include <type_traits>

#include "../kv_pages.h"
#include "check.cuh"
#include "elements.cuh"

namespace inferix {
namespace {

constexpr int kThreads = 256, kWarpsPerBlock = kThreads / kWarp;

struct Entry {
  int64_t index, page, length, head;
  bool valid;
};

__device__ Entry this_entry(const PageList& list, int64_t num_pages, int64_t page_size) {
  Entry e{blockIdx.x, list.ids[blockIdx.x], list.lens[blockIdx.x], blockIdx.y, false};
  e.valid = e.page >= 0 && e.page < num_pages && e.length >= 0 && e.length <= page_size;
  return e;
}

// Tokens in the entries before this one. Each block adds them up for itself: lists are short, and a prefix sum
// beforehand would be a launch of its own.
__device__ int64_t first_token(const PageList& list) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < blockIdx.x; i += kThreads) mine += list.lens[i] > 0 ? list.lens[i] : 0;
  atomicAdd(&total, mine);
  __syncthreads();
  return static_cast<int64_t>(total);
}

__device__ int64_t tile_offset(const PageShape& s, int64_t page, int64_t head) {
  return (page * s.H + head) * s.page_size * s.D;
}

// A source of float32 tokens for write_tile: rows of a tensor, or a page of another pool.
template <typename X>
struct TensorTile {
  const X *k_rows, *v_rows;
  int64_t k_stride, v_stride;
  __device__ float k(int64_t t, int64_t d) const { return to_float(k_rows[t * k_stride + d]); }
  __device__ float v(int64_t t, int64_t d) const { return to_float(v_rows[t * v_stride + d]); }
};

template <typename T>
struct PageTile {
  const T *k_tile, *v_tile;               // [page_size, D]
  const float *k_scales, *v_scales;       // [page_size], [D]; int8 only
  const float* k_mean;                    // [D] or null
  int64_t D;

  __device__ PageTile(const Pool& pool, const PageShape& s, int64_t page, int64_t head, const float* mean)
      : k_tile(static_cast<const T*>(pool.k) + tile_offset(s, page, head)),
        v_tile(static_cast<const T*>(pool.v) + tile_offset(s, page, head)),
        k_scales(pool.k_scales + (page * s.H + head) * s.page_size),
        v_scales(pool.v_scales + (page * s.H + head) * s.D),
        k_mean(mean ? mean + head * s.D : nullptr),
        D(s.D) {}
  __device__ float k(int64_t t, int64_t d) const {
    float x = to_float(k_tile[t * D + d]);
    if constexpr (std::is_same_v<T, int8_t>) x = __fmul_rn(x, k_scales[t]);
    return k_mean ? __fsub_rn(x, k_mean[d]) : x;
  }
  __device__ float v(int64_t t, int64_t d) const {
    const float x = to_float(v_tile[t * D + d]);
    if constexpr (std::is_same_v<T, int8_t>) return __fmul_rn(x, v_scales[d]);
    return x;
  }
};

template <typename Source>
__device__ void write_int8_tile(const Pool& pool, const PageShape& s, const Entry& e, const Source& source) {
  const int64_t tile = e.page * s.H + e.head;
  int8_t* to_k = static_cast<int8_t*>(pool.k) + tile * s.page_size * s.D;
  int8_t* to_v = static_cast<int8_t*>(pool.v) + tile * s.page_size * s.D;
  // Keys: a warp per token, which shares one scale. A token past the end is one of zeros.
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = threadIdx.x / kWarp; t < s.page_size; t += kWarpsPerBlock) {
    float largest = 0.f;
    for (int64_t d = lane; d < s.D; d += kWarp) largest = fmaxf(largest, t < e.length ? fabsf(source.k(t, d)) : 0.f);
    const float scale = int8_scale(warp_max(largest));
    for (int64_t d = lane; d < s.D; d += kWarp) to_k[t * s.D + d] = quantized(t < e.length ? source.k(t, d) : 0.f, scale);
    if (lane == 0) pool.k_scales[tile * s.page_size + t] = scale;
  }
  // Values: a thread per channel, which shares one scale.
  for (int64_t d = threadIdx.x; d < s.D; d += kThreads) {
    float largest = 0.f;
    for (int64_t t = 0; t < e.length; ++t) largest = fmaxf(largest, fabsf(source.v(t, d)));
    const float scale = int8_scale(largest);
    for (int64_t t = 0; t < s.page_size; ++t)
      to_v[t * s.D + d] = quantized(t < e.length ? source.v(t, d) : 0.f, scale);
    pool.v_scales[tile * s.D + d] = scale;
  }
}

template <typename T, typename Source>
__device__ void write_tile(const Pool& pool, const PageShape& s, const Entry& e, const Source& source) {
  if constexpr (std::is_same_v<T, int8_t>) {
    write_int8_tile(pool, s, e, source);
  } else {
    T* to_k = static_cast<T*>(pool.k) + tile_offset(s, e.page, e.head);
    T* to_v = static_cast<T*>(pool.v) + tile_offset(s, e.page, e.head);
    for (int64_t i = threadIdx.x; i < s.page_size * s.D; i += kThreads) {
      const int64_t t = i / s.D, d = i % s.D;
      to_k[i] = from_float<T>(t < e.length ? source.k(t, d) : 0.f);
      to_v[i] = from_float<T>(t < e.length ? source.v(t, d) : 0.f);
    }
  }
}

template <typename X, typename T>
__global__ void kv_append_kernel(KvAppendParams p) {
  const Entry e = this_entry(p.where, p.pages.pages, p.shape.page_size);
  const int64_t first = first_token(p.where);
  if (!e.valid || first + e.length > p.T) return;
  const TensorTile<X> source{
      static_cast<const X*>(p.k.data) + first * p.k.token_stride + e.head * p.k.head_stride,
      static_cast<const X*>(p.v.data) + first * p.v.token_stride + e.head * p.v.head_stride,
      p.k.token_stride, p.v.token_stride};
  write_tile<T>(p.pages, p.shape, e, source);
}

// int8 to int8: the codes and scales themselves.
__device__ void copy_int8_tile(const KvCommitParams& p, const Entry& from, const Entry& to) {
  const PageShape& s = p.shape;
  const int64_t source = from.page * s.H + from.head, target = to.page * s.H + to.head, size = s.page_size * s.D;
  const int8_t *k = static_cast<const int8_t*>(p.source.k), *v = static_cast<const int8_t*>(p.source.v);
  int8_t *to_k = static_cast<int8_t*>(p.target.k), *to_v = static_cast<int8_t*>(p.target.v);
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const bool valid = i < from.length * s.D;
    to_k[target * size + i] = valid ? k[source * size + i] : int8_t{0};
    to_v[target * size + i] = valid ? v[source * size + i] : int8_t{0};
  }
  for (int64_t t = threadIdx.x; t < s.page_size; t += kThreads)
    p.target.k_scales[target * s.page_size + t] =
        t < from.length ? p.source.k_scales[source * s.page_size + t] : int8_scale(0.f);
  for (int64_t d = threadIdx.x; d < s.D; d += kThreads)
    p.target.v_scales[target * s.D + d] = p.source.v_scales[source * s.D + d];
}

template <typename S, typename T>
__global__ void kv_commit_kernel(KvCommitParams p) {
  const Entry from = this_entry(p.source_list, p.source.pages, p.shape.page_size);
  const Entry to = this_entry(p.target_list, p.target.pages, p.shape.page_size);
  if (!from.valid || !to.valid || from.length != to.length) return;
  if constexpr (std::is_same_v<S, int8_t> && std::is_same_v<T, int8_t>) {
    copy_int8_tile(p, from, to);
  } else {
    // float to the same float keeps the bits of every number; a NaN's payload may change.
    write_tile<T>(p.target, p.shape, to, PageTile<S>(p.source, p.shape, from.page, from.head, p.k_mean));
  }
}

template <typename X, typename T>
__device__ void gather_tile(const KvGatherParams& p, const PageTile<T>& tile, const Entry& e, int64_t first) {
  X* k = static_cast<X*>(p.k.data) + first * p.k.token_stride + e.head * p.k.head_stride;
  X* v = static_cast<X*>(p.v.data) + first * p.v.token_stride + e.head * p.v.head_stride;
  for (int64_t i = threadIdx.x; i < e.length * p.shape.D; i += kThreads) {
    const int64_t t = i / p.shape.D, d = i % p.shape.D;
    k[t * p.k.token_stride + d] = from_float<X>(tile.k(t, d));
    v[t * p.v.token_stride + d] = from_float<X>(tile.v(t, d));
  }
}

template <typename X>
__global__ void kv_gather_kernel(KvGatherParams p, int64_t total_pages) {
  Entry e = this_entry(p.where, total_pages, p.shape.page_size);
  const int64_t first = first_token(p.where);
  if (!e.valid || first + e.length > p.T) return;
  int i = 0;
  for (; e.page >= p.pools.pool[i].pages; ++i) e.page -= p.pools.pool[i].pages;
  const Pool& pool = p.pools.pool[i];
  switch (pool.dtype) {
    case DType::f32: return gather_tile<X>(p, PageTile<float>(pool, p.shape, e.page, e.head, nullptr), e, first);
    case DType::bf16:
      return gather_tile<X>(p, PageTile<__nv_bfloat16>(pool, p.shape, e.page, e.head, nullptr), e, first);
    case DType::i8: return gather_tile<X>(p, PageTile<int8_t>(pool, p.shape, e.page, e.head, nullptr), e, first);
  }
}

dim3 grid(const PageList& list, const PageShape& shape) {
  return dim3(static_cast<unsigned>(list.n), static_cast<unsigned>(shape.H));
}

}  // namespace

void kv_append_cuda(const KvAppendParams& p, void* stream) {
  if (p.where.n == 0) return;
  with_float_type("k", p.x_dtype, [&](auto x) {
    with_page_type(p.pages.dtype, [&](auto page) {
      kv_append_kernel<decltype(x), decltype(page)>
          <<<grid(p.where, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check_launch("kv_append");
}

void kv_commit_cuda(const KvCommitParams& p, void* stream) {
  if (p.source_list.n == 0) return;
  with_page_type(p.source.dtype, [&](auto source) {
    with_page_type(p.target.dtype, [&](auto target) {
      kv_commit_kernel<decltype(source), decltype(target)>
          <<<grid(p.source_list, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
  });
  check_launch("kv_commit");
}

void kv_gather_cuda(const KvGatherParams& p, void* stream) {
  if (p.where.n == 0) return;
  int64_t total_pages = 0;
  for (int i = 0; i < p.pools.count; ++i) total_pages += p.pools.pool[i].pages;
  with_float_type("out", p.out_dtype, [&](auto x) {
    kv_gather_kernel<decltype(x)>
        <<<grid(p.where, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, total_pages);
  });
  check_launch("kv_gather");
}

}  // namespace inferix
