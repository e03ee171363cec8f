// Layer norm and RMS norm.
#pragma once
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace inferix {

// The sum of term(i), i < count, as sixteen partial sums: a single one is a chain of dependent additions, less exact.
template <typename Term>
INFERIX_INLINE float sum_of(int64_t count, const Term& term) {
  constexpr int kParts = 16;
  float parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int j = 0; j < kParts; ++j) parts[j] += term(i + j);
  for (; i < count; ++i) parts[0] += term(i);
  float sum = 0.f;
  for (const float part : parts) sum += part;
  return sum;
}

INFERIX_INLINE void subtract_mean(float* x, int64_t count) {
  const float mean = sum_of(count, [x](int64_t i) INFERIX_INLINE_LAMBDA { return x[i]; }) / float(count);
  for (int64_t i = 0; i < count; ++i) x[i] -= mean;
}

INFERIX_INLINE float inverse_rms(const float* x, int64_t count, float eps) {
  const float sum = sum_of(count, [x](int64_t i) INFERIX_INLINE_LAMBDA { return x[i] * x[i]; });
  return 1.f / std::sqrt(sum / float(count) + eps);
}

}  // namespace inferix
