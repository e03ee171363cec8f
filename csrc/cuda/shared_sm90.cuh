// A thread block's shared memory, by kind of page, and the other types that the attention kernels share.
#pragma once
#include <cmath>
#include <type_traits>

#include "attention_sm90.h"
#ifdef __CUDACC__
#include "wgmma.cuh"
#else
#include "machine.h"
#endif

namespace inferix::sm90 {

constexpr float kLn2 = 0.69314718f, kLog2E = 1.44269504f;

struct alignas(16) Chunk {
  uint32_t word[4];
};
template <int kCount>
struct alignas(4 * kCount) Floats {
  float x[kCount];
};
using Pair = Floats<2>;

// What the producer tells the consumers about the key tile of a stage.
struct TileInfo {
  int length[kUnits];
  float bias[kUnits];
  int variant;
  bool last;   // of its item
  bool whole;  // all of its keys are valid
  bool fresh;  // its queries are not those of the tile before
};

// The query rows of an item, or some of them.
struct RowBlock {
  int64_t first_query;
  int first_row, rows;  // of the strip: first_row .. rows - 1
  int first_head;
  Divisor group;
  INFERIX_DEVICE bool has(int r) const { return first_row + r < rows; }
  INFERIX_DEVICE int64_t query(int r) const { return first_query + group.quotient(first_row + r); }
  INFERIX_DEVICE int head(int r) const {
    return first_head + first_row + r - group.quotient(first_row + r) * group.value;
  }
};

INFERIX_DEVICE RowBlock rows_of(const AttentionArgs& p, int strip, int tile, int first_row) {
  const Range queries = range_of(p.q_indptr, strip / p.heads, p.T);
  const int group = p.group.value;
  return {queries.begin, tile * kBlockM + first_row, int(queries.end - queries.begin) * group,
          strip % p.heads * group, p.group};
}

INFERIX_DEVICE const Unit* units_of(const AttentionArgs& p, const WorkItem& item) {
  const int list = p.lists_per_segment == 1 ? item.strip / p.heads : item.strip;
  return p.units + p.list_start[list] + kUnits * item.first;
}

// Where a consumer warpgroup is. In shared memory: registers are for what the loop over keys needs.
struct ConsumerState {
  TileScheduler scheduler;
  WorkItem item;
  RowBlock rows;
  bool more;
};

// Where the producer warpgroup is: at a key tile.
struct ProducerState {
  TileScheduler scheduler;
  WorkItem item;
  const Unit* next;
  Unit units[kUnits];
  int left;    // key tiles of the item after this one
  bool fresh;  // see TileInfo
  bool more;   // there is a tile at all
  INFERIX_DEVICE void begin(const AttentionArgs& p) {
    scheduler = TileScheduler(p.work, block_index());
    left = 0;
    step(p);
  }
  INFERIX_DEVICE void step(const AttentionArgs& p) {
    fresh = left == 0;
    if (left == 0) {
      more = scheduler.next(p.work, item);
      if (!more) return;
      next = units_of(p, item);
      left = item.count;
    }
    const int variant = units[0].variant;
    for (int u = 0; u < kUnits; ++u) units[u] = next[u];
    fresh = fresh || units[0].variant != variant;
    next += kUnits;
    --left;
  }
  INFERIX_DEVICE int head(const AttentionArgs& p) const { return item.strip % p.heads; }
  INFERIX_DEVICE TileInfo info() const {
    return {{units[0].length, units[1].length}, {units[0].bias, units[1].bias}, units[0].variant, left == 0,
            units[0].length + units[1].length == kBlockN, fresh};
  }
};

// The keys or the values of a key tile as the page has them: codes that are still to be widened, scales and offsets.
template <Codec kCodec, int kD>
struct RawSide {
  static constexpr bool kTransposed = is_transposed(kCodec);
  static constexpr int kCodeRows = kTransposed ? kD : kUnitKeys, kColumns = kTransposed ? kUnitKeys : kD;
  static constexpr int kRowBytes = is_packed(kCodec) ? kColumns / 2 : kColumns, kUnitBytes = kCodeRows * kRowBytes;
  static constexpr int kScales = is_by_token(kCodec) ? kUnitKeys : kD;
  using Scale = std::conditional_t<is_packed(kCodec), uint16_t, float>;

  alignas(1024) char codes[kUnits * kUnitBytes];
  alignas(128) Scale scales[kUnits][kScales];
  alignas(128) Scale offsets[is_packed(kCodec) ? kUnits : 1][kScales];
  uint64_t full;

