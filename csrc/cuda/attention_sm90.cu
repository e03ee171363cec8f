// paged_attention on Hopper: argument checks, workspace, launches. Never run on a GPU; tests/cuda/native emulates one
// on the CPU and runs the kernels there.
//
// One pass for the pools of each kind, in the order of their first ones: the first writes out and lse, each later one
// merges into them, as a call with accumulate does. The intermediate result is float32.
//
// What passes make of the plan (units, work tables) is the same for every layer and every step of a block:
// prepare_attention_cuda writes it once, and calls are given it. A call without it makes it for itself.
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
static_assert(sizeof(AttentionArgs) + sizeof(TensorMaps) <= 4096);  // bytes of a kernel's parameters

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
  require(!p.arrivals, "waits for no pages: plan.arrivals must be None");
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
  require(aligned(p.prepared, 256), "takes a plan.prepared that begins at a multiple of 256 bytes");
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

// The pools of one kind, which one pass reads: their places in the call.
struct Pass {
  int pools, pool[kMaxPools];
};
struct Passes {
  int count;
  Pass pass[kMaxPools];
};

// Pools are of one kind if they have the same codecs, at any precision.
Passes passes_of(const Pools& pools) {
  Passes passes{};
  for (int i = 0; i < pools.count; ++i) {
    int n = 0;
    for (; n < passes.count; ++n) {
      const Pool& first = pools.pool[passes.pass[n].pool[0]];
      if (first.k.codec == pools.pool[i].k.codec && first.v.codec == pools.pool[i].v.codec) break;
    }
    passes.count = std::max(passes.count, n + 1);
    Pass& pass = passes.pass[n];
    pass.pool[pass.pools++] = i;
  }
  return passes;
}

// What prepare_kernel writes for one pass. Where it lies does not depend on the device.
struct Prepared {
  WorkTable work;
  Unit* units;
  int64_t* list_start;
  int32_t* list_tiles;

  Prepared(Arena& arena, const PagedAttentionParams& p, int blocks) {
    const int64_t strips = p.segments * p.shape.H, lists = p.segments * p.lists_per_segment;
    work = {arena.take<int64_t>(strips + 1), arena.take<int32_t>(strips + 1), arena.take<int32_t>(strips),
            arena.take<int64_t>(kMaxBlocks + 1), arena.take<int32_t>(1), int32_t(strips), blocks};
    units = arena.take<Unit>(unit_start(lists, p.entries.n, int(p.variants), int(p.shape.page_size)));
    list_start = arena.take<int64_t>(lists + 1);
    list_tiles = arena.take<int32_t>(lists);
  }
};

// What a call writes for itself.
struct Workspace {
  float *partial_out, *partial_lse, *running;

  Workspace(Arena& arena, const PagedAttentionParams& p, int passes) {
    const int64_t D = p.pools.pool[0].k.width;
    partial_out = arena.take<float>(2 * int64_t(kMaxBlocks) * kBlockM * D);
    partial_lse = arena.take<float>(2 * int64_t(kMaxBlocks) * kBlockM);
    running = arena.take<float>(passes > 1 && p.out_dtype != DType::f32 ? p.T * p.query_heads * D : 0);
  }
};

PrepareArgs prepare_args(const PagedAttentionParams& p, const Prepared& prepared, const Pass& pass) {
  PrepareArgs args{p.q_indptr, p.page_indptr, p.entries.ids, p.entries.lens, p.page_bias, p.page_variants,
                   int32_t(p.T), int32_t(p.entries.n), int32_t(p.segments), int32_t(p.shape.H),
                   int32_t(p.lists_per_segment), int32_t(p.variants), int32_t(p.shape.page_size),
                   int32_t(p.query_heads / p.shape.H), pass.pools, {}, prepared.work, prepared.units,
                   prepared.list_start, prepared.list_tiles};
  int64_t first = 0;
  for (int i = 0, n = 0; i < p.pools.count; first += p.pools.pool[i++].pages)
    if (n < pass.pools && pass.pool[n] == i) args.pool[n++] = {int32_t(first), int32_t(p.pools.pool[i].pages)};
  return args;
}

// Writes what each pass needs of the plan.
void prepare(const PagedAttentionParams& p, const Passes& passes, void* to, int blocks, cudaStream_t stream) {
  Arena arena(to);
  for (int n = 0; n < passes.count; ++n) {
    const Prepared prepared(arena, p, blocks);
    prepare_kernel<<<1, kPrepareThreads, 0, stream>>>(prepare_args(p, prepared, passes.pass[n]));
    check_launch("paged_attention");
  }
}

int64_t bytes_of(const PagedAttentionParams& p, const Passes& passes) {
  Arena arena(nullptr);
  for (int n = 0; n < passes.count; ++n) Prepared(arena, p, kMaxBlocks);
  return arena.used();
}

