// Norms over the channels of each pixel, forward and backward. The specification is
// kernels/lpmrf_kernels/pixel_norm.py.
#include "rows.h"
#include "sums.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace lpmrf {
namespace {

constexpr int64_t kTile = 4096;   // floats worked on at a time: a few such buffers fit in the first cache
constexpr int64_t kRows = 64;     // pixels worked on at a time, at most
constexpr int64_t kColumns = 64;  // the same where channels are planes

// Up to kRows rows. Each step runs over all of them, so that one row's additions fill the waiting times of another's.
#define LPMRF_STATISTICS                                                                                     \
  const float size = static_cast<float>(channels);                                                           \
  float sums[kRows][kLanes], mean[kRows] = {}, rstd[kRows];                                                  \
  if (centred) {                                                                                             \
    /* relative to the first element: a large mean costs no digits */                                        \
    for (int64_t row = 0; row < rows; ++row) {                                                               \
      const float *r = x + row * channels, shift = *r;                                                       \
      LPMRF_SUM(sums[row], channels, r[c] - shift)                                                           \
    }                                                                                                        \
    for (int64_t row = 0; row < rows; ++row) mean[row] = x[row * channels] + fold(sums[row]) / size;         \
  }                                                                                                          \
  for (int64_t row = 0; row < rows; ++row) {                                                                 \
    const float *r = x + row * channels, m = mean[row];                                                      \
    LPMRF_SUM(sums[row], channels, (r[c] - m) * (r[c] - m))                                                  \
  }                                                                                                          \
  for (int64_t row = 0; row < rows; ++row) rstd[row] = fold(sums[row]);                                      \
  for (int64_t row = 0; row < rows; ++row) rstd[row] = 1 / std::sqrt(rstd[row] / size + eps);

LPMRF_VECTORISED void norm_rows(float* __restrict y, const float* __restrict x, int64_t rows, int64_t channels,
                                const float* __restrict weight, const float* __restrict bias, float eps,
                                bool centred) {
  LPMRF_STATISTICS
  for (int64_t row = 0; row < rows; ++row) {
    const float *r = x + row * channels, m = mean[row], s = rstd[row];
    for (int64_t c = 0; c < channels; ++c) y[row * channels + c] = (r[c] - m) * s * weight[c] + bias[c];
  }
}

// tile: [channels][kColumns], in place.
LPMRF_VECTORISED void norm_columns(float* __restrict tile, int64_t channels, const float* __restrict weight,
                                   const float* __restrict bias, float eps, bool centred) {
  const float size = static_cast<float>(channels);
  float mean[kColumns] = {}, rstd[kColumns] = {};
  if (centred) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < kColumns; ++p) mean[p] += tile[c * kColumns + p] - tile[p];  // as in LPMRF_STATISTICS
    for (int64_t p = 0; p < kColumns; ++p) mean[p] = tile[p] + mean[p] / size;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < kColumns; ++p) {
      const float d = tile[c * kColumns + p] - mean[p];
      tile[c * kColumns + p] = d;
      rstd[p] += d * d;
    }
  for (int64_t p = 0; p < kColumns; ++p) rstd[p] = 1 / std::sqrt(rstd[p] / size + eps);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < kColumns; ++p)
      tile[c * kColumns + p] = tile[c * kColumns + p] * rstd[p] * weight[c] + bias[c];
}

// dweight and dbias are added to.
LPMRF_VECTORISED void norm_rows_backward(float* __restrict dx, float* __restrict dweight, float* __restrict dbias,
                                         const float* __restrict x, const float* __restrict g,
                                         const float* __restrict g_sum, int64_t rows, int64_t channels,
                                         const float* __restrict weight, float eps, bool centred) {
  LPMRF_STATISTICS
  float g_mean[kRows] = {}, g_x[kRows];
  if (centred) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* gr = g + row * channels;
      LPMRF_SUM(sums[row], channels, gr[c] * weight[c])
    }
    for (int64_t row = 0; row < rows; ++row) g_mean[row] = fold(sums[row]) / size;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float *r = x + row * channels, *gr = g + row * channels, m = mean[row], s = rstd[row];
    LPMRF_SUM(sums[row], channels, gr[c] * weight[c] * ((r[c] - m) * s))
  }
  for (int64_t row = 0; row < rows; ++row) g_x[row] = fold(sums[row]) / size;
  for (int64_t row = 0; row < rows; ++row) {
    const float *r = x + row * channels, *gr = g + row * channels, *gs = g_sum + row * channels;
    const float m = mean[row], s = rstd[row], a = g_mean[row], b = g_x[row];
    for (int64_t c = 0; c < channels; ++c) {
      const float x_hat = (r[c] - m) * s;
      dweight[c] += gr[c] * x_hat;
      dbias[c] += gr[c];
      dx[row * channels + c] = (gr[c] * weight[c] - a - x_hat * b) * s + gs[c];
    }
  }
}

