// z + dt * (weight * RMSNorm(x) + bias) at each pixel. The specification is kernels/lpmrf_kernels/output_euler.py.
#include "common.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace lpmrf {
namespace {

constexpr int64_t kLanes = 16;  // outputs computed together: a register of AVX-512, two of AVX2
constexpr int64_t kPixels = 8;  // pixels that share a load of the weights

// Explicit lanes, because a compiler must not reorder sums: the same bits on every instruction set.
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Mean squares and projections of kPixels rows of `padded` values, zero behind their channels.
LPMRF_VECTORISED void project(const float* x, int64_t padded, int64_t channels, const float* weight, int64_t outputs,
                              float* squares, float* v) {
  for (int64_t p = 0; p < kPixels; ++p) {
    Lanes sums = {};
    for (int64_t c = 0; c < padded; c += kLanes) {
      const Lanes row = *reinterpret_cast<const Lanes*>(x + p * padded + c);
      sums += row * row;
    }
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    squares[p] = sum / static_cast<float>(channels);
  }
  for (int64_t first = 0; first < outputs; first += kLanes) {
    Lanes sums[kPixels] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Lanes row = *reinterpret_cast<const Lanes*>(weight + c * outputs + first);
      for (int64_t p = 0; p < kPixels; ++p) sums[p] += row * x[p * padded + c];
    }
    for (int64_t p = 0; p < kPixels; ++p) *reinterpret_cast<Lanes*>(v + p * outputs + first) = sums[p];
  }
}

#define LPMRF_UPCAST_ROW(T)                                                     \
  LPMRF_VECTORISED void upcast_row(float* out, const T* x, int64_t count) {     \
    for (int64_t i = 0; i < count; ++i) out[i] = upcast(x[i]);                  \
  }
// Overloads, not a template: GCC clones no templates.
LPMRF_UPCAST_ROW(float)
LPMRF_UPCAST_ROW(BFloat16)
LPMRF_UPCAST_ROW(Half)
#undef LPMRF_UPCAST_ROW

template <class T>
void step(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& z, float eps, float dt,
          int64_t patch_height, int64_t patch_width, Tensor& out) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t outputs = z.size(1) * patch_height * patch_width, columns = weight.size(1), padded = (channels + kLanes - 1) / kLanes * kLanes;
  const auto x_data = static_cast<const T*>(x.const_data_ptr());
  const auto weight_data = static_cast<const float*>(weight.const_data_ptr());
  const auto bias_data = static_cast<const float*>(bias.const_data_ptr());
  const auto z_data = static_cast<const float*>(z.const_data_ptr());
  const auto out_data = static_cast<float*>(out.mutable_data_ptr());
  const auto offset = [&](const Tensor& t, int64_t pixel, int64_t tall, int64_t wide) {
    const int64_t w = pixel % width, h = pixel / width % height, b = pixel / width / height;
    return b * t.stride(0) + h * tall * t.stride(2) + w * wide * t.stride(3);
  };
  const auto within_patch = [&](const Tensor& t) {  // outputs are ordered (row, column, channel)
    std::vector<int64_t> at;
    for (int64_t r = 0; r < patch_height; ++r)
      for (int64_t s = 0; s < patch_width; ++s)
        for (int64_t c = 0; c < t.size(1); ++c) at.push_back(c * t.stride(1) + r * t.stride(2) + s * t.stride(3));
    return at;
  };
  const std::vector<int64_t> in_z = within_patch(z), in_out = within_patch(out);
  const int64_t xc = x.stride(1);
  const int64_t grain = std::max(kPixels, kGrain / std::max<int64_t>(1, channels));

  torch::stable::parallel_for(0, x.size(0) * height * width, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(kPixels * padded), v(kPixels * columns);
    float squares[kPixels];
    for (int64_t first = begin; first < end; first += kPixels) {
      const int64_t count = std::min(kPixels, end - first);
      for (int64_t p = 0; p < count; ++p) {
        const T* pixel = x_data + offset(x, first + p, 1, 1);
        float* row = rows.data() + p * padded;
        if (xc == 1) {
          upcast_row(row, pixel, channels);
        } else {
          for (int64_t c = 0; c < channels; ++c) row[c] = upcast(pixel[c * xc]);
        }
      }
      project(rows.data(), padded, channels, weight_data, columns, squares, v.data());
      for (int64_t p = 0; p < count; ++p) {
        const float scale = 1.0f / std::sqrt(squares[p] + eps);
        const float* z_row = z_data + offset(z, first + p, patch_height, patch_width);
        float* out_row = out_data + offset(out, first + p, patch_height, patch_width);
        for (int64_t o = 0; o < outputs; ++o)
          out_row[in_out[o]] = z_row[in_z[o]] + dt * (v[p * columns + o] * scale + bias_data[o]);
      }
    }
  });
}

// weight (C, O) is that of the projection times the norm's; its columns and bias are padded to a multiple of kLanes.
void output_euler(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& z, double eps, double dt,
                  int64_t patch_height, int64_t patch_width, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && z.dim() == 4 && out.dim() == 4 && z.scalar_type() == ScalarType::Float &&
                      out.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
                      bias.scalar_type() == ScalarType::Float && weight.is_contiguous() && bias.is_contiguous() &&
                      weight.size(0) == x.size(1) && weight.size(1) % kLanes == 0 && bias.numel() == weight.size(1) &&
                      weight.size(1) >= z.size(1) * patch_height * patch_width && z.numel() == out.numel() &&
                      z.size(2) == x.size(2) * patch_height && z.size(3) == x.size(3) * patch_width,
                  "lpmrf_cpp::output_euler: expected (B, C, H, W) x, float32 z and out of patches, padded weights");
  if (out.numel() == 0) return;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    step<T>(x, weight, bias, z, static_cast<float>(eps), static_cast<float>(dt), patch_height, patch_width, out);
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("output_euler(Tensor x, Tensor weight, Tensor bias, Tensor z, float eps, float dt, int patch_height, int patch_width,"
        " Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) { m.impl("output_euler", TORCH_BOX(&lpmrf::output_euler)); }
