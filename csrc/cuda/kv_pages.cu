// kv_append, kv_commit and kv_gather on CUDA: one thread block per entry of the page list and KV head.
//
// Compiled for sm_80 and sm_90a, never run on a GPU. The numbers of a page list are not checked on the host, which
// would wait for the device: an entry that does not fit its pool is skipped.
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

// One side of a (page, head) tile. The codecs here are neither packed nor transposed, and their scales are float32.
struct Tile {
  Codec codec;
  int64_t page_size, width;
  char* codes;    // [page_size, width]
  float* scales;  // [page_size] or [width]; int8 only

  __device__ Tile(const Plane& plane, const PageShape& s, int64_t page, int64_t head)
      : codec(plane.codec), page_size(s.page_size), width(plane.width) {
    const int64_t index = page * s.H + head;
    codes = static_cast<char*>(plane.codes) + index * page_size * width * code_bytes();
    scales = static_cast<float*>(plane.scales) + (quantized() ? index * scale_count() : 0);
  }
  __device__ bool quantized() const { return codec == Codec::i8_token || codec == Codec::i8_channel; }
  __device__ int64_t code_bytes() const { return codec == Codec::f32 ? 4 : quantized() ? 1 : 2; }
  __device__ int64_t scale_count() const { return codec == Codec::i8_token ? page_size : width; }
  template <typename T>
  __device__ T* as() const {
    return reinterpret_cast<T*>(codes);
  }
  __device__ float operator()(int64_t t, int64_t d) const {
    const int64_t i = t * width + d;
    switch (codec) {
      case Codec::f32: return as<float>()[i];
      case Codec::bf16: return to_float(as<__nv_bfloat16>()[i]);
      case Codec::f16: return to_float(as<__half>()[i]);
      default: return __fmul_rn(float(as<int8_t>()[i]), scales[codec == Codec::i8_token ? t : d]);
    }
  }
};

// A source of float32 tokens for write_tile is called with (token, channel): a Tile, or one of these.
template <typename X>
struct TensorRows {
  const X* rows;
  int64_t stride;
  __device__ TensorRows(const Rows& x, int64_t first, int64_t head)
      : rows(static_cast<const X*>(x.data) + first * x.token_stride + head * x.head_stride), stride(x.token_stride) {}
  __device__ float operator()(int64_t t, int64_t d) const { return to_float(rows[t * stride + d]); }
};

struct Centred {
  Tile tile;
  const float* mean;  // [width]
  __device__ float operator()(int64_t t, int64_t d) const { return __fsub_rn(tile(t, d), mean[d]); }
};

template <typename T, typename Source>
__device__ void write_floats(const Tile& to, int64_t length, const Source& source) {
  for (int64_t i = threadIdx.x; i < to.page_size * to.width; i += kThreads) {
    const int64_t t = i / to.width, d = i % to.width;
    to.as<T>()[i] = from_float<T>(t < length ? source(t, d) : 0.f);
  }
}

// A warp per token, which shares one scale. A token past the end is one of zeros.
template <typename Source>
__device__ void write_int8_tokens(const Tile& to, int64_t length, const Source& source) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t t = threadIdx.x / kWarp; t < to.page_size; t += kWarpsPerBlock) {
    float largest = 0.f;
    for (int64_t d = lane; d < to.width; d += kWarp) largest = fmaxf(largest, t < length ? fabsf(source(t, d)) : 0.f);
    const float scale = int8_scale(warp_max(largest));
    for (int64_t d = lane; d < to.width; d += kWarp)
      to.as<int8_t>()[t * to.width + d] = quantized(t < length ? source(t, d) : 0.f, scale);
    if (lane == 0) to.scales[t] = scale;
  }
}

// A thread per channel, which shares one scale.
template <typename Source>
__device__ void write_int8_channels(const Tile& to, int64_t length, const Source& source) {
  for (int64_t d = threadIdx.x; d < to.width; d += kThreads) {
    float largest = 0.f;
    for (int64_t t = 0; t < length; ++t) largest = fmaxf(largest, fabsf(source(t, d)));
    const float scale = int8_scale(largest);
    for (int64_t t = 0; t < to.page_size; ++t)
      to.as<int8_t>()[t * to.width + d] = quantized(t < length ? source(t, d) : 0.f, scale);
    to.scales[d] = scale;
  }
}

template <typename Source>
__device__ void write_tile(const Tile& to, int64_t length, const Source& source) {
  switch (to.codec) {
    case Codec::f32: return write_floats<float>(to, length, source);
    case Codec::bf16: return write_floats<__nv_bfloat16>(to, length, source);
    case Codec::f16: return write_floats<__half>(to, length, source);
    case Codec::i8_token: return write_int8_tokens(to, length, source);
    default: return write_int8_channels(to, length, source);
  }
}

