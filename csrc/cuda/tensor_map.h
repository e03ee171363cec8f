// Tensor maps (TMA descriptors), encoded by the driver. Its function is looked up at run time: nothing links to it.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "layouts.h"

#if CUDART_VERSION < 12050
#error "the Hopper kernels need nvcc 12.5 or later; without it on PATH the C++ kernels are built alone"
#endif

namespace inferix::sm90 {

inline CUtensorMap tensor_map(const char* op, const void* data, const TensorBox& box, bool eight_bit) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [op] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(std::string(op) + ": this driver has no cuTensorMapEncodeTiled, it is older than CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(
      &map, eight_bit ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, box.rank,
      const_cast<void*>(data), reinterpret_cast<const cuuint64_t*>(box.size),
      reinterpret_cast<const cuuint64_t*>(box.stride), box.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box.swizzle_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled refused a pool, CUresult " +
                             std::to_string(result));
  return map;
}

}  // namespace inferix::sm90
