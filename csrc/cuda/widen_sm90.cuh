// Pages whose codes are widened (dequantized to bf16) on their way to the tensor cores: TMA loads the codes into a
// buffer of their own, and all threads of the producer warpgroup write their values where the consumers expect bf16.
//
// A scale by token multiplies that key's scores instead, so that its codes are exact in bf16; all else is scaled here
// and rounded once. Transposed values stay transposed: 16-bit operands may be K-major or MN-major. While keys are
// widened, values are being loaded, and the other way round.
#pragma once
#include "load_sm90.cuh"

namespace inferix::sm90 {

// The value of code n of eight. An integer below 2^23 is written into the last bits of 2^23, which are worth that much.
// e4m3: sign, exponent and mantissa go to their places in a float, whose exponent counts from 120 further down; a NaN
// becomes 480, and its scale is a NaN too.
template <Codec kCodec>
INFERIX_DEVICE float code_value(const uint32_t* codes, int n) {
  constexpr int kBits = is_packed(kCodec) ? 4 : 8, kInWord = 32 / kBits;
  const uint32_t word = codes[n / kInWord];
  const int shift = n % kInWord * kBits;
  if constexpr (is_e4m3(kCodec)) {
    return float_of(uint32_t(int32_t(word << (24 - shift)) >> 4) & 0x87f00000u) * 0x1p120f;
  } else if constexpr (is_packed(kCodec)) {
    return float_of(0x4b000000u | (word >> shift & 15)) - 0x1p23f;
  } else {
    return float_of(byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7540u | n % kInWord)) - (0x1p23f + 128.f);
  }
}

// One side of a unit, chunks of eight bf16 out of eight codes each. What lies past the end of a page may be anything,
// and a value's weight of 0 does not undo a NaN: kClear makes it 0.
template <Codec kCodec, int kD, bool kScaled, bool kClear>
INFERIX_DEVICE void widen_unit(const RawSide<kCodec, kD>& raw, char* tile, int u, int length, int t) {
  using Raw = RawSide<kCodec, kD>;
  constexpr bool kTransposed = is_transposed(kCodec);
  // A row of codes has one scale for each, or one for all. Eight floats are kept for all rows; eight pairs of halves
  // would become more floats than there are registers.
  constexpr bool kAlong = is_by_token(kCodec) == kTransposed, kKept = kAlong && !is_packed(kCodec);
  constexpr int kOctets = Raw::kColumns / 8, kParameters = kAlong ? 8 : 1;
  // A thread's rows are so far apart that swizzles, which repeat every eight rows, are the same in all of them.
  constexpr int kStep = kWarpgroup / kOctets;
  static_assert(kStep % 8 == 0);
  t = opaque(t);
  const int octet = t % kOctets, first = t / kOctets;
  const char* from = raw.codes + u * Raw::kUnitBytes + Raw::code_offset(first, octet);
  char* to = tile + (kTransposed ? u * (kUnitKeys * kD * 2) + tile_offset(first, octet * kChunk, kD, kUnitKeys * 2)
                                 : tile_offset(u * kUnitKeys + first, octet * kChunk, kBlockN, kD * 2));
  typename Raw::template Parameters<kParameters> parameters;
  if constexpr (kScaled && kKept) parameters.read(raw, u, 8 * octet);
  // The next row's codes are on their way while these are widened.
  auto next = *reinterpret_cast<const typename Raw::Octet*>(from);
#pragma unroll 2
  for (int row = first; row < Raw::kCodeRows; row += kStep, to += kStep * 128) {
    const auto codes = next;
    from += kStep * Raw::kRowBytes;
    if (row + kStep < Raw::kCodeRows) next = *reinterpret_cast<const typename Raw::Octet*>(from);
    if constexpr (kScaled && !kKept) parameters.read(raw, u, kAlong ? 8 * octet : row);
    Chunk chunk;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      float x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[i] = code_value<kCodec>(codes.word, n + i);
        if constexpr (kScaled) x[i] = parameters.scaled(x[i], (n + i) % kParameters);
        if (kClear && (kTransposed ? 8 * octet + n + i : row) >= length) x[i] = 0.f;
      }
      chunk.word[n / 2] = pack_bf16x2(x[0], x[1]);
    }
    *reinterpret_cast<Chunk*>(to) = chunk;
  }
}

template <Kind kKind, int kD>
INFERIX_DEVICE void widen_keys(SharedStorage<kKind, kD>& shared, int stage, int t) {
  using S = SharedStorage<kKind, kD>;
#pragma unroll 1
  for (int u = 0; u < kUnits; ++u)
    widen_unit<S::kKeyCodec, kD, !S::kKeyScales, false>(shared.raw.keys, shared.keys[stage], u, kUnitKeys, t);
  if constexpr (S::kKeyScales) shared.key_scales[stage][t] = shared.raw.keys.scales[t / kUnitKeys][t % kUnitKeys];
  fence_proxy_async();
}

