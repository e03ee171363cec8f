// The tensor cores' instructions: d (+)= a b^T, a 64 rows tall, started by the four warps of a warpgroup together and
// finished at multiply_wait. Between the two neither d nor registers of a may be touched, nor the shared memory read.
//
// A name says where a comes from, shared memory or registers, and the types. b always comes from shared memory. d holds
// 64 or 32 accumulators, for 128 or 64 columns; where they lie says layouts.h. Not `sum`: d is overwritten.
#pragma once
#include "ptx.cuh"

namespace inferix::sm90 {

// Registers and shared memory written before are seen by what is started after.
INFERIX_DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INFERIX_DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
INFERIX_DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from moving uses of accumulators across a begin or a wait, of which it does not know that they
// concern them.
template <typename T, int kCount>
INFERIX_DEVICE void pin(T (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (T(0.5f) == T(0)) asm volatile("" : "+r"(d[i])::"memory");
    else asm volatile("" : "+f"(d[i])::"memory");
  }
}

// Operands %0 ... of an accumulator tile.
#define INFERIX_D8(kind, d, i)                                                                                  \
  kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3]), kind(d[i + 4]), kind(d[i + 5]), kind(d[i + 6]),   \
      kind(d[i + 7])
#define INFERIX_D32(kind, d, i) \
  INFERIX_D8(kind, d, i), INFERIX_D8(kind, d, i + 8), INFERIX_D8(kind, d, i + 16), INFERIX_D8(kind, d, i + 24)
#define INFERIX_D64(kind, d) INFERIX_D32(kind, d, 0), INFERIX_D32(kind, d, 32)

#define INFERIX_PLUS_F(x) "+f"(x)
#define INFERIX_PLUS_R(x) "+r"(x)

// k = 16, types of 16 bits. a and, with a from shared memory, b are K-major; else b is K-major or MN-major.
#define INFERIX_MULTIPLY_16_BIT(type)                                                                         \
INFERIX_DEVICE void multiply_shared_##type(float (&d)[64], uint64_t a, uint64_t b, bool sum) {                \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " "                                      \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
      "%64, %65, p, 1, 1, 0, 0;\n}"                                                                           \
      : INFERIX_D64(INFERIX_PLUS_F, d)                                                                        \
      : "l"(a), "l"(b), "r"(int(sum)));                                                                       \
}                                                                                                             \
template <bool kKMajor>                                                                                       \
INFERIX_DEVICE void multiply_registers_##type(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool sum) { \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." #type "." #type " "                                      \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                                                           \
      : INFERIX_D64(INFERIX_PLUS_F, d)                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(sum)), "n"(int(!kKMajor)));               \
}                                                                                                             \
template <bool kKMajor>                                                                                       \
INFERIX_DEVICE void multiply_registers_##type(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool sum) { \
  asm volatile(                                                                                               \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." #type "." #type " "                                       \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                     \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"                                                           \
      : INFERIX_D32(INFERIX_PLUS_F, d, 0)                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(sum)), "n"(int(!kKMajor)));               \
}
INFERIX_MULTIPLY_16_BIT(bf16)
INFERIX_MULTIPLY_16_BIT(f16)

// k = 32. 8-bit operands are always K-major.
INFERIX_DEVICE void multiply_registers_e4m3(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool sum) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1;\n}"
      : INFERIX_D32(INFERIX_PLUS_F, d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(sum)));
}
// k = 32; exact.
INFERIX_DEVICE void multiply_registers_s8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool sum) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p;\n}"
      : INFERIX_D32(INFERIX_PLUS_R, d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(sum)));
}

#undef INFERIX_MULTIPLY_16_BIT
#undef INFERIX_D8
#undef INFERIX_D32
#undef INFERIX_D64
#undef INFERIX_PLUS_F
#undef INFERIX_PLUS_R

}  // namespace inferix::sm90
