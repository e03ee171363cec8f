// The Hopper attention kernels, from their own source, on tests/cuda/native/machine.h: random plans over poisoned pools
// against a softmax in float64.
#include "machine.h"

#include "../../../csrc/cuda/attention_sm90.cuh"
#include "../../../csrc/cuda/prepare_sm90.cuh"
#include "../../../csrc/cuda/probes_sm90.cuh"

using namespace inferix;
using namespace inferix::sm90;

namespace {

std::mt19937 rng;
int below(int n) { return int(rng() % n); }
float normal() { return std::normal_distribution<float>()(rng); }

struct Case {
  const char* name;
  std::vector<int> queries;
  int heads, group, page_size, pages, variants, lists_per_segment, blocks;
  int entries;  // of a list, at most
  bool bias, accumulate, flat;  // flat: all keys are 0
  int slow = -1;                // a warpgroup
  int pools = 1;                // of the pages' kind
};

constexpr Type type_of_queries(Kind kind) { return query_type(kind) == DType::f16 ? Type::f16 : Type::bf16; }

// The keys or the values of a pool, of which all that no entry names is NaN.
template <int kD>
struct Numbers {
  Codec codec;
  int heads, page_size;
  std::vector<uint8_t> codes;                       // as they lie in the page
  std::vector<float> scales;                        // 8 bits
  std::vector<uint16_t> half_scales, half_offsets;  // 4 bits
  std::vector<float> numbers;                       // what they stand for: [pages, heads, page_size, D]

  Numbers(Codec codec, const Case& c) : codec(codec), heads(c.heads), page_size(c.page_size) {
    const size_t slots = size_t(c.pages) * heads * page_size;
    codes.assign(slots * kD * 2, is_float(codec) ? 0xff : 0x7f);
    const size_t count = is_by_token(codec) ? slots : slots / page_size * kD;
    scales.assign(count, NAN);
    half_scales.assign(count, from_float<Half>(NAN).bits);
    half_offsets = half_scales;
    numbers.assign(slots * kD, NAN);
  }
  Plane plane() {
    const bool four = is_packed(codec);
    void* const parameters = four ? static_cast<void*>(half_scales.data()) : scales.data();
    const int64_t row = is_packed(codec) ? kD / 2 : kD;
    return {codes.data(), heads * page_size * row, page_size * row, row, parameters, half_offsets.data(), kD, codec};
  }
  // Of page `page`: its parameters, then each of its first `length` tokens. `flat`: all are 0, as keys are with which
  // every weight is the same.
  void fill(int page, int length, bool values, bool flat) {
    for (int tile = page * heads; tile < (page + 1) * heads; ++tile) {
      const int first = is_by_token(codec) ? tile * page_size : tile * kD, count = is_by_token(codec) ? length : kD;
      for (int at = first; at < first + count; ++at) {
        scales[at] = flat ? 0.f : values ? 0.01f + 0.001f * below(10) : 0.002f + 0.0005f * below(8);
        half_scales[at] = from_float<Half>(flat ? 0.f : 0.1f + 0.01f * below(10)).bits;
        half_offsets[at] = from_float<Half>(flat ? 0.f : -1.f - 0.1f * below(10)).bits;
      }
      for (int t = 0; t < length; ++t)
        for (int d = 0; d < kD; ++d) numbers[(size_t(tile) * page_size + t) * kD + d] = draw(tile, t, d, values, flat);
    }
  }

