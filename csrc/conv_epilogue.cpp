// silu(x + bias) and x + bias + residual, one pass. The specification is kernels/lpmrf_kernels/conv_epilogue.py.
#include "depthwise.h"

namespace lpmrf::lanes {
namespace {

// Dense memory as [outer][channels][inner]: channels-last has inner 1, channels-first the pixels.
struct Dense {
  int64_t outer, channels, inner;

  Dense(const Tensor& x, bool channels_last)
      : outer(channels_last ? x.size(0) * x.size(2) * x.size(3) : x.size(0)),
        channels(x.size(1)),
        inner(channels_last ? 1 : x.size(2) * x.size(3)) {}
};

struct Bias {
  std::vector<float> data;

  explicit Bias(const Tensor& bias) : data(bias.numel()) {
    dispatch(bias.scalar_type(), [&](auto type) {
      const auto from = static_cast<decltype(type)>(bias.const_data_ptr());
      for (size_t c = 0; c < data.size(); ++c) data[c] = upcast(from[c * bias.stride(0)]);
    });
  }
};

template <class V, class T>
LPMRF_INLINE void apply(T* out, const T* x, const T* residual, V bias) {
  const V h = load<V>(x) + bias;
  store<V>(out, residual == nullptr ? h * sigmoid<V>(h) : h + load<V>(residual));
}

template <class V, class T>
LPMRF_INLINE V apply_backward(T* dx, const T* g, const T* x, V bias) {
  const V h = load<V>(x) + bias, s = sigmoid<V>(h), d = load<V>(g) * (s + h * s * (1.0f - s));
  store<V>(dx, d);
  return d;
}

template <class T>
LPMRF_INLINE const T* at(const T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

// `rows` pixels of `count` channels (STEP 1), or `rows` planes of `count` pixels, each of one channel (STEP 0).
template <int STEP, class T>
LPMRF_INLINE void rows_forward(T* out, const T* x, const T* residual, const float* bias, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t base = r * count;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Lanes b = STEP ? load<Lanes>(bias + i) : splat<Lanes>(bias[r]);
      apply<Lanes>(out + base + i, x + base + i, at(residual, base + i), b);
    }
    for (; i < count; ++i) apply<float>(out + base + i, x + base + i, at(residual, base + i), bias[STEP ? i : r]);
  }
}

template <class V, class T>
LPMRF_INLINE void pixels_backward(T* dx, const T* g, const T* x, float bias_sum[], const float* bias, int64_t rows,
                                  int64_t count, int64_t i) {
  V total = {};
  for (int64_t r = 0; r < rows; ++r)
    total += apply_backward<V>(dx + r * count + i, g + r * count + i, x + r * count + i, load<V>(bias + i));
  store<V>(bias_sum + i, total);
}

constexpr int64_t kChunk = 4096;  // pixels of a plane that are added up in one go

template <class T>
LPMRF_INLINE float plane_backward(T* dx, const T* g, const T* x, float bias, int64_t count) {
  float total = 0;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = std::min(count, first + kChunk);
    Lanes lanes = {};
    float rest = 0;
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) lanes += apply_backward<Lanes>(dx + i, g + i, x + i, splat<Lanes>(bias));
    for (; i < last; ++i) rest += apply_backward<float>(dx + i, g + i, x + i, bias);
    total += sum(lanes) + rest;
  }
  return total;
}

#define LPMRF_EPILOGUE(T)                                                                                           \
  LPMRF_VECTORISED void pixels_job(T* out, const T* x, const T* residual, const float* bias, int64_t rows,          \
                                   int64_t count) {                                                                 \
    rows_forward<1>(out, x, residual, bias, rows, count);                                                           \
  }                                                                                                                 \
  LPMRF_VECTORISED void planes_job(T* out, const T* x, const T* residual, const float* bias, int64_t rows,          \
                                   int64_t count) {                                                                 \
    rows_forward<0>(out, x, residual, bias, rows, count);                                                           \
  }                                                                                                                 \
  LPMRF_VECTORISED void pixels_backward_job(T* dx, const T* g, const T* x, float* bias_sum, const float* bias,      \
                                            int64_t rows, int64_t count) {                                          \
    int64_t i = 0;                                                                                                  \
    for (; i + kLanes <= count; i += kLanes) pixels_backward<Lanes>(dx, g, x, bias_sum, bias, rows, count, i);      \
    for (; i < count; ++i) pixels_backward<float>(dx, g, x, bias_sum, bias, rows, count, i);                        \
  }                                                                                                                 \
  LPMRF_VECTORISED float plane_backward_job(T* dx, const T* g, const T* x, float bias, int64_t count) {             \
    return plane_backward(dx, g, x, bias, count);                                                                   \
  }
