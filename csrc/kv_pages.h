// kv_append, kv_commit, kv_gather: the contract shared by the CPU kernels, the CUDA kernels and the binding.
// What the ops mean is written in inferix_kernels/reference.
#pragma once
#include <cstdint>

#include "cpu.h"
#include "dtypes.h"
#include "fields.h"

namespace inferix {

// The keys or the values of a pool: tiles of page_size tokens, one for each page and head.
struct Plane {
  void* codes;    // [pages, H, page_size, width]; width / 2 bytes if u4; [pages, H, width, page_size] if transposed
  int64_t page_stride, head_stride, row_stride;  // of codes, in elements; only floats may be other than contiguous
  void* scales;   // [pages, H, page_size or width]  float, float16 if u4; null for floats. x = code * scale + offset
  void* offsets;  // [pages, H, page_size or width]  float16; u4 only, else null
  int64_t width;
  Codec codec;
  INFERIX_FIELDS(codes, page_stride, head_stride, row_stride, scales, offsets, width, codec)
};

struct Pool {
  Plane k, v;  // D and Dv wide
  int64_t pages;
  INFERIX_FIELDS(k, v, pages)
};

struct PageShape {
  int64_t H, page_size;
  INFERIX_FIELDS(H, page_size)
};

// Do the codes lie as a pool of our own has them? Strides of a single page, head or token say nothing.
inline bool is_contiguous(const Plane& plane, const PageShape& shape, int64_t pages) {
  const auto is = [](int64_t count, int64_t stride, int64_t dense) { return count == 1 || stride == dense; };
  return !is_float(plane.codec) || (is(shape.page_size, plane.row_stride, plane.width) &&
                                    is(shape.H, plane.head_stride, shape.page_size * plane.width) &&
                                    is(pages, plane.page_stride, shape.H * shape.page_size * plane.width));
}
inline bool is_contiguous(const Pool& pool, const PageShape& shape) {
  return is_contiguous(pool.k, shape, pool.pages) && is_contiguous(pool.v, shape, pool.pages);
}

// Rows of a [T, H, D] tensor; the last dimension is contiguous.
struct Rows {
  void* data;
  int64_t token_stride, head_stride;  // in elements
  INFERIX_FIELDS(data, token_stride, head_stride)
};

// Tokens fill, or are read from, these pages in order.
struct PageList {
  const int32_t* ids;     // [n]
  const int32_t* lens;    // [n]  valid tokens of each page
  const int32_t* starts;  // [n]  the slot of the first of them; or null: all 0
  int64_t n;
  INFERIX_FIELDS(ids, lens, starts, n)
};

constexpr int kMaxPools = 8;

// Page ids count through the pools in order.
struct Pools {
  Pool pool[kMaxPools];
  int count;
  INFERIX_FIELDS(pool, count)
};

struct KvAppendParams {
  Rows k, v;  // [T, H, D], [T, H, Dv]  x_dtype
  Pool pages;
  PageList where;
  PageShape shape;
  int64_t T;
  DType x_dtype;
  INFERIX_FIELDS(k, v, pages, where, shape, T, x_dtype)
};

struct KvCommitParams {
  Pool source, target;                // of the same widths
  PageList source_list, target_list;  // same lens
  const float* k_mean;                // [H, D] or null
  PageShape shape;
  INFERIX_FIELDS(source, target, source_list, target_list, k_mean, shape)
};

struct KvGatherParams {
  Pools pools;
  PageList where;
  PageShape shape;
  Rows k, v;  // [T, H, D], [T, H, Dv]  out_dtype, written
  int64_t T;
  DType out_dtype;
  INFERIX_FIELDS(pools, where, shape, k, v, T, out_dtype)
};

void kv_append_cpu(const KvAppendParams& params, const Cpu& cpu);
void kv_commit_cpu(const KvCommitParams& params, const Cpu& cpu);
void kv_gather_cpu(const KvGatherParams& params, const Cpu& cpu);

void kv_append_cuda(const KvAppendParams& params, void* stream);
void kv_commit_cuda(const KvCommitParams& params, void* stream);
void kv_gather_cuda(const KvGatherParams& params, void* stream);

}  // namespace inferix
