// out = z + dt * v, one pass. The specification is kernels/lpmrf_kernels/euler_step.py.
#include "common.h"

#include <algorithm>
#include <array>

namespace lpmrf {
namespace {

#define LPMRF_EULER_ROW(T)                                                                            \
  LPMRF_VECTORISED void euler_row(float* out, const float* z, const T* v, float dt, int64_t count) {  \
    for (int64_t i = 0; i < count; ++i) out[i] = z[i] + dt * upcast(v[i]);                            \
  }
// Overloads, not a template: GCC clones no templates.
LPMRF_EULER_ROW(float)
LPMRF_EULER_ROW(BFloat16)
LPMRF_EULER_ROW(Half)
#undef LPMRF_EULER_ROW

// One to four dimensions, outermost first, padded in front.
struct Shape {
  std::array<int64_t, 4> size{1, 1, 1, 1}, z{}, v{};

  Shape(const Tensor& z_tensor, const Tensor& v_tensor) {
    const int64_t dim = z_tensor.dim();
    STD_TORCH_CHECK(dim <= 4, "lpmrf_cpp::euler_step: expected up to four dimensions");
    for (int64_t d = 0; d < dim; ++d) {
      size[4 - dim + d] = z_tensor.size(d);
      z[4 - dim + d] = z_tensor.stride(d);
      v[4 - dim + d] = v_tensor.stride(d);
    }
  }
};

template <class T>
void strided(float* out, const float* z, const T* v, float dt, const Shape& s, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t i3 = begin % s.size[3], row = begin / s.size[3];
    const int64_t i2 = row % s.size[2], i1 = row / s.size[2] % s.size[1], i0 = row / s.size[2] / s.size[1];
    const float* z_row = z + i0 * s.z[0] + i1 * s.z[1] + i2 * s.z[2];
    const T* v_row = v + i0 * s.v[0] + i1 * s.v[1] + i2 * s.v[2];
    const int64_t stop = std::min(s.size[3], i3 + end - begin);
    for (int64_t i = i3; i < stop; ++i) out[begin++] = z_row[i * s.z[3]] + dt * upcast(v_row[i * s.v[3]]);
  }
}

// out is contiguous; the caller has permuted the dimensions for that.
void euler_step(const Tensor& z, const Tensor& v, double dt, Tensor out) {
  STD_TORCH_CHECK(
      z.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float && out.is_contiguous() &&
          z.numel() == out.numel() && v.numel() == out.numel() && v.dim() == z.dim(),
      "lpmrf_cpp::euler_step: expected float32 z and a contiguous float32 out, all of one shape");
  if (out.numel() == 0) return;
  const Shape shape(z, v);
  const bool flat = z.is_contiguous() && v.is_contiguous();
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  const float* z_data = static_cast<const float*>(z.const_data_ptr());
  dispatch(v.scalar_type(), [&](auto type) {
    const auto v_data = static_cast<decltype(type)>(v.const_data_ptr());
    torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      if (flat) {
        euler_row(out_data + begin, z_data + begin, v_data + begin, static_cast<float>(dt), end - begin);
      } else {
        strided(out_data, z_data, v_data, static_cast<float>(dt), shape, begin, end);
      }
    });
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("euler_step(Tensor z, Tensor v, float dt, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) { m.impl("euler_step", TORCH_BOX(&lpmrf::euler_step)); }
