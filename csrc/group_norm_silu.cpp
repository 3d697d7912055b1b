// act(GroupNorm(x)), forward and backward: sums over pixels, then one pass. The specification is
// kernels/lpmrf_kernels/group_norm_silu.py.
//
// Channels-last is rows of channels, one a pixel. NCHW is planes, one a channel; a plane is read as rows of kWide
// neighbouring pixels, whose columns are added up at the end.
#include "lanes.h"
#include "rows.h"

#include <cmath>

namespace lpmrf::lanes {
namespace {

constexpr int64_t kWide = 64;
constexpr int64_t kRows = 64;     // whose moments are taken together
constexpr int64_t kTile = 8192;   // elements worked on at a time: a few such tiles fit in the caches
constexpr int64_t kPart = 65536;  // elements, about, that one partial result covers; fixed, so that threads do not matter

// ---- rows

// The moments of each column, its mean relative to `shift` and its sum of squared differences, over `have` rows take in
// those of more rows, by Chan's formula; the first row of all becomes the shift. The rows are read twice, from memory
// and from the first cache: squares of differences to anything but their own mean lose digits.
template <int N, class T>
LPMRF_INLINE void columns_moments(float* shift, float* mean, float* squares, int64_t have, const T* x, int64_t rows,
                                  int64_t columns, int64_t first, int64_t count) {
  Pair origin[N], m[N] = {}, square[N] = {};
  for (int k = 0; k < N; ++k) {
    float* at = shift + first + k * kPair;
    if (!have) store_pair(at, load_pair(x + first + k * kPair, count));
    origin[k] = load_pair(at);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < N; ++k) {
      const T* at = x + row * columns + first + k * kPair;
      for (size_t line = 0; line < kPair * sizeof(T); line += 64)  // of the rows that follow, which memory is to bring
        __builtin_prefetch(reinterpret_cast<const char*>(at + rows * columns) + line);
      m[k] = m[k] + (load_pair(at, count) - origin[k]);
    }
  const float share = 1.0f / rows, part = static_cast<float>(rows) / (have + rows), weight = have * part;
  for (int k = 0; k < N; ++k) m[k] = m[k] * share;
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < N; ++k) {
      const Pair d = load_pair(x + row * columns + first + k * kPair, count) - origin[k] - m[k];
      square[k] = square[k] + d * d;
    }
  for (int k = 0; k < N; ++k) {
    const int64_t c = first + k * kPair;
    if (have) {
      const Pair before = load_pair(mean + c), d = m[k] - before;
      square[k] = square[k] + load_pair(squares + c) + d * d * weight;
      m[k] = before + d * part;
    }
    store_pair(mean + c, m[k]);
    store_pair(squares + c, square[k]);
  }
}

template <class T>
LPMRF_INLINE void rows_moments(float* shift, float* mean, float* squares, int64_t have, const T* x, int64_t rows,
                               int64_t columns) {
  int64_t c = 0;
  for (; c + 4 * kPair <= columns; c += 4 * kPair)  // whole rows of 128 channels: memory is read in order
    columns_moments<4>(shift, mean, squares, have, x, rows, columns, c, kPair);
  for (; c + 2 * kPair <= columns; c += 2 * kPair)
    columns_moments<2>(shift, mean, squares, have, x, rows, columns, c, kPair);
  for (; c + kPair <= columns; c += kPair)
    columns_moments<1>(shift, mean, squares, have, x, rows, columns, c, kPair);
  if (c < columns) columns_moments<1>(shift, mean, squares, have, x, rows, columns, c, columns - c);
}

// What the norm does to each channel; PLANE: the same for all columns.
struct Channel {
  const float *mean, *scale, *bias;
};

template <bool PLANE>
LPMRF_INLINE Pair parameter(const float* p, int64_t c) {
  return PLANE ? Pair{splat<Lanes>(*p), splat<Lanes>(*p)} : load_pair(p + c);
}

template <bool PLANE, class T>
LPMRF_INLINE void columns_norm(T* y, const T* x, Channel p, bool act, int64_t c, int64_t count) {
  const Pair n = (load_pair(x, count) - parameter<PLANE>(p.mean, c)) * parameter<PLANE>(p.scale, c) +
                 parameter<PLANE>(p.bias, c);
  store_pair(y, act ? silu(n) : n, count);
}

template <bool PLANE, class T>
LPMRF_INLINE void rows_norm(T* y, const T* x, Channel p, bool act, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    int64_t c = 0;
    for (; c + kPair <= columns; c += kPair) columns_norm<PLANE>(y + c, x + c, p, act, c, kPair);
    if (c < columns) columns_norm<PLANE>(y + c, x + c, p, act, c, columns - c);
  }
}

