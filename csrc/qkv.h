// qkv_prologue: see inferix_kernels/reference for what it means.
#pragma once
#include "kv_pages.h"

namespace inferix {

struct QkvPrologueParams {
  const void* qkv;  // [T, (query_heads + 2 H) * D]  dtype; rows qkv_stride elements apart
  void* q;          // [T, query_heads, D]           dtype, written
  int64_t qkv_stride;
  const float* bias;     // [(query_heads + 2 H) * D] or null
  const float* norm_q;   // [query_heads * D], or [D] for each head by itself, or null
  const float* norm_k;   // [H * D], or [D] for each head by itself, or null
  const float *norm_q_bias, *norm_k_bias;  // as the weights: of a layer norm; or null: an RMS norm
  int64_t norm_q_size, norm_k_size;
  const float* rope;     // [T, rope_pairs, 2]  cos, sin; or null
  const float* k_mean;   // [H, D] or null
  int64_t rope_pairs;
  bool interleaved;      // pairs are (2j, 2j+1), else (j, j + rope_pairs)
  float eps;
  Pool pages;            // written; Dv = D
  PageList where;
  PageShape shape;
  int64_t T, query_heads;
  DType dtype;
  void* workspace;  // on a GPU, qkv_prologue_workspace(params) bytes; else null
  INFERIX_FIELDS(qkv, q, qkv_stride, bias, norm_q, norm_k, norm_q_bias, norm_k_bias, norm_q_size, norm_k_size, rope,
                 k_mean, rope_pairs, interleaved, eps, pages, where, shape, T, query_heads, dtype, workspace)
};

void qkv_prologue_cpu(const QkvPrologueParams& params, const Cpu& cpu);

int64_t qkv_prologue_workspace(const QkvPrologueParams& params);
void qkv_prologue_cuda(const QkvPrologueParams& params, void* stream);

}  // namespace inferix
