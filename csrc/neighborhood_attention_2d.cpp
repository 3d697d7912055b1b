// Neighborhood attention. The specification is kernels/lpmrf_kernels/neighborhood_attention_2d.py.
//
// A task is a band of query rows of one head. It keeps the K rows of keys and values that the current query row sees, as
// float32, in a ring: each row is converted once a band. Keys lie transposed, so that the K keys of a window row are
// neighbours in a vector and a score is never a sum across one; values lie as they are used, channels side by side.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lpmrf {
namespace {

using Eight = float __attribute__((vector_size(32)));
constexpr int64_t kEight = 8;
constexpr int64_t kBand = 16;  // query rows of a task

}  // namespace

namespace lanes {
namespace {
template <>
struct Traits<Eight> {
  using Int = int32_t __attribute__((vector_size(32)));
  static constexpr int64_t size = kEight;
};
}  // namespace
}  // namespace lanes

namespace {

using lanes::kLanes;
using lanes::Lanes;
using matmul::float_or_bfloat16;
using matmul::gather;
using matmul::padded;
using matmul::scatter;

int64_t window_start(int64_t i, int64_t length, int64_t size) {
  return std::min(std::max<int64_t>(i - size / 2, 0), length - size);
}

// Scores of one query with 8 keys of each of R rows: out[r] = sum over d of q[d] rows[r][d].
template <int R>
LPMRF_INLINE void score_rows(const float* q, const float* const* rows, int64_t at, int64_t depth, int64_t row_stride,
                             float* out, int64_t out_stride) {
  Eight sums[R] = {};
  for (int64_t d = 0; d < depth; ++d) {
    for (int r = 0; r < R; ++r) sums[r] += q[d] * lanes::load<Eight>(rows[r] + d * row_stride + at);
  }
  for (int r = 0; r < R; ++r) lanes::store<Eight>(out + r * out_stride, sums[r]);
}

template <int N>
LPMRF_INLINE void weigh(const float* weights, int64_t weights_stride, const float* const* rows, int64_t at,
                        int64_t size, int64_t row, float factor, float* out) {
  Lanes sums[N] = {};
  for (int64_t y = 0; y < size; ++y) {
    const float* value = rows[y] + at;
    for (int64_t x = 0; x < size; ++x, value += row) {
      for (int n = 0; n < N; ++n) sums[n] += weights[y * weights_stride + x] * lanes::load<Lanes>(value + n * kLanes);
    }
  }
  for (int n = 0; n < N; ++n) lanes::store<Lanes>(out + n * kLanes, factor * sums[n]);
}

// out[d] += weights[y, x] row[d] over the window: what `weigh` reads, this adds to.
template <int N>
LPMRF_INLINE void spread(const float* weights, int64_t weights_stride, float* const* rows, int64_t at, int64_t size,
                         int64_t row, const float* from) {
  Lanes values[N];
  for (int n = 0; n < N; ++n) values[n] = lanes::load<Lanes>(from + n * kLanes);
  for (int64_t y = 0; y < size; ++y) {
    float* to = rows[y] + at;
    for (int64_t x = 0; x < size; ++x, to += row) {
      const float weight = weights[y * weights_stride + x];
      for (int n = 0; n < N; ++n) {
        lanes::store<Lanes>(to + n * kLanes, lanes::load<Lanes>(to + n * kLanes) + weight * values[n]);
      }
    }
  }
}

// Scores of one query with its window, whose columns start at `first`: out is (size x wide).
LPMRF_INLINE void score_window(const float* q, const float* const* keys, int64_t first, int64_t size, int64_t wide,
                               int64_t depth, int64_t key_stride, float* out) {
  for (int64_t x = 0; x < wide; x += kEight) {
    int64_t y = 0;
    float* to = out + x;
    for (; y + 7 <= size; y += 7) score_rows<7>(q, keys + y, first + x, depth, key_stride, to + y * wide, wide);
    for (; y + 3 <= size; y += 3) score_rows<3>(q, keys + y, first + x, depth, key_stride, to + y * wide, wide);
    for (; y < size; ++y) score_rows<1>(q, keys + y, first + x, depth, key_stride, to + y * wide, wide);
  }
}

// A row of queries (width x row, scaled) with the rows that it sees: keys[y] is (depth x key_stride), values[y] is
// (width x row). Writes out (width x row) and the logsumexp. `room` holds size x padded(size) scores.
LPMRF_VECTORISED void attend_row(const float* q, const float* const* keys, const float* const* values, int64_t width,
                                 int64_t size, int64_t depth, int64_t row, int64_t key_stride, float* room, float* out,
                                 float* lse) {
  const int64_t wide = (size + kEight - 1) / kEight * kEight;
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < width; ++i) {
    const int64_t first = std::min(std::max<int64_t>(i - size / 2, 0), width - size);
    score_window(q + i * row, keys, first, size, wide, depth, key_stride, room);
    for (int64_t y = 0; y < size; ++y) std::fill(room + y * wide + size, room + (y + 1) * wide, lowest);
    Eight largest = lanes::load<Eight>(room), total{};
    for (int64_t at = 0; at < size * wide; at += kEight) {
      const Eight s = lanes::load<Eight>(room + at);
      largest = s > largest ? s : largest;
    }
    float most = largest[0];
    for (int n = 1; n < kEight; ++n) most = largest[n] > most ? largest[n] : most;
    for (int64_t at = 0; at < size * wide; at += kEight) {
      const Eight s = lanes::load<Eight>(room + at);
      const Eight e = lanes::exp<Eight>(s - most);
      const Eight p = s == lowest ? Eight{} : e;
      lanes::store<Eight>(room + at, p);
      total += p;
    }
    float sum = 0;
    for (int n = 0; n < kEight; ++n) sum += total[n];
    int64_t d = 0;
    for (; d + 4 * kLanes <= row; d += 4 * kLanes) {
      weigh<4>(room, wide, values, first * row + d, size, row, 1.0f / sum, out + i * row + d);
    }
    for (; d < row; d += kLanes) weigh<1>(room, wide, values, first * row + d, size, row, 1.0f / sum, out + i * row + d);
    lse[i] = most + std::log(sum);
  }
}

