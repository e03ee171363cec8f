// GELU of sixteen numbers at a time.
#pragma once
#include "../linear.h"
#include "simd.h"

namespace inferix {

template <typename S>
INFERIX_INLINE typename S::Lanes gelu_tanh(const typename S::Lanes& x) {
  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), and e^-2|u| does not overflow.
  const auto u = x * 0.79788456f * S::fma(x * x, S::all(0.044715f), S::all(1.f));
  const auto e = S::exp2(S::max(u, -u) * -2.88539008f);
  return x * (u >= 0.f ? S::all(1.f) : e) * S::reciprocal(e + 1.f);
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: erfc within 1.5e-7.
template <typename S>
INFERIX_INLINE typename S::Lanes gelu_erf(const typename S::Lanes& x) {
  const auto z = S::min(S::max(x, -x) * 0.70710678f, S::all(16.f));  // beyond it erfc is 0
  const auto t = S::reciprocal(S::fma(z, S::all(0.3275911f), S::all(1.f)));
  auto p = S::fma(t, S::all(1.061405429f), S::all(-1.453152027f));
  p = S::fma(p, t, S::all(1.421413741f));
  p = S::fma(p, t, S::all(-0.284496736f));
  p = S::fma(p, t, S::all(0.254829592f));
  const auto tail = x * 0.5f * (p * t * S::exp2(z * z * -1.44269504f));  // 0.5 x erfc(|x| / sqrt 2)
  return x < 0.f ? tail : x - tail;
}

// function(f) with f the activation: called with Lanes.
template <typename S, typename Function>
INFERIX_INLINE void with_activation(Activation activation, const Function& function) {
  using Lanes = typename S::Lanes;
  if (activation == Activation::gelu) function([](const Lanes& x) INFERIX_INLINE_LAMBDA { return gelu_erf<S>(x); });
  if (activation == Activation::gelu_tanh)
    function([](const Lanes& x) INFERIX_INLINE_LAMBDA { return gelu_tanh<S>(x); });
}

}  // namespace inferix