AttentionArgs attention_args(const PagedAttentionParams& p, const Workspace& workspace, const Prepared& prepared,
                             const Passes& passes, int n) {
  const Pass& pass = passes.pass[n];
  const int64_t D = p.pools.pool[0].k.width;
  const HeadRows out{static_cast<char*>(p.out.data), p.out.token_stride, p.out.head_stride, p.out_dtype};
  const HeadRows running = p.out_dtype == DType::f32
                               ? out
                               : HeadRows{reinterpret_cast<char*>(workspace.running), p.query_heads * D, D, DType::f32};
  const HeadRows nothing{nullptr, 0, 0, DType::f32};
  const bool first = n == 0, last = n == passes.count - 1;
  AttentionArgs args{static_cast<const char*>(p.q.data), p.q_variant_stride, p.q.token_stride, p.q.head_stride,
                     !first ? running : p.accumulate ? out : nothing, last ? out : running, p.lse,
                     pass.pools, {}, {}, p.q_indptr, prepared.units, prepared.list_start, prepared.work, int32_t(p.T),
                     int32_t(p.shape.H), int32_t(p.lists_per_segment), int32_t(p.shape.page_size),
                     Divisor(int32_t(p.query_heads / p.shape.H)), p.scale * kLog2E, workspace.partial_out,
                     workspace.partial_lse};
  for (int i = 0; i < pass.pools; ++i) {
    args.k[i] = p.pools.pool[pass.pool[i]].k;
    args.v[i] = p.pools.pool[pass.pool[i]].v;
  }
  return args;
}

template <typename S>
constexpr TensorBox box_of_values(uint64_t channels, uint64_t slots, int D, int page_size) {
  if (S::kEightBit) return box_of_8_bit_values(channels, D, page_size);
  return S::kTransposed ? box_of_transposed_values(channels, D, page_size) : box_of_16_bit_rows(slots, D);
}

// Of a pool, what is read through a map; the others stay empty.
template <Kind kKind, int kD>
void set_maps(TensorMaps& maps, int i, const Pool& pool, const PageShape& s) {
  using S = SharedStorage<kKind, kD>;
  const uint64_t tiles = uint64_t(pool.pages) * s.H, slots = tiles * s.page_size;
  const auto map = [](const void* codes, const TensorBox& box, bool bytes) {
    return tensor_map("paged_attention", codes, box, bytes);
  };
  if (S::kKeyMap)
    maps.keys[i] = map(pool.k.codes, S::kEightBit ? box_of_8_bit_keys(slots, kD) : box_of_16_bit_rows(slots, kD),
                       S::kEightBit);
  if (S::kValueMap)
    maps.values[i] = map(pool.v.codes, box_of_values<S>(tiles * kD, slots, kD, int(s.page_size)), S::kTransposed);
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
  const Passes passes = passes_of(p.pools);
  Arena arena(nullptr);
  Workspace(arena, p, passes.count);
  return arena.used() + (p.prepared ? 0 : bytes_of(p, passes));
}

int64_t prepared_attention_bytes(const PagedAttentionParams& p) {
  check(p);
  return bytes_of(p, passes_of(p.pools));
}

void prepare_attention_cuda(const PagedAttentionParams& p, void* stream) {
  check(p);
  prepare(p, passes_of(p.pools), p.workspace, multiprocessors(), static_cast<cudaStream_t>(stream));
}

void paged_attention_cuda(const PagedAttentionParams& p, void* stream) {
  check(p);
  if (p.T == 0 || p.query_heads == 0) return;
  const int blocks = multiprocessors();
  const Passes passes = passes_of(p.pools);
  Arena own(p.workspace);
  const Workspace workspace(own, p, passes.count);
  const auto s = static_cast<cudaStream_t>(stream);
  void* prepared = p.prepared;
  if (!prepared) prepare(p, passes, prepared = own.take<char>(0), blocks, s);
  Arena given(prepared);
  for (int n = 0; n < passes.count; ++n) {
    const Pass& pass = passes.pass[n];
    const AttentionArgs args = attention_args(p, workspace, Prepared(given, p, blocks), passes, n);
    with_kernel(p.pools.pool[pass.pool[0]], p.precision == Precision::eight_bit, [&](auto kind, auto width) {
      constexpr Kind kKind = decltype(kind)::value;
      constexpr int kD = decltype(width)::value;
      TensorMaps maps{};
      for (int i = 0; i < pass.pools; ++i) set_maps<kKind, kD>(maps, i, p.pools.pool[pass.pool[i]], p.shape);
      launch<kKind, kD>("paged_attention", attention_kernel<kKind, kD>, blocks, (kConsumers + 1) * kWarpgroup, s, args,
                        maps);
      merge_partials_kernel<kD><<<dim3(blocks, kMergeParts), kMergeThreads, 0, s>>>(args);
      check_launch("paged_attention");
    });
  }
}

void probe_load_cuda(const ProbeLoadParams& p, void* stream) {
  with_kernel(p.pages, p.eight_bit, [&](auto kind, auto width) {
    constexpr Kind kKind = decltype(kind)::value;
    constexpr int kD = decltype(width)::value;
    TensorMaps maps{};
    set_maps<kKind, kD>(maps, 0, p.pages, p.shape);
    AttentionArgs args{};
    args.k[0] = p.pages.k;
    args.v[0] = p.pages.v;
    args.page_size = int32_t(p.shape.page_size);
    launch<kKind, kD>("probe_load", probe_load_kernel<kKind, kD>, 1, kWarpgroup, static_cast<cudaStream_t>(stream), args,
                      maps, p.first_row, p.second_row, p.head, static_cast<char*>(p.keys),
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
