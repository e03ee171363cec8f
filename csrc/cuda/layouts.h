// Layouts: tiles in shared memory, matrix descriptors, fragments in registers.
//
// Plain arithmetic, compiled for the CPU too, where tests/cuda/native/layouts.cpp checks it against brute force.
// Sources: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate" and "Tensor copy".
#pragma once
#include <cstdint>

#include "../dtypes.h"

namespace inferix::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 3;    // consumer warpgroups, which multiply; one more, the producer, loads
constexpr int kWgmmaM = 64;      // query rows of a warpgroup: M of every wgmma
constexpr int kBlockM = kConsumers * kWgmmaM;
constexpr int kUnitKeys = 64;    // keys loaded at once, of one page
constexpr int kUnits = 2;
constexpr int kBlockN = kUnits * kUnitKeys;

// A tile of `rows` rows is stored as panels of at most 128 bytes in width, [panels][rows][swizzle_bytes], each
// swizzled: within eight rows the 16-byte chunks of a row are permuted, so that neither rows nor columns meet in a
// bank. TMA writes this pattern and wgmma reads it. It repeats every 8 * swizzle_bytes bytes, to which a panel must be
// aligned.
constexpr int kChunk = 16;
INFERIX_BOTH constexpr int swizzle_bytes(int width_bytes) { return width_bytes < 128 ? width_bytes : 128; }
INFERIX_BOTH constexpr int panels(int width_bytes) { return width_bytes / swizzle_bytes(width_bytes); }
INFERIX_BOTH constexpr uint32_t swizzle(uint32_t offset, int swizzle_bytes) {
  return offset ^ ((offset >> 3) & (swizzle_bytes == 128 ? 0x70 : 0x30));
}
// Byte `byte` of row `row` of a tile.
INFERIX_BOTH constexpr uint32_t tile_offset(int row, int byte, int rows, int width_bytes) {
  const int wide = swizzle_bytes(width_bytes), panel = byte / wide;
  return panel * rows * wide + swizzle(row * wide + byte % wide, wide);
}

// Matrix descriptors of wgmma; `start` is an address in units of 16 bytes. Bits 0-13: start; 16-29: leading dimension offset;
// 32-45: stride dimension offset; 62-63: swizzle, 1 for rows of 128 bytes, 2 for 64. Shared memory ends below 2^18, so
// that 14 bits hold every address.
INFERIX_BOTH constexpr uint64_t matrix_descriptor(uint32_t start, uint32_t leading, uint32_t stride,
                                                  int swizzle_bytes) {
  const uint32_t low = start + (leading / kChunk << 16);
  return low | uint64_t(stride / kChunk) << 32 | uint64_t(swizzle_bytes == 128 ? 1 : 2) << 62;
}

// K-major: rows are M or N, K runs along a row. Eight rows follow each other; the next eight lie `stride` bytes
// further. The leading offset is not used with a swizzle. K of one wgmma is 32 bytes of a row, whatever the type;
// `step` counts wgmmas.
constexpr int kWgmmaKBytes = 32;
INFERIX_BOTH constexpr uint64_t k_major_descriptor(uint32_t start, int swizzle_bytes) {
  return matrix_descriptor(start, 16, 8 * swizzle_bytes, swizzle_bytes);
}
INFERIX_BOTH constexpr uint32_t k_major_offset(int step, int rows, int width_bytes) {
  const int wide = swizzle_bytes(width_bytes), byte = step * kWgmmaKBytes;
  return byte / wide * rows * wide + byte % wide;
}

// MN-major, of 16-bit types only: K runs over rows of 128 bytes, 64 columns. The next 64 columns lie `leading` bytes
// further, the next eight rows `stride`. K of one wgmma is 16 rows.
INFERIX_BOTH constexpr uint64_t mn_major_descriptor(uint32_t start, int rows) {
  return matrix_descriptor(start, rows * 128, 8 * 128, 128);
}
INFERIX_BOTH constexpr uint32_t mn_major_offset(int step) { return step * 16 * 128; }

