// A launch that CUDA refuses becomes a Python RuntimeError that names the op.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace inferix {

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace inferix
