// paged_attention on Hopper: argument checks, workspace, launches. Never run on a GPU; tests/cuda/native emulates one
// on the CPU and runs the kernels there.
//
// One pass for each pool, in order: the first writes out and lse, each later one merges into them, as a call with
// accumulate does. The intermediate result is float32.
#include <algorithm>

#include "../attention.h"
#include "attention_sm90.cuh"
#include "check.cuh"
#include "prepare_sm90.cuh"
#include "probes_sm90.cuh"
#include "probes_sm90.h"
#include "tensor_map.h"

namespace inferix {
namespace {

using namespace sm90;

constexpr int kMaxBlocks = 256;  // multiprocessors of a Hopper GPU are at most 144

void require(bool fits, const std::string& what) {
  if (!fits) throw Unsupported("paged_attention: the Hopper kernel " + what);
}

// Calls function(kind, head_dim), both constants, for the kernels that read such pages.
template <typename Function>
void with_kernel(const Pool& pool, bool eight_bit, const Function& function) {
  const bool found = with_kind(pool, eight_bit, [&](auto kind) {
    if (pool.k.width == 128 && pool.v.width == 128) function(kind, std::integral_constant<int, 128>{});
    else if (pool.k.width == 64 && pool.v.width == 64) function(kind, std::integral_constant<int, 64>{});
    else require(false, "needs head_dim 64 or 128, got " + std::to_string(pool.k.width));
  });
  require(found, "reads bf16, fp16, int8, i8f8, fp8 and int4 pages only");
}

bool aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

void check(const PagedAttentionParams& p) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  const int64_t group = p.query_heads / p.shape.H;
  require(p.scale > 0.f, "needs a scale above 0, got " + std::to_string(p.scale));
  require(p.softcap == 0.f, "has no softcap, got " + std::to_string(p.softcap));
  require(!p.alibi_slopes, "has no alibi_slopes");
  require(!p.windows, "has no windows: plan.windows must be None");
  require(!p.entries.starts, "reads pages from their first slot on: plan.page_starts must be None");
  for (int i = 0; i < p.pools.count; ++i) {
    const Pool& pool = p.pools.pool[i];
    require(is_contiguous(pool, p.shape), "takes contiguous pages only");
    with_kernel(pool, p.precision == Precision::eight_bit, [&](auto kind, auto) {
      constexpr Kind kKind = decltype(kind)::value;
      constexpr DType type = query_type(kKind);
      // What a box of 16-bit rows reads past the end of its page is another's, and masked like slots not yet written.
      require(!(is_eight_bit(kKind) || is_wide(kKind)) || p.shape.page_size % kUnitKeys == 0,
              "needs a page_size that is a multiple of 64 for 8-bit and 4-bit pages, got " +
                  std::to_string(p.shape.page_size));
      require(p.q_dtype == type, std::string("takes q in ") + name(type) + " over such pages, got " + name(p.q_dtype));
    });
    require(pool.pages * p.shape.H * std::max(p.shape.page_size, pool.k.width) <= kMost,
            "counts slots of a pool in 31 bits, got " + std::to_string(pool.pages) + " pages");
    for (const void* x : {pool.k.codes, pool.v.codes, pool.k.scales, pool.v.scales, pool.k.offsets, pool.v.offsets})
      require(aligned(x, 16), "needs pools whose tensors begin at a multiple of 16 bytes");
  }
  require(p.T * group <= kMost && p.entries.n * units_of_page(int(p.shape.page_size)) <= kMost, "counts rows in 31 bits");
  require(aligned(p.q.data, 16) && p.q.token_stride % 8 == 0 && p.q.head_stride % 8 == 0 && p.q_variant_stride % 8 == 0,
          "reads q 16 bytes at a time: its address and strides must be multiples of that");
  require(aligned(p.out.data, p.out_dtype == DType::f32 ? 8 : 4) && p.out.token_stride % 2 == 0 &&
              p.out.head_stride % 2 == 0,
          "writes out two channels at a time: its address and strides must be multiples of that");
}

// Divides the workspace into arrays. With a null base it only adds up their size.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Workspace {
  WorkTable work;
  Unit* units;
  int64_t* list_start;
  int32_t* list_tiles;
  float *partial_out, *partial_lse, *running;
  int64_t bytes;

