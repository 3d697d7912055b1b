// out = gelu(gate) * value of the halves of x, or of its depthwise convolution. The specification is
// kernels/lpmrf_kernels/dwconv_geglu.py.
#include "depthwise.h"

namespace lpmrf::lanes {
namespace {

template <class V>
LPMRF_INLINE V gated(V gate, V value) {
  return gate * normal_cdf(gate) * value;
}

// The gradients of gate and value.
template <class V>
LPMRF_INLINE void gated_backward(V g, V gate, V value, V& dgate, V& dvalue) {
  V cdf, density;
  normal(gate, cdf, density);
  dgate = g * value * (cdf + gate * density);
  dvalue = g * gate * cdf;
}

// ---- what follows the convolution at a pixel

template <class T>
struct Gate {
  const Map<T>& out;
  int64_t b, c;

  template <class V>
  LPMRF_INLINE void operator()(int64_t y, int64_t i, const V (&values)[2]) const {
    store<V>(out.row(b, y, c) + i * out.sw, gated(values[0], values[1]));
  }
};

template <class T>
struct GateBackward {
  const Map<T>&g, &dconv;
  int64_t b, c, gate, value;

  template <class V>
  LPMRF_INLINE void operator()(int64_t y, int64_t i, const V (&values)[2]) const {
    V dgate, dvalue;
    gated_backward(load<V>(g.row(b, y, c) + i * g.sw), values[0], values[1], dgate, dvalue);
    store<V>(dconv.row(b, y, c + gate) + i * dconv.sw, dgate);
    store<V>(dconv.row(b, y, c + value) + i * dconv.sw, dvalue);
  }
};

// ---- without it: a row of pixels

template <class V, class T>
LPMRF_INLINE void plain(const T* x, T* out, int64_t gate, int64_t value, int64_t c) {
  store<V>(out + c, gated(load<V>(x + gate + c), load<V>(x + value + c)));
}

template <class V, class T>
LPMRF_INLINE void plain_backward(const T* g, const T* x, T* dx, int64_t gate, int64_t value, int64_t c) {
  V dgate, dvalue;
  gated_backward(load<V>(g + c), load<V>(x + gate + c), load<V>(x + value + c), dgate, dvalue);
  store<V>(dx + gate + c, dgate);
  store<V>(dx + value + c, dvalue);
}

#define LPMRF_GEGLU(T)                                                                                              \
  LPMRF_VECTORISED void conv_job(const Map<T>& x, const Taps& taps, const Map<T>& out, int64_t gate, int64_t value, \
                                 const Job& job, float* scratch) {                                                  \
    int64_t c = job.c;                                                                                              \
    const int64_t stop = std::min(c + kLanes, out.channels);                                                        \
    if (c + kLanes == stop) {                                                                                       \
      return convolve<Lanes, 2>(x, taps, job.b, job.first, job.last, {c + gate, c + value}, scratch,                \
                                Gate<T>{out, job.b, c});                                                            \
    }                                                                                                               \
    for (; c < stop; ++c)                                                                                           \
      convolve<float, 2>(x, taps, job.b, job.first, job.last, {c + gate, c + value}, scratch,                       \
                         Gate<T>{out, job.b, c});                                                                   \
  }                                                                                                                 \
  LPMRF_VECTORISED void conv_backward_job(const Map<T>& g, const Map<T>& x, const Taps& taps, const Map<T>& dconv,  \
                                          int64_t gate, int64_t value, const Job& job, float* scratch) {            \
    int64_t c = job.c;                                                                                              \
    const int64_t stop = std::min(c + kLanes, g.channels);                                                          \
    if (c + kLanes == stop) {                                                                                       \
      return convolve<Lanes, 2>(x, taps, job.b, job.first, job.last, {c + gate, c + value}, scratch,                \
                                GateBackward<T>{g, dconv, job.b, c, gate, value});                                  \
    }                                                                                                               \
    for (; c < stop; ++c)                                                                                           \
      convolve<float, 2>(x, taps, job.b, job.first, job.last, {c + gate, c + value}, scratch,                       \
                         GateBackward<T>{g, dconv, job.b, c, gate, value});                                         \
  }                                                                                                                 \
  LPMRF_VECTORISED void plain_job(const Map<T>& x, const Map<T>& out, int64_t gate, int64_t value, int64_t job) {   \
    const int64_t b = job / x.height, y = job % x.height;                                                           \
    for (int64_t i = 0; i < x.width; ++i) {                                                                         \
      const T* from = x.row(b, y, 0) + i * x.sw;                                                                    \
      T* to = out.row(b, y, 0) + i * out.sw;                                                                        \
      int64_t c = 0;                                                                                                \
      for (; c + kLanes <= out.channels; c += kLanes) plain<Lanes>(from, to, gate, value, c);                       \
      for (; c < out.channels; ++c) plain<float>(from, to, gate, value, c);                                         \
    }                                                                                                               \
  }                                                                                                                 \
  LPMRF_VECTORISED void plain_backward_job(const Map<T>& g, const Map<T>& x, const Map<T>& dx, int64_t gate,        \
                                           int64_t value, int64_t job) {                                            \
    const int64_t b = job / x.height, y = job % x.height;                                                           \
    for (int64_t i = 0; i < x.width; ++i) {                                                                         \
      const T *from = x.row(b, y, 0) + i * x.sw, *d = g.row(b, y, 0) + i * g.sw;                                    \
      T* to = dx.row(b, y, 0) + i * dx.sw;                                                                          \
      int64_t c = 0;                                                                                                \
      for (; c + kLanes <= g.channels; c += kLanes) plain_backward<Lanes>(d, from, to, gate, value, c);             \
      for (; c < g.channels; ++c) plain_backward<float>(d, from, to, gate, value, c);                               \
    }                                                                                                               \
  }
LPMRF_GEGLU(float)
LPMRF_GEGLU(BFloat16)
#undef LPMRF_GEGLU

// x of 2 * hidden channels, half of it (out, or g), and a second one like x (a gradient), all of one dtype.
void check(const Tensor& x, const Tensor& half, const Tensor& like_x) {
  STD_TORCH_CHECK(x.dim() == 4 && half.dim() == 4 && x.size(1) == 2 * half.size(1) && x.numel() == 2 * half.numel() &&
                      like_x.numel() == x.numel() && x.scalar_type() == half.scalar_type() &&
                      x.scalar_type() == like_x.scalar_type(),
                  "lpmrf_cpp: geglu expects (B, 2 C, H, W) and (B, C, H, W) of one dtype");
}

constexpr int64_t kWork = 20 * kLanes;  // of a pixel, in the elements that kGrain counts

void dwconv_geglu(const Tensor& x_tensor, const Tensor& weight, const Tensor& bias, bool gate_first, Tensor out_tensor) {
  check(x_tensor, out_tensor, x_tensor);
  if (x_tensor.numel() == 0) return;
  const Taps taps(weight, bias.numel() ? &bias : nullptr);
  dispatch_map(x_tensor.scalar_type(), [&](auto type) {
    const Map<Element<decltype(type)>> x(x_tensor), out(out_tensor);
    const int64_t gate = gate_first ? 0 : out.channels, value = out.channels - gate;
    for_each_job(Job::count(x.batch, out.channels, x.height), kWork * kRows * x.width, 6 * (x.width + 2) * kLanes,
                 [&](int64_t job, float* scratch) {
                   conv_job(x, taps, out, gate, value, Job(job, out.channels, x.height), scratch);
                 });
  });
}

// dconv: the gradient of the convolution's output; lpmrf_cpp::depthwise_backward goes on from there.
void dwconv_geglu_backward(const Tensor& g_tensor, const Tensor& x_tensor, const Tensor& weight, const Tensor& bias,
                           bool gate_first, Tensor dconv_tensor) {
  check(x_tensor, g_tensor, dconv_tensor);
  if (x_tensor.numel() == 0) return;
  const Taps taps(weight, bias.numel() ? &bias : nullptr);
  dispatch_map(x_tensor.scalar_type(), [&](auto type) {
    const Map<Element<decltype(type)>> g(g_tensor), x(x_tensor), dconv(dconv_tensor);
    const int64_t gate = gate_first ? 0 : g.channels, value = g.channels - gate;
    for_each_job(Job::count(x.batch, g.channels, x.height), kWork * kRows * x.width, 6 * (x.width + 2) * kLanes,
                 [&](int64_t job, float* scratch) {
                   conv_backward_job(g, x, taps, dconv, gate, value, Job(job, g.channels, x.height), scratch);
                 });
  });
}

void geglu(const Tensor& x_tensor, bool gate_first, Tensor out_tensor) {
  check(x_tensor, out_tensor, x_tensor);
  if (x_tensor.numel() == 0) return;
  dispatch_map(x_tensor.scalar_type(), [&](auto type) {
    const Map<Element<decltype(type)>> x(x_tensor), out(out_tensor);
    const int64_t gate = gate_first ? 0 : out.channels, value = out.channels - gate;
    for_each_job(x.batch * x.height, 4 * x.width * out.channels, 0,
                 [&](int64_t job, float*) { plain_job(x, out, gate, value, job); });
  });
}

void geglu_backward(const Tensor& g_tensor, const Tensor& x_tensor, bool gate_first, Tensor dx_tensor) {
  check(x_tensor, g_tensor, dx_tensor);
  if (x_tensor.numel() == 0) return;
  dispatch_map(x_tensor.scalar_type(), [&](auto type) {
    const Map<Element<decltype(type)>> g(g_tensor), x(x_tensor), dx(dx_tensor);
    const int64_t gate = gate_first ? 0 : g.channels, value = g.channels - gate;
    for_each_job(x.batch * x.height, 4 * x.width * g.channels, 0,
                 [&](int64_t job, float*) { plain_backward_job(g, x, dx, gate, value, job); });
  });
}

}  // namespace
}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("dwconv_geglu(Tensor x, Tensor weight, Tensor bias, bool gate_first, Tensor(a!) out) -> ()");
  m.def(
      "dwconv_geglu_backward(Tensor g, Tensor x, Tensor weight, Tensor bias, bool gate_first, Tensor(a!) dconv) -> ()");
  m.def("geglu(Tensor x, bool gate_first, Tensor(a!) out) -> ()");
  m.def("geglu_backward(Tensor g, Tensor x, bool gate_first, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("dwconv_geglu", TORCH_BOX(&lpmrf::lanes::dwconv_geglu));
  m.impl("dwconv_geglu_backward", TORCH_BOX(&lpmrf::lanes::dwconv_geglu_backward));
  m.impl("geglu", TORCH_BOX(&lpmrf::lanes::geglu));
  m.impl("geglu_backward", TORCH_BOX(&lpmrf::lanes::geglu_backward));
}
