// wgmma: d (+)= a b^T on the tensor cores, M = 64, issued by the four warps of a warpgroup together and complete at
// wgmma_wait_all. Between the two neither d nor a's registers may be touched, nor the shared memory that is read.
//
// wgmma_ss: a and b come from shared memory; wgmma_rs: a comes from registers, b from shared memory (CUTLASS's SS and
// RS). The suffix is the type of a and b. d holds 64 or 32 accumulators, for N = 128 or 64; layouts.h says where they
// lie. Without scale_d, d is overwritten.
#pragma once
#include "ptx.cuh"

namespace inferix::sm90 {

// wgmma_fence: registers and shared memory written before it are seen by the wgmmas after it.
INFERIX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INFERIX_DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
INFERIX_DEVICE void wgmma_wait_all() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from moving uses of accumulators or fragments across a wgmma_fence or a wgmma_wait_all: it does
// not know that these concern them.
template <typename T, int kCount>
INFERIX_DEVICE void warpgroup_fence_operand(T (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (T(0.5f) == T(0)) asm volatile("" : "+r"(d[i])::"memory");
    else asm volatile("" : "+f"(d[i])::"memory");
  }
}

// The accumulators as operands %0 ... of the assembly.
#define INFERIX_D8(kind, d, i)                                                                                  \
  kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), kind(d[i + 6]),   \
      kind(d[i + 7])
#define INFERIX_D32(kind, d, i) \
  INFERIX_D8(kind, d, i), INFERIX_D8(kind, d, i + 8), INFERIX_D8(kind, d, i + 16), INFERIX_D8(kind, d, i + 24)
#define INFERIX_D64(kind, d) INFERIX_D32(kind, d, 0), INFERIX_D32(kind, d, 32)

#define INFERIX_INOUT_F(x) "+f"(x)
#define INFERIX_INOUT_R(x) "+r"(x)

// k = 16, types of 16 bits. a and, with a from shared memory, b are K-major; else b is K-major or MN-major.
#define INFERIX_WGMMA_16_BIT(type)                                                                         \
INFERIX_DEVICE void wgmma_ss_##type(float (&d)[64], uint64_t a, uint64_t b, bool scale_d) {                \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " "                                      \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
      "%64, %65, p, 1, 1, 0, 0;\n}"                                                                           \
      : INFERIX_D64(INFERIX_INOUT_F, d)                                                                        \
      : "l"(a), "l"(b), "r"(int(scale_d)));                                                                       \
}                                                                                                             \
template <bool kKMajor>                                                                                       \
INFERIX_DEVICE void wgmma_rs_##type(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool scale_d) { \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " "                                      \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                                                           \
      : INFERIX_D64(INFERIX_INOUT_F, d)                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(scale_d)), "n"(int(!kKMajor)));               \
}                                                                                                             \
template <bool kKMajor>                                                                                       \
INFERIX_DEVICE void wgmma_rs_##type(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool scale_d) { \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." #type "." #type " "                                       \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                     \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"                                                           \
      : INFERIX_D32(INFERIX_INOUT_F, d, 0)                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(scale_d)), "n"(int(!kKMajor)));               \
}
INFERIX_WGMMA_16_BIT(bf16)
INFERIX_WGMMA_16_BIT(f16)

// k = 32. 8-bit operands are always K-major.
INFERIX_DEVICE void wgmma_ss_e4m3(float (&d)[64], uint64_t a, uint64_t b, bool scale_d) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;\n}"
      : INFERIX_D64(INFERIX_INOUT_F, d)
      : "l"(a), "l"(b), "r"(int(scale_d)));
}
INFERIX_DEVICE void wgmma_rs_e4m3(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool scale_d) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1;\n}"
      : INFERIX_D64(INFERIX_INOUT_F, d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(scale_d)));
}
INFERIX_DEVICE void wgmma_rs_e4m3(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool scale_d) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1;\n}"
      : INFERIX_D32(INFERIX_INOUT_F, d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(scale_d)));
}
// k = 32; exact.
INFERIX_DEVICE void wgmma_ss_s8(int32_t (&d)[64], uint64_t a, uint64_t b, bool scale_d) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p;\n}"
      : INFERIX_D64(INFERIX_INOUT_R, d)
      : "l"(a), "l"(b), "r"(int(scale_d)));
}

#undef INFERIX_WGMMA_16_BIT
#undef INFERIX_D8
#undef INFERIX_D32
#undef INFERIX_D64
#undef INFERIX_INOUT_F
#undef INFERIX_INOUT_R

}  // namespace inferix::sm90