// Bit for bit; slots past length as write_tile leaves them.
__device__ void copy_tile(const Tile& from, const Tile& to, int64_t length) {
  const int64_t row = to.width * to.code_bytes();
  for (int64_t i = threadIdx.x; i < to.page_size * row; i += kThreads)
    to.codes[i] = i < length * row ? from.codes[i] : 0;
  if (!to.quantized()) return;
  const int64_t valid = to.codec == Codec::i8_token ? length : to.width;
  for (int64_t i = threadIdx.x; i < to.scale_count(); i += kThreads)
    to.scales[i] = i < valid ? from.scales[i] : int8_scale(0.f);
}

template <typename X>
__global__ void kv_append_kernel(KvAppendParams p) {
  const Entry e = this_entry(p.where, p.pages.pages, p.shape.page_size);
  const int64_t first = first_token(p.where);
  if (!e.valid || first + e.length > p.T) return;
  write_tile(Tile(p.pages.k, p.shape, e.page, e.head), e.length, TensorRows<X>(p.k, first, e.head));
  write_tile(Tile(p.pages.v, p.shape, e.page, e.head), e.length, TensorRows<X>(p.v, first, e.head));
}

__global__ void kv_commit_kernel(KvCommitParams p) {
  const Entry from = this_entry(p.source_list, p.source.pages, p.shape.page_size);
  const Entry to = this_entry(p.target_list, p.target.pages, p.shape.page_size);
  if (!from.valid || !to.valid || from.length != to.length) return;
  const Tile from_k(p.source.k, p.shape, from.page, from.head), to_k(p.target.k, p.shape, to.page, to.head);
  const Tile from_v(p.source.v, p.shape, from.page, from.head), to_v(p.target.v, p.shape, to.page, to.head);
  if (from_k.codec == to_k.codec && from_v.codec == to_v.codec && !p.k_mean) {
    copy_tile(from_k, to_k, to.length);
    copy_tile(from_v, to_v, to.length);
  } else {
    if (p.k_mean) write_tile(to_k, to.length, Centred{from_k, p.k_mean + to.head * to_k.width});
    else write_tile(to_k, to.length, from_k);
    write_tile(to_v, to.length, from_v);
  }
}

template <typename X>
__device__ void gather_tile(const Tile& from, const Entry& e, const Rows& to, int64_t first) {
  X* rows = static_cast<X*>(to.data) + first * to.token_stride + e.head * to.head_stride;
  for (int64_t i = threadIdx.x; i < e.length * from.width; i += kThreads) {
    const int64_t t = i / from.width, d = i % from.width;
    rows[t * to.token_stride + d] = from_float<X>(from(t, d));
  }
}

template <typename X>
__global__ void kv_gather_kernel(KvGatherParams p, int64_t total_pages) {
  Entry e = this_entry(p.where, total_pages, p.shape.page_size);
  const int64_t first = first_token(p.where);
  if (!e.valid || first + e.length > p.T) return;
  int i = 0;
  for (; e.page >= p.pools.pool[i].pages; ++i) e.page -= p.pools.pool[i].pages;
  gather_tile<X>(Tile(p.pools.pool[i].k, p.shape, e.page, e.head), e, p.k, first);
  gather_tile<X>(Tile(p.pools.pool[i].v, p.shape, e.page, e.head), e, p.v, first);
}

// compiled.py refuses these before it comes here.
void check_codecs(const Pool& pool) {
  for (const Codec codec : {pool.k.codec, pool.v.codec})
    if (codec > Codec::i8_channel) throw std::invalid_argument("pages of this format have no CUDA kernel yet");
}

dim3 grid(const PageList& list, const PageShape& shape) {
  return dim3(static_cast<unsigned>(list.n), static_cast<unsigned>(shape.H));
}

}  // namespace

void kv_append_cuda(const KvAppendParams& p, void* stream) {
  if (p.where.n == 0) return;
  check_codecs(p.pages);
  with_float_type(p.x_dtype, [&](auto x) {
    kv_append_kernel<decltype(x)><<<grid(p.where, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("kv_append");
}

void kv_commit_cuda(const KvCommitParams& p, void* stream) {
  if (p.source_list.n == 0) return;
  check_codecs(p.source);
  check_codecs(p.target);
  kv_commit_kernel<<<grid(p.source_list, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("kv_commit");
}

void kv_gather_cuda(const KvGatherParams& p, void* stream) {
  if (p.where.n == 0) return;
  int64_t total_pages = 0;
  for (int i = 0; i < p.pools.count; ++i) {
    check_codecs(p.pools.pool[i]);
    total_pages += p.pools.pool[i].pages;
  }
  with_float_type(p.out_dtype, [&](auto x) {
    kv_gather_kernel<decltype(x)>
        <<<grid(p.where, p.shape), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, total_pages);
  });
  check_launch("kv_gather");
}

}  // namespace inferix
