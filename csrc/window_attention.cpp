// Attention in SwinIR's windows, forward and backward. The specification is kernels/lpmrf_kernels/window_attention.py.
//
// A window of one head fits the cache: its tokens are gathered as float32, and everything until the output is a product
// of two small matrices. Scores are kept as (key, query): sixteen queries lie side by side in a vector, so that the
// softmax, a sum over keys, never adds across a vector.
#include "matmul.h"

#include <algorithm>
#include <vector>

namespace lpmrf {
namespace {

using lanes::kLanes;
using lanes::Lanes;
using matmul::multiply;
using matmul::padded;

// Tokens at `offsets` → rows (tokens x row_stride) and, unless null, columns (channels x column_stride), times factor.
#define LPMRF_GATHER(T)                                                                                            \
  LPMRF_VECTORISED void gather(const T* x, const int64_t* offsets, int64_t tokens, int64_t channels, int64_t step, \
                               float factor, float* rows, int64_t row_stride, float* columns,                      \
                               int64_t column_stride) {                                                            \
    for (int64_t t = 0; t < tokens; ++t) {                                                                         \
      const T* from = x + offsets[t];                                                                              \
      float* row = rows + t * row_stride;                                                                          \
      if (step == 1) {                                                                                             \
        for (int64_t d = 0; d < channels; ++d) row[d] = factor * upcast(from[d]);                                  \
      } else {                                                                                                     \
        for (int64_t d = 0; d < channels; ++d) row[d] = factor * upcast(from[d * step]);                           \
      }                                                                                                            \
      for (int64_t d = channels; d < row_stride; ++d) row[d] = 0;                                                  \
    }                                                                                                              \
    if (columns == nullptr) return;                                                                                \
    for (int64_t d = 0; d < channels; ++d) {                                                                       \
      for (int64_t t = 0; t < tokens; ++t) columns[d * column_stride + t] = rows[t * row_stride + d];              \
      for (int64_t t = tokens; t < column_stride; ++t) columns[d * column_stride + t] = 0;                         \
    }                                                                                                              \
  }
LPMRF_GATHER(float)
LPMRF_GATHER(BFloat16)
#undef LPMRF_GATHER

// rows (tokens x row_stride), each times factor and, unless null, its own of `factors`, → tokens at `offsets`.
#define LPMRF_SCATTER(T)                                                                                            \
  LPMRF_VECTORISED void scatter(const float* rows, int64_t row_stride, float factor, const float* factors,          \
                                const int64_t* offsets, int64_t tokens, int64_t channels, T* out) {                 \
    for (int64_t t = 0; t < tokens; ++t) {                                                                          \
      const float f = factors == nullptr ? factor : factor * factors[t];                                            \
      const float* row = rows + t * row_stride;                                                                     \
      T* to = out + offsets[t];                                                                                     \
      int64_t d = 0;                                                                                                \
      for (; d + kLanes <= channels; d += kLanes) lanes::store<Lanes>(to + d, f * lanes::load<Lanes>(row + d));     \
      for (; d < channels; ++d) lanes::store<float>(to + d, f * row[d]);                                            \
    }                                                                                                               \
  }
LPMRF_SCATTER(float)
LPMRF_SCATTER(BFloat16)
#undef LPMRF_SCATTER

// scores (keys x queries) → exp(scores + bias + mask - maximum over keys), and one over its sum for each query.
LPMRF_VECTORISED void exponentials(float* scores, const float* bias, const float* mask, int64_t keys, int64_t queries,
                                   float* inverse) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    Lanes largest{}, total{};
    for (int64_t j = 0; j < keys; ++j) {
      Lanes s = lanes::load<Lanes>(scores + j * queries + i) + lanes::load<Lanes>(bias + j * queries + i);
      if (mask != nullptr) s += lanes::load<Lanes>(mask + j * queries + i);
      lanes::store<Lanes>(scores + j * queries + i, s);
      if (j == 0) largest = s;
      largest = s > largest ? s : largest;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const Lanes e = lanes::exp<Lanes>(lanes::load<Lanes>(scores + j * queries + i) - largest);
      lanes::store<Lanes>(scores + j * queries + i, e);
      total += e;
    }
    lanes::store<Lanes>(inverse + i, 1.0f / total);
  }
}

