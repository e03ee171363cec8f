// Element types that cross the boundary, and how pages store them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace inferix {

// Of activations: k, v, q, qkv, out.
enum class DType : int32_t { f32, bf16, f16 };

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

// A kernel cannot take these arguments, and says why before it writes anything; another backend may.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void unsupported(const char* argument, DType dtype) {
  throw std::invalid_argument(std::string(argument) + " cannot be " + name(dtype));
}

// How one side of a page, its keys or its values, is stored (Codec in inferix_kernels/layout.py). The second word says
// what shares a scale. u4 lies two codes to a byte, the even channel in the low half; e4m3_channel lies transposed.
enum class Codec : int32_t { f32, bf16, f16, i8_token, i8_channel, e4m3_token, e4m3_channel, u4_token, u4_channel };

// A row of zeros gets a scale above 0, so that it stores zeros and not NaN. Those of 4-bit codes are float16.
constexpr float kInt8Max = 127.f, kE4m3Max = 448.f, kU4Max = 15.f;  // int8 codes are symmetric
constexpr float kAmaxFloor = 1e-12f;
constexpr float kStepFloor = 0x1p-14f;  // the smallest normal float16
constexpr float kHalfMax = 65504.f;

}  // namespace inferix