 private:
  float draw(int tile, int t, int d, bool values, bool flat) {
    const size_t row = size_t(tile) * page_size + t, at = row * kD + d;
    const size_t parameter = is_by_token(codec) ? row : size_t(tile) * kD + d;
    const float x = flat ? 0.f : normal();
    if (is_float(codec)) {
      const uint16_t bits = codec == Codec::f16 ? from_float<Half>(x).bits : from_float<Bf16>(x).bits;
      std::memcpy(&codes[2 * at], &bits, 2);
      return decode(&bits, codec == Codec::f16 ? Type::f16 : Type::bf16);
    }
    if (is_packed(codec)) {
      const int code = below(16);
      uint8_t& pair = codes[at / 2];
      pair = d % 2 ? uint8_t((pair & 15) | code << 4) : uint8_t((pair & 0xf0) | code);
      const float scale = to_float(Half{half_scales[parameter]}), offset = to_float(Half{half_offsets[parameter]});
      const float y = std::fma(float(code), scale, offset);
      return values ? y : to_float(from_float<Bf16>(y));  // keys are rounded to what is multiplied
    }
    uint8_t& code = codes[is_transposed(codec) ? (size_t(tile) * kD + d) * page_size + t : at];
    const float top = values ? 100 : 40;
    code = is_e4m3(codec) ? uint8_t(e4m3_bits(x * top)) : uint8_t(int8_t(std::fmax(-127.f, std::fmin(127.f, x * 40))));
    return scales[parameter] * decode(&code, is_e4m3(codec) ? Type::e4m3 : Type::s8);
  }
};

template <Kind kKind, int kD>
struct Pages {
  Numbers<kD> k, v;
  explicit Pages(const Case& c) : k(traits_of(kKind).k, c), v(traits_of(kKind).v, c) {}
  void fill(int page, int length, bool flat) {
    k.fill(page, length, false, flat);
    v.fill(page, length, true, false);
  }
};

// Rows of q that 8 bits hold exactly: what is left is the rounding of the weights.
template <Kind kKind, int kD>
void fill_queries(std::vector<uint16_t>& q) {
  for (size_t i = 0; i < q.size(); ++i) {
    float x = normal();
    if (is_int8(kKind)) x = i % kD == 0 ? 127 / 64.f : std::fmax(-127.f, std::fmin(127.f, std::nearbyint(x * 64))) / 64;
    else if (is_eight_bit(kKind)) x = i % kD == 0 ? 448 / 128.f : to_float(E4m3{uint8_t(e4m3_bits(x * 128))}) / 128;
    q[i] = query_type(kKind) == DType::f16 ? from_float<Half>(x).bits : from_float<Bf16>(x).bits;
  }
}

struct Error {
  double out = 0, lse = 0;  // the largest; of out as a share of what rounding may do
};

template <Kind kKind, int kD>
Error run(const Case& c, uint32_t seed) {
  rng.seed(seed);
  int T = 0;
  std::vector<int32_t> q_indptr{0}, page_indptr{0}, ids, lens, variants;
  std::vector<float> bias;
  for (const int n : c.queries) q_indptr.push_back(T += n);
  std::vector<Pages<kKind, kD>> pools(c.pools, Pages<kKind, kD>(c));
  std::vector<int> length(c.pools * c.pages);
  for (int page = 0; page < c.pools * c.pages; ++page) {
    length[page] = below(3) ? c.page_size : below(c.page_size + 1);
    // Page 0 of each belongs to nobody.
    if (page % c.pages) pools[page / c.pages].fill(page % c.pages, length[page], c.flat);
  }
  // Before each pool lie kForeign page ids of pools of other kinds.
  constexpr int kForeign = 5;
  const int stride = kForeign + c.pages, segments = int(c.queries.size());
  for (int list = 0; list < segments * c.lists_per_segment; ++list) {
    const int n = list % 3 == 2 ? 0 : c.entries / 2 + below(c.entries / 2 + 1);
    for (int i = 0; i < n; ++i) {
      const int pool = below(c.pools), page = 1 + below(c.pages - 1);
      const bool foreign = below(8) == 0;
      ids.push_back(pool * stride + (foreign ? below(kForeign) : kForeign + page));
      lens.push_back(length[pool * c.pages + page]);
      variants.push_back(below(c.variants));
      bias.push_back(below(5) == 0 ? -INFINITY : normal());
    }
    page_indptr.push_back(int32_t(ids.size()));
  }
  const int query_heads = c.heads * c.group, lists = int(page_indptr.size()) - 1, strips = segments * c.heads;
  std::vector<uint16_t> q(size_t(c.variants) * T * query_heads * kD);
  fill_queries<kKind, kD>(q);
  std::vector<float> out(size_t(T) * query_heads * kD, NAN), lse(size_t(T) * query_heads, -INFINITY);
  if (c.accumulate)
    for (size_t i = 0; i < lse.size(); ++i)
      if (i % 3) {
        lse[i] = normal();
        for (int d = 0; d < kD; ++d) out[i * kD + d] = normal();
      }
  const std::vector<float> old_out = out, old_lse = lse;

  std::vector<int64_t> work_start(strips + 1), range_start(c.blocks + 1), list_start(lists + 1);
  std::vector<int32_t> tile_start(strips + 1), key_tiles(strips), list_tiles(lists);
  int32_t whole = -1;
  const WorkTable work{work_start.data(), tile_start.data(), key_tiles.data(), range_start.data(), &whole, strips,
                       c.blocks};
  std::vector<Unit> units(unit_start(lists, int64_t(ids.size()), c.variants, c.page_size));
  PrepareArgs prepare{q_indptr.data(), page_indptr.data(), ids.data(), lens.data(), c.bias ? bias.data() : nullptr,
                      c.variants > 1 ? variants.data() : nullptr, T, int32_t(ids.size()), segments, c.heads,
                      c.lists_per_segment, c.variants, c.page_size, c.group, c.pools, {}, work, units.data(),
                      list_start.data(), list_tiles.data()};
  for (int i = 0; i < c.pools; ++i) prepare.pool[i] = {i * stride + kForeign, c.pages};
  {
    Machine m(kPrepareThreads, seed);
    machine = &m;
    m.run(0, 0, [&] { prepare_kernel(prepare); });
  }
  std::vector<float> partial_out(size_t(2) * c.blocks * kBlockM * kD, NAN);
  std::vector<float> partial_lse(size_t(2) * c.blocks * kBlockM, NAN);
  HeadRows rows{reinterpret_cast<char*>(out.data()), int64_t(query_heads) * kD, kD, DType::f32};
  HeadRows from = rows;
  if (!c.accumulate) from.data = nullptr;
  const float scale = 1 / std::sqrt(float(kD));
  AttentionArgs args{reinterpret_cast<char*>(q.data()), int64_t(T) * query_heads * kD, int64_t(query_heads) * kD, kD,
                     from, rows, lse.data(), c.pools, {}, {}, q_indptr.data(),
                     units.data(), list_start.data(), work, T, c.heads, c.lists_per_segment, c.page_size,
                     Divisor(c.group), scale * kLog2E, partial_out.data(), partial_lse.data()};
  const uint64_t slots = uint64_t(c.pages) * c.heads * c.page_size;
  const bool floats = is_float(traits_of(kKind).k);
  TensorMaps maps{};
  for (int i = 0; i < c.pools; ++i) {
    args.k[i] = pools[i].k.plane();
    args.v[i] = pools[i].v.plane();
    maps.keys[i] = {reinterpret_cast<char*>(pools[i].k.codes.data()),
                    floats ? box_of_16_bit_rows(slots, kD) : box_of_8_bit_keys(slots, kD), floats ? 2 : 1};
    maps.values[i] = {reinterpret_cast<char*>(pools[i].v.codes.data()),
                      floats                   ? box_of_16_bit_rows(slots, kD)
                      : is_eight_bit(kKind) ? box_of_8_bit_values(slots / c.page_size * kD, kD, c.page_size)
                                            : box_of_transposed_values(slots / c.page_size * kD, kD, c.page_size),
                      floats ? 2 : 1};
  }
  for (int block = 0; block < c.blocks; ++block) {
    Machine m((kConsumers + 1) * kWarpgroup, seed + block);
    machine = &m;
    m.slow = c.slow;
    m.run(block, 0, [&] { attention_kernel<kKind, kD>(args, maps); });
  }
  for (int block = 0; block < c.blocks; ++block)
    for (int part = 0; part < kMergeParts; ++part) {
      Machine m(kMergeThreads, seed);
      machine = &m;
      m.run(block, part, [&] { merge_partials_kernel<kD>(args); });
    }

  Error error;
  for (int s = 0; s < segments; ++s)
    for (int t = q_indptr[s]; t < q_indptr[s + 1]; ++t)
      for (int h = 0; h < query_heads; ++h) {
        const int head = h / c.group, list = c.lists_per_segment == 1 ? s : s * c.heads + head;
        const size_t row = size_t(t) * query_heads + h;
        std::vector<double> scores, sum(kD, 0.), magnitude(kD, 0.);
        std::vector<const float*> values;
        for (int e = page_indptr[list]; e < page_indptr[list + 1]; ++e) {
          const int page = ids[e] % stride - kForeign;
          if (page < 0) continue;
          Pages<kKind, kD>& pages = pools[ids[e] / stride];
          const uint16_t* x = &q[(size_t(c.variants > 1 ? variants[e] : 0) * T * query_heads + row) * kD];
          for (int i = 0; i < lens[e]; ++i) {
            const size_t slot = (size_t(page) * c.heads + head) * c.page_size + i;
            double score = 0;
            for (int d = 0; d < kD; ++d) score += double(decode(&x[d], type_of_queries(kKind))) * pages.k.numbers[slot * kD + d];
            scores.push_back(score * scale + (c.bias ? bias[e] : 0.f));
            values.push_back(&pages.v.numbers[slot * kD]);
          }
        }
        double total = 0, top = -INFINITY;
        const bool old = c.accumulate && old_lse[row] != -INFINITY;
        if (old) top = old_lse[row];
        for (const double x : scores) top = std::max(top, x);
        if (old) {
          total += std::exp(old_lse[row] - top);
          for (int d = 0; d < kD; ++d) sum[d] += total * old_out[row * kD + d];
        }
        for (size_t i = 0; i < scores.size(); ++i) {
          const double w = top == -INFINITY ? 0 : std::exp(scores[i] - top);
          total += w;
          // Weights are rounded to 8 bits of mantissa (bf16), to 11 and in steps of 2^-24 at least (f16), or to 4 and
          // in steps of 2^-17 (e4m3, scaled by 2^8): by half of that, in proportion to the value they belong to. So are
          // values that were widened.
          const double rounding = is_eight_bit(kKind)                ? w * 0x1p-4 + 0x1p-18
                                  : query_type(kKind) == DType::f16 ? w * 0x1p-11 + 0x1p-25
                                                                    : w * 0x1p-8;
          const double widening = is_wide(kKind) ? w * 0x1p-8 : 0;
          for (int d = 0; d < kD && w > 0; ++d) {
            sum[d] += w * values[i][d];
            magnitude[d] += ((c.flat ? 0 : rounding) + widening) * std::fabs(values[i][d]);
          }
        }
        for (int d = 0; d < kD; ++d) {
          const double diff = std::fabs(out[row * kD + d] - (total > 0 ? sum[d] / total : 0));
          const double most = (total > 0 ? magnitude[d] / total : 0) + 2e-6;  // and float32 sums
          error.out = std::isnan(diff) ? INFINITY : std::max(error.out, diff / most);
        }
        const double want = total > 0 ? top + std::log(total) : -INFINITY;
        const double diff = want == lse[row] ? 0 : std::fabs(lse[row] - want);
        error.lse = std::isnan(diff) ? INFINITY : std::max(error.lse, diff);
      }
  return error;
}

int failures = 0;

// The bring-up's probes: one product of each kind, and one key tile by TMA.
template <Kind kKind, int kD>
void check_probes(const char* kind, uint32_t seed) {
  rng.seed(seed);
  constexpr int kSize = is_eight_bit(kKind) ? 1 : 2;
  constexpr Type kKeys = !is_eight_bit(kKind) ? type_of_queries(kKind) : is_int8(kKind) ? Type::s8 : Type::e4m3;
  constexpr Type kValues = !is_eight_bit(kKind) ? type_of_queries(kKind) : Type::e4m3;
  const auto random_codes = [](int count, Type type) {
    std::vector<char> bytes(count * bytes_of(type));
    for (int i = 0; i < count; ++i) {
      const float x = float(below(17) - 8);
      const uint16_t code = type == Type::bf16  ? from_float<Bf16>(x).bits
                            : type == Type::f16 ? from_float<Half>(x).bits
                            : type == Type::s8 ? uint16_t(uint8_t(int8_t(x))) : uint16_t(e4m3_bits(x));
      std::memcpy(&bytes[i * bytes_of(type)], &code, bytes_of(type));
    }
    return bytes;
  };
  const auto q = random_codes(kWgmmaM * kD, kKeys), k = random_codes(kBlockN * kD, kKeys);
  const auto v = random_codes(kBlockN * kD, kValues);
  std::vector<float> weights(kWgmmaM * kBlockN), scores(kWgmmaM * kBlockN), out(kWgmmaM * kD);
  for (float& w : weights) w = float(below(9));
  Machine m(kWarpgroup, seed);
  machine = &m;
  m.run(0, 0, [&] { probe_scores_kernel<kKind, kD>(q.data(), k.data(), scores.data()); });
  m.run(0, 0, [&] { probe_values_kernel<kKind, kD>(weights.data(), v.data(), out.data()); });
  bool good = true;
  for (int r = 0; r < kWgmmaM; ++r) {
    for (int n = 0; n < kBlockN; ++n) {
      float want = 0;
      for (int d = 0; d < kD; ++d) want += decode(&q[(r * kD + d) * kSize], kKeys) * decode(&k[(n * kD + d) * kSize], kKeys);
      good = good && scores[r * kBlockN + n] == want;
    }
    for (int column = 0; column < kD; ++column) {
      const int d = is_eight_bit(kKind) ? key_of_column_8(column) : column;
      float want = 0;
      for (int n = 0; n < kBlockN; ++n) {
        const bool transposed = is_transposed(traits_of(kKind).v);
        const int at = transposed ? (n / kUnitKeys * kD + column) * kUnitKeys + n % kUnitKeys : n * kD + column;
        want += weights[r * kBlockN + n] * decode(&v[at * kSize], kValues);
      }
      good = good && out[r * kD + d] == want;
    }
  }
  failures += !good;
  std::printf("%s %s, D = %d, probes\n", good ? "ok  " : "FAIL", kind, kD);
}

template <Kind kKind, int kD>
void check(const char* kind, const Case& c, uint32_t seed) {
  const Error error = run<kKind, kD>(c, seed);
  const bool good = error.out <= 1 && error.lse <= 2e-5;
  failures += !good;
  std::printf("%s %s, D = %d, %s: out %.2g, lse %.2g\n", good ? "ok  " : "FAIL", kind, kD, c.name, error.out, error.lse);
  std::fflush(stdout);
}

// Of all cases of all kinds, one after the other, each `every`-th.
struct Slice {
  int every, next = 0;
  bool takes() { return next++ % every == 0; }
};

template <Kind kKind>
void check_all(const std::vector<Case>& cases, uint32_t seed, Slice& slice) {
  constexpr const char* kind = traits_of(kKind).name;
  for (const Case& c : cases) {
    if (!slice.takes()) continue;
    check<kKind, 128>(kind, c, seed);
    check<kKind, 64>(kind, c, seed);
  }
  check_probes<kKind, 128>(kind, seed);
  check_probes<kKind, 64>(kind, seed);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Case> cases{
      // queries, heads, group, page_size, pages, variants, lists, blocks, entries, bias, accumulate, flat
      {"one segment", {70}, 1, 1, 64, 9, 1, 1, 2, 9, false, false, false},
      {"a slow warpgroup", {20}, 1, 1, 128, 9, 1, 1, 1, 12, false, false, false, 0},
      {"equal keys", {5}, 2, 1, 64, 6, 1, 1, 3, 5, false, false, true},
      {"grouped heads, ragged", {37, 3, 50}, 2, 3, 64, 8, 1, 1, 3, 6, true, true, false},
      {"lists per head, variants", {9, 30}, 3, 2, 128, 6, 3, 3, 4, 5, true, false, false},
      {"more blocks than work", {1, 2}, 1, 1, 64, 4, 1, 1, 9, 2, false, true, false},
      {"three pools", {70, 9}, 2, 1, 64, 5, 2, 1, 2, 9, true, false, false, -1, 3},
  };
  const std::vector<Case> any_page_size{
      {"small pages", {70}, 2, 1, 24, 9, 2, 1, 2, 12, true, false, false},
      {"odd pages", {70}, 2, 1, 93, 9, 1, 2, 2, 6, false, false, false},
  };
  const uint32_t seed = argc > 1 ? uint32_t(std::atoi(argv[1])) : 0;
  Slice slice{argc > 2 ? std::atoi(argv[2]) : 1};
  for_each_kind([&](auto kind) {
    constexpr Kind kKind = decltype(kind)::value;
    check_all<kKind>(cases, seed, slice);
    if (is_float(traits_of(kKind).k)) check_all<kKind>(any_page_size, seed, slice);
  });
  return failures != 0;
}
