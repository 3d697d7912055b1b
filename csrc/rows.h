// Runs of elements: to float32 and back, and where the pixels of an image are. Overloads, not templates: GCC clones none.
#pragma once

#include "lanes.h"

#include <optional>
#include <type_traits>
#include <vector>

namespace lpmrf {
namespace {

inline void downcast(float* to, float x) { *to = x; }
inline void downcast(Half* to, float x) { *to = Half(x); }
inline void downcast(BFloat16* to, float x) {  // to nearest, ties to even, without a branch
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

#define LPMRF_ROWS(T)                                                                                                \
  [[maybe_unused]] LPMRF_VECTORISED void read_row(float* __restrict to, const T* __restrict from, int64_t count) {    \
    for (int64_t i = 0; i < count; ++i) to[i] = upcast(from[i]);                                                     \
  }                                                                                                                  \
  [[maybe_unused]] LPMRF_VECTORISED void write_row(T* __restrict to, const float* __restrict from, int64_t count) {   \
    for (int64_t i = 0; i < count; ++i) downcast(to + i, from[i]);                                                   \
  }
LPMRF_ROWS(float)
LPMRF_ROWS(BFloat16)
LPMRF_ROWS(Half)
#undef LPMRF_ROWS

// A (B, C, H, W) tensor.
template <class T>
struct Image {
  T* data;
  int64_t channels, height, width, stride_b, stride_c, stride_h, stride_w;

  explicit Image(const Tensor& t)
      : channels(t.size(1)), height(t.size(2)), width(t.size(3)),
        stride_b(t.stride(0)), stride_c(t.stride(1)), stride_h(t.stride(2)), stride_w(t.stride(3)) {
    if constexpr (std::is_const_v<T>) {
      data = static_cast<T*>(t.const_data_ptr());
    } else {
      data = static_cast<T*>(t.mutable_data_ptr());
    }
  }

  T* at(int64_t b, int64_t pixel) const {
    return data + b * stride_b + pixel / width * stride_h + pixel % width * stride_w;
  }
  // A photo is one run of memory, pixel after pixel (channels-last) or channel after channel (NCHW).
  bool by_pixel() const { return stride_c == 1 && stride_w == channels && stride_h == width * channels; }
  bool by_channel() const { return stride_w == 1 && stride_h == width && stride_c == width * height; }
};

// Pixels first ... first + count of photo b as rows of float32: `buffer`, or the tensor itself where it has them.
template <class T>
const float* read_pixels(float* buffer, const Image<const T>& x, int64_t b, int64_t first, int64_t count) {
  if (x.by_pixel()) {
    const T* from = x.at(b, first);
    if constexpr (std::is_same_v<T, float>) return from;
    read_row(buffer, from, count * x.channels);
    return buffer;
  }
  for (int64_t p = 0; p < count; ++p) {
    const T* from = x.at(b, first + p);
    float* to = buffer + p * x.channels;
    if (x.stride_c == 1) {
      read_row(to, from, x.channels);
    } else {
      for (int64_t c = 0; c < x.channels; ++c) to[c] = upcast(from[c * x.stride_c]);
    }
  }
  return buffer;
}

// Where to compute the same pixels of y: `buffer`, or y itself; then write_pixels.
template <class T>
float* room_for_pixels(float* buffer, const Image<T>& y, int64_t b, int64_t first) {
  if constexpr (std::is_same_v<T, float>) {
    if (y.by_pixel()) return y.at(b, first);
  }
  return buffer;
}

template <class T>
void write_pixels(const Image<T>& y, const float* buffer, int64_t b, int64_t first, int64_t count) {
  if (y.by_pixel()) {
    if constexpr (!std::is_same_v<T, float>) write_row(y.at(b, first), buffer, count * y.channels);
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    T* to = y.at(b, first + p);
    const float* from = buffer + p * y.channels;
    if (y.stride_c == 1) {
      write_row(to, from, y.channels);
    } else {
      for (int64_t c = 0; c < y.channels; ++c) downcast(to + c * y.stride_c, from[c]);
    }
  }
}

// A parameter (C) or (B, C) of any float type and strides as rows of float32, plus a number; the same value for every
// channel where there is none.
struct Parameter {
  std::vector<float> data;
  int64_t stride = 0;

  Parameter(const std::optional<Tensor>& p, int64_t channels, float otherwise, float plus = 0) {
    if (!p) {
      data.assign(channels, otherwise);
      return;
    }
    const int64_t rows = p->dim() == 2 ? p->size(0) : 1, step_b = p->dim() == 2 ? p->stride(0) : 0;
    const int64_t step = p->stride(p->dim() - 1);
    data.resize(rows * channels);
    stride = rows > 1 ? channels : 0;
    dispatch(p->scalar_type(), [&](auto type) {
      const auto from = static_cast<decltype(type)>(p->const_data_ptr());
      for (int64_t b = 0; b < rows; ++b)
        for (int64_t c = 0; c < channels; ++c) data[b * channels + c] = upcast(from[b * step_b + c * step]) + plus;
    });
  }
  const float* row(int64_t b) const { return data.data() + b * stride; }

  // All rows as rows of pairs: of bfloat16, or of float32.
  std::vector<float> pairs(bool of_bfloat16) const {
    const int64_t count = stride ? stride : static_cast<int64_t>(data.size()), rows = data.size() / count;
    std::vector<float> result(rows * lanes::padded(count));
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t c = 0; c < count; ++c) {
        const int64_t at = of_bfloat16 ? lanes::place<BFloat16>(c) : c;
        result[b * lanes::padded(count) + at] = data[b * count + c];
      }
    return result;
  }
};

}  // namespace
}  // namespace lpmrf
