// Element types that cross the boundary, and how pages store them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define INFERIX_BOTH __host__ __device__
#else
#define INFERIX_BOTH
#endif

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

INFERIX_BOTH constexpr bool is_float(Codec codec) {
  return codec == Codec::f32 || codec == Codec::bf16 || codec == Codec::f16;
}
INFERIX_BOTH constexpr bool is_packed(Codec codec) { return codec == Codec::u4_token || codec == Codec::u4_channel; }
INFERIX_BOTH constexpr bool is_e4m3(Codec codec) { return codec == Codec::e4m3_token || codec == Codec::e4m3_channel; }
INFERIX_BOTH constexpr bool is_transposed(Codec codec) { return codec == Codec::e4m3_channel; }
INFERIX_BOTH constexpr bool is_by_token(Codec codec) {
  return codec == Codec::i8_token || codec == Codec::e4m3_token || codec == Codec::u4_token;
}
// Bytes of a stored element, of one token's codes, and of one scale.
INFERIX_BOTH constexpr int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
INFERIX_BOTH constexpr int element_bytes(Codec codec) { return codec == Codec::f32 ? 4 : is_float(codec) ? 2 : 1; }
template <typename Int>
INFERIX_BOTH constexpr Int row_bytes(Codec codec, Int width) {
  return codec == Codec::f32 ? 4 * width : is_float(codec) ? 2 * width : is_packed(codec) ? width / 2 : width;
}
INFERIX_BOTH constexpr int scale_bytes(Codec codec) { return is_float(codec) ? 0 : is_packed(codec) ? 2 : 4; }

// A row of zeros gets a scale above 0, so that it stores zeros and not NaN. Those of 4-bit codes are float16.
constexpr float kInt8Max = 127.f, kE4m3Max = 448.f, kU4Max = 15.f;  // int8 codes are symmetric
constexpr float kAmaxFloor = 1e-12f;
constexpr float kStepFloor = 0x1p-14f;  // the smallest normal float16
constexpr float kHalfMax = 65504.f;

}  // namespace inferix