// From e = p / inverse and dp: p in e's place, ds = p (dp - sum over keys of p dp) in dp's; dbias += ds.
LPMRF_VECTORISED void softmax_backward(float* e, float* dp, const float* inverse, int64_t keys, int64_t queries,
                                       float* dbias) {
  for (int64_t i = 0; i < queries; i += kLanes) {
    const Lanes inv = lanes::load<Lanes>(inverse + i);
    Lanes delta{};
    for (int64_t j = 0; j < keys; ++j) {
      const Lanes p = lanes::load<Lanes>(e + j * queries + i) * inv;
      lanes::store<Lanes>(e + j * queries + i, p);
      delta += p * lanes::load<Lanes>(dp + j * queries + i);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * queries + i;
      const Lanes ds = lanes::load<Lanes>(e + at) * (lanes::load<Lanes>(dp + at) - delta);
      lanes::store<Lanes>(dp + at, ds);
      lanes::store<Lanes>(dbias + at, lanes::load<Lanes>(dbias + at) + ds);
    }
  }
}

struct Map {
  int64_t batch, height, width, channels, heads, size, shift;
  int64_t tokens, depth, queries, row;  // of a window; of a head; both padded
  int64_t across, windows;              // of a photo

  Map(const Tensor& x, const Tensor& bias, int64_t window_size, int64_t window_shift)
      : batch(x.size(0)), height(x.size(1)), width(x.size(2)), channels(x.size(3) / 3), heads(bias.size(0)),
        size(window_size), shift(window_shift), tokens(size * size), depth(channels / heads),
        queries(padded(tokens)), row(padded(depth)), across(width / size), windows(across * (height / size)) {
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.size(1) == tokens &&
                        depth * heads * 3 == x.size(3) && height % size == 0 && width % size == 0,
                    "lpmrf_cpp::window_attention: unexpected arguments");
  }
};

// Where the tokens of one window are in a tensor, and which of them the cyclic shift brought from the other side.
class Window {
 public:
  explicit Window(const Map& map) : map_(map), y_(map.tokens), x_(map.tokens), region_(map.tokens) {}

  void move_to(int64_t window) {
    const auto region = [&](int64_t i, int64_t n) { return (i >= n - map_.size) + (i >= n - map_.shift); };
    photo_ = window / map_.windows;
    const int64_t top = window % map_.windows / map_.across * map_.size, left = window % map_.across * map_.size;
    for (int64_t t = 0; t < map_.tokens; ++t) {
      const int64_t y = top + t / map_.size, x = left + t % map_.size;
      region_[t] = map_.shift == 0 ? 0 : 3 * region(y, map_.height) + region(x, map_.width);
      y_[t] = (y + map_.shift) % map_.height;
      x_[t] = (x + map_.shift) % map_.width;
    }
  }

  void offsets(int64_t stride_b, int64_t stride_h, int64_t stride_w, std::vector<int64_t>& into) const {
    for (int64_t t = 0; t < map_.tokens; ++t) into[t] = photo_ * stride_b + y_[t] * stride_h + x_[t] * stride_w;
  }

  // -100 between tokens that were not neighbours before the shift, (keys x queries); null if there are none.
  const float* mask(std::vector<float>& room) const {
    if (std::all_of(region_.begin(), region_.end(), [&](int64_t r) { return r == region_[0]; })) return nullptr;
    for (int64_t j = 0; j < map_.tokens; ++j) {
      for (int64_t i = 0; i < map_.tokens; ++i) room[j * map_.queries + i] = region_[i] == region_[j] ? 0.0f : -100.0f;
    }
    return room.data();
  }

