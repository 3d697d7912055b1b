// out = z + noise_std * noise. The specification is kernels/lpmrf_kernels/add_source_noise.py.
#include "philox.h"

#include <algorithm>
#include <type_traits>

namespace lpmrf {
namespace {

constexpr int64_t kBlocks = 256;  // Philox blocks made at a time: 4 KB of noise, which stays in the first cache

LPMRF_VECTORISED void make_noise(float* noise, uint64_t seed, int64_t first_block) {
  float lanes[4][kBlocks];
  for (int64_t j = 0; j < kBlocks; ++j) {
    const uint64_t k = static_cast<uint64_t>(first_block + j);
    const Words x = philox_4x32_10({static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32), 0, 0},
                                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const Pair p = box_muller(x[0], x[1]), q = box_muller(x[2], x[3]);
    lanes[0][j] = p.x, lanes[1][j] = p.y, lanes[2][j] = q.x, lanes[3][j] = q.y;
  }
  for (int64_t j = 0; j < kBlocks; ++j)
    for (int lane = 0; lane < 4; ++lane) noise[4 * j + lane] = lanes[lane][j];
}

template <class T>
void add(const Tensor& z, float noise_std, const Tensor& seeds, Tensor& out) {
  const int64_t height = z.size(2), width = z.size(3), numel = z.size(1) * height * width;
  const int64_t chunk = 4 * kBlocks, chunks = (numel + chunk - 1) / chunk;
  const auto z_data = static_cast<const T*>(z.const_data_ptr());
  const auto seeds_data = static_cast<const int64_t*>(seeds.const_data_ptr());
  const auto out_data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t seeds_stride = seeds.stride(0);
  const int64_t zb = z.stride(0), zc = z.stride(1), zh = z.stride(2), zw = z.stride(3);
  const int64_t ob = out.stride(0), oc = out.stride(1), oh = out.stride(2), ow = out.stride(3);

  torch::stable::parallel_for(0, z.size(0) * chunks, kGrain / chunk, [&](int64_t begin, int64_t end) {
    float noise[4 * kBlocks];
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / chunks, first = job % chunks * chunk, last = std::min(numel, first + chunk);
      make_noise(noise, static_cast<uint64_t>(seeds_data[b * seeds_stride]), first / 4);
      for (int64_t i = first; i < last;) {  // a row of the photo, or what this chunk has of it
        const int64_t w = i % width, h = i / width % height, c = i / width / height;
        const T* z_row = z_data + b * zb + c * zc + h * zh;
        float* out_row = out_data + b * ob + c * oc + h * oh;
        const int64_t stop = std::min(width, w + last - i);
        for (int64_t x = w; x < stop; ++x, ++i)
          out_row[x * ow] = upcast(z_row[x * zw]) + noise_std * noise[i - first];
      }
    }
  });
}

void add_source_noise(const Tensor& z, double noise_std, const Tensor& seeds, Tensor out) {
  STD_TORCH_CHECK(
      z.dim() == 4 && out.dim() == 4 && z.numel() == out.numel() && out.scalar_type() == ScalarType::Float &&
          seeds.scalar_type() == ScalarType::Long && seeds.numel() == z.size(0),
      "lpmrf_cpp::add_source_noise: expected (B, C, H, W) z and float32 out, and int64 seeds (B,)");
  if (z.numel() == 0) return;
  dispatch(z.scalar_type(), [&](auto type) {
    add<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(z, static_cast<float>(noise_std), seeds, out);
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("add_source_noise(Tensor z, float noise_std, Tensor seeds, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) { m.impl("add_source_noise", TORCH_BOX(&lpmrf::add_source_noise)); }