// The same of the backward: x̂ is (x - mean) · rstd, and g becomes the gradient of n = x̂ · weight + bias.
struct ChannelBackward {
  const float *mean, *rstd, *weight, *bias, *group_gx, *group_g;
};

template <bool PLANE>
struct Before {
  Pair mean, rstd, weight, bias;

  LPMRF_INLINE Before(const ChannelBackward& p, int64_t c)
      : mean(parameter<PLANE>(p.mean, c)), rstd(parameter<PLANE>(p.rstd, c)), weight(parameter<PLANE>(p.weight, c)),
        bias(parameter<PLANE>(p.bias, c)) {}

  LPMRF_INLINE void operator()(Pair x, Pair& x_hat, Pair& g, bool act) const {
    x_hat = (x - mean) * rstd;
    if (act) g = g * silu_slope(x_hat * weight + bias);
  }
};

// dweight and dbias, sums of each column, are added to.
template <bool PLANE, class T>
LPMRF_INLINE void columns_sums(float* dweight, float* dbias, const T* g, const T* x, const ChannelBackward& p, bool act,
                               int64_t rows, int64_t columns, int64_t c, int64_t count) {
  const Before<PLANE> before(p, c);
  Pair w = {}, b = {};
  for (int64_t row = 0; row < rows; ++row) {
    Pair x_hat, d = load_pair(g + row * columns + c, count);
    before(load_pair(x + row * columns + c, count), x_hat, d, act);
    w = w + d * x_hat;
    b = b + d;
  }
  store_pair(dweight + c, load_pair(dweight + c) + w);
  store_pair(dbias + c, load_pair(dbias + c) + b);
}

template <bool PLANE, class T>
LPMRF_INLINE void rows_sums(float* dweight, float* dbias, const T* g, const T* x, const ChannelBackward& p, bool act,
                            int64_t rows, int64_t columns) {
  int64_t c = 0;
  for (; c + kPair <= columns; c += kPair)
    columns_sums<PLANE>(dweight, dbias, g, x, p, act, rows, columns, c, kPair);
  if (c < columns) columns_sums<PLANE>(dweight, dbias, g, x, p, act, rows, columns, c, columns - c);
}

template <bool PLANE, class T>
LPMRF_INLINE void columns_backward(T* dx, const T* g, const T* x, const ChannelBackward& p, bool act, int64_t c,
                                   int64_t count) {
  const Before<PLANE> before(p, c);
  Pair x_hat, d = load_pair(g, count);
  before(load_pair(x, count), x_hat, d, act);
  d = d * before.weight - parameter<PLANE>(p.group_g, c) - x_hat * parameter<PLANE>(p.group_gx, c);
  store_pair(dx, d * before.rstd, count);
}

template <bool PLANE, class T>
LPMRF_INLINE void rows_backward(T* dx, const T* g, const T* x, const ChannelBackward& p, bool act, int64_t rows,
                                int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, x += columns, g += columns, dx += columns) {
    int64_t c = 0;
    for (; c + kPair <= columns; c += kPair) columns_backward<PLANE>(dx + c, g + c, x + c, p, act, c, kPair);
    if (c < columns) columns_backward<PLANE>(dx + c, g + c, x + c, p, act, c, columns - c);
  }
}