 private:
  const Map& map_;
  std::vector<int64_t> y_, x_, region_;
  int64_t photo_ = 0;
};

// bias (heads, query, key) → (heads, key, query padded).
std::vector<float> transposed(const float* bias, const Map& map) {
  std::vector<float> result(map.heads * map.tokens * map.queries, 0.0f);
  for (int64_t h = 0; h < map.heads; ++h) {
    for (int64_t i = 0; i < map.tokens; ++i) {
      for (int64_t j = 0; j < map.tokens; ++j) {
        result[(h * map.tokens + j) * map.queries + i] = bias[(h * map.tokens + i) * map.tokens + j];
      }
    }
  }
  return result;
}

template <class F>
void float_or_bfloat16(ScalarType dtype, const F& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "lpmrf_cpp::window_attention: expected a float32 or bfloat16 tensor");
  dtype == ScalarType::Float ? f(static_cast<float*>(nullptr)) : f(static_cast<BFloat16*>(nullptr));
}

// x (B, H, W, 3C) with any strides, bias (heads, L, L) and out (B, H, W, C) contiguous.
void window_attention(const Tensor& x, const Tensor& bias, int64_t size, int64_t shift, double scale, Tensor out) {
  const Map map(x, bias, size, shift);
  STD_TORCH_CHECK(out.is_contiguous() && out.scalar_type() == x.scalar_type() && out.size(3) == map.channels,
                  "lpmrf_cpp::window_attention: expected a contiguous out of x's dtype");
  const auto bias_t = transposed(static_cast<const float*>(bias.const_data_ptr()), map);
  float_or_bfloat16(x.scalar_type(), [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const int64_t step = x.stride(3), part = map.channels * step;
    torch::stable::parallel_for(0, map.batch * map.windows, 1, [&](int64_t begin, int64_t end) {
      const int64_t L = map.tokens, Q = map.queries, D = map.depth, R = map.row;
      Window window(map);
      std::vector<int64_t> from(L), to(L);
      std::vector<float> room(L * Q), rows(L * R), q(D * Q), k(L * R), v(L * R), scores(L * Q), o(L * R), inverse(Q);
      for (int64_t w = begin; w < end; ++w) {
        window.move_to(w);
        window.offsets(x.stride(0), x.stride(1), x.stride(2), from);
        window.offsets(out.stride(0), out.stride(1), out.stride(2), to);
        const float* mask = window.mask(room);
        for (int64_t h = 0; h < map.heads; ++h) {
          const T* head = x_data + h * D * step;
          gather(head, from.data(), L, D, step, static_cast<float>(scale), rows.data(), R, q.data(), Q);
          gather(head + part, from.data(), L, D, step, 1.0f, k.data(), R, nullptr, 0);
          gather(head + 2 * part, from.data(), L, D, step, 1.0f, v.data(), R, nullptr, 0);
          multiply(L, Q, D, k.data(), R, 1, q.data(), Q, scores.data(), Q, false);
          exponentials(scores.data(), bias_t.data() + h * L * Q, mask, L, Q, inverse.data());
          multiply(L, R, L, scores.data(), 1, Q, v.data(), R, o.data(), R, false);
          scatter(o.data(), R, 1.0f, inverse.data(), to.data(), L, D, out_data + h * D);
        }
      }
    });
  });
}

