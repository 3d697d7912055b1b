// act(GroupNorm(x)): statistics, then one pass. The specification is kernels/lpmrf_kernels/group_norm_silu.py.
#include "rows.h"
#include "sums.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace lpmrf {
namespace {

constexpr int64_t kTile = 4096;   // floats worked on at a time: a few such buffers fit in the first cache
constexpr int64_t kRows = 64;     // pixels, likewise: a sum of more terms, one after another, loses digits
constexpr int64_t kPart = 65536;  // elements, about, that one partial result covers; fixed, so that threads do not matter

// e^x within 2 ulp, without a branch: Cephes' expf.
inline __attribute__((always_inline)) float exponential(float x) {
  x = x < -87.f ? -87.f : x;  // not std::max: a NaN stays one
  x = x > 88.f ? 88.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 · 2^23 leaves the nearest integer in the low bits
  const float n = shifted - 12582912.f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - 0x4B400000;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1) * bit_cast<float>((exponent + 127) << 23);
}

inline __attribute__((always_inline)) float silu(float x) { return x / (1 + exponential(-x)); }

// Mean, relative to `shift`, and sum of squared differences of each channel, over rows of pixels.
LPMRF_VECTORISED void row_moments(float* __restrict mean, float* __restrict squares, const float* __restrict x,
                                  const float* __restrict shift, int64_t rows, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) mean[c] += x[row * channels + c] - shift[c];
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<float>(rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const float d = x[row * channels + c] - shift[c] - mean[c];
      squares[c] += d * d;
    }
}

// The same of one channel's run of pixels.
LPMRF_VECTORISED void run_moments(float* mean, float* squares, const float* __restrict x, float shift, int64_t count) {
  float sums[kLanes];
  LPMRF_SUM(sums, count, x[c] - shift)
  const float m = fold(sums) / static_cast<float>(count);
  LPMRF_SUM(sums, count, (x[c] - shift - m) * (x[c] - shift - m))
  *mean = m;
  *squares = fold(sums);
}

// Chan's formula, channel by channel: (mean, squares) over `have` pixels take in others over `count`.
LPMRF_VECTORISED void merge_moments(float* __restrict mean, float* __restrict squares, float have,
                                    const float* __restrict other_mean, const float* __restrict other_squares,
                                    float count, int64_t channels) {
  const float part = count / (have + count), weight = have * part;
  for (int64_t c = 0; c < channels; ++c) {
    const float d = other_mean[c] - mean[c];
    mean[c] += d * part;
    squares[c] += other_squares[c] + d * d * weight;
  }
}

LPMRF_VECTORISED void norm_rows(float* __restrict y, const float* __restrict x, int64_t rows, int64_t channels,
                                const float* __restrict mean, const float* __restrict scale,
                                const float* __restrict bias, bool act) {
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
    if (act) {
      for (int64_t c = 0; c < channels; ++c) y[c] = silu((x[c] - mean[c]) * scale[c] + bias[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) y[c] = (x[c] - mean[c]) * scale[c] + bias[c];
    }
  }
}

LPMRF_VECTORISED void norm_run(float* __restrict y, const float* __restrict x, int64_t count, float mean, float scale,
                               float bias, bool act) {
  if (act) {
    for (int64_t i = 0; i < count; ++i) y[i] = silu((x[i] - mean) * scale + bias);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * scale + bias;
  }
}

// Pixels that part k of `parts` begins with.
int64_t part_begin(int64_t k, int64_t parts, int64_t pixels) { return pixels * k / parts; }

// A run of a plane as float32: `buffer`, or the run itself.
template <class T>
const float* read_run(float* buffer, const T* x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) return x;
  read_row(buffer, x, count);
  return buffer;
}