template <Kind kKind, int kD>
INFERIX_DEVICE void widen_values(SharedStorage<kKind, kD>& shared, int stage, const int (&length)[kUnits], int t) {
  constexpr Codec kCodec = SharedStorage<kKind, kD>::kValueCodec;
  char* tile = shared.values[stage];
#pragma unroll 1
  for (int u = 0; u < kUnits; ++u) {
    const int valid = u ? length[1] : length[0];
    if (valid == kUnitKeys) widen_unit<kCodec, kD, true, false>(shared.raw.values, tile, u, valid, t);
    else widen_unit<kCodec, kD, true, true>(shared.raw.values, tile, u, valid, t);
  }
  fence_proxy_async();
}

// The codes of one side of a key tile, by one thread. Those of a unit lie together, but for transposed ones.
template <Codec kCodec, int kD>
INFERIX_DEVICE void load_raw(const AttentionArgs& p, const Plane (&planes)[kMaxPools],
                             const TensorMap (&maps)[kMaxPools], const Unit (&units)[kUnits], int head,
                             RawSide<kCodec, kD>& raw) {
  using Raw = RawSide<kCodec, kD>;
  constexpr int kParameterBytes = sizeof raw.scales[0];
  mbarrier_arrive_expect_tx(&raw.full, kUnits * (Raw::kUnitBytes + kParameterBytes * (is_packed(kCodec) ? 2 : 1)));
#pragma unroll 1
  for (int u = 0; u < kUnits; ++u) {
    const int64_t row = units[u].row + head * p.page_size, tile = units[u].row / p.page_size + head;
    const Plane& from = planes[units[u].pool];
    const TensorMap& map = maps[units[u].pool];
    char* codes = raw.codes + u * Raw::kUnitBytes;
    if constexpr (is_transposed(kCodec)) tma_load_2d(map, codes, &raw.full, units[u].row % p.page_size, int(tile) * kD);
    else tma_load_1d(static_cast<const char*>(from.codes) + row * Raw::kRowBytes, codes, &raw.full, Raw::kUnitBytes);
    const int64_t at = (is_by_token(kCodec) ? row : tile * kD) * int(sizeof raw.scales[0][0]);
    tma_load_1d(static_cast<const char*>(from.scales) + at, raw.scales[u], &raw.full, kParameterBytes);
    if constexpr (is_packed(kCodec))
      tma_load_1d(static_cast<const char*>(from.offsets) + at, raw.offsets[u], &raw.full, kParameterBytes);
  }
}

// The producer warpgroup, when it widens.
template <Kind kKind, int kD>
INFERIX_DEVICE void produce_widened(const AttentionArgs& p, const TensorMap (&values)[kMaxPools],
                                    SharedStorage<kKind, kD>& shared, int t) {
  using S = SharedStorage<kKind, kD>;
  const auto sync = [] { named_barrier_sync(1 + kConsumers, kWarpgroup); };
  PipelineState<S::kStages> pipeline;
  uint32_t parity = 0;  // of the codes
  ProducerState& producer = shared.producer;
  if (t == 0) {
    producer.begin(p);
    if (producer.more) {
      load_raw(p, p.k, values, producer.units, producer.head(p), shared.raw.keys);
      load_raw(p, p.v, values, producer.units, producer.head(p), shared.raw.values);
    }
  }
  sync();
  while (producer.more) {
    const int stage = pipeline.stage, length[kUnits] = {producer.units[0].length, producer.units[1].length};
    mbarrier_wait(&shared.raw.keys.full, parity);
    mbarrier_wait(&shared.keys_empty[stage], pipeline.phase ^ 1);
    widen_keys(shared, stage, t);
    sync();  // codes and the producer's state have been read by all threads
    if (t == 0) {
      shared.tiles[stage] = producer.info();
      mbarrier_arrive(&shared.keys_full[stage]);
      producer.step(p);
      if (producer.more) load_raw(p, p.k, values, producer.units, producer.head(p), shared.raw.keys);
    }
    mbarrier_wait(&shared.raw.values.full, parity);
    mbarrier_wait(&shared.values_empty[stage], pipeline.phase ^ 1);
    widen_values(shared, stage, length, t);
    sync();
    if (t == 0) {
      mbarrier_arrive(&shared.values_full[stage]);
      if (producer.more) load_raw(p, p.v, values, producer.units, producer.head(p), shared.raw.values);
    }
    pipeline.advance();
    parity ^= 1;
  }
}

}  // namespace inferix::sm90
