// The emulator's tensor cores: the functions of csrc/cuda/wgmma.cuh. Included by machine.h.
#pragma once
#include "machine.h"

namespace inferix::sm90 {

enum class Type { bf16, f16, e4m3, s8 };
inline int bytes_of(Type type) { return type == Type::bf16 || type == Type::f16 ? 2 : 1; }
inline float decode(const void* from, Type type) {
  uint16_t wide = 0;
  std::memcpy(&wide, from, bytes_of(type));
  if (type == Type::bf16) return to_float(Bf16{wide});
  if (type == Type::f16) return to_float(Half{wide});
  if (type == Type::e4m3) return to_float(E4m3{uint8_t(wide)});
  return float(int8_t(wide));
}

// Element (row, k) of the matrix that a descriptor names.
inline float element(uint64_t descriptor, bool k_major, int row, int k, Type type) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = int(descriptor >> 62), wide = mode == 1 ? 128 : mode == 2 ? 64 : 0, size = bytes_of(type);
  if (!wide || descriptor >> 49 & 7) fail("a descriptor without a swizzle, or with a base offset");
  uint32_t address;
  if (k_major) {
    address = start + row / 8 * stride + row % 8 * wide + k * size;
  } else {
    if (wide != 128 || size != 2) fail("MN-major operands are 16 bits wide here, their rows 128 bytes");
    address = start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2;
  }
  return decode(at_shared(apply_swizzle(address, wide)), type);
}

inline void wgmma_fence() {}
inline void wgmma_commit_group() {}
template <typename T, int kCount>
void warpgroup_fence_operand(T (&)[kCount]) {}

// A row of the A fragment, from the four threads of a quad.
inline float fragment(const uint32_t (*quad)[4], bool lower, int k, Type type) {
  const int per = 4 / bytes_of(type), within = k % (4 * per) / per, part = k / (4 * per);
  const uint32_t word = quad[within][2 * part + lower];
  char bytes[4];
  std::memcpy(bytes, &word, 4);
  return decode(bytes + k % per * bytes_of(type), type);
}

template <typename T, int kCount>
void wgmma(T (&d)[kCount], Type type, bool b_k_major, uint64_t b, bool sum, std::function<float(int, int, int)> a) {
  const int columns = 2 * kCount, depth = 32 / bytes_of(type);
  T* to = d;
  machine->self().products.push_back(
      {[=](const std::vector<float>& right, int thread) {
         const int t = thread % kWarpgroup;
         for (int lower = 0; lower < 2; ++lower) {
           float left[32];
           for (int k = 0; k < depth; ++k) left[k] = a(t, lower, k);
           for (int group = 0; group < columns / 8; ++group)
             for (int n = 0; n < 2; ++n) {
               T& out = to[4 * group + 2 * lower + n];
               const float* column = &right[size_t(8 * group + t % 4 * 2 + n) * depth];
               float total = 0;
               for (int k = 0; k < depth; ++k) total += left[k] * column[k];
               out = T(total) + (sum ? out : T(0));
             }
         }
       },
       [=] {
         std::vector<float> right(size_t(columns) * depth);
         for (int n = 0; n < columns; ++n)
           for (int k = 0; k < depth; ++k) right[size_t(n) * depth + k] = element(b, b_k_major, n, k, type);
         return right;
       }});
}

template <typename T, int kCount>
void wgmma_ss(T (&d)[kCount], Type type, uint64_t a, uint64_t b, bool sum) {
  wgmma(d, type, true, b, sum, [=](int t, int lower, int k) {
    return element(a, true, t / 32 * 16 + t % 32 / 4 + 8 * lower, k, type);
  });
}
inline void wgmma_ss_bf16(float (&d)[64], uint64_t a, uint64_t b, bool sum) {
  wgmma_ss(d, Type::bf16, a, b, sum);
}
inline void wgmma_ss_f16(float (&d)[64], uint64_t a, uint64_t b, bool sum) {
  wgmma_ss(d, Type::f16, a, b, sum);
}
template <typename T, int kCount>
void wgmma_rs(T (&d)[kCount], Type type, bool k_major, const uint32_t (&a)[4], uint64_t b, bool sum) {
  const int warpgroup = thread_index() / kWarpgroup * kWarpgroup;
  const size_t n = machine->self().products.size();
  std::memcpy(machine->self().a[n], a, sizeof a);
  wgmma(d, type, k_major, b, sum, [=](int t, int lower, int k) {
    uint32_t quad[4][4];
    for (int i = 0; i < 4; ++i) std::memcpy(quad[i], machine->fibers[warpgroup + (t & ~3) + i].a[n], 16);
    return fragment(quad, lower, k, type);
  });
}
template <bool kKMajor, int kCount>
void wgmma_rs_bf16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool sum) {
  wgmma_rs(d, Type::bf16, kKMajor, a, b, sum);
}
template <bool kKMajor, int kCount>
void wgmma_rs_f16(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool sum) {
  wgmma_rs(d, Type::f16, kKMajor, a, b, sum);
}
template <int kCount>
void wgmma_rs_e4m3(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool sum) {
  wgmma_rs(d, Type::e4m3, true, a, b, sum);
}
inline void wgmma_ss_e4m3(float (&d)[64], uint64_t a, uint64_t b, bool sum) { wgmma_ss(d, Type::e4m3, a, b, sum); }
inline void wgmma_ss_s8(int32_t (&d)[64], uint64_t a, uint64_t b, bool sum) { wgmma_ss(d, Type::s8, a, b, sum); }

inline void wgmma_wait_all() {
  const int warpgroup = thread_index() / kWarpgroup;
  machine->meet(3000 + warpgroup, kWarpgroup);
  Fiber& self = machine->self();
  for (size_t i = 0; i < self.products.size(); ++i) {
    auto& right = machine->right_operands[{warpgroup, i}];
    if (right.empty()) right = self.products[i].read_b();
    self.products[i].add(right, thread_index());
  }
  machine->meet(4000 + warpgroup, kWarpgroup);
  self.products.clear();
  for (int i = 0; i < 16; ++i) machine->right_operands.erase({warpgroup, size_t(i)});
}

}  // namespace inferix::sm90
