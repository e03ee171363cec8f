// quantize_rows and linear on the CPU.
//
// linear is the q . k micro-kernel of attention: weight rows are the keys, sixteen rows of x the queries. Its sums are
// scaled in the epilogue, row by row, so that int8 gives the bits of the formula with every instruction set.
#include "../linear.h"

#include <algorithm>
#include <string>
#include <vector>

#include "attention_tile.h"
#include "codes.h"
#include "norms.h"
#include "parallel.h"

namespace inferix {
namespace {

// 2^x for x <= 0, within 2 units in the last place; as Simd::exp2, but for loops that the compiler makes vectors of.
INFERIX_INLINE float exp2_of(float x) {
  x = std::max(x, -126.f);
  const float shifted = x + 12582912.f, f = x - (shifted - 12582912.f);
  float p = f * 1.5344105e-4f + 1.3405462e-3f;
  p = p * f + 9.6185449e-3f;
  p = p * f + 5.5503126e-2f;
  p = p * f + 2.4022646e-1f;
  p = p * f + 6.9314724e-1f;
  p = p * f + 1.f;
  return p * float_of((bits_of(shifted) + 127) << 23);
}

INFERIX_INLINE float gelu_tanh(float x) {
  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), and e^-2|u| does not overflow.
  const float u = 0.79788456f * (x + 0.044715f * x * x * x), e = exp2_of(-2.88539008f * std::abs(u));
  return x * (u >= 0.f ? 1.f : e) / (1.f + e);
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erfc within 1.5e-7.
INFERIX_INLINE float gelu_erf(float x) {
  const float z = std::abs(x) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * z);
  float p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * x * (p * t * exp2_of(-1.44269504f * z * z));  // 0.5 x erfc(|x| / sqrt 2)
  return x < 0.f ? tail : x - tail;
}

INFERIX_INLINE void activate(float* y, int64_t count, Activation activation) {
  if (activation == Activation::gelu)
    for (int64_t i = 0; i < count; ++i) y[i] = gelu_erf(y[i]);
  if (activation == Activation::gelu_tanh)
    for (int64_t i = 0; i < count; ++i) y[i] = gelu_tanh(y[i]);
}

const float* row_of(const Groups& groups, int64_t width, int64_t row, int64_t rows) {
  return groups.data ? groups.data + row / (rows / groups.groups) * width : nullptr;
}

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

INFERIX_INLINE void prepare(const QuantizeRowsParams& p, int64_t row, float* __restrict y) {
  if (p.norm == Norm::layer) subtract_mean(y, p.K);
  if (p.norm != Norm::none) {
    const float inverse = inverse_rms(y, p.K, p.eps);
    for (int64_t k = 0; k < p.K; ++k) y[k] *= inverse;
  }
  if (p.weight)
    for (int64_t k = 0; k < p.K; ++k) y[k] *= p.weight[k];
  if (p.bias)
    for (int64_t k = 0; k < p.K; ++k) y[k] += p.bias[k];
  if (const float* scale = row_of(p.scale, p.K, row, p.M))
    for (int64_t k = 0; k < p.K; ++k) y[k] *= 1.f + scale[k];
  if (const float* shift = row_of(p.shift, p.K, row, p.M))
    for (int64_t k = 0; k < p.K; ++k) y[k] += shift[k];
  activate(y, p.K, p.activation);
}

constexpr int64_t kRowsPerTask = 128;
// float32 holds the sum of this many products of int8 codes exactly: for instruction sets without integer dot products.
constexpr int64_t kExactTerms = 1024;

enum class Words { floats, bf16, int8 };

Words words_of(Codec codec, Isa isa) {
  if (codec == Codec::i8_token) return isa >= Isa::avx512_vnni ? Words::int8 : Words::floats;
  return isa >= Isa::avx512_bf16 ? Words::bf16 : Words::floats;  // e4m3 is exact in bfloat16
}

// x and the weight, packed for the micro-kernel.
struct Operands {
  Words words;
  int64_t row_words;             // to a row
  std::vector<Column> x;         // [ceil(M / 16)][row_words]
  std::vector<int32_t> weight;   // [N rounded up to 16][row_words]; empty if read in place
  std::vector<int32_t> compensation;  // [N rounded up to 16]  int8: of x's zero point
  const char* weight_rows;
};

// One row of K codes as words, zeros up to a whole one; unsigned bytes are 128 more.
INFERIX_INLINE void row_to_words(const Operands& o, Isa isa, Codec codec, const char* codes, int64_t K,
                                 bool is_unsigned, int32_t* words) {
  words[o.row_words - 1] = 0;
  if (o.words == Words::int8) {
    std::memcpy(words, codes, K);
    if (is_unsigned)
      for (int64_t n = 0; n < o.row_words; ++n) words[n] ^= static_cast<int32_t>(0x80808080);
    return;
  }
  thread_local Buffer buffer;
  float one = 1.f, *x = buffer.floats(K);
  decode(isa, Tile{codec, 1, K, K, const_cast<char*>(codes), reinterpret_cast<char*>(&one), nullptr}, 0, 1, x, K);
  from_floats(isa, o.words == Words::bf16 ? DType::bf16 : DType::f32, x, K, 1, K, words, K);
}

// Sixteen rows of x, or as many as there are, side by side.
template <typename S>
INFERIX_INLINE void pack_x(Isa isa, const LinearParams& p, int64_t group, Operands& o) {
  const int64_t stride = (o.row_words + kLanes - 1) / kLanes * kLanes, first = group * kLanes;
  thread_local std::vector<int32_t> words;
  words.assign(kLanes * stride, 0);
  for (int64_t m = first; m < std::min(p.M, first + kLanes); ++m)
    row_to_words(o, isa, p.codec, static_cast<const char*>(p.x) + m * p.K, p.K, true, &words[(m - first) * stride]);
  alignas(64) Column block[kLanes];
  for (int64_t n = 0; n < o.row_words; n += kLanes) {
    S::transpose(reinterpret_cast<const float*>(&words[n]), stride, block[0].lane, kLanes);
    std::copy_n(block, std::min<int64_t>(kLanes, o.row_words - n), &o.x[group * o.row_words + n]);
  }
}

// A row of the weight, and its zero-point compensation.
template <typename S>
INFERIX_INLINE void pack_weight(Isa isa, const LinearParams& p, int64_t n, Operands& o) {
  const char* codes = static_cast<const char*>(p.weight) + n * p.K;
  if (!o.weight.empty()) row_to_words(o, isa, p.codec, codes, p.K, false, &o.weight[n * o.row_words]);
  if (o.words == Words::int8) o.compensation[n] = zero_point_compensation<S>(codes, p.K);
}

template <typename S, int kBlock, typename Function>
INFERIX_INLINE void with_micro_kernels(Words words, const Function& function) {
#if defined(__x86_64__)
  if constexpr (S::kWidth == 16) {
    if (words == Words::int8) return function(MicroKernels<S, Int8Quads, kBlock>{});
    if (words == Words::bf16) return function(MicroKernels<S, Bf16Pairs, kBlock>{});
  }
#endif
  function(MicroKernels<S, Floats<S>, kBlock>{});
}

// sums[n] = x . weight row first + n, for sixteen rows of x.
template <typename S, int kBlock>
INFERIX_INLINE void dot_products(const LinearParams& p, const Operands& o, int64_t group, int64_t first, int64_t count,
                                 Column* sums) {
  alignas(64) float zeros[kTileKeys] = {}, ones[kTileKeys];
  std::fill_n(ones, kTileKeys, 1.f);
  Column unit;
  std::fill_n(unit.lane, kLanes, 1.f);
  const char* rows = o.weight_rows + first * o.row_words * 4;
  const Column* x = &o.x[group * o.row_words];
  const bool split = o.words == Words::floats && p.codec == Codec::i8_token && p.K > kExactTerms;
  const int64_t step = split ? kExactTerms : o.row_words;
  alignas(64) Column part[kTileKeys];
  int32_t exact_sums[kTileKeys][kLanes] = {};
  for (int64_t k = 0; k < o.row_words; k += step) {
    const TileKeys keys{rows + k * 4, o.row_words * 4, std::min(step, o.row_words - k), count, zeros, ones,
                        o.compensation.data() + first};
    with_micro_kernels<S, kBlock>(o.words, [&](auto kernels) INFERIX_INLINE_LAMBDA {
      kernels.qk_product(keys, x + k, unit, split ? part : sums);
    });
    for (int64_t n = 0; split && n < count; ++n)
      for (int lane = 0; lane < kLanes; ++lane) exact_sums[n][lane] += static_cast<int32_t>(part[n].lane[lane]);
  }
  for (int64_t n = 0; split && n < count; ++n)
    for (int lane = 0; lane < kLanes; ++lane) sums[n].lane[lane] = float(exact_sums[n][lane]);
}

// Scales, bias, activation, gate and residual of `count` elements of one row.
INFERIX_INLINE void epilogue(Isa isa, const LinearParams& p, int64_t m, int64_t n, int64_t count, float* __restrict y) {
  for (int64_t i = 0; i < count; ++i) y[i] *= p.x_scales[m] * p.weight_scales[n + i];
  if (p.bias)
    for (int64_t i = 0; i < count; ++i) y[i] += p.bias[n + i];
  activate(y, count, p.activation);
  if (const float* gate = row_of(p.gate, p.N, m, p.M))
    for (int64_t i = 0; i < count; ++i) y[i] *= gate[n + i];
  if (p.residual) {
    float residual[kTileKeys];
    const char* from = static_cast<const char*>(p.residual) + (m * p.N + n) * element_bytes(p.residual_dtype);
    to_floats(isa, p.residual_dtype, from, count, 1, count, residual, count);
    for (int64_t i = 0; i < count; ++i) y[i] += residual[i];
  }
  char* out = static_cast<char*>(p.out) + (m * p.N + n) * element_bytes(p.out_dtype);
  from_floats(isa, p.out_dtype, y, count, 1, count, out, count);
}

// Rows first_row : end_row of the result, columns first : first + count.
template <typename S, int kBlock>
INFERIX_INLINE void multiply(Isa isa, const LinearParams& p, const Operands& o, int64_t first_row, int64_t end_row,
                             int64_t first) {
  const int64_t count = std::min(kTileKeys, p.N - first), rows = (count + kLanes - 1) / kLanes * kLanes;
  alignas(64) Column sums[kTileKeys];
  alignas(64) float y[kLanes][kTileKeys];
  for (int64_t group = first_row; group < end_row; group += kLanes) {
    dot_products<S, kBlock>(p, o, group / kLanes, first, rows, sums);
    for (int64_t n = 0; n < rows; n += kLanes) S::transpose(sums[n].lane, kLanes, &y[0][n], kTileKeys);
    for (int64_t m = group; m < std::min(end_row, group + kLanes); ++m) epilogue(isa, p, m, first, count, y[m - group]);
  }
}

struct Kernels {
  void (*prepare_row)(const QuantizeRowsParams&, int64_t, float*);
  void (*pack_x)(Isa, const LinearParams&, int64_t, Operands&);
  void (*pack_weight)(Isa, const LinearParams&, int64_t, Operands&);
  void (*linear_tile)(Isa, const LinearParams&, const Operands&, int64_t, int64_t, int64_t);
};

#define INFERIX_KERNELS(level, target, width, block)                                                                  \
  target void prepare_##level(const QuantizeRowsParams& p, int64_t row, float* y) { prepare(p, row, y); }             \
  target void pack_x_##level(Isa isa, const LinearParams& p, int64_t group, Operands& o) {                            \
    pack_x<Simd<width>>(isa, p, group, o);                                                                            \
  }                                                                                                                   \
  target void pack_weight_##level(Isa isa, const LinearParams& p, int64_t n, Operands& o) {                           \
    pack_weight<Simd<width>>(isa, p, n, o);                                                                           \
  }                                                                                                                   \
  target void multiply_##level(Isa isa, const LinearParams& p, const Operands& o, int64_t first_row, int64_t end_row, \
                               int64_t first) {                                                                       \
    multiply<Simd<width>, block>(isa, p, o, first_row, end_row, first);                                               \
  }                                                                                                                   \
  constexpr Kernels level{prepare_##level, pack_x_##level, pack_weight_##level, multiply_##level};

INFERIX_KERNELS(portable, , 4, 2)
#if defined(__x86_64__)
INFERIX_KERNELS(v3, INFERIX_V3, 8, 4)
INFERIX_KERNELS(v4, INFERIX_V4, 16, 16)
Kernels kernels(Isa isa) { return *dispatch(isa, &portable, &v3, &v4); }
#else
Kernels kernels(Isa) { return portable; }
#endif

Operands operands(const LinearParams& p, const Cpu& cpu) {
  const Kernels level = kernels(cpu.isa);
  const int64_t groups = (p.M + kLanes - 1) / kLanes, blocks = (p.N + kLanes - 1) / kLanes;
  Operands o{};
  o.words = words_of(p.codec, cpu.isa);
  const int64_t elements = o.words == Words::int8 ? 4 : o.words == Words::bf16 ? 2 : 1;
  o.row_words = (p.K + elements - 1) / elements;
  o.x.resize(groups * o.row_words);
  o.compensation.resize(blocks * kLanes);
  o.weight_rows = static_cast<const char*>(p.weight);
  if (o.words != Words::int8 || p.K % 4 || p.N % kLanes) {
    o.weight.resize(blocks * kLanes * o.row_words);
    o.weight_rows = reinterpret_cast<const char*>(o.weight.data());
  }
  parallel_for(cpu.threads, groups, [&](int64_t group) { level.pack_x(cpu.isa, p, group, o); });
  parallel_for(cpu.threads, blocks, [&](int64_t block) {
    for (int64_t n = block * kLanes; n < std::min(p.N, (block + 1) * kLanes); ++n)
      level.pack_weight(cpu.isa, p, n, o);
  });
  return o;
}

}  // namespace

