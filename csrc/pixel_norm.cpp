// Norms over the channels of each pixel, forward and backward. The specification is
// kernels/lpmrf_kernels/pixel_norm.py.
#include "lanes.h"
#include "rows.h"

#include <cmath>

namespace lpmrf::lanes {
namespace {

constexpr int64_t kTile = 4096;   // elements worked on at a time: a few such tiles fit in the first cache
constexpr int64_t kRows = 64;     // pixels worked on at a time, at most
constexpr int64_t kColumns = 64;  // the same where channels are planes
constexpr int64_t kFirstCache = 32768;  // bytes

// ---- rows of channels, sixteen pixels at a time: lane i of a statistic is pixel i's

// How many rows are worked on together: what they are read from and written to is in the first cache for all passes.
template <class T>
LPMRF_INLINE int64_t rows_together(int64_t channels) {
  return std::clamp<int64_t>(kFirstCache / 2 / static_cast<int64_t>(channels * sizeof(T)), 1, kLanes);
}

// Sums over the channels of f(row, c, count), for each of up to kLanes rows of elements T.
template <class T, class F>
LPMRF_INLINE Lanes sums_of_rows(int64_t rows, int64_t channels, const F& f) {
  Lanes totals[kLanes] = {};
  for (int64_t row = 0; row < rows; ++row) {
    Pair total = {};
    int64_t c = 0;
    for (; c + kPair <= channels; c += kPair) total = total + f(row, c, kPair);
    if (c < channels) total = total + keep<T>(f(row, c, channels - c), channels - c);
    totals[row] = total.a + total.b;
  }
  return sums(totals);
}

struct Statistics {
  float mean[kLanes] = {}, rstd[kLanes];
};

template <class T>
LPMRF_INLINE Statistics statistics(const T* x, int64_t rows, int64_t channels, float eps, bool centred) {
  Statistics s;
  const float size = static_cast<float>(channels);
  if (centred) {
    float shift[kLanes];  // relative to the first element: a large mean costs no digits
    for (int64_t r = 0; r < kLanes; ++r) shift[r] = upcast(x[std::min(r, rows - 1) * channels]);
    const Lanes away = sums_of_rows<T>(rows, channels, [&](int64_t r, int64_t c, int64_t n) LPMRF_LAMBDA {
      return load_pair(x + r * channels + c, n) - shift[r];
    });
    store<Lanes>(s.mean, load<Lanes>(shift) + away / size);
  }
  const Lanes squares = sums_of_rows<T>(rows, channels, [&](int64_t r, int64_t c, int64_t n) LPMRF_LAMBDA {
    const Pair d = load_pair(x + r * channels + c, n) - s.mean[r];
    return d * d;
  });
  store<Lanes>(s.rstd, squares);
  for (float& r : s.rstd) r = 1 / std::sqrt(r / size + eps);
  return s;
}

template <class T>
LPMRF_INLINE void rows_norm(T* y, const T* x, int64_t rows, int64_t channels, const float* weight, const float* bias,
                            float eps, bool centred) {
  const int64_t together = rows_together<T>(channels);
  for (int64_t first = 0; first < rows; first += together, x += together * channels, y += together * channels) {
    const int64_t here = std::min(together, rows - first);
    const Statistics s = statistics(x, here, channels, eps, centred);
    for (int64_t r = 0; r < here; ++r) {
      const auto norm = [&](int64_t c, int64_t n) LPMRF_LAMBDA {
        const Pair d = load_pair(x + r * channels + c, n) - s.mean[r];
        store_pair(y + r * channels + c, d * s.rstd[r] * load_pair(weight + c) + load_pair(bias + c), n);
      };
      int64_t c = 0;
      for (; c + kPair <= channels; c += kPair) norm(c, kPair);
      if (c < channels) norm(c, channels - c);
    }
  }
}

// Parameters and their gradients are rows of pairs of T. dweight and dbias are added to; g_sum may be null.
template <class T>
LPMRF_INLINE void rows_backward(T* dx, float* dweight, float* dbias, const T* x, const T* g, const T* g_sum,
                                int64_t rows, int64_t channels, const float* weight, float eps, bool centred) {
  const float size = static_cast<float>(channels);
  for (int64_t first = 0; first < rows; first += kLanes, x += kLanes * channels, g += kLanes * channels,
               dx += kLanes * channels, g_sum += g_sum ? kLanes * channels : 0) {
    const int64_t here = std::min(kLanes, rows - first);
    const Statistics s = statistics(x, here, channels, eps, centred);
    float g_mean[kLanes] = {}, g_x[kLanes];
    if (centred)
      store<Lanes>(g_mean, sums_of_rows<T>(here, channels, [&](int64_t r, int64_t c, int64_t n) LPMRF_LAMBDA {
                             return load_pair(g + r * channels + c, n) * load_pair(weight + c);
                           }) / size);
    store<Lanes>(g_x, sums_of_rows<T>(here, channels, [&](int64_t r, int64_t c, int64_t n) LPMRF_LAMBDA {
                        const Pair x_hat = (load_pair(x + r * channels + c, n) - s.mean[r]) * s.rstd[r];
                        return load_pair(g + r * channels + c, n) * load_pair(weight + c) * x_hat;
                      }) / size);
    const auto column = [&](int64_t c, int64_t n) LPMRF_LAMBDA {
      Pair w = load_pair(dweight + c), b = load_pair(dbias + c);
      for (int64_t r = 0; r < here; ++r) {
        const int64_t at = r * channels + c;
        const Pair x_hat = (load_pair(x + at, n) - s.mean[r]) * s.rstd[r], d = load_pair(g + at, n);
        w = w + d * x_hat;
        b = b + d;
        const Pair own = (d * load_pair(weight + c) - g_mean[r] - x_hat * g_x[r]) * s.rstd[r];
        store_pair(dx + at, g_sum ? own + load_pair(g_sum + at, n) : own, n);
      }
      store_pair(dweight + c, w);
      store_pair(dbias + c, b);
    };
    int64_t c = 0;
    for (; c + kPair <= channels; c += kPair) column(c, kPair);
    if (c < channels) column(c, channels - c);
  }
}

#define LPMRF_PIXEL_NORM(T)                                                                                          \
  LPMRF_VECTORISED void norm_rows(T* y, const T* x, int64_t rows, int64_t channels, const float* weight,             \
                                  const float* bias, float eps, bool centred) {                                      \
    rows_norm(y, x, rows, channels, weight, bias, eps, centred);                                                     \
  }                                                                                                                  \
  LPMRF_VECTORISED void norm_rows_backward(T* dx, float* dweight, float* dbias, const T* x, const T* g,              \
                                           const T* g_sum, int64_t rows, int64_t channels, const float* weight,      \
                                           float eps, bool centred) {                                                \
    rows_backward(dx, dweight, dbias, x, g, g_sum, rows, channels, weight, eps, centred);                            \
  }                                                                                                                  \
  LPMRF_VECTORISED void add_rows(T* sum, const T* x, const T* y, int64_t count) {                                    \
    int64_t i = 0;                                                                                                   \
    for (; i + kLanes <= count; i += kLanes) store<Lanes>(sum + i, load<Lanes>(x + i) + load<Lanes>(y + i));         \
    for (; i < count; ++i) store<float>(sum + i, load<float>(x + i) + load<float>(y + i));                           \
  }
// Overloads, not templates: GCC clones none.
LPMRF_PIXEL_NORM(float)
LPMRF_PIXEL_NORM(BFloat16)
#undef LPMRF_PIXEL_NORM

// ---- planes

// tile: [channels][kColumns], in place.
LPMRF_VECTORISED void norm_columns(float* __restrict tile, int64_t channels, const float* __restrict weight,
                                   const float* __restrict bias, float eps, bool centred) {
  const float size = static_cast<float>(channels);
  float mean[kColumns] = {}, rstd[kColumns] = {};
  if (centred) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < kColumns; ++p) mean[p] += tile[c * kColumns + p] - tile[p];  // as for rows
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

// ---- photos

template <class T>
void forward(const Tensor& x_tensor, const std::optional<Tensor>& residual, const Parameter& weight,
             const Parameter& bias, float eps, bool centred, std::optional<Tensor>& sum_tensor, Tensor& y_tensor) {
  const Image<const T> x(x_tensor), r(residual ? *residual : x_tensor);
  const Image<T> y(y_tensor), sum(sum_tensor ? *sum_tensor : y_tensor);
  const Image<const T> in(sum_tensor ? *sum_tensor : x_tensor);  // of the norm
  const int64_t channels = x.channels, pixels = x.height * x.width;

  const bool planes = x.by_channel() && r.by_channel() && y.by_channel() && !x.by_pixel();
  const bool in_place = std::is_same_v<T, BFloat16> && x.by_pixel() && r.by_pixel() && y.by_pixel();  // sum is as y
  const std::vector<float> weights = weight.pairs(in_place), biases = bias.pairs(in_place);
  const auto row = [&](const Parameter& p, const std::vector<float>& pairs, int64_t b) {
    return pairs.data() + (p.stride ? b * padded(channels) : 0);
  };
  const int64_t step = planes ? kColumns : std::clamp<int64_t>(kTile / channels, kLanes, kRows);
  const int64_t tiles = (pixels + step - 1) / step;
  torch::stable::parallel_for(
      0, x_tensor.size(0) * tiles, std::max<int64_t>(1, kGrain / (step * channels)), [&](int64_t begin, int64_t end) {
        std::vector<float> first_buffer(step * channels), second_buffer(step * channels);
        float *const a = first_buffer.data(), *const other = second_buffer.data();
        for (int64_t job = begin; job < end; ++job) {
          const int64_t b = job / tiles, first = job % tiles * step, count = std::min(step, pixels - first);
          const float *weight_row = row(weight, weights, b), *bias_row = row(bias, biases, b);
          if (planes) {
            for (int64_t c = 0; c < channels; ++c) {
              const int64_t at = first + c * pixels;
              float* row = a + c * kColumns;
              read_row(row, x.at(b, 0) + at, count);
              if (!residual) continue;
              read_row(other, r.at(b, 0) + at, count);
              add_rows(row, row, other, count);
              write_row(sum.at(b, 0) + at, row, count);
              read_row(row, in.at(b, 0) + at, count);  // as rounded
            }
            norm_columns(a, channels, weight.row(b), bias.row(b), eps, centred);
            for (int64_t c = 0; c < channels; ++c)
              write_row(y.at(b, 0) + first + c * pixels, a + c * kColumns, count);
            continue;
          }
          if constexpr (std::is_same_v<T, BFloat16>) {
            if (in_place) {
              if (residual) add_rows(sum.at(b, first), x.at(b, first), r.at(b, first), count * channels);
              norm_rows(y.at(b, first), in.at(b, first), count, channels, weight_row, bias_row, eps, centred);
              continue;
            }
          }
          if (residual) {
            float* total = room_for_pixels(a, sum, b, first);
            add_rows(total, read_pixels(a, x, b, first, count), read_pixels(other, r, b, first, count),
                     count * channels);
            write_pixels(sum, total, b, first, count);
          }
          float* out = room_for_pixels(other, y, b, first);
          norm_rows(out, read_pixels(a, in, b, first, count), count, channels, weight_row, bias_row, eps, centred);
          write_pixels(y, out, b, first, count);
        }
      });
}

void pixel_norm(const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> weight, double weight_plus,
                std::optional<Tensor> bias, double eps, bool centred, std::optional<Tensor> sum, Tensor y) {
  const Parameter w(weight, x.size(1), 1, static_cast<float>(weight_plus)), b(bias, x.size(1), 0);
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
  const int64_t step = std::clamp<int64_t>(kTile / channels, kLanes, kRows);
  const bool in_place =
      std::is_same_v<T, BFloat16> && x.by_pixel() && g.by_pixel() && g_sum.by_pixel() && dx.by_pixel();
  const int64_t columns = padded(channels);
  const std::vector<float> weights = weight.pairs(in_place);
  torch::stable::parallel_for(0, x_tensor.size(0) * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(4 * step * channels), dw(columns), db(columns);
    float *const a = buffers.data(), *const b1 = a + step * channels, *const c1 = b1 + step * channels,
                 *const out_buffer = c1 + step * channels;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t b = job / chunks, chunk = job % chunks, last = pixels * (chunk + 1) / chunks;
      const float* weight_row = weights.data() + (weight.stride ? b * columns : 0);
      std::fill(dw.begin(), dw.end(), 0.f);
      std::fill(db.begin(), db.end(), 0.f);
      for (int64_t first = pixels * chunk / chunks; first < last; first += step) {
        const int64_t count = std::min(step, last - first);
        if constexpr (std::is_same_v<T, BFloat16>) {
          if (in_place) {
            norm_rows_backward(dx.at(b, first), dw.data(), db.data(), x.at(b, first), g.at(b, first),
                               g_sum_tensor ? g_sum.at(b, first) : nullptr, count, channels, weight_row, eps, centred);
            continue;
          }
        }
        float* out = room_for_pixels(out_buffer, dx, b, first);
        norm_rows_backward(out, dw.data(), db.data(), read_pixels(a, x, b, first, count),
                           read_pixels(b1, g, b, first, count),
                           g_sum_tensor ? read_pixels(c1, g_sum, b, first, count) : nullptr, count, channels,
                           weight_row, eps, centred);
        write_pixels(dx, out, b, first, count);
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = in_place ? place<BFloat16>(c) : c;
        if (dweight) dweight[job * channels + c] = dw[at];
        if (dbias) dbias[job * channels + c] = db[at];
      }
    }
  });
}

void pixel_norm_backward(const Tensor& x, const Tensor& g, std::optional<Tensor> g_sum, std::optional<Tensor> weight,
                         double weight_plus, double eps, bool centred, int64_t chunks, Tensor dx,
                         std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  const Parameter w(weight, x.size(1), 1, static_cast<float>(weight_plus));
  const auto data = [](std::optional<Tensor>& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; };
  dispatch(x.scalar_type(), [&](auto type) {
    backward<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(
        x, g, g_sum, w, static_cast<float>(eps), centred, chunks, dx, data(dweight), data(dbias));
  });
}

}  // namespace
}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("pixel_norm(Tensor x, Tensor? residual, Tensor? weight, float weight_plus, Tensor? bias,"
        " float eps, bool centred, Tensor(a!)? sum, Tensor(b!) y) -> ()");
  m.def("pixel_norm_backward(Tensor x, Tensor g, Tensor? g_sum, Tensor? weight, float weight_plus, float eps,"
        " bool centred, int chunks, Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("pixel_norm", TORCH_BOX(&lpmrf::lanes::pixel_norm));
  m.impl("pixel_norm_backward", TORCH_BOX(&lpmrf::lanes::pixel_norm_backward));
}
