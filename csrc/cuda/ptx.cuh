// Hopper's own instructions, one per function, under the names of PTX and CUTLASS. Source: PTX ISA 9.0.
//
// tests/cuda/native/machine.h emulates them on the CPU under the same names, so that the kernels above them run there
// from the same source.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#define INFERIX_DEVICE __device__ __forceinline__
#define INFERIX_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define INFERIX_GRID_CONSTANT const __grid_constant__

namespace inferix::sm90 {

using TensorMap = CUtensorMap;  // a kernel parameter by value: TMA reads it from there

// Threads. sync_quad: four neighbouring lanes.
INFERIX_DEVICE int thread_index() { return threadIdx.x; }
INFERIX_DEVICE int block_index() { return blockIdx.x; }
INFERIX_DEVICE int block_index_y() { return blockIdx.y; }
INFERIX_DEVICE void sync_threads() { __syncthreads(); }
INFERIX_DEVICE void sync_warp() { __syncwarp(); }
INFERIX_DEVICE void sync_quad() { __syncwarp(0xfu << (threadIdx.x & 28)); }
// Named barriers. Barrier 0 is that of sync_threads.
INFERIX_DEVICE void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <typename T>
INFERIX_DEVICE T shfl_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
template <typename T>
INFERIX_DEVICE T shfl_up(T x, int distance) {
  return __shfl_up_sync(~0u, x, distance);
}
template <typename T>
INFERIX_DEVICE T shfl_idx(T x, int lane) {
  return __shfl_sync(~0u, x, lane);
}

INFERIX_DEVICE bool any_in_warp(bool x) { return __any_sync(~0u, x); }

// The same number, but opaque to the optimizer, which then knows only that it is not negative: what is computed from it
// is computed where it is used, instead of being hoisted out of a loop and kept in registers.
INFERIX_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  __builtin_assume(x >= 0);
  return x;
}

// Atomics in shared memory.
template <typename T>
INFERIX_DEVICE void atomic_max(T* at, T x) {
  atomicMax(at, x);
}
template <typename T>
INFERIX_DEVICE void atomic_min(T* at, T x) {
  atomicMin(at, x);
}
template <typename T>
INFERIX_DEVICE void atomic_add(T* at, T x) {
  atomicAdd(at, x);
}

// setmaxnreg: registers move from the producer to the consumers. Every warp of a warpgroup must execute it; counts are
// multiples of 8.
template <int kCount>
INFERIX_DEVICE void warpgroup_reg_alloc() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
INFERIX_DEVICE void warpgroup_reg_dealloc() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Shared memory, as 32-bit addresses.
INFERIX_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
INFERIX_DEVICE uint32_t shared_address(const void* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); }

// mbarriers, in shared memory. Phase n completes when `count` threads have arrived and all bytes that were announced
// (expect_tx) have been copied. mbarrier_wait(parity) returns once the phase of that parity has completed; on a new
// mbarrier mbarrier_wait(1) returns at once.
INFERIX_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
INFERIX_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
INFERIX_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
INFERIX_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Fences. New mbarriers and ordinary stores become visible to the async proxy, which TMA and wgmma are.
INFERIX_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INFERIX_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// TMA loads: copies to shared memory, issued by one thread; `barrier` counts their bytes. 2d and 5d copy a box of a
// tensor map to an address that is a multiple of 128. 1d copies `bytes` bytes: they and both addresses are multiples
// of 16.
INFERIX_DEVICE void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
INFERIX_DEVICE void tma_load_2d(const TensorMap& map, void* to, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
INFERIX_DEVICE void tma_load_5d(const TensorMap& map, void* to, uint64_t* barrier, int a, int b, int c, int d, int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e)
      : "memory");
}
INFERIX_DEVICE void tma_load_1d(const void* from, void* to, uint64_t* barrier, int bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Arithmetic. exp2(-inf) = 0; log2(0) = -inf. pack: the first argument lies lowest.
INFERIX_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INFERIX_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INFERIX_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
INFERIX_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
INFERIX_DEVICE float fmax(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
INFERIX_DEVICE float rint(float x) { return rintf(x); }  // halves to even
INFERIX_DEVICE float sqrt_rn(float x) { return __fsqrt_rn(x); }
INFERIX_DEVICE int float_to_int_rn(float x) { return __float2int_rn(x); }
INFERIX_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
INFERIX_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
// Byte i is number (which >> 4 i & 7) of a's four and b's four.
INFERIX_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }
INFERIX_DEVICE uint32_t pack_bf16x2(float a, float b) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(a), "f"(b));
  return y;
}
INFERIX_DEVICE uint32_t pack_f16x2(float a, float b) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(y) : "f"(a), "f"(b));
  return y;
}
INFERIX_DEVICE uint32_t pack_e4m3x4(float a, float b, float c, float d) {
  uint32_t y;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(y)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return y;
}
INFERIX_DEVICE float half_to_float(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

}  // namespace inferix::sm90