  // Codes 8 * octet .. 8 * octet + 7 of a row of a unit.
  static constexpr int kOctetBytes = 8 * kRowBytes / kColumns;
  struct alignas(kOctetBytes) Octet {
    uint32_t word[kOctetBytes / 4];
  };
  INFERIX_DEVICE static int code_offset(int row, int octet) {
    return kTransposed ? tile_offset(row, octet * 8, kCodeRows, kRowBytes) : row * kRowBytes + octet * kOctetBytes;
  }

  // Scales and offsets first .. first + kCount - 1 of a unit.
  template <int kCount>
  struct Parameters {
    struct alignas(kCount * sizeof(Scale) < 16 ? kCount * sizeof(Scale) : 16) Run {
      Scale x[kCount];
    };
    Run scale, offset;
    INFERIX_DEVICE void read(const RawSide& raw, int u, int first) {
      scale = *reinterpret_cast<const Run*>(&raw.scales[u][first]);
      if constexpr (is_packed(kCodec)) offset = *reinterpret_cast<const Run*>(&raw.offsets[u][first]);
    }
    INFERIX_DEVICE float scaled(float x, int n) const {
      if constexpr (is_packed(kCodec)) return fma(x, half_to_float(scale.x[n]), half_to_float(offset.x[n]));
      else return x * scale.x[n];
    }
  };
};
template <Kind kKind, int kD>
struct Raw {
  RawSide<traits_of(kKind).k, kD> keys;
  RawSide<traits_of(kKind).v, kD> values;
};
struct Empty {};

template <Kind kKind, int kD>
struct SharedStorage {
  static constexpr Codec kKeyCodec = traits_of(kKind).k, kValueCodec = traits_of(kKind).v;
  static constexpr bool kEightBit = is_eight_bit(kKind), kWide = is_wide(kKind);
  static constexpr bool kTransposed = is_transposed(kValueCodec);
  static constexpr bool kKeyScales = is_by_token(kKeyCodec);  // multiply scores
  static constexpr bool kKeyMap = !kWide, kValueMap = !kWide || kTransposed;  // what TMA needs a tensor map for
  static constexpr int kElementBytes = kEightBit ? 1 : 2;     // bytes of a number that is multiplied
  static constexpr int kWidth = kD * kElementBytes;           // bytes of a row of keys or queries
  static constexpr int kRowBytes = swizzle_bytes(kWidth), kPanels = panels(kWidth);
  static constexpr int kTileBytes = kBlockN * kWidth, kPanelBytes = kBlockN * kRowBytes;
  static constexpr int kUnitBytes = kTileBytes / kUnits;
  static constexpr int kStages = kTileBytes > 16384 ? 2 : 4;
  static constexpr int kKeyBytes = kTileBytes + (kEightBit ? kBlockN * 4 : 0);
  static constexpr int kValueBytes = kTileBytes + (kEightBit ? kUnits * kD * 4 : 0);
  static constexpr float kLog2WeightScale = kEightBit ? 8.f : 0.f;  // weights are up to 2^8: e4m3 has 2^-9 to 448
  static constexpr int kUnitSteps = kUnitKeys / (kEightBit ? 32 : 16);  // of the weighted sum
  static constexpr int kPerRegister = kEightBit ? 4 : 2;                // weights in a register

  // Swizzled tiles first: their pattern repeats every 1024 bytes, to which all of this is aligned.
  char queries[kConsumers][kWgmmaM * kWidth];
  char keys[kStages][kTileBytes];    // 16 bits: [panels][128 keys][128 bytes]; 8 bits: [units][64 keys][D]
  char values[kStages][kTileBytes];  // as 16-bit keys; transposed: [units][D][64 keys]
  std::conditional_t<kWide, Raw<kKind, kD>, Empty> raw;
  alignas(128) float key_scales[kKeyScales ? kStages : 1][kBlockN];
  alignas(128) float value_scales[kEightBit ? kStages : 1][kUnits * kD];
  float query_scales[kConsumers][kWgmmaM];
  TileInfo tiles[kStages];
  ConsumerState consumers[kConsumers];
  ProducerState producer;
  uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];

  static INFERIX_BOTH constexpr int a_fragment_source(int r, int n, int step) {
    return kEightBit ? a_fragment_source_8(r, n, step) : a_fragment_source_16(r, n, step);
  }
  INFERIX_DEVICE static uint32_t pack_weights(const float* w) {
    if constexpr (kEightBit) return pack_e4m3x4(w[0], w[1], w[2], w[3]);
    else if constexpr (query_type(kKind) == DType::f16) return pack_f16x2(w[0], w[1]);
    else return pack_bf16x2(w[0], w[1]);
  }
  // Four codes of a query, of 8 bits.
  INFERIX_DEVICE static uint32_t pack_codes(const float* x) {
    if constexpr (!is_int8(kKind)) return pack_e4m3x4(x[0], x[1], x[2], x[3]);
    uint32_t word = 0;
    for (int n = 0; n < 4; ++n) word |= uint32_t(float_to_int_rn(x[n]) & 0xff) << 8 * n;
    return word;
  }
};