  Workspace(const PagedAttentionParams& p, int blocks) {
    Arena arena(p.workspace);
    const int64_t D = p.pools.pool[0].k.width, strips = p.segments * p.shape.H, lists = p.segments * p.lists_per_segment;
    work = {arena.take<int64_t>(strips + 1), arena.take<int32_t>(strips + 1), arena.take<int32_t>(strips),
            arena.take<int64_t>(blocks + 1), arena.take<int32_t>(1), int32_t(strips), blocks};
    units = arena.take<Unit>(unit_start(lists, p.entries.n, int(p.variants), int(p.shape.page_size)));
    list_start = arena.take<int64_t>(lists + 1);
    list_tiles = arena.take<int32_t>(lists);
    partial_out = arena.take<float>(2 * int64_t(blocks) * kBlockM * D);
    partial_lse = arena.take<float>(2 * int64_t(blocks) * kBlockM);
    running = arena.take<float>(p.pools.count > 1 && p.out_dtype != DType::f32 ? p.T * p.query_heads * D : 0);
    bytes = arena.used();
  }
};

PrepareArgs prepare_args(const PagedAttentionParams& p, const Workspace& workspace, int pool, int64_t first_page) {
  return {p.q_indptr, p.page_indptr, p.entries.ids, p.entries.lens, p.page_bias, p.page_variants, int32_t(p.T),
          int32_t(p.entries.n), int32_t(p.segments), int32_t(p.shape.H), int32_t(p.lists_per_segment),
          int32_t(p.variants), int32_t(first_page), int32_t(p.pools.pool[pool].pages), int32_t(p.shape.page_size),
          int32_t(p.query_heads / p.shape.H), workspace.work, workspace.units, workspace.list_start,
          workspace.list_tiles};
}

AttentionArgs attention_args(const PagedAttentionParams& p, const Workspace& workspace, int pool) {
  const int64_t D = p.pools.pool[pool].k.width;
  const HeadRows out{static_cast<char*>(p.out.data), p.out.token_stride, p.out.head_stride, p.out_dtype};
  const HeadRows running = p.out_dtype == DType::f32
                               ? out
                               : HeadRows{reinterpret_cast<char*>(workspace.running), p.query_heads * D, D, DType::f32};
  const HeadRows nothing{nullptr, 0, 0, DType::f32};
  const bool first = pool == 0, last = pool == p.pools.count - 1;
  return {static_cast<const char*>(p.q.data), p.q_variant_stride, p.q.token_stride, p.q.head_stride,
          !first ? running : p.accumulate ? out : nothing, last ? out : running, p.lse,
          p.pools.pool[pool].k, p.pools.pool[pool].v,
          p.q_indptr, workspace.units, workspace.list_start, workspace.work, int32_t(p.T), int32_t(p.shape.H),
          int32_t(p.query_heads / p.shape.H), int32_t(p.lists_per_segment), int32_t(p.shape.page_size),
          p.scale * kLog2E, workspace.partial_out, workspace.partial_lse};
}

struct Maps {
  CUtensorMap keys, values;
};

// Of what is read through a map; the others stay empty.
template <Kind kKind, int kD>
Maps maps_of(const Pool& pool, const PageShape& s) {
  using S = SharedStorage<kKind, kD>;
  const uint64_t tiles = uint64_t(pool.pages) * s.H, slots = tiles * s.page_size;
  const auto map = [](const void* codes, const TensorBox& box, bool bytes) {
    return tensor_map("paged_attention", codes, box, bytes);
  };
  Maps maps{};
  if (S::kKeyMap)
    maps.keys = map(pool.k.codes, S::kEightBit ? box_of_8_bit_keys(slots, kD) : box_of_16_bit_rows(slots, kD),
                    S::kEightBit);
  if (S::kValueMap)
    maps.values = map(pool.v.codes, S::kTransposed ? box_of_transposed_values(tiles * kD, kD, int(s.page_size))
                                                   : box_of_16_bit_rows(slots, kD), S::kTransposed);
  return maps;
}