// A row of the backward pass: q (scaled), g and dq are (width x row), the windows' rows as above, keys and values
// transposed. Writes dq without its scale, adds to the rows of dk and dv. `room` holds 2 x size x padded(size).
LPMRF_VECTORISED void differentiate_row(const float* q, const float* g, const float* lse, const float* const* keys,
                                        const float* const* values, const float* const* key_rows, float* const* dk,
                                        float* const* dv, int64_t width, int64_t size, int64_t depth, int64_t row,
                                        int64_t key_stride, float* room, float* dq) {
  const int64_t wide = (size + kEight - 1) / kEight * kEight;
  float* p = room;
  float* ds = room + size * wide;
  for (int64_t i = 0; i < width; ++i) {
    const int64_t first = std::min(std::max<int64_t>(i - size / 2, 0), width - size);
    score_window(q + i * row, keys, first, size, wide, depth, key_stride, p);
    score_window(g + i * row, values, first, size, wide, depth, key_stride, ds);
    for (int64_t y = 0; y < size; ++y) {  // beyond the window: no weight, whatever lies there
      std::fill(p + y * wide + size, p + (y + 1) * wide, -std::numeric_limits<float>::infinity());
      std::fill(ds + y * wide + size, ds + (y + 1) * wide, 0.0f);
    }
    Eight sums{};
    for (int64_t at = 0; at < size * wide; at += kEight) {
      const Eight s = lanes::load<Eight>(p + at);
      const Eight e = lanes::exp<Eight>(s - lse[i]);
      const Eight weight = s == -std::numeric_limits<float>::infinity() ? Eight{} : e;
      lanes::store<Eight>(p + at, weight);
      sums += weight * lanes::load<Eight>(ds + at);
    }
    float delta = 0;
    for (int n = 0; n < kEight; ++n) delta += sums[n];
    for (int64_t at = 0; at < size * wide; at += kEight) {
      lanes::store<Eight>(ds + at, lanes::load<Eight>(p + at) * (lanes::load<Eight>(ds + at) - delta));
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= row; d += 4 * kLanes) {
      weigh<4>(ds, wide, key_rows, first * row + d, size, row, 1.0f, dq + i * row + d);
      spread<4>(ds, wide, dk, first * row + d, size, row, q + i * row + d);
      spread<4>(p, wide, dv, first * row + d, size, row, g + i * row + d);
    }
    for (; d < row; d += kLanes) {
      weigh<1>(ds, wide, key_rows, first * row + d, size, row, 1.0f, dq + i * row + d);
      spread<1>(ds, wide, dk, first * row + d, size, row, q + i * row + d);
      spread<1>(p, wide, dv, first * row + d, size, row, g + i * row + d);
    }
  }
}

