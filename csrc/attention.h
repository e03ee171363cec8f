// paged_attention, merge_attention: see inferix_kernels/reference for what they mean.
#pragma once
#include "arrivals.h"
#include "kv_pages.h"

namespace inferix {

// Of the products of q and keys, and of weights and values, over pages that are quantized.
enum class Precision : int32_t {
  exact,      // q and weights have at least 16 bits
  eight_bit,  // they are rounded to 8 bits where the hardware is faster so
  automatic   // 8 bits where that costs little whatever q holds: on a CPU q in two bytes and weights in one; on a GPU
              // never
};

struct PagedAttentionParams {
  Rows q;    // [variants, T, query_heads, D]  q_dtype
  int64_t q_variant_stride;  // in elements
  Rows out;  // [T, query_heads, D]  out_dtype, written; read too when accumulating
  float* lse;  // [T, query_heads]   natural logarithm
  Pools pools;  // Dv = D
  const int32_t* q_indptr;     // [segments + 1]  from 0 to T
  const int32_t* page_indptr;  // [segments * lists_per_segment + 1]  from 0 to entries
  PageList entries;            // pages of all lists
  const float* page_bias;      // [entries]  added to the scaled scores, finite or -inf; or null
  const int32_t* page_variants;  // [entries]  in [0, variants); or null: all 0
  const int32_t* windows;  // [segments, 2]  (left, right): query i sees positions i - left to i + right; or null: all
  const int32_t* page_positions;  // [entries]  of each page's first valid token; or null
  const int32_t* arrivals;  // [entries, 2]  the counter, or -1, and the value of it from which the page is there; or null
  const int32_t* counters;  // [counter_count]  other threads raise them meanwhile; null without arrivals
  PageShape shape;
  int64_t variants, T, query_heads, segments, lists_per_segment, counter_count;  // 1 list, or H
  float scale;
  float softcap;    // scores become softcap * tanh(score / softcap); 0: they stay
  const float* alibi_slopes;  // [query_heads], alibi_stride apart for each segment: times the distance of a key, they
  int64_t alibi_stride;       // are taken from scores after softcap; or null
  bool accumulate;  // out and lse hold a result over other keys: merge into it
  Precision precision;
  float deadline;  // seconds from the start of the call, after which no page is waited for
  DType q_dtype, out_dtype;
  void* prepared;   // on a GPU, what prepare_attention_cuda made of the plan for such pools and sizes; or null
  void* workspace;  // on a GPU, paged_attention_workspace(params) bytes aligned to 256; else null
  INFERIX_FIELDS(q, q_variant_stride, out, lse, pools, q_indptr, page_indptr, entries, page_bias, page_variants,
                 windows, page_positions, arrivals, counters, shape, variants, T, query_heads, segments,
                 lists_per_segment, counter_count, scale, softcap, alibi_slopes, alibi_stride, accumulate, precision,
                 deadline, q_dtype, out_dtype, prepared, workspace)
};

struct MergeAttentionParams {
  const void *out_a, *out_b;   // [rows, D]  in_dtype
  const float *lse_a, *lse_b;  // [rows]
  void* out;                   // [rows, D]  out_dtype; may be out_a or out_b
  float* lse;                  // [rows]     may be lse_a or lse_b
  int64_t rows, D;
  DType in_dtype, out_dtype;
  INFERIX_FIELDS(out_a, out_b, lse_a, lse_b, out, lse, rows, D, in_dtype, out_dtype)
};

void paged_attention_cpu(const PagedAttentionParams& params, const Cpu& cpu);
void merge_attention_cpu(const MergeAttentionParams& params, const Cpu& cpu);

int64_t paged_attention_workspace(const PagedAttentionParams& params);
// What the Hopper kernel makes of a plan, once for all calls that follow it: to workspace, which is of
// prepared_attention_bytes then, aligned to 256. Neither q nor out nor what pools hold is read.
int64_t prepared_attention_bytes(const PagedAttentionParams& params);
void prepare_attention_cuda(const PagedAttentionParams& params, void* stream);
void paged_attention_cuda(const PagedAttentionParams& params, void* stream);
void merge_attention_cuda(const MergeAttentionParams& params, void* stream);

}  // namespace inferix