template <class T>
void group_norm(const Tensor& x_tensor, int64_t groups, const float* weight, const float* bias, double eps, bool act,
                Tensor& y_tensor, float* group_mean, float* group_rstd) {
  const Image<const T> x(x_tensor);
  const Image<T> y(y_tensor);
  const int64_t photos = x_tensor.size(0), channels = x.channels, pixels = x.height * x.width, size = channels / groups;
  const bool planes = x.by_channel() && y.by_channel() && !x.by_pixel();
  const int64_t part_pixels = planes ? kPart : std::max<int64_t>(1, kPart / channels);
  const int64_t parts = (pixels + part_pixels - 1) / part_pixels;
  const int64_t step = planes ? kTile : std::clamp<int64_t>(kTile / channels, 1, kRows);

  // Each part's moments of each channel, [photos][parts][channels].
  std::vector<float> means(photos * parts * channels), squares(means.size());
  torch::stable::parallel_for(0, photos * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(planes ? step : step * channels), shift(channels), tile_mean(channels), tile_squares(channels);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / parts, first = part_begin(job % parts, parts, pixels);
      const int64_t last = part_begin(job % parts + 1, parts, pixels);
      float *mean = means.data() + job * channels, *square = squares.data() + job * channels;
      // Relative to the part's first pixel: a large mean costs no digits.
      for (int64_t c = 0; c < channels; ++c) shift[c] = upcast(x.at(b, first)[c * x.stride_c]);
      for (int64_t c = 0; c < (planes ? channels : 1); ++c) {
        for (int64_t p = first; p < last; p += step) {
          const int64_t count = std::min(step, last - p);
          const bool start = p == first;
          float *m = start ? mean + c : tile_mean.data(), *s = start ? square + c : tile_squares.data();
          if (planes) {
            run_moments(m, s, read_run(buffer.data(), x.at(b, 0) + c * pixels + p, count), shift[c], count);
          } else {
            row_moments(m, s, read_pixels(buffer.data(), x, b, p, count), shift.data(), count, channels);
          }
          if (!start)
            merge_moments(mean + c, square + c, static_cast<float>(p - first), m, s, static_cast<float>(count),
                          planes ? 1 : channels);
        }
      }
      for (int64_t c = 0; c < channels; ++c) mean[c] += shift[c];
    }
  });

  // Each group's mean, and what each channel is multiplied by.
  std::vector<float> mean(photos * channels), scale(photos * channels);
  torch::stable::parallel_for(0, photos * groups, 1 + kGrain / (parts * size), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / groups, channel = job % groups * size;
      const int64_t row = b * parts * channels + channel;
      double total = 0, square = 0;
      const double shift = means[row];
      for (int64_t k = 0; k < parts; ++k) {
        const double n = part_begin(k + 1, parts, pixels) - part_begin(k, parts, pixels);
        for (int64_t c = 0; c < size; ++c) total += n * (means[row + k * channels + c] - shift);
      }
      const double m = shift + total / (static_cast<double>(pixels) * size);
      for (int64_t k = 0; k < parts; ++k) {
        const double n = part_begin(k + 1, parts, pixels) - part_begin(k, parts, pixels);
        for (int64_t c = 0; c < size; ++c) {
          const double d = means[row + k * channels + c] - m;
          square += squares[row + k * channels + c] + n * d * d;
        }
      }
      const double rstd = 1 / std::sqrt(square / (static_cast<double>(pixels) * size) + eps);
      group_mean[job] = static_cast<float>(m);
      group_rstd[job] = static_cast<float>(rstd);
      for (int64_t c = 0; c < size; ++c) {
        mean[b * channels + channel + c] = static_cast<float>(m);
        scale[b * channels + channel + c] = static_cast<float>(rstd) * weight[channel + c];
      }
    }
  });

  const int64_t runs = planes ? channels : 1, tiles = (pixels + step - 1) / step, jobs = photos * runs * tiles;
  torch::stable::parallel_for(0, jobs, 1 + kGrain / kTile, [&](int64_t begin, int64_t end) {
    std::vector<float> in(planes ? step : step * channels), out(in.size());
    for (int64_t turn = begin; turn < end; ++turn) {
      const int64_t job = jobs - 1 - turn;  // backwards: the caches still hold what the statistics read last
      const int64_t b = job / (runs * tiles), c = job / tiles % runs, p = job % tiles * step;
      const int64_t count = std::min(step, pixels - p), channel = b * channels + c;
      if (planes) {
        T* to = y.at(b, 0) + c * pixels + p;
        float* room = out.data();
        if constexpr (std::is_same_v<T, float>) room = to;
        norm_run(room, read_run(in.data(), x.at(b, 0) + c * pixels + p, count), count, mean[channel], scale[channel],
                 bias[c], act);
        if constexpr (!std::is_same_v<T, float>) write_row(to, room, count);
      } else {
        float* room = room_for_pixels(out.data(), y, b, p);
        norm_rows(room, read_pixels(in.data(), x, b, p, count), count, channels, mean.data() + channel,
                  scale.data() + channel, bias, act);
        write_pixels(y, room, b, p, count);
      }
    }
  });
}

void group_norm_silu(const Tensor& x, int64_t groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
                     double eps, bool act, Tensor y, Tensor mean, Tensor rstd) {
  const Parameter w(weight, x.size(1), 1), b(bias, x.size(1), 0);
  dispatch(x.scalar_type(), [&](auto type) {
    group_norm<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(
        x, groups, w.row(0), b.row(0), eps, act, y, static_cast<float*>(mean.mutable_data_ptr()),
        static_cast<float*>(rstd.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool act, Tensor(a!) y,"
        " Tensor(b!) mean, Tensor(c!) rstd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&lpmrf::group_norm_silu)); }