std::vector<int64_t> columns(const Tensor& t) {
  std::vector<int64_t> offsets(t.size(2));
  for (int64_t x = 0; x < t.size(2); ++x) offsets[x] = x * t.stride(2);
  return offsets;
}

// q, k, v, out (B, H, W, heads, D) with any strides, out's channels contiguous; lse (B, heads, H, W) contiguous.
void neighborhood_attention_2d(const Tensor& q, const Tensor& k, const Tensor& v, int64_t size, double scale,
                               Tensor out, Tensor lse) {
  const int64_t B = q.size(0), H = q.size(1), W = q.size(2), heads = q.size(3), D = q.size(4);
  STD_TORCH_CHECK(size % 2 == 1 && size <= std::min(H, W) && out.stride(4) == 1 &&
                      lse.is_contiguous() && lse.scalar_type() == ScalarType::Float &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                      q.scalar_type() == out.scalar_type(),
                  "lpmrf_cpp::neighborhood_attention_2d: unexpected arguments");
  const int64_t bands = (H + kBand - 1) / kBand, row = padded(D), key_stride = W + kLanes;
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  float_or_bfloat16(q.scalar_type(), [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* q_data = static_cast<const T*>(q.const_data_ptr());
    const T* k_data = static_cast<const T*>(k.const_data_ptr());
    const T* v_data = static_cast<const T*>(v.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const auto q_columns = columns(q), k_columns = columns(k), v_columns = columns(v), out_columns = columns(out);
    torch::stable::parallel_for(0, B * heads * bands, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> q_row(W * row), o_row(W * row), room(size * (size + kEight)), scratch(W * row);
      std::vector<float> key_ring(size * D * key_stride), value_ring(size * W * row);
      std::vector<const float*> keys(size), values(size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / bands / heads, n = task / bands % heads, top = task % bands * kBand;
        const auto at = [&](const Tensor& t, int64_t y) {
          return b * t.stride(0) + y * t.stride(1) + n * t.stride(3);
        };
        int64_t loaded = window_start(top, H, size);  // rows before this one are in the ring or no longer needed
        for (int64_t y = top; y < std::min(top + kBand, H); ++y) {
          const int64_t first = window_start(y, H, size);
          for (; loaded < first + size; ++loaded) {
            float* key_row = key_ring.data() + loaded % size * D * key_stride;
            float* value_row = value_ring.data() + loaded % size * W * row;
            gather(k_data + at(k, loaded), k_columns.data(), W, D, k.stride(4), 1.0f, scratch.data(), row, key_row,
                   key_stride);
            gather(v_data + at(v, loaded), v_columns.data(), W, D, v.stride(4), 1.0f, value_row, row, nullptr, 0);
          }
          for (int64_t i = 0; i < size; ++i) {
            keys[i] = key_ring.data() + (first + i) % size * D * key_stride;
            values[i] = value_ring.data() + (first + i) % size * W * row;
          }
          gather(q_data + at(q, y), q_columns.data(), W, D, q.stride(4), static_cast<float>(scale), q_row.data(), row,
                 nullptr, 0);
          attend_row(q_row.data(), keys.data(), values.data(), W, size, D, row, key_stride, room.data(), o_row.data(),
                     lse_data + ((b * heads + n) * H + y) * W);
          scatter(o_row.data(), row, 1.0f, nullptr, out_columns.data(), W, D, out_data + at(out, y));
        }
      }
    });
  });
}