// g (B, H, W, C) with any strides; dx contiguous; dbias (parts, heads, L, L), each part summed over its own windows, so
// that the result does not depend on the number of threads.
void window_attention_backward(const Tensor& g, const Tensor& x, const Tensor& bias, int64_t size, int64_t shift,
                               double scale, Tensor dx, Tensor dbias) {
  const Map map(x, bias, size, shift);
  STD_TORCH_CHECK(dx.is_contiguous() && dx.scalar_type() == x.scalar_type() && g.scalar_type() == x.scalar_type() &&
                      dbias.is_contiguous() && dbias.scalar_type() == ScalarType::Float,
                  "lpmrf_cpp::window_attention_backward: expected g, x and a contiguous dx of one dtype");
  const auto bias_t = transposed(static_cast<const float*>(bias.const_data_ptr()), map);
  const int64_t parts = dbias.size(0), total = map.batch * map.windows;
  float* dbias_data = static_cast<float*>(dbias.mutable_data_ptr());
  float_or_bfloat16(x.scalar_type(), [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x_data = static_cast<const T*>(x.const_data_ptr());
    const T* g_data = static_cast<const T*>(g.const_data_ptr());
    T* dx_data = static_cast<T*>(dx.mutable_data_ptr());
    const int64_t step = x.stride(3), part = map.channels * step;
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const int64_t L = map.tokens, Q = map.queries, D = map.depth, R = map.row;
      Window window(map);
      std::vector<int64_t> from(L), from_g(L), to(L);
      std::vector<float> room(L * Q), q(L * R), k(L * R), v(L * R), go(L * R), q_t(D * Q), g_t(D * Q), scores(L * Q),
          dp(L * Q), result(L * R), inverse(Q), sums(map.heads * L * Q);
      for (int64_t p = begin; p < end; ++p) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t w = total * p / parts; w < total * (p + 1) / parts; ++w) {
          window.move_to(w);
          window.offsets(x.stride(0), x.stride(1), x.stride(2), from);
          window.offsets(g.stride(0), g.stride(1), g.stride(2), from_g);
          window.offsets(dx.stride(0), dx.stride(1), dx.stride(2), to);
          const float* mask = window.mask(room);
          for (int64_t h = 0; h < map.heads; ++h) {
            const T* head = x_data + h * D * step;
            T* dhead = dx_data + h * D;
            const float s = static_cast<float>(scale);
            gather(head, from.data(), L, D, step, s, q.data(), R, q_t.data(), Q);
            gather(head + part, from.data(), L, D, step, 1.0f, k.data(), R, nullptr, 0);
            gather(head + 2 * part, from.data(), L, D, step, 1.0f, v.data(), R, nullptr, 0);
            gather(g_data + h * D * g.stride(3), from_g.data(), L, D, g.stride(3), 1.0f, go.data(), R, g_t.data(), Q);
            multiply(L, Q, D, k.data(), R, 1, q_t.data(), Q, scores.data(), Q, false);
            exponentials(scores.data(), bias_t.data() + h * L * Q, mask, L, Q, inverse.data());
            multiply(L, Q, D, v.data(), R, 1, g_t.data(), Q, dp.data(), Q, false);
            softmax_backward(scores.data(), dp.data(), inverse.data(), L, Q, sums.data() + h * L * Q);
            multiply(L, R, L, dp.data(), 1, Q, k.data(), R, result.data(), R, false);
            scatter(result.data(), R, s, nullptr, to.data(), L, D, dhead);
            multiply(L, R, L, dp.data(), Q, 1, q.data(), R, result.data(), R, false);
            scatter(result.data(), R, 1.0f, nullptr, to.data(), L, D, dhead + map.channels);
            multiply(L, R, L, scores.data(), Q, 1, go.data(), R, result.data(), R, false);
            scatter(result.data(), R, 1.0f, nullptr, to.data(), L, D, dhead + 2 * map.channels);
          }
        }
        for (int64_t h = 0; h < map.heads; ++h) {
          float* to_bias = dbias_data + (p * map.heads + h) * L * L;
          for (int64_t i = 0; i < L; ++i) {
            for (int64_t j = 0; j < L; ++j) to_bias[i * L + j] = sums[(h * L + j) * Q + i];
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("window_attention(Tensor x, Tensor bias, int size, int shift, float scale, Tensor(a!) out) -> ()");
  m.def("window_attention_backward(Tensor g, Tensor x, Tensor bias, int size, int shift, float scale, Tensor(a!) dx,"
        " Tensor(b!) dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&lpmrf::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&lpmrf::window_attention_backward));
}
