// CUDA errors become a Python RuntimeError that names the op.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace inferix {

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

inline void check_launch(const char* op) { check_cuda(op, cudaGetLastError()); }

}  // namespace inferix
