// Photos to and from uint8, any layout on either side. The specification is kernels/lpmrf_kernels/uint8.py.
#include "common.h"

#include <algorithm>
#include <type_traits>

namespace lpmrf {
namespace {

constexpr int64_t kChunk = 1024;  // elements between two layouts: 4 KB, which stay in the first cache

#define LPMRF_TO_UINT8(T)                                                                             \
  LPMRF_VECTORISED void convert(uint8_t* out, const T* x, float low, float scale, int64_t count) {    \
    for (int64_t i = 0; i < count; ++i) {                                                             \
      float y = (upcast(x[i]) - low) * scale;                                                         \
      y = y > 0.0f ? y : 0.0f; /* NaN too */                                                          \
      y = y < 255.0f ? y : 255.0f;                                                                    \
      /* Beside 2^23 a float has no room for fractions: the addition rounds, halves to even. */       \
      out[i] = static_cast<uint8_t>(bit_cast<uint32_t>(y + 8388608.0f));                              \
    }                                                                                                 \
  }
// Overloads, not a template: GCC clones no templates.
LPMRF_TO_UINT8(float)
LPMRF_TO_UINT8(BFloat16)
LPMRF_TO_UINT8(Half)
#undef LPMRF_TO_UINT8

inline void downcast(float x, float* out) { *out = x; }
inline void downcast(float x, Half* out) { *out = static_cast<Half>(x); }
inline void downcast(float x, BFloat16* out) {  // finite x: nearest, halves to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->x = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

#define LPMRF_FROM_UINT8(T)                                                                           \
  LPMRF_VECTORISED void convert(T* out, const uint8_t* x, float low, float scale, int64_t count) {    \
    for (int64_t i = 0; i < count; ++i)                                                               \
      downcast(static_cast<float>(x[i]) / 255.0f * scale + low, out + i);                             \
  }
LPMRF_FROM_UINT8(float)
LPMRF_FROM_UINT8(BFloat16)
LPMRF_FROM_UINT8(Half)
#undef LPMRF_FROM_UINT8

// A piece of a row: what does not lie densely passes through a buffer, so that the arithmetic is always vectorised.
template <class To, class From>
void piece(To* out, int64_t out_stride, const From* x, int64_t x_stride, float low, float scale, int64_t count) {
  From gathered[kChunk] = {};
  To scattered[kChunk] = {};
  if (x_stride != 1) {
    for (int64_t i = 0; i < count; ++i) gathered[i] = x[i * x_stride];
    x = gathered;
  }
  convert(out_stride == 1 ? out : scattered, x, low, scale, count);
  if (out_stride != 1)
    for (int64_t i = 0; i < count; ++i) out[i * out_stride] = scattered[i];
}

bool same_memory(const Tensor& x, const Tensor& out) {  // out is dense
  for (int64_t d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != out.stride(d)) return false;
  return true;
}

template <class To, class From>
void transfer(const Tensor& x, float low, float scale, Tensor& out) {
  const auto x_data = static_cast<const From*>(x.const_data_ptr());
  const auto out_data = static_cast<To*>(out.mutable_data_ptr());
  if (same_memory(x, out)) {
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      convert(out_data + begin, x_data + begin, low, scale, end - begin);
    });
    return;
  }
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t xb = x.stride(0), xc = x.stride(1), xh = x.stride(2), xw = x.stride(3);
  const int64_t ob = out.stride(0), oc = out.stride(1), oh = out.stride(2), ow = out.stride(3);
  const int64_t grain = std::max<int64_t>(1, kGrain / (channels * width));
  torch::stable::parallel_for(0, x.size(0) * height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const From* x_row = x_data + row / height * xb + row % height * xh;
      To* out_row = out_data + row / height * ob + row % height * oh;
      for (int64_t first = 0; first < width; first += kChunk)
        for (int64_t c = 0; c < channels; ++c)  // all channels of a chunk, while its cache lines are at hand
          piece(out_row + c * oc + first * ow, ow, x_row + c * xc + first * xw, xw, low, scale,
                std::min(kChunk, width - first));
    }
  });
}

void check(const Tensor& x, const Tensor& out, const Tensor& bytes) {
  bool same = x.dim() == 4 && out.dim() == 4 && bytes.scalar_type() == ScalarType::Byte;
  for (int64_t d = 0; same && d < 4; ++d) same = x.size(d) == out.size(d);
  STD_TORCH_CHECK(same, "lpmrf_cpp: expected (B, C, H, W) twice, one of them uint8");
}

void to_uint8(const Tensor& x, double low, double scale, Tensor out) {
  check(x, out, out);
  if (x.numel() == 0) return;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    transfer<uint8_t, T>(x, static_cast<float>(low), static_cast<float>(scale), out);
  });
}

void from_uint8(const Tensor& x, double low, double scale, Tensor out) {
  check(x, out, x);
  if (x.numel() == 0) return;
  dispatch(out.scalar_type(), [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    transfer<T, uint8_t>(x, static_cast<float>(low), static_cast<float>(scale), out);
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("to_uint8(Tensor x, float low, float scale, Tensor(a!) out) -> ()");
  m.def("from_uint8(Tensor x, float low, float scale, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("to_uint8", TORCH_BOX(&lpmrf::to_uint8));
  m.impl("from_uint8", TORCH_BOX(&lpmrf::from_uint8));
}
