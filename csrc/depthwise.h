// Depthwise 3x3 convolution with zero padding, sixteen channels at a time, for the ops that fuse it.
#pragma once

#include "lanes.h"

#include <type_traits>
#include <vector>

namespace lpmrf::lanes {
namespace {

// A (B, C, H, W) tensor whose channels are adjacent in memory.
template <class T>
struct Map {
  T* data;
  int64_t batch, channels, height, width, sb, sh, sw;

  explicit Map(const Tensor& t)
      : data(const_cast<T*>(static_cast<const T*>(t.const_data_ptr()))),
        batch(t.size(0)), channels(t.size(1)), height(t.size(2)), width(t.size(3)),
        sb(t.stride(0)), sh(t.stride(2)), sw(t.stride(3)) {
    STD_TORCH_CHECK(t.dim() == 4 && (t.stride(1) == 1 || channels == 1), "lpmrf_cpp: expected a channels-last tensor");
  }

  T* row(int64_t b, int64_t y, int64_t c) const { return data + b * sb + y * sh + c; }
};

// The weight (C, 1, 3, 3) as float [9][C], so that a tap of neighbouring channels is one load; and the bias, or zeros.
struct Taps {
  std::vector<float> weight, bias;
  int64_t channels;

  // flipped: the transposed convolution's weight, without a bias
  Taps(const Tensor& w, const Tensor* b, bool flipped = false)
      : weight(9 * w.size(0)), bias(w.size(0)), channels(w.size(0)) {
    STD_TORCH_CHECK(w.is_contiguous() && w.numel() == 9 * channels,
                    "lpmrf_cpp: expected a contiguous (C, 1, 3, 3) weight");
    dispatch(w.scalar_type(), [&](auto type) {
      const auto data = static_cast<decltype(type)>(w.const_data_ptr());
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < 9; ++k) weight[k * channels + c] = upcast(data[9 * c + (flipped ? 8 - k : k)]);
    });
    if (b == nullptr || flipped) return;
    dispatch(b->scalar_type(), [&](auto type) {
      const auto data = static_cast<decltype(type)>(b->const_data_ptr());
      for (int64_t c = 0; c < channels; ++c) bias[c] = upcast(data[c * b->stride(0)]);
    });
  }
};

// Row y of the channels from c on, as floats [width + 2][lanes]; zeros outside of the map.
template <class V, class T>
LPMRF_INLINE void pack_row(float* packed, const Map<T>& x, int64_t b, int64_t y, int64_t c) {
  constexpr int64_t n = Traits<V>::size;
  const bool inside = y >= 0 && y < x.height;
  const T* row = inside ? x.row(b, y, c) : nullptr;
  for (int64_t i = 0; i < x.width; ++i) store<V>(packed + (i + 1) * n, inside ? load<V>(row + i * x.sw) : V{});
  store<V>(packed, V{});
  store<V>(packed + (x.width + 1) * n, V{});
}

// Calls epilogue(y, i, values) at each pixel (y, i) of rows first to last - 1, where values[t] is the convolution of the
// channels from c[t] on. Each input is read and upcast once, into a ring of three packed rows a tile, from which the nine
// taps read neighbouring memory; pixels of a channels-last map lie far apart.
template <class V, int TILES, class T, class Epilogue>
LPMRF_INLINE void convolve(const Map<T>& x, const Taps& taps, int64_t b, int64_t first, int64_t last,
                           const int64_t (&c)[TILES], float* scratch, const Epilogue& epilogue) {
  constexpr int64_t n = Traits<V>::size;
  const int64_t size = (x.width + 2) * n;
  V w[TILES][9], bias[TILES];
  for (int t = 0; t < TILES; ++t) {
    for (int k = 0; k < 9; ++k) w[t][k] = load<V>(&taps.weight[k * taps.channels + c[t]]);
    bias[t] = load<V>(&taps.bias[c[t]]);
  }
  for (int64_t y = first - 1; y <= last; ++y) {
    for (int t = 0; t < TILES; ++t) pack_row<V>(scratch + (t * 3 + (y + 3) % 3) * size, x, b, y, c[t]);
    if (y <= first) continue;
    for (int64_t i = 0; i < x.width; ++i) {
      V values[TILES];
      for (int t = 0; t < TILES; ++t) {
        const float* above = scratch + (t * 3 + (y + 1) % 3) * size + i * n;
        const float* here = scratch + (t * 3 + (y + 2) % 3) * size + i * n;
        const float* below = scratch + (t * 3 + (y + 3) % 3) * size + i * n;
        const V* const weight = w[t];
        const V top = load<V>(above) * weight[0] + load<V>(above + n) * weight[1] + load<V>(above + 2 * n) * weight[2];
        const V mid = load<V>(here) * weight[3] + load<V>(here + n) * weight[4] + load<V>(here + 2 * n) * weight[5];
        const V low = load<V>(below) * weight[6] + load<V>(below + n) * weight[7] + load<V>(below + 2 * n) * weight[8];
        values[t] = bias[t] + (top + mid + low);
      }
      epilogue(y - 1, i, values);
    }
  }
}

constexpr int64_t kRows = 16;  // of a job: packing two more costs an eighth of the packing

// Which rows of which channels a job computes, channels in blocks of kLanes.
struct Job {
  int64_t b, c, first, last;

  Job(int64_t job, int64_t channels, int64_t height) {
    const int64_t bands = (height + kRows - 1) / kRows, blocks = (channels + kLanes - 1) / kLanes;
    c = job % blocks * kLanes;  // fastest: neighbouring channels share cache lines
    first = job / blocks % bands * kRows;
    last = std::min(height, first + kRows);
    b = job / blocks / bands;
  }

  static int64_t count(int64_t batch, int64_t channels, int64_t height) {
    return batch * ((channels + kLanes - 1) / kLanes) * ((height + kRows - 1) / kRows);
  }
};

// The dtypes that these kernels take: `f(static_cast<const T*>(nullptr))`.
template <class F>
void dispatch_map(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(static_cast<const float*>(nullptr));
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "lpmrf_cpp: expected float32 or bfloat16");
  f(static_cast<const BFloat16*>(nullptr));
}

template <class P>
using Element = std::remove_cv_t<std::remove_pointer_t<P>>;

// f(job, scratch) for every job; `floats` floats of scratch memory, aligned to cache lines, are shared by nobody.
template <class F>
void for_each_job(int64_t jobs, int64_t elements_a_job, int64_t floats, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_a_job));
  torch::stable::parallel_for(0, jobs, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(floats + kLanes);
    const auto misaligned = reinterpret_cast<uintptr_t>(memory.data()) / 4 % kLanes;
    float* scratch = memory.data() + (kLanes - misaligned) % kLanes;
    for (int64_t job = begin; job < end; ++job) f(job, scratch);
  });
}

}  // namespace
}  // namespace lpmrf::lanes
