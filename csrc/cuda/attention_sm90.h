// Parameters of the Hopper attention kernels: the pools of one kind, their part of the plan, and where results go.
#pragma once
#include <type_traits>

#include "../kv_pages.h"
#include "work.h"

namespace inferix::sm90 {

// What pages hold and how they are multiplied: a row of the table below. Each is compiled as a kernel of its own, and
// nvcc can only name a kernel for a value that has a name.
enum class Kind : int { bf16, f16, i8f8, fp8, wide_int8, wide_i8f8, wide_fp8, wide_int4 };

struct KindTraits {
  const char* name;
  Codec k, v;      // of the pages
  bool eight_bit;  // 8-bit products: int8 or e4m3 of q and keys, as the keys are; e4m3 of weights and values
};
constexpr int kKinds = int(Kind::wide_int4) + 1;
INFERIX_BOTH constexpr KindTraits traits_of(Kind kind) {
  constexpr KindTraits kTable[kKinds] = {
      // With 8-bit products before the same pages without: the first that fits is taken.
      {"bf16", Codec::bf16, Codec::bf16, false},
      {"f16", Codec::f16, Codec::f16, false},
      {"i8f8", Codec::i8_token, Codec::e4m3_channel, true},
      {"fp8", Codec::e4m3_token, Codec::e4m3_channel, true},
      // Codes become bf16 on their way to the tensor cores, all products are of bf16: q and weights lose no bits to
      // 8-bit types.
      {"wide int8", Codec::i8_token, Codec::i8_channel, false},
      {"wide i8f8", Codec::i8_token, Codec::e4m3_channel, false},
      {"wide fp8", Codec::e4m3_token, Codec::e4m3_channel, false},
      {"wide int4", Codec::u4_channel, Codec::u4_token, false},
  };
  return kTable[int(kind)];
}
INFERIX_BOTH constexpr bool is_eight_bit(Kind kind) { return traits_of(kind).eight_bit; }
INFERIX_BOTH constexpr bool is_int8(Kind kind) { return is_eight_bit(kind) && traits_of(kind).k == Codec::i8_token; }
INFERIX_BOTH constexpr bool is_wide(Kind kind) { return !is_eight_bit(kind) && !is_float(traits_of(kind).k); }
INFERIX_BOTH constexpr DType query_type(Kind kind) {
  return traits_of(kind).k == Codec::f16 ? DType::f16 : DType::bf16;
}

// Calls function(kind), with the kind as a constant, for each in turn.
template <int kFirst = 0, typename Function>
void for_each_kind(const Function& function) {
  if constexpr (kFirst < kKinds) {
    function(std::integral_constant<Kind, Kind(kFirst)>{});
    for_each_kind<kFirst + 1>(function);
  }
}

// The same for the first that reads such pages, with 8-bit products only where they are allowed. False if none does.
template <typename Function>
bool with_kind(const Pool& pool, bool eight_bit, const Function& function) {
  bool found = false;
  for_each_kind([&](auto kind) {
    constexpr KindTraits kTraits = traits_of(decltype(kind)::value);
    if (found || pool.k.codec != kTraits.k || pool.v.codec != kTraits.v || (kTraits.eight_bit && !eight_bit)) return;
    found = true;
    function(kind);
  });
  return found;
}

// Page ids of a pool.
struct PageRange {
  int32_t first, count;
};

// The plan as prepare reads it, and what it makes of it for the pools of one kind.
struct PrepareArgs {
  const int32_t *q_indptr, *page_indptr, *page_ids, *page_lens;
  const float* page_bias;        // or null
  const int32_t* page_variants;  // or null
  int32_t T, entries, segments, heads, lists_per_segment, variants;
  int32_t page_size, group;              // group: query heads that read one KV head
  int32_t pools;
  PageRange pool[kMaxPools];
  WorkTable work;
  Unit* units;
  int64_t* list_start;  // [lists + 1]  where each page list's units begin; the last is not used
  int32_t* list_tiles;  // [lists]      key tiles of each page list
};

INFERIX_BOTH inline int units_of_page(int page_size) { return (page_size + kUnitKeys - 1) / kUnitKeys; }

// Where a list's units begin, and with the number of lists the room that all need: each entry has at most all units of
// a page, those of each variant may be followed by an empty one, and a list of nothing is two empty ones.
INFERIX_BOTH inline int64_t unit_start(int64_t list, int64_t first_entry, int variants, int page_size) {
  return first_entry * units_of_page(page_size) + list * (variants + 2);
}

// Elements i and i + 1 of a CSR row pointer. It has not been checked on the host, which would have to wait for the
// device: whatever it holds, nothing outside 0 .. end is read.
INFERIX_BOTH inline Range range_of(const int32_t* indptr, int i, int32_t end) {
  const int32_t low = indptr[i] < 0 ? 0 : indptr[i] > end ? end : indptr[i];
  const int32_t high = indptr[i + 1] < low ? low : indptr[i + 1] > end ? end : indptr[i + 1];
  return {low, high};
}

// Elements of a [T, heads, D] tensor.
struct HeadRows {
  char* data;
  int64_t token_stride, head_stride;  // in elements
  DType dtype;
};

struct AttentionArgs {
  const char* q;  // [variants, T, query_heads, D] query_type
  int64_t q_variant_stride, q_token_stride, q_head_stride;
  HeadRows from, out;  // from: a result over other keys to start with, or null; may be out
  float* lse;          // [T, query_heads]; read too if there is a from
  int32_t pools;
  Plane k[kMaxPools], v[kMaxPools];
  const int32_t* q_indptr;
  const Unit* units;
  const int64_t* list_start;
  WorkTable work;
  int32_t T, heads, lists_per_segment, page_size;
  Divisor group;        // query heads that read one KV head
  float scale;          // of scores, times log2(e)
  float* partial_out;     // [2 * blocks, kBlockM, D]  results of parts of query tiles
  float* partial_lse;     // [2 * blocks, kBlockM]
};

}  // namespace inferix::sm90
