// From codes and scales to floats, and between the types of activations.
#include "codes.h"

namespace inferix {
namespace {

// codes [count, width] of tokens first : first + count.
template <typename Code>
INFERIX_INLINE void decode_tokens(const Tile& from, const typename Code::Stored* codes, int64_t first, int64_t count,
                                  float* to, int64_t stride) {
  const int64_t width = from.width;
  for (int64_t t = 0; t < count; ++t) {
    const auto* __restrict row = codes + t * width;
    float* __restrict to_row = to + t * stride;
    const float scale = reinterpret_cast<const float*>(from.scales)[first + t];
    for (int64_t d = 0; d < width; ++d) to_row[d] = Code::decode(row[d]) * scale;
  }
}

template <typename Code>
INFERIX_INLINE void decode_channels(const Tile& from, const typename Code::Stored* codes, int64_t count, float* to,
                                    int64_t stride) {
  const int64_t width = from.width;
  const float* __restrict scales = reinterpret_cast<const float*>(from.scales);
  for (int64_t t = 0; t < count; ++t) {
    const auto* __restrict row = codes + t * width;
    float* __restrict to_row = to + t * stride;
    for (int64_t d = 0; d < width; ++d) to_row[d] = Code::decode(row[d]) * scales[d];
  }
}

INFERIX_INLINE void decode_transposed(const Tile& from, int64_t first, int64_t count, float* to, int64_t stride) {
  uint8_t* codes = thread_buffers().codes(count * from.width);
  transpose(reinterpret_cast<const uint8_t*>(from.codes) + first, from.page_size, from.width, count, codes, from.width);
  decode_channels<E4m3Code>(from, codes, count, to, stride);
}

template <bool kByToken>
INFERIX_INLINE void decode_u4(const Tile& from, int64_t first, int64_t count, float* to, int64_t stride) {
  const int64_t width = from.width;
  uint8_t* __restrict codes = thread_buffers().codes(width);
  float *__restrict scales = thread_buffers().floats.floats(2 * width), *__restrict offsets = scales + width;
  const Half *stored_scales = reinterpret_cast<const Half*>(from.scales) + (kByToken ? first : 0),
             *stored_offsets = reinterpret_cast<const Half*>(from.offsets) + (kByToken ? first : 0);
  if constexpr (!kByToken) {
    load<Half>(stored_scales, 0, 1, width, scales, 0);
    load<Half>(stored_offsets, 0, 1, width, offsets, 0);
  }
  for (int64_t t = 0; t < count; ++t) {
    unpack(reinterpret_cast<const uint8_t*>(from.codes) + (first + t) * width / 2, codes, width);
    float* __restrict row = to + t * stride;
    if constexpr (kByToken) {
      const float scale = to_float(stored_scales[t]), offset = to_float(stored_offsets[t]);
      for (int64_t d = 0; d < width; ++d) row[d] = float(codes[d]) * scale + offset;
    } else {
      for (int64_t d = 0; d < width; ++d) row[d] = float(codes[d]) * scales[d] + offsets[d];
    }
  }
}

INFERIX_INLINE void decode_any(const Tile& from, int64_t first, int64_t count, float* to, int64_t stride) {
  const char* codes = from.codes + first * from.row;
  const int64_t row = from.row / element_bytes(from.codec);
  const auto *i8 = reinterpret_cast<const int8_t*>(codes);
  const auto *u8 = reinterpret_cast<const uint8_t*>(codes);
  switch (from.codec) {
    case Codec::f32: return load<float>(codes, row, count, from.width, to, stride);
    case Codec::bf16: return load<Bf16>(codes, row, count, from.width, to, stride);
    case Codec::f16: return load<Half>(codes, row, count, from.width, to, stride);
    case Codec::i8_token: return decode_tokens<Int8Code>(from, i8, first, count, to, stride);
    case Codec::i8_channel: return decode_channels<Int8Code>(from, i8, count, to, stride);
    case Codec::e4m3_token: return decode_tokens<E4m3Code>(from, u8, first, count, to, stride);
    case Codec::e4m3_channel: return decode_transposed(from, first, count, to, stride);
    case Codec::u4_token: return decode_u4<true>(from, first, count, to, stride);
    case Codec::u4_channel: return decode_u4<false>(from, first, count, to, stride);
  }
}

INFERIX_INLINE void to_floats_any(DType dtype, const void* from, int64_t from_stride, int64_t count, int64_t width,
                                  float* to, int64_t stride) {
  switch (dtype) {
    case DType::f32: return load<float>(from, from_stride, count, width, to, stride);
    case DType::bf16: return load<Bf16>(from, from_stride, count, width, to, stride);
    case DType::f16: return load<Half>(from, from_stride, count, width, to, stride);
  }
}

INFERIX_INLINE void from_floats_any(DType dtype, const float* from, int64_t stride, int64_t count, int64_t width,
                                    void* to, int64_t to_stride) {
  switch (dtype) {
    case DType::f32: return store<float>(from, stride, count, width, to, to_stride);
    case DType::bf16: return store<Bf16>(from, stride, count, width, to, to_stride);
    case DType::f16: return store<Half>(from, stride, count, width, to, to_stride);
  }
}

struct Kernels {
  void (*decode_tile)(const Tile&, int64_t, int64_t, float*, int64_t);
  void (*rows_to_floats)(DType, const void*, int64_t, int64_t, int64_t, float*, int64_t);
  void (*rows_from_floats)(DType, const float*, int64_t, int64_t, int64_t, void*, int64_t);
};

// The three for one instruction set.
#define INFERIX_KERNELS(level, target)                                                                              \
  target void decode_##level(const Tile& from, int64_t first, int64_t count, float* to, int64_t stride) {           \
    decode_any(from, first, count, to, stride);                                                                     \
  }                                                                                                                 \
  target void to_floats_##level(DType dtype, const void* from, int64_t from_stride, int64_t count, int64_t width,   \
                                float* to, int64_t stride) {                                                        \
    to_floats_any(dtype, from, from_stride, count, width, to, stride);                                              \
  }                                                                                                                 \
  target void from_floats_##level(DType dtype, const float* from, int64_t stride, int64_t count, int64_t width,     \
                                  void* to, int64_t to_stride) {                                                    \
    from_floats_any(dtype, from, stride, count, width, to, to_stride);                                              \
  }                                                                                                                 \
  constexpr Kernels level{decode_##level, to_floats_##level, from_floats_##level};

INFERIX_KERNELS(portable, )
#if defined(__x86_64__)
INFERIX_KERNELS(v3, INFERIX_V3)
INFERIX_KERNELS(v4, INFERIX_V4)
Kernels kernels(Isa isa) { return *dispatch(isa, &portable, &v3, &v4); }
#else
Kernels kernels(Isa) { return portable; }
#endif

}  // namespace

void decode(Isa isa, const Tile& from, int64_t first, int64_t count, float* to, int64_t stride) {
  kernels(isa).decode_tile(from, first, count, to, stride);
}

void to_floats(Isa isa, DType dtype, const void* from, int64_t from_stride, int64_t count, int64_t width, float* to,
               int64_t stride) {
  kernels(isa).rows_to_floats(dtype, from, from_stride, count, width, to, stride);
}

void from_floats(Isa isa, DType dtype, const float* from, int64_t stride, int64_t count, int64_t width, void* to,
                 int64_t to_stride) {
  kernels(isa).rows_from_floats(dtype, from, stride, count, width, to, to_stride);
}

}  // namespace inferix
