// Single stages of the Hopper attention kernel, for bring-up: see probes_sm90.cuh.
#pragma once
#include "../kv_pages.h"

namespace inferix {

struct ProbeLoadParams {
  Pool pages;
  PageShape shape;
  bool eight_bit;                    // as in PagedAttentionParams
  int first_row, second_row, head;  // of two units of 64 keys: (page * H * page_size) + first slot
  void *keys, *values;              // written: a key tile as it lies in shared memory
  float *key_scales, *value_scales;  // [128], [2, D]; written with 8 bits
  INFERIX_FIELDS(pages, shape, eight_bit, first_row, second_row, head, keys, values, key_scales, value_scales)
};

struct ProbeMultiplyParams {
  Pool like;     // codecs and widths
  bool eight_bit;
  // out [64, D] = a [64, 128] float . b; else out [64, 128] = a [64, D] . b [128, D], of the type that is multiplied
  bool values;
  const void *a, *b;
  float* out;
  INFERIX_FIELDS(like, eight_bit, values, a, b, out)
};

void probe_load_cuda(const ProbeLoadParams& params, void* stream);
void probe_multiply_cuda(const ProbeMultiplyParams& params, void* stream);

}  // namespace inferix