// Accumulators: value i of thread t of the warpgroup is at (accumulator_row, accumulator_column). A thread has two
// rows, 8 apart, and of each eight columns two neighbours; four threads, a quad, share a row.
INFERIX_BOTH constexpr int row_in_thread(int i) { return i / 2 % 2; }
INFERIX_BOTH constexpr int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + 8 * row_in_thread(i); }
INFERIX_BOTH constexpr int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// The A fragment: register r of thread t holds 4 of the 32 bytes of a row that one wgmma reads: lowest first, 2 values
// of 16 bits or 4 of 8 bits.
// Scores, an accumulator, become weights, an A fragment: a_fragment_source(r, n, s) is the accumulator that becomes the
// n-th value of register r of wgmma s.
//
// 16 bits: a thread's columns are two neighbours of every eight, in both. 8 bits: they are four neighbours of every
// sixteen here, two of every eight there. So the 8-bit keys of a unit are loaded in another order, in which column
// 16a + 8j + 2c + b is key 16a + 4c + 2j + b (a tensor map of five dimensions does it for nothing): a thread's scores
// are then of the very keys whose weights it must hold.
INFERIX_BOTH constexpr int a_fragment_source_16(int r, int n, int step) {
  return 8 * step + 4 * (r / 2) + 2 * (r % 2) + n;
}
INFERIX_BOTH constexpr int a_fragment_source_8(int r, int n, int step) {
  return 16 * step + 8 * (r / 2) + 4 * (n / 2) + 2 * (r % 2) + n % 2;
}
INFERIX_BOTH constexpr int key_of_column_8(int column) {
  return (column & ~15) | (column & 6) << 1 | (column & 8) >> 2 | (column & 1);
}
// The key within a unit of accumulator i of thread t.
INFERIX_BOTH constexpr int key_of(int t, int i, bool eight_bit) {
  const int column = accumulator_column(t, i) % kUnitKeys;
  return eight_bit ? key_of_column_8(column) : column;
}
// The channel of accumulator i of the weighted sum. Those of 8-bit values are loaded in the order of key_of_column_8
// too: of every sixteen a thread then has four neighbours, whose scales it reads at once.
INFERIX_BOTH constexpr int channel_of(int t, int i, bool eight_bit) {
  const int column = accumulator_column(t, i);
  return eight_bit ? key_of_column_8(column) : column;
}

// A pool as a tensor map describes it to TMA: dimensions, strides of all but the first in bytes, box; the fastest
// dimension first.
struct TensorBox {
  int rank;
  uint64_t size[5], stride[4];
  uint32_t box[5];
  int swizzle_bytes;
};

// 16-bit keys or values: codes [rows, D]; a box is 64 rows of one panel, at (first column, first row).
INFERIX_BOTH constexpr TensorBox box_of_16_bit_rows(uint64_t rows, int D) {
  return {2, {uint64_t(D), rows}, {uint64_t(D) * 2}, {64, kUnitKeys}, 128};
}
// 8-bit keys: codes [rows, D] in the order of key_of_column_8; a box is a unit, at (0, 0, 0, 0, first row / 16).
INFERIX_BOTH constexpr TensorBox box_of_8_bit_keys(uint64_t rows, int D) {
  const uint64_t wide = D;
  return {5, {wide, 2, 4, 2, rows / 16}, {wide, 4 * wide, 2 * wide, 16 * wide}, {uint32_t(D), 2, 4, 2, kUnitKeys / 16},
          swizzle_bytes(D)};
}
// 8-bit transposed values, to be multiplied as they are: codes [rows of D channels, page_size] in the order of
// channel_of; a box is a unit's keys of D channels, at (first key, 0, 0, 0, first row / 16).
INFERIX_BOTH constexpr TensorBox box_of_8_bit_values(uint64_t rows, int D, int page_size) {
  const uint64_t wide = page_size;
  return {5, {wide, 2, 4, 2, rows / 16}, {wide, 4 * wide, 2 * wide, 16 * wide}, {kUnitKeys, 2, 4, 2, uint32_t(D) / 16},
          kUnitKeys};
}
// Others: as they lie in the page; a box is at (first key, first row).
INFERIX_BOTH constexpr TensorBox box_of_transposed_values(uint64_t rows, int D, int page_size) {
  return {2, {uint64_t(page_size), rows}, {uint64_t(page_size)}, {kUnitKeys, uint32_t(D)}, kUnitKeys};
}

}  // namespace inferix::sm90