// As above; dq, dk and dv have contiguous channels. A task is a whole map of one head: its queries add to the keys that
// they see, in one order.
void neighborhood_attention_2d_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& lse, int64_t size, double scale, Tensor dq, Tensor dk,
                                        Tensor dv) {
  const int64_t B = q.size(0), H = q.size(1), W = q.size(2), heads = q.size(3), D = q.size(4);
  STD_TORCH_CHECK(size % 2 == 1 && size <= std::min(H, W) && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float && dq.stride(4) == 1 && dk.stride(4) == 1 &&
                      dv.stride(4) == 1,
                  "lpmrf_cpp::neighborhood_attention_2d_backward: unexpected arguments");
  for (ScalarType dtype : {g.scalar_type(), k.scalar_type(), v.scalar_type(), dq.scalar_type(), dk.scalar_type(),
                           dv.scalar_type()}) {
    STD_TORCH_CHECK(dtype == q.scalar_type(), "lpmrf_cpp: expected tensors of one dtype");
  }
  const int64_t row = padded(D), key_stride = W + kLanes;
  const float* lse_data = static_cast<const float*>(lse.const_data_ptr());
  float_or_bfloat16(q.scalar_type(), [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto g_columns = columns(g), q_columns = columns(q), k_columns = columns(k), v_columns = columns(v);
    const auto dq_columns = columns(dq), dk_columns = columns(dk), dv_columns = columns(dv);
    torch::stable::parallel_for(0, B * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> q_row(W * row), g_row(W * row), dq_row(W * row), room(2 * size * (size + kEight));
      std::vector<float> k_t(H * D * key_stride), v_t(H * D * key_stride), k_rows(H * W * row), scratch(W * row);
      std::vector<float> dk_rows(H * W * row), dv_rows(H * W * row);
      std::vector<const float*> keys(size), values(size), straight(size);
      std::vector<float*> to_dk(size), to_dv(size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / heads, n = task % heads;
        const auto at = [&](const Tensor& t, int64_t y) {
          return b * t.stride(0) + y * t.stride(1) + n * t.stride(3);
        };
        std::fill(dk_rows.begin(), dk_rows.end(), 0.0f);
        std::fill(dv_rows.begin(), dv_rows.end(), 0.0f);
        for (int64_t y = 0; y < H; ++y) {
          gather(data(k) + at(k, y), k_columns.data(), W, D, k.stride(4), 1.0f, k_rows.data() + y * W * row, row,
                 k_t.data() + y * D * key_stride, key_stride);
          gather(data(v) + at(v, y), v_columns.data(), W, D, v.stride(4), 1.0f, scratch.data(), row,
                 v_t.data() + y * D * key_stride, key_stride);
        }
        for (int64_t y = 0; y < H; ++y) {
          const int64_t first = window_start(y, H, size);
          for (int64_t i = 0; i < size; ++i) {
            keys[i] = k_t.data() + (first + i) * D * key_stride;
            values[i] = v_t.data() + (first + i) * D * key_stride;
            straight[i] = k_rows.data() + (first + i) * W * row;
            to_dk[i] = dk_rows.data() + (first + i) * W * row;
            to_dv[i] = dv_rows.data() + (first + i) * W * row;
          }
          gather(data(q) + at(q, y), q_columns.data(), W, D, q.stride(4), static_cast<float>(scale), q_row.data(), row,
                 nullptr, 0);
          gather(data(g) + at(g, y), g_columns.data(), W, D, g.stride(4), 1.0f, g_row.data(), row, nullptr, 0);
          differentiate_row(q_row.data(), g_row.data(), lse_data + ((b * heads + n) * H + y) * W, keys.data(),
                            values.data(), straight.data(), to_dk.data(), to_dv.data(), W, size, D, row, key_stride,
                            room.data(), dq_row.data());
          scatter(dq_row.data(), row, static_cast<float>(scale), nullptr, dq_columns.data(), W, D,
                  static_cast<T*>(dq.mutable_data_ptr()) + at(dq, y));
        }
        for (int64_t y = 0; y < H; ++y) {
          scatter(dk_rows.data() + y * W * row, row, 1.0f, nullptr, dk_columns.data(), W, D,
                  static_cast<T*>(dk.mutable_data_ptr()) + at(dk, y));
          scatter(dv_rows.data() + y * W * row, row, 1.0f, nullptr, dv_columns.data(), W, D,
                  static_cast<T*>(dv.mutable_data_ptr()) + at(dv, y));
        }
      }
    });
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("neighborhood_attention_2d(Tensor q, Tensor k, Tensor v, int size, float scale, Tensor(a!) out, Tensor(b!) lse)"
        " -> ()");
  m.def("neighborhood_attention_2d_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor lse, int size, float scale,"
        " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("neighborhood_attention_2d", TORCH_BOX(&lpmrf::neighborhood_attention_2d));
  m.impl("neighborhood_attention_2d_backward", TORCH_BOX(&lpmrf::neighborhood_attention_2d_backward));
}