int multiprocessors() {
  int device, count, major;
  check_cuda("paged_attention", cudaGetDevice(&device));
  check_cuda("paged_attention", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  check_cuda("paged_attention", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  require(major == 9, "needs a GPU of compute capability 9.0, got " + std::to_string(major));
  return std::min(count, kMaxBlocks);
}

// Launches with the shared memory that a kind of page needs.
template <Kind kKind, int kD, typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  constexpr int kBytes = shared_bytes<kKind, kD>();
  check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<grid, threads, kBytes, stream>>>(arguments...);
  check_launch(op);
}

}  // namespace

int64_t paged_attention_workspace(const PagedAttentionParams& p) {
  check(p);
  return Workspace(p, kMaxBlocks).bytes;
}

void paged_attention_cuda(const PagedAttentionParams& p, void* stream) {
  check(p);
  if (p.T == 0 || p.query_heads == 0) return;
  const int blocks = multiprocessors();
  const Workspace workspace(p, blocks);
  const auto s = static_cast<cudaStream_t>(stream);
  int64_t first_page = 0;
  for (int i = 0; i < p.pools.count; ++i) {
    const Pool& pool = p.pools.pool[i];
    const AttentionArgs args = attention_args(p, workspace, i);
    prepare_kernel<<<1, kPrepareThreads, 0, s>>>(prepare_args(p, workspace, i, first_page));
    check_launch("paged_attention");
    with_kernel(pool, p.precision == Precision::eight_bit, [&](auto kind, auto width) {
      constexpr Kind kKind = decltype(kind)::value;
      constexpr int kD = decltype(width)::value;
      const Maps maps = maps_of<kKind, kD>(pool, p.shape);
      launch<kKind, kD>("paged_attention", attention_kernel<kKind, kD>, blocks, (kConsumers + 1) * kWarpgroup, s, args,
                        maps.keys, maps.values);
      merge_partials_kernel<kD><<<dim3(blocks, kMergeParts), kMergeThreads, 0, s>>>(args);
      check_launch("paged_attention");
    });
    first_page += pool.pages;
  }
}

void probe_load_cuda(const ProbeLoadParams& p, void* stream) {
  with_kernel(p.pages, p.eight_bit, [&](auto kind, auto width) {
    constexpr Kind kKind = decltype(kind)::value;
    constexpr int kD = decltype(width)::value;
    const Maps maps = maps_of<kKind, kD>(p.pages, p.shape);
    AttentionArgs args{};
    args.k = p.pages.k;
    args.v = p.pages.v;
    args.page_size = int32_t(p.shape.page_size);
    launch<kKind, kD>("probe_load", probe_load_kernel<kKind, kD>, 1, kWarpgroup, static_cast<cudaStream_t>(stream), args,
                      maps.keys, maps.values, p.first_row, p.second_row, p.head, static_cast<char*>(p.keys),
                      static_cast<char*>(p.values), p.key_scales, p.value_scales);
  });
}

void probe_multiply_cuda(const ProbeMultiplyParams& p, void* stream) {
  with_kernel(p.like, p.eight_bit, [&](auto kind, auto width) {
    constexpr Kind kKind = decltype(kind)::value;
    constexpr int kD = decltype(width)::value;
    const auto s = static_cast<cudaStream_t>(stream);
    if (p.values)
      launch<kKind, kD>("probe_multiply", probe_values_kernel<kKind, kD>, 1, kWarpgroup, s,
                        static_cast<const float*>(p.a), static_cast<const char*>(p.b), p.out);
    else
      launch<kKind, kD>("probe_multiply", probe_scores_kernel<kKind, kD>, 1, kWarpgroup, s,
                        static_cast<const char*>(p.a), static_cast<const char*>(p.b), p.out);
  });
}

}  // namespace inferix