#define LPMRF_GROUP_NORM(T)                                                                                           \
  LPMRF_VECTORISED void moments(float* shift, float* mean, float* squares, int64_t have, const T* x, int64_t rows,    \
                                int64_t columns) {                                                                    \
    rows_moments(shift, mean, squares, have, x, rows, columns);                                                       \
  }                                                                                                                   \
  LPMRF_VECTORISED void norm(T* y, const T* x, Channel p, bool act, int64_t rows, int64_t columns) {                  \
    act ? rows_norm<false>(y, x, p, true, rows, columns) : rows_norm<false>(y, x, p, false, rows, columns);           \
  }                                                                                                                   \
  LPMRF_VECTORISED void norm_plane(T* y, const T* x, Channel p, bool act, int64_t count) {                            \
    act ? rows_norm<true>(y, x, p, true, 1, count) : rows_norm<true>(y, x, p, false, 1, count);                       \
  }                                                                                                                   \
  LPMRF_VECTORISED void gradient_sums(float* dweight, float* dbias, const T* g, const T* x, const ChannelBackward& p, \
                                      bool act, int64_t rows, int64_t columns) {                                      \
    rows_sums<false>(dweight, dbias, g, x, p, act, rows, columns);                                                    \
  }                                                                                                                   \
  LPMRF_VECTORISED void gradient_sums_plane(float* dweight, float* dbias, const T* g, const T* x,                     \
                                            const ChannelBackward& p, bool act, int64_t rows, int64_t columns) {      \
    rows_sums<true>(dweight, dbias, g, x, p, act, rows, columns);                                                     \
  }                                                                                                                   \
  LPMRF_VECTORISED void backward(T* dx, const T* g, const T* x, const ChannelBackward& p, bool act, int64_t rows,     \
                                 int64_t columns) {                                                                   \
    rows_backward<false>(dx, g, x, p, act, rows, columns);                                                            \
  }                                                                                                                   \
  LPMRF_VECTORISED void backward_plane(T* dx, const T* g, const T* x, const ChannelBackward& p, bool act,             \
                                       int64_t count) {                                                               \
    rows_backward<true>(dx, g, x, p, act, 1, count);                                                                  \
  }
// Overloads, not templates: GCC clones none.
LPMRF_GROUP_NORM(float)
LPMRF_GROUP_NORM(BFloat16)
#undef LPMRF_GROUP_NORM

// ---- photos

// How the pixels of all photos are divided. A part has partial sums of its own; a tile is what a kernel is called with:
// rows of all channels, or a run of one plane.
struct Division {
  bool planes;
  int64_t photos, channels, columns, pixels, step, parts;  // columns: of a row of parameters or sums, whole pairs

  Division(const Tensor& x, bool planes)
      : planes(planes), photos(x.size(0)), channels(x.size(1)), columns(padded(channels)), pixels(x.size(2) * x.size(3)),
        step(planes ? kRows * kWide : std::clamp<int64_t>(kTile / channels, 1, kRows)) {
    const int64_t part = planes ? kPart : std::max<int64_t>(1, kPart / channels);
    parts = (pixels + part - 1) / part;
  }

  int64_t part_begin(int64_t part) const { return pixels * part / parts; }
  int64_t part_size(int64_t part) const { return part_begin(part + 1) - part_begin(part); }
  int64_t buffer() const { return planes ? step : step * channels; }

  // f(photo, part, channel, first, count) for each tile of the parts, the tiles of one part and channel in order, on one
  // thread; channel is 0 where a tile has them all.
  template <class F>
  void for_parts(const F& f) const {
    torch::stable::parallel_for(0, photos * parts, 1, [&](int64_t begin, int64_t end) {
      auto call = f();  // with the thread's buffers
      for (int64_t job = begin; job < end; ++job) {
        const int64_t part = job % parts, last = part_begin(part + 1);
        for (int64_t c = 0; c < (planes ? channels : 1); ++c)
          for (int64_t p = part_begin(part); p < last; p += step)
            call(job / parts, part, c, p, std::min(step, last - p));
      }
    });
  }

  // f(photo, channel, first, count) for each tile, the last ones first: the caches still hold what was read last.
  template <class F>
  void for_tiles(const F& f) const {
    const int64_t runs = planes ? channels : 1, tiles = (pixels + step - 1) / step, jobs = photos * runs * tiles;
    torch::stable::parallel_for(0, jobs, 1 + kGrain / kTile, [&](int64_t begin, int64_t end) {
      auto call = f();
      for (int64_t turn = begin; turn < end; ++turn) {
        const int64_t job = jobs - 1 - turn, p = job % tiles * step;
        call(job / (runs * tiles), job / tiles % runs, p, std::min(step, pixels - p));
      }
    });
  }
};

// Whether kernels read these elements where they lie; else they get copies in float32.
template <class T>
constexpr bool kInPlace = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

// A run of a plane: the run itself, or `buffer` with its values.
template <class T>
auto read_run(float* buffer, const T* x, int64_t count) {
  if constexpr (kInPlace<T>) {
    return x;
  } else {
    read_row(buffer, x, count);
    return static_cast<const float*>(buffer);
  }
}

template <class T>
auto room_for_run(float* buffer, T* y) {
  if constexpr (kInPlace<T>) {
    return y;
  } else {
    return buffer;
  }
}