void quantize_rows_cpu(const QuantizeRowsParams& p, const Cpu& cpu) {
  constexpr int64_t kRows = 16;
  const auto prepare_row = kernels(cpu.isa).prepare_row;
  parallel_for(cpu.threads, (p.M + kRows - 1) / kRows, [&](int64_t task) {
    thread_local std::vector<float> y;
    y.resize(p.K);
    for (int64_t row = task * kRows; row < std::min(p.M, (task + 1) * kRows); ++row) {
      const char* x = static_cast<const char*>(p.x) + row * p.x_stride * element_bytes(p.x_dtype);
      to_floats(cpu.isa, p.x_dtype, x, p.K, 1, p.K, y.data(), p.K);
      prepare_row(p, row, y.data());
      char* codes = static_cast<char*>(p.codes) + row * p.K;
      encode(cpu.isa, Tile{p.codec, 1, p.K, p.K, codes, reinterpret_cast<char*>(p.scales + row), nullptr}, y.data(), p.K, 1);
    }
  });
}

void linear_cpu(const LinearParams& p, const Cpu& cpu) {
  if (p.codec == Codec::i8_token && p.K > kMaxInt8Terms)
    throw std::invalid_argument("x.codes must have at most " + std::to_string(kMaxInt8Terms) + " columns, got " +
                                std::to_string(p.K));
  if (p.M == 0 || p.N == 0 || p.K == 0) {
    if (p.M && p.N) throw std::invalid_argument("x.codes must have at least 1 column, got 0");
    return;
  }
  const Operands o = operands(p, cpu);
  const auto linear_tile = kernels(cpu.isa).linear_tile;
  const int64_t tiles = (p.N + kTileKeys - 1) / kTileKeys, shares = (p.M + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(cpu.threads, shares * tiles, [&](int64_t task) {
    const int64_t first = task / tiles * kRowsPerTask;
    linear_tile(cpu.isa, p, o, first, std::min(p.M, first + kRowsPerTask), task % tiles * kTileKeys);
  });
}

}  // namespace inferix
