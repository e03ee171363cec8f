// How a CPU kernel is to run.
#pragma once
#include "fields.h"

namespace inferix {

// Each has the instructions of those before it.
enum class Isa {
  portable,     // what the compiler assumes of every CPU of this kind
  avx2,         // with FMA
  avx512,       // F, VL, BW, DQ
  avx512_vnni,  // dot products of 8-bit integers
  avx512_bf16,  // dot products of bfloat16
  amx,          // products of matrices of both, in tile registers
};

// The last that this CPU has and this process may use.
Isa best_isa();

// What is used unless a call says otherwise: of those the fastest. Intel's CPUs take a dot product of bfloat16 at half
// the rate of two products of float32 or less, and so are faster without, where they may not use tile registers.
Isa default_isa();

struct Cpu {
  int threads;
  Isa isa;
  INFERIX_FIELDS(threads, isa)
};

}  // namespace inferix