// A plane's part: the moments of its columns, over `rows` each, and single elements.
struct Columns {
  float shift[kWide], mean[kWide], squares[kWide];

  template <class T>
  void fold(float* total_shift, float* total_mean, float* total_squares, int64_t rows, const T* rest,
            int64_t rest_count) const {
    const int64_t columns = rows ? kWide : 0;
    const double origin = columns ? shift[0] : upcast(rest[0]), count = rows * columns + rest_count;
    const auto column = [&](int64_t c) { return shift[c] - origin + mean[c]; };
    double sum = 0, square = 0;
    for (int64_t c = 0; c < columns; ++c) sum += rows * column(c);
    for (int64_t i = 0; i < rest_count; ++i) sum += upcast(rest[i]) - origin;
    const double m = sum / count;
    for (int64_t c = 0; c < columns; ++c) square += squares[c] + rows * (column(c) - m) * (column(c) - m);
    for (int64_t i = 0; i < rest_count; ++i) {
      const double d = upcast(rest[i]) - origin - m;
      square += d * d;
    }
    *total_shift = static_cast<float>(origin);
    *total_mean = static_cast<float>(m);
    *total_squares = static_cast<float>(square);
  }
};

template <class T>
void group_norm(const Tensor& x_tensor, int64_t groups, const float* weight, const float* bias, double eps, bool act,
                Tensor& y_tensor, float* group_mean, float* group_rstd) {
  const Image<const T> x(x_tensor);
  const Image<T> y(y_tensor);
  const Division d(x_tensor, x.by_channel() && y.by_channel() && !x.by_pixel());
  const bool in_place = std::is_same_v<T, BFloat16> && !d.planes && x.by_pixel() && y.by_pixel();
  const auto slot = [&](int64_t c) { return in_place ? place<T>(c) : c; };  // of a channel in a row of columns
  const int64_t channels = d.channels, columns = d.columns, size = channels / groups, pixels = d.pixels;
  const int64_t parts = d.parts;

  // Each part's moments of each channel, [photos][parts][columns]; means are relative to shifts.
  std::vector<float> shifts(d.photos * parts * columns), means(shifts.size()), squares(shifts.size());
  d.for_parts([&] {
    return [&, buffer = std::vector<float>(d.buffer()), plane = Columns()](int64_t b, int64_t part, int64_t c,
                                                                             int64_t p, int64_t count) mutable {
      const int64_t first = d.part_begin(part), have = p - first, at = (b * parts + part) * columns + c;
      if (d.planes) {
        const auto run = read_run(buffer.data(), x.at(b, 0) + c * pixels + p, count);
        const int64_t rows = count / kWide, rest = count % kWide;
        if (rows) moments(plane.shift, plane.mean, plane.squares, have / kWide, run, rows, kWide);
        if (p + count == first + d.part_size(part))
          plane.fold(&shifts[at], &means[at], &squares[at], have / kWide + rows, run + rows * kWide, rest);
        return;
      }
      const auto take = [&](const auto* rows) {
        moments(&shifts[at], &means[at], &squares[at], have, rows, count, channels);
      };
      if constexpr (std::is_same_v<T, BFloat16>)
        if (in_place) return take(x.at(b, p));
      take(read_pixels(buffer.data(), x, b, p, count));
    };
  });

  // Each group's mean, and what each channel is multiplied by and what is added to it. The latter takes in what the
  // mean loses in float32.
  std::vector<float> mean(d.photos * columns), scale(mean.size()), offset(mean.size());
  torch::stable::parallel_for(0, d.photos * groups, 1 + kGrain / (parts * size), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t channel = job % groups * size, row = job / groups * parts;
      const auto at = [&](int64_t part, int64_t c) { return (row + part) * columns + slot(channel + c); };
      const double origin = shifts[at(0, 0)], total = static_cast<double>(pixels) * size;
      const auto centre = [&](int64_t i) { return shifts[i] - origin + means[i]; };
      double sum = 0, square = 0;
      for (int64_t k = 0; k < parts; ++k)
        for (int64_t c = 0; c < size; ++c) sum += d.part_size(k) * centre(at(k, c));
      const double m = sum / total;
      for (int64_t k = 0; k < parts; ++k)
        for (int64_t c = 0; c < size; ++c) {
          const double away = centre(at(k, c)) - m;
          square += squares[at(k, c)] + d.part_size(k) * away * away;
        }
      const double rstd = 1 / std::sqrt(square / total + eps);
      group_mean[job] = static_cast<float>(origin + m);
      group_rstd[job] = static_cast<float>(rstd);
      for (int64_t c = channel; c < channel + size; ++c) {
        const int64_t i = job / groups * columns + slot(c);
        mean[i] = group_mean[job];
        scale[i] = static_cast<float>(rstd * weight[c]);
        offset[i] = static_cast<float>(bias[c] + (mean[i] - (origin + m)) * rstd * weight[c]);
      }
    }
  });

  d.for_tiles([&] {
    return [&, in = std::vector<float>(d.buffer()), out = std::vector<float>(d.buffer())](int64_t b, int64_t c, int64_t p,
                                                                                          int64_t count) mutable {
      const int64_t i = b * columns + c;
      const Channel channel{&mean[i], &scale[i], &offset[i]};
      if (d.planes) {
        T* to = y.at(b, 0) + c * pixels + p;
        const auto room = room_for_run(out.data(), to);
        norm_plane(room, read_run(in.data(), x.at(b, 0) + c * pixels + p, count), channel, act, count);
        if constexpr (!kInPlace<T>) write_row(to, room, count);
        return;
      }
      if constexpr (std::is_same_v<T, BFloat16>)
        if (in_place) return norm(y.at(b, p), x.at(b, p), channel, act, count, channels);
      float* room = room_for_pixels(out.data(), y, b, p);
      norm(room, read_pixels(in.data(), x, b, p, count), channel, act, count, channels);
      write_pixels(y, room, b, p, count);
    };
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

template <class T>
void group_norm_backward(const Tensor& x_tensor, const Tensor& g_tensor, const float* group_mean,
                         const float* group_rstd, int64_t groups, const float* weight, const float* bias, bool act,
                         Tensor& dx_tensor, float* dweight, float* dbias) {
  const Image<const T> x(x_tensor), g(g_tensor);
  const Image<T> dx(dx_tensor);
  const Division d(x_tensor, x.by_channel() && g.by_channel() && dx.by_channel() && !x.by_pixel());
  const bool in_place =
      std::is_same_v<T, BFloat16> && !d.planes && x.by_pixel() && g.by_pixel() && dx.by_pixel();
  const auto slot = [&](int64_t c) { return in_place ? place<T>(c) : c; };  // of a channel in a row of columns
  const int64_t channels = d.channels, columns = d.columns, size = channels / groups, pixels = d.pixels;
  const int64_t parts = d.parts;

  std::vector<float> mean(d.photos * columns), rstd(mean.size()), group_gx(mean.size()), group_g(mean.size());
  std::vector<float> weights(columns), biases(columns);
  for (int64_t c = 0; c < channels; ++c) {
    weights[slot(c)] = weight[c];
    biases[slot(c)] = bias[c];
    for (int64_t b = 0; b < d.photos; ++b) {
      mean[b * columns + slot(c)] = group_mean[b * groups + c / size];
      rstd[b * columns + slot(c)] = group_rstd[b * groups + c / size];
    }
  }
  const auto channel = [&](int64_t b, int64_t c) {
    const int64_t i = b * columns + c;
    return ChannelBackward{&mean[i], &rstd[i], &weights[c], &biases[c], &group_gx[i], &group_g[i]};
  };

  // Each part's sums of each channel, [photos][parts][columns].
  std::vector<float> part_dweight(d.photos * parts * columns), part_dbias(part_dweight.size());
  d.for_parts([&] {
    return [&, x_buffer = std::vector<float>(d.buffer()), g_buffer = std::vector<float>(d.buffer())](
               int64_t b, int64_t part, int64_t c, int64_t p, int64_t count) mutable {
      float *dw = &part_dweight[(b * parts + part) * columns + c], *db = &part_dbias[dw - part_dweight.data()];
      const ChannelBackward of = channel(b, c);
      if (d.planes) {
        const auto x_run = read_run(x_buffer.data(), x.at(b, 0) + c * pixels + p, count);
        const auto g_run = read_run(g_buffer.data(), g.at(b, 0) + c * pixels + p, count);
        const int64_t rows = count / kWide, rest = count % kWide;
        float w[kWide] = {}, bb[kWide] = {};
        gradient_sums_plane(w, bb, g_run, x_run, of, act, rows, kWide);
        if (rest) gradient_sums_plane(w, bb, g_run + rows * kWide, x_run + rows * kWide, of, act, 1, rest);
        double sum_w = *dw, sum_b = *db;
        for (int64_t i = 0; i < kWide; ++i) {
          sum_w += w[i];
          sum_b += bb[i];
        }
        *dw = static_cast<float>(sum_w);
        *db = static_cast<float>(sum_b);
        return;
      }
      if constexpr (std::is_same_v<T, BFloat16>)
        if (in_place) return gradient_sums(dw, db, g.at(b, p), x.at(b, p), of, act, count, channels);
      gradient_sums(dw, db, read_pixels(g_buffer.data(), g, b, p, count), read_pixels(x_buffer.data(), x, b, p, count),
                    of, act, count, channels);
    };
  });

  // Each photo's sums of each channel; of each group the means of weight · g · x̂ and of weight · g.
  std::vector<double> all_dweight(d.photos * channels), all_dbias(all_dweight.size());
  torch::stable::parallel_for(0, d.photos * groups, 1 + kGrain / (parts * size), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t channel = job % groups * size, row = job / groups * parts;
      double gx = 0, gg = 0;
      for (int64_t c = 0; c < size; ++c) {
        double &w = all_dweight[job * size + c], &b = all_dbias[job * size + c];
        for (int64_t k = 0; k < parts; ++k) {
          w += part_dweight[(row + k) * columns + slot(channel + c)];
          b += part_dbias[(row + k) * columns + slot(channel + c)];
        }
        gx += w * weight[channel + c];
        gg += b * weight[channel + c];
      }
      const double total = static_cast<double>(pixels) * size;
      for (int64_t c = channel; c < channel + size; ++c) {
        group_gx[job / groups * columns + slot(c)] = static_cast<float>(gx / total);
        group_g[job / groups * columns + slot(c)] = static_cast<float>(gg / total);
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double w = 0, b = 0;
    for (int64_t photo = 0; photo < d.photos; ++photo) {
      w += all_dweight[photo * channels + c];
      b += all_dbias[photo * channels + c];
    }
    dweight[c] = static_cast<float>(w);
    dbias[c] = static_cast<float>(b);
  }

  d.for_tiles([&] {
    return [&, x_buffer = std::vector<float>(d.buffer()), g_buffer = std::vector<float>(d.buffer()),
            out = std::vector<float>(d.buffer())](int64_t b, int64_t c, int64_t p, int64_t count) mutable {
      const ChannelBackward of = channel(b, c);
      if (d.planes) {
        T* to = dx.at(b, 0) + c * pixels + p;
        const auto room = room_for_run(out.data(), to);
        backward_plane(room, read_run(g_buffer.data(), g.at(b, 0) + c * pixels + p, count),
                       read_run(x_buffer.data(), x.at(b, 0) + c * pixels + p, count), of, act, count);
        if constexpr (!kInPlace<T>) write_row(to, room, count);
        return;
      }
      if constexpr (std::is_same_v<T, BFloat16>)
        if (in_place) return backward(dx.at(b, p), g.at(b, p), x.at(b, p), of, act, count, channels);
      float* room = room_for_pixels(out.data(), dx, b, p);
      backward(room, read_pixels(g_buffer.data(), g, b, p, count), read_pixels(x_buffer.data(), x, b, p, count), of, act,
               count, channels);
      write_pixels(dx, room, b, p, count);
    };
  });
}

// mean and rstd (B, groups) are the forward's; dweight and dbias (C) float32.
void group_norm_silu_backward(const Tensor& x, const Tensor& g, const Tensor& mean, const Tensor& rstd,
                              std::optional<Tensor> weight, std::optional<Tensor> bias, bool act, Tensor dx,
                              Tensor dweight, Tensor dbias) {
  const Parameter w(weight, x.size(1), 1), b(bias, x.size(1), 0);
  dispatch(x.scalar_type(), [&](auto type) {
    group_norm_backward<std::remove_cv_t<std::remove_pointer_t<decltype(type)>>>(
        x, g, static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
        mean.size(1), w.row(0), b.row(0), act, dx, static_cast<float*>(dweight.mutable_data_ptr()),
        static_cast<float*>(dbias.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool act, Tensor(a!) y,"
        " Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("group_norm_silu_backward(Tensor x, Tensor g, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool act,"
        " Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&lpmrf::lanes::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&lpmrf::lanes::group_norm_silu_backward));
}
