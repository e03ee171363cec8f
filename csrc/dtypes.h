// Element types that cross the boundary.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace inferix {

enum class DType : int32_t { f32, bf16, i8 };

inline const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "int8"};
  return names[static_cast<int>(dtype)];
}

[[noreturn]] inline void unsupported(const char* argument, DType dtype) {
  throw std::invalid_argument(std::string(argument) + " cannot be " + name(dtype));
}

// int8 codes are symmetric; an all-zero group gets a scale above 0, so that it stores zeros and not NaN.
constexpr float kInt8Max = 127.f;
constexpr float kAmaxFloor = 1e-12f;

}  // namespace inferix