LPMRF_EPILOGUE(float)
LPMRF_EPILOGUE(BFloat16)
#undef LPMRF_EPILOGUE

void check(const Tensor& x, const Tensor& bias, const Tensor& other, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 4 && bias.numel() == x.size(1) && x.numel() == other.numel() && x.numel() == out.numel() &&
                      x.scalar_type() == other.scalar_type() && x.scalar_type() == out.scalar_type(),
                  "lpmrf_cpp: expected dense (B, C, H, W) tensors of one dtype and memory format, and a bias (C)");
}

void forward(const Tensor& x, const Tensor& bias, const Tensor* residual, bool channels_last, Tensor& out) {
  check(x, bias, residual ? *residual : x, out);
  if (x.numel() == 0) return;
  const Dense d(x, channels_last);
  const Bias b(bias);
  dispatch_map(x.scalar_type(), [&](auto type) {
    using T = Element<decltype(type)>;
    const T *x_data = static_cast<const T*>(x.const_data_ptr()),
            *r_data = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const auto run = [&](int64_t first, int64_t rows, int64_t count, const float* bias_data, auto job) {
      job(out_data + first, x_data + first, at(r_data, first), bias_data, rows, count);
    };
    if (channels_last) {
      const int64_t grain = std::max<int64_t>(1, kGrain / 4 / d.channels);
      torch::stable::parallel_for(0, d.outer, grain, [&](int64_t begin, int64_t end) {
        run(begin * d.channels, end - begin, d.channels, b.data.data(), [](auto... args) { pixels_job(args...); });
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kGrain / 4 / d.inner);
      torch::stable::parallel_for(0, d.outer * d.channels, grain, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane)
          run(plane * d.inner, 1, d.inner, &b.data[plane % d.channels], [](auto... args) { planes_job(args...); });
      });
    }
  });
}

void bias_silu(const Tensor& x, const Tensor& bias, bool channels_last, Tensor out) {
  forward(x, bias, nullptr, channels_last, out);
}

void bias_residual(const Tensor& x, const Tensor& bias, const Tensor& residual, bool channels_last, Tensor out) {
  forward(x, bias, &residual, channels_last, out);
}

// partial (P, C) float32: row p has the sum of dx over the p-th part of the outer index. Their sum is dbias.
void bias_silu_backward(const Tensor& g, const Tensor& x, const Tensor& bias, bool channels_last, Tensor dx,
                        Tensor partial) {
  check(x, bias, g, dx);
  STD_TORCH_CHECK(partial.scalar_type() == ScalarType::Float && partial.is_contiguous() && partial.dim() == 2 &&
                      partial.size(1) == x.size(1) && (channels_last || partial.size(0) == x.size(0)),
                  "lpmrf_cpp::bias_silu_backward: expected float32 partial sums (P, C), P = B for channels-first");
  if (x.numel() == 0) return;
  const Dense d(x, channels_last);
  const Bias b(bias);
  const int64_t parts = partial.size(0), share = (d.outer + parts - 1) / parts;
  float* sums = static_cast<float*>(partial.mutable_data_ptr());
  dispatch_map(x.scalar_type(), [&](auto type) {
    using T = Element<decltype(type)>;
    const T *g_data = static_cast<const T*>(g.const_data_ptr()), *x_data = static_cast<const T*>(x.const_data_ptr());
    T* dx_data = static_cast<T*>(dx.mutable_data_ptr());
    if (channels_last) {
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t first = std::min(d.outer, part * share), last = std::min(d.outer, first + share);
          const int64_t at = first * d.channels;
          pixels_backward_job(dx_data + at, g_data + at, x_data + at, sums + part * d.channels, b.data.data(),
                              last - first, d.channels);
        }
      });
    } else {
      torch::stable::parallel_for(0, d.outer * d.channels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t at = plane * d.inner;
          sums[plane] = plane_backward_job(dx_data + at, g_data + at, x_data + at, b.data[plane % d.channels], d.inner);
        }
      });
    }
  });
}

}  // namespace
}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("bias_silu(Tensor x, Tensor bias, bool channels_last, Tensor(a!) out) -> ()");
  m.def("bias_residual(Tensor x, Tensor bias, Tensor residual, bool channels_last, Tensor(a!) out) -> ()");
  m.def(
      "bias_silu_backward(Tensor g, Tensor x, Tensor bias, bool channels_last, Tensor(a!) dx, Tensor(b!) partial)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("bias_silu", TORCH_BOX(&lpmrf::lanes::bias_silu));
  m.impl("bias_residual", TORCH_BOX(&lpmrf::lanes::bias_residual));
  m.impl("bias_silu_backward", TORCH_BOX(&lpmrf::lanes::bias_silu_backward));
}