template <class T>
void forward(const Tensor& x_tensor, const std::optional<Tensor>& residual, const Parameter& weight,
             const Parameter& bias, float eps, bool centred, std::optional<Tensor>& sum_tensor, Tensor& y_tensor) {
  const Image<const T> x(x_tensor), r(residual ? *residual : x_tensor);
  const Image<T> y(y_tensor), sum(sum_tensor ? *sum_tensor : y_tensor);
  const int64_t channels = x.channels, pixels = x.height * x.width;

  const bool planes = x.by_channel() && r.by_channel() && y.by_channel() && !x.by_pixel();
  const int64_t step = planes ? kColumns : std::clamp<int64_t>(kTile / channels, 1, kRows);
  const int64_t tiles = (pixels + step - 1) / step;
  torch::stable::parallel_for(
      0, x_tensor.size(0) * tiles, std::max<int64_t>(1, kGrain / (step * channels)), [&](int64_t begin, int64_t end) {
        std::vector<float> buffers(3 * step * channels);
        float *const first_buffer = buffers.data(), *const second = first_buffer + step * channels,
                     *const third = second + step * channels;
        for (int64_t job = begin; job < end; ++job) {
          const int64_t b = job / tiles, first = job % tiles * step, count = std::min(step, pixels - first);
          if (planes) {
            const T *x_data = x.at(b, 0) + first, *r_data = r.at(b, 0) + first;
            for (int64_t c = 0; c < channels; ++c) {
              float* row = first_buffer + c * kColumns;
              read_row(row, x_data + c * pixels, count);
              if (residual) {
                read_row(second, r_data + c * pixels, count);
                add_rows(row, row, second, x_data, count);
                write_row(sum.at(b, 0) + first + c * pixels, row, count);
              }
            }
            norm_columns(first_buffer, channels, weight.row(b), bias.row(b), eps, centred);
            for (int64_t c = 0; c < channels; ++c)
              write_row(y.at(b, 0) + first + c * pixels, first_buffer + c * kColumns, count);
            continue;
          }
          const float* in = read_pixels(first_buffer, x, b, first, count);
          if (residual) {
            float* total = room_for_pixels(third, sum, b, first);
            add_rows(total, in, read_pixels(second, r, b, first, count), static_cast<const T*>(nullptr),
                     count * channels);
            write_pixels(sum, total, b, first, count);
            in = total;
          }
          float* out = room_for_pixels(second, y, b, first);
          norm_rows(out, in, count, channels, weight.row(b), bias.row(b), eps, centred);
          write_pixels(y, out, b, first, count);
        }
      });
}

void pixel_norm(const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                std::optional<Tensor> bias, double eps, bool centred, std::optional<Tensor> sum, Tensor y) {
  const Parameter w(weight, x.size(1), 1), b(bias, x.size(1), 0);
  dispatch(x.scalar_type(), [&](auto type) {
    forward<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(x, residual, w, b, static_cast<float>(eps),
                                                                     centred, sum, y);
  });
}

template <class T>
void backward(const Tensor& x_tensor, const Tensor& g_tensor, const std::optional<Tensor>& g_sum_tensor,
              const Parameter& weight, float eps, bool centred, int64_t chunks, Tensor& dx_tensor, float* dweight,
              float* dbias) {
  const Image<const T> x(x_tensor), g(g_tensor), g_sum(g_sum_tensor ? *g_sum_tensor : g_tensor);
  const Image<T> dx(dx_tensor);
  const int64_t channels = x.channels, pixels = x.height * x.width;
  const int64_t step = std::clamp<int64_t>(kTile / channels, 1, kRows);
  torch::stable::parallel_for(0, x_tensor.size(0) * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(4 * step * channels), sums(2 * channels);
    float *const a = buffers.data(), *const b1 = a + step * channels, *const c1 = b1 + step * channels,
                 *const d = c1 + step * channels;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / chunks, chunk = job % chunks;
      const int64_t last = pixels * (chunk + 1) / chunks;
      std::fill(sums.begin(), sums.end(), 0.f);
      if (!g_sum_tensor) std::fill_n(c1, step * channels, 0.f);
      for (int64_t first = pixels * chunk / chunks; first < last; first += step) {
        const int64_t count = std::min(step, last - first);
        const float* x_rows = read_pixels(a, x, b, first, count);
        const float* g_rows = read_pixels(b1, g, b, first, count);
        const float* s_rows = g_sum_tensor ? read_pixels(c1, g_sum, b, first, count) : c1;
        float* out = room_for_pixels(d, dx, b, first);
        norm_rows_backward(out, sums.data(), sums.data() + channels, x_rows, g_rows, s_rows, count, channels,
                           weight.row(b), eps, centred);
        write_pixels(dx, out, b, first, count);
      }
      if (dweight) std::copy_n(sums.data(), channels, dweight + job * channels);
      if (dbias) std::copy_n(sums.data() + channels, channels, dbias + job * channels);
    }
  });
}

void pixel_norm_backward(const Tensor& x, const Tensor& g, std::optional<Tensor> g_sum, std::optional<Tensor> weight,
                         double eps, bool centred, int64_t chunks, Tensor dx, std::optional<Tensor> dweight,
                         std::optional<Tensor> dbias) {
  const Parameter w(weight, x.size(1), 1);
  const auto data = [](std::optional<Tensor>& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; };
  dispatch(x.scalar_type(), [&](auto type) {
    backward<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(
        x, g, g_sum, w, static_cast<float>(eps), centred, chunks, dx, data(dweight), data(dbias));
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("pixel_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred, Tensor(a!)? sum,"
        " Tensor(b!) y) -> ()");
  m.def("pixel_norm_backward(Tensor x, Tensor g, Tensor? g_sum, Tensor? weight, float eps, bool centred, int chunks,"
        " Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("pixel_norm", TORCH_BOX(&lpmrf::pixel_norm));
  m.impl("pixel_norm_backward", TORCH_BOX(&lpmrf::pixel_norm_backward));
}