// Of the pools of a pass, those maps that their kind is read through.
struct TensorMaps {
  TensorMap keys[kMaxPools], values[kMaxPools];
};

constexpr int kSharedLimit = 232448;  // bytes of a block on Hopper
template <Kind kKind, int kD>
constexpr int shared_bytes() {
  constexpr int bytes = sizeof(SharedStorage<kKind, kD>) + 1024;  // dynamic shared memory need not begin aligned
  static_assert(bytes <= kSharedLimit);
  return bytes;
}

template <Kind kKind, int kD>
INFERIX_DEVICE SharedStorage<kKind, kD>& shared_storage() {
  char* memory = shared_memory();
  return *reinterpret_cast<SharedStorage<kKind, kD>*>(memory + (-shared_address(memory) & 1023));
}

// The epilogue of a row: its result over these keys is merged with one over other keys, if there is one, and stored.
struct RowEpilogue {
  float weight, other_weight, lse;
  int64_t from, out, lse_at;
  INFERIX_DEVICE void write_lse(const AttentionArgs& p) const { p.lse[lse_at] = lse; }

  // count pairs, pair i at column(i), of x(i).
  template <int kCount, typename Column, typename Value>
  INFERIX_DEVICE void write(const AttentionArgs& p, const Column& column, const Value& x) const {
    if (p.from.data) {
      if (p.from.dtype == DType::f32) add_and_write<true, DType::f32, kCount>(p, column, x);
      else if (p.from.dtype == DType::bf16) add_and_write<true, DType::bf16, kCount>(p, column, x);
      else add_and_write<true, DType::f16, kCount>(p, column, x);
    } else {
      add_and_write<false, DType::f32, kCount>(p, column, x);
    }
  }

 private:
  template <bool kAdd, DType kFrom, int kCount, typename Column, typename Value>
  INFERIX_DEVICE void add_and_write(const AttentionArgs& p, const Column& column, const Value& x) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Pair y = x(i);
      if constexpr (kAdd) {
        // A side that saw no key contributes nothing, whatever is stored there: 0 * NaN is NaN, hence the selection.
        const Pair other = other_weight > 0.f ? read_pair<kFrom>(p.from.data, from + column(i)) : Pair{};
        y = {{fma(other.x[0], other_weight, y.x[0] * weight), fma(other.x[1], other_weight, y.x[1] * weight)}};
      }
      write_pair(p.out, out + column(i), y);
    }
  }
  template <DType kType>
  INFERIX_DEVICE static Pair read_pair(const char* data, int64_t at) {
    if constexpr (kType == DType::f32) return *reinterpret_cast<const Pair*>(data + 4 * at);
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(data + 2 * at);
    if constexpr (kType == DType::bf16) return {{float_of(bits << 16), float_of(bits & 0xffff0000u)}};
    return {{half_to_float(uint16_t(bits)), half_to_float(uint16_t(bits >> 16))}};
  }
  INFERIX_DEVICE static void write_pair(const HeadRows& rows, int64_t at, Pair y) {
    if (rows.dtype == DType::f32) *reinterpret_cast<Pair*>(rows.data + 4 * at) = y;
    else
      *reinterpret_cast<uint32_t*>(rows.data + 2 * at) =
          rows.dtype == DType::bf16 ? pack_bf16x2(y.x[0], y.x[1]) : pack_f16x2(y.x[0], y.x[1]);
  }
};

INFERIX_DEVICE float exp_approx(float x) { return exp2_approx(x * kLog2E); }

// lse is over these keys; the epilogue's is over both.
INFERIX_DEVICE RowEpilogue row_epilogue(const AttentionArgs& p, int64_t query, int head, float lse) {
  RowEpilogue epilogue{1.f, 0.f, lse, query * p.from.token_stride + head * p.from.head_stride,
                       query * p.out.token_stride + head * p.out.head_stride, query * p.heads * p.group.value + head};
  if (!p.from.data) return epilogue;
  const float before = p.lse[epilogue.lse_at], highest = fmax(before, lse), base = highest == -INFINITY ? 0.f : highest;
  const float a = exp_approx(before - base), b = exp_approx(lse - base), total = a + b;
  epilogue.other_weight = total == 0.f ? 0.f : div_rn(a, total);
  epilogue.weight = total == 0.f ? 0.f : div_rn(b, total);
  epilogue.lse = base + log2_approx(total) * kLn2;
  return epilogue;
}

}  // namespace inferix::sm90
