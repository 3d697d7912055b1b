// The backward of the depthwise 3x3 convolution: what kernels/lpmrf_kernels/depthwise.py describes.
#include "depthwise.h"

namespace lpmrf::lanes {
namespace {

// dx is the convolution of g with the taps turned round.
template <class T>
struct Store {
  const Map<T>& out;
  int64_t b, c;

  template <class V>
  LPMRF_INLINE void operator()(int64_t y, int64_t i, const V (&values)[1]) const {
    store<V>(out.row(b, y, c) + i * out.sw, values[0]);
  }
};

// dweight[k] = sum over the output pixels of g times the input under tap k; dbias = sum of g. Sums of a row, then of a
// photo, then of the batch: a float loses little at each.
template <class V, class T>
LPMRF_INLINE void weight_sums(const Map<T>& g, const Map<T>& x, float* dweight, float* dbias, int64_t c) {
  constexpr int64_t n = Traits<V>::size;
  const T zeros[n] = {};
  V total[10] = {};
  for (int64_t b = 0; b < x.batch; ++b) {
    V photo[10] = {};
    for (int64_t y = 0; y < x.height; ++y) {
      const T* rows[3];
      int64_t strides[3];
      for (int k = 0; k < 3; ++k) {
        const bool inside = y + k >= 1 && y + k <= x.height;
        rows[k] = inside ? x.row(b, y + k - 1, c) : zeros;
        strides[k] = inside ? x.sw : 0;
      }
      const T* g_row = g.row(b, y, c);
      V line[10] = {};
      V left[3] = {}, here[3], right[3] = {};
      for (int k = 0; k < 3; ++k) here[k] = load<V>(rows[k]);
      for (int64_t i = 0; i < x.width; ++i) {
        const bool last = i + 1 == x.width;
        const V d = load<V>(g_row + i * g.sw);
        for (int k = 0; k < 3; ++k) {
          right[k] = last ? V{} : load<V>(rows[k] + (last ? i : i + 1) * strides[k]);
          line[3 * k] += d * left[k];
          line[3 * k + 1] += d * here[k];
          line[3 * k + 2] += d * right[k];
          left[k] = here[k];
          here[k] = right[k];
        }
        line[9] += d;
      }
      for (int k = 0; k < 10; ++k) photo[k] += line[k];
    }
    for (int k = 0; k < 10; ++k) total[k] += photo[k];
  }
  for (int k = 0; k < 9; ++k) {
    float lane[n];
    store<V>(lane, total[k]);
    for (int64_t i = 0; i < n; ++i) dweight[9 * (c + i) + k] = lane[i];
  }
  store<V>(dbias + c, total[9]);
}

#define LPMRF_DEPTHWISE_BACKWARD(T)                                                                               \
  LPMRF_VECTORISED void dx_job(const Map<T>& g, const Taps& turned, const Map<T>& dx, const Job& job, float* s) { \
    int64_t c = job.c;                                                                                            \
    const int64_t stop = std::min(c + kLanes, dx.channels);                                                       \
    if (c + kLanes == stop) {                                                                                     \
      return convolve<Lanes, 1>(g, turned, job.b, job.first, job.last, {c}, s, Store<T>{dx, job.b, c});           \
    }                                                                                                             \
    for (; c < stop; ++c)                                                                                         \
      convolve<float, 1>(g, turned, job.b, job.first, job.last, {c}, s, Store<T>{dx, job.b, c});                  \
  }                                                                                                               \
  LPMRF_VECTORISED void weight_job(const Map<T>& g, const Map<T>& x, float* dw, float* db, int64_t block) {       \
    const int64_t c = block * kLanes;                                                                             \
    if (c + kLanes <= x.channels) return weight_sums<Lanes>(g, x, dw, db, c);                                     \
    for (int64_t i = c; i < x.channels; ++i) weight_sums<float>(g, x, dw, db, i);                                 \
  }
LPMRF_DEPTHWISE_BACKWARD(float)
LPMRF_DEPTHWISE_BACKWARD(BFloat16)
#undef LPMRF_DEPTHWISE_BACKWARD

template <class T>
void backward(const Tensor& g_tensor, const Tensor& x_tensor, const Tensor& weight, Tensor& dx_tensor, float* dweight,
              float* dbias) {
  const Map<T> g(g_tensor), x(x_tensor), dx(dx_tensor);
  const int64_t blocks = (x.channels + kLanes - 1) / kLanes;
  const Taps turned(weight, nullptr, true);
  for_each_job(Job::count(x.batch, x.channels, x.height), 9 * kRows * x.width * kLanes, 3 * (x.width + 2) * kLanes,
               [&](int64_t job, float* scratch) { dx_job(g, turned, dx, Job(job, x.channels, x.height), scratch); });
  for_each_job(blocks, kGrain, 0, [&](int64_t block, float*) { weight_job(g, x, dweight, dbias, block); });
}

}  // namespace

void depthwise_backward(const Tensor& g, const Tensor& x, const Tensor& weight, Tensor dx, Tensor dweight,
                        Tensor dbias) {
  STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && dx.scalar_type() == x.scalar_type() &&
                      g.numel() == x.numel() && dx.numel() == x.numel() && dweight.is_contiguous() &&
                      dweight.numel() == 9 * x.size(1) && dweight.scalar_type() == ScalarType::Float &&
                      dbias.numel() == x.size(1) && dbias.scalar_type() == ScalarType::Float,
                  "lpmrf_cpp::depthwise_backward: expected g and dx like x, float32 dweight (C, 9) and dbias (C)");
  if (x.numel() == 0) return;
  float *dw = static_cast<float*>(dweight.mutable_data_ptr()), *db = static_cast<float*>(dbias.mutable_data_ptr());
  dispatch_map(x.scalar_type(), [&](auto type) { backward<Element<decltype(type)>>(g, x, weight, dx, dw, db); });
}

}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def(
      "depthwise_backward(Tensor g, Tensor x, Tensor weight, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("depthwise_backward", TORCH_BOX(&lpmrf::lanes::depthwise_backward));
}
