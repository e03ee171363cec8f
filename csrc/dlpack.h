// Tensors as DLPack lays them out, and the table of functions by which a tensor's type offers them to C: the structs of
// DLPack 1.3, field by field. Source: https://github.com/dmlc/dlpack, include/dlpack/dlpack.h.
#pragma once
#include <cstdint>

namespace inferix {

struct DlTensor {
  void* data;  // of the first element, with byte_offset
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim]  in elements
  uint64_t byte_offset;
};

// The capsule `__dlpack_c_exchange_api__` of a tensor's type holds a pointer to one.
struct DlExchange {
  static constexpr const char* kCapsule = "dlpack_exchange_api";
  static constexpr uint32_t kMajor = 1;  // of the versions that look so
  uint32_t major, minor;
  void* older;
  void *allocate, *managed_from_object, *managed_to_object;
  // Fills in what the object is, without owning it: 0, or -1 with a Python error. May be null.
  int (*from_object)(void* object, DlTensor* tensor);
  void* current_stream;
};

}  // namespace inferix
