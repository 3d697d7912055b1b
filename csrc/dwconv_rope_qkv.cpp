// Depthwise convolution of the qkv projection, cosine-similarity scaling, rotary embedding, heads laid out for attention.
// The specification is kernels/lpmrf_kernels/dwconv_rope_qkv.py.
#include "depthwise.h"

#include <cmath>

namespace lpmrf::lanes {
namespace {

// What a pixel's heads go through. Tables (H, W, heads, quarter) and scale (heads,) are null where there are none.
struct Heads {
  int64_t heads, size, quarter, channels, height, width;
  const float *cos, *sin, *scale;
  float eps;

  int64_t pixel(int64_t b, int64_t y, int64_t i) const { return (b * height + y) * width + i; }
  int64_t table(int64_t y, int64_t i, int64_t head) const { return ((y * width + i) * heads + head) * quarter; }
};

// ---- convolution and rotation at once: pairs of lanes that rotate together, or pass

template <class T>
struct Rotate {
  const Heads& heads;
  T* out;  // of q, k or v
  int64_t b, c, table;
  bool rotated;

  template <class V>
  LPMRF_INLINE void operator()(int64_t y, int64_t i, const V (&values)[2]) const {
    V first = values[0], second = values[1];
    if (rotated) {
      const int64_t at = (y * heads.width + i) * heads.heads * heads.quarter + table;
      const V cos = load<V>(heads.cos + at), sin = load<V>(heads.sin + at);
      first = values[0] * cos - values[1] * sin;
      second = values[1] * cos + values[0] * sin;
    }
    T* to = out + heads.pixel(b, y, i) * heads.channels + c;
    store<V>(to, first);
    store<V>(to + heads.quarter, second);
  }
};

// Pair j of 3 * channels / 2: of the part (q, k, v), then the head, its lower or upper half, and the place in a quarter.
template <class V, class T>
LPMRF_INLINE void rotate_pairs(const Map<T>& x, const Taps& taps, const Heads& h, T* const (&out)[3], const Job& job,
                               int64_t j, float* scratch) {
  const int64_t part = j / (h.channels / 2), pair = j % (h.channels / 2);
  const int64_t half = pair / h.quarter, a = pair % h.quarter, c = half * 2 * h.quarter + a;
  const bool rotated = h.cos != nullptr && part < 2 && half % 2 == 0;
  const int64_t first = part * h.channels + c;
  convolve<V, 2>(x, taps, job.b, job.first, job.last, {first, first + h.quarter}, scratch,
                 Rotate<T>{h, out[part], job.b, c, half / 2 * h.quarter + a, rotated});
}

// ---- one head of one pixel, for what needs all its elements

template <class V>
LPMRF_INLINE float dot(const float* a, const float* b, int64_t count) {
  V total = {};
  for (int64_t c = 0; c < count; c += Traits<V>::size) total += load<V>(a + c) * load<V>(b + c);
  return sum(total);
}

template <class V, class T>
LPMRF_INLINE void finish(float* h, T* out, const Heads& heads, int64_t part, int64_t head, int64_t y, int64_t i) {
  constexpr int64_t n = Traits<V>::size;
  float factor = 1;
  if (part < 2 && heads.scale != nullptr) {
    factor = std::sqrt(heads.scale[head]) / std::sqrt(dot<V>(h, h, heads.size) + heads.eps);
  }
  const bool rotated = part < 2 && heads.cos != nullptr;
  int64_t c = 0;
  if (rotated) {
    const float *cos = heads.cos + heads.table(y, i, head), *sin = heads.sin + heads.table(y, i, head);
    for (; c < heads.quarter; c += n) {
      const V first = load<V>(h + c) * factor, second = load<V>(h + c + heads.quarter) * factor;
      store<V>(out + c, first * load<V>(cos + c) - second * load<V>(sin + c));
      store<V>(out + c + heads.quarter, second * load<V>(cos + c) + first * load<V>(sin + c));
    }
    c = 2 * heads.quarter;
  }
  for (; c < heads.size; c += n) store<V>(out + c, load<V>(h + c) * factor);
}

// The gradient of the head before scale and rotation; returns dot(gradient, h) / |h|, which dscale sums.
template <class V, class T>
LPMRF_INLINE float finish_backward(const T* g, const float* h, float* turned, T* dh, const Heads& heads, int64_t part,
                                   int64_t head, int64_t y, int64_t i) {
  constexpr int64_t n = Traits<V>::size;
  const bool rotated = part < 2 && heads.cos != nullptr, scaled = part < 2 && heads.scale != nullptr;
  int64_t c = 0;
  if (rotated) {
    const float *cos = heads.cos + heads.table(y, i, head), *sin = heads.sin + heads.table(y, i, head);
    for (; c < heads.quarter; c += n) {
      const V first = load<V>(g + c), second = load<V>(g + c + heads.quarter);
      store<V>(turned + c, first * load<V>(cos + c) + second * load<V>(sin + c));
      store<V>(turned + c + heads.quarter, second * load<V>(cos + c) - first * load<V>(sin + c));
    }
    c = 2 * heads.quarter;
  }
  for (; c < heads.size; c += n) store<V>(turned + c, load<V>(g + c));
  if (!scaled) {
    for (c = 0; c < heads.size; c += n) store<V>(dh + c, load<V>(turned + c));
    return 0;
  }
  const float r = 1 / std::sqrt(dot<V>(h, h, heads.size) + heads.eps), along = dot<V>(turned, h, heads.size) * r;
  const float factor = std::sqrt(heads.scale[head]) * r;
  for (c = 0; c < heads.size; c += n)
    store<V>(dh + c, (load<V>(turned + c) - load<V>(h + c) * (along * r)) * factor);
  return along;
}

template <class T>
struct Keep {  // the convolution's result, [rows][width][size] of a head
  float* band;
  int64_t first, width, size;

  template <class V>
  LPMRF_INLINE void operator()(int64_t y, int64_t i, const V (&values)[1]) const {
    store<V>(band + ((y - first) * width + i) * size, values[0]);
  }
};

// Rows first to last - 1 of a head before scale and rotation, with the convolution or, where taps is null, without it.
template <class V, class T>
LPMRF_INLINE void head_band(float* band, const Map<T>& x, const Taps* taps, int64_t b, int64_t first, int64_t last,
                            int64_t c0, int64_t size, float* scratch) {
  constexpr int64_t n = Traits<V>::size;
  for (int64_t c = 0; c < size; c += n) {
    if (taps != nullptr) {
      convolve<V, 1>(x, *taps, b, first, last, {c0 + c}, scratch, Keep<T>{band + c, first, x.width, size});
    } else {
      for (int64_t y = first; y < last; ++y)
        for (int64_t i = 0; i < x.width; ++i)
          store<V>(band + ((y - first) * x.width + i) * size + c, load<V>(x.row(b, y, c0 + c) + i * x.sw));
    }
  }
}

// A job in heads: channels counts heads, one a block.
struct HeadJob {
  int64_t b, part, head, first, last, band;

  HeadJob(int64_t job, const Heads& h) {
    const int64_t bands = (h.height + kRows - 1) / kRows;
    first = job % bands * kRows;
    last = std::min(h.height, first + kRows);
    head = job / bands % h.heads;
    part = job / bands / h.heads % 3;
    b = job / bands / h.heads / 3;
    band = b * bands + job % bands;
  }
};

template <class V, class T>
LPMRF_INLINE void head_forward(const Map<T>& x, const Taps* taps, const Heads& h, T* const (&out)[3], const HeadJob& job,
                               float* scratch) {
  float* ring = scratch + kRows * h.width * h.size;
  const int64_t c0 = job.part * h.channels + job.head * h.size;
  head_band<V>(scratch, x, taps, job.b, job.first, job.last, c0, h.size, ring);
  for (int64_t y = job.first; y < job.last; ++y)
    for (int64_t i = 0; i < h.width; ++i)
      finish<V>(scratch + ((y - job.first) * h.width + i) * h.size,
                out[job.part] + h.pixel(job.b, y, i) * h.channels + job.head * h.size, h, job.part, job.head, y, i);
}

template <class V, class T>
LPMRF_INLINE float head_backward(const Map<T>& x, const Taps* taps, const Heads& h, const T* const (&g)[3],
                                 const Map<T>& dconv, const HeadJob& job, float* scratch) {
  float *ring = scratch + kRows * h.width * h.size, *turned = ring + 3 * (h.width + 2) * kLanes, total = 0;
  const int64_t c0 = job.part * h.channels + job.head * h.size;
  if (h.scale != nullptr && job.part < 2) {
    head_band<V>(scratch, x, taps, job.b, job.first, job.last, c0, h.size, ring);
  }
  for (int64_t y = job.first; y < job.last; ++y) {
    float line = 0;
    for (int64_t i = 0; i < h.width; ++i)
      line += finish_backward<V>(g[job.part] + h.pixel(job.b, y, i) * h.channels + job.head * h.size,
                                 scratch + ((y - job.first) * h.width + i) * h.size, turned,
                                 dconv.row(job.b, y, c0) + i * dconv.sw, h, job.part, job.head, y, i);
    total += line;
  }
  return total;
}

#define LPMRF_ROPE(T)                                                                                                 \
  LPMRF_VECTORISED void pairs_job(const Map<T>& x, const Taps& taps, const Heads& h, T* const (&out)[3],              \
                                  const Job& job, float* scratch) {                                                   \
    const int64_t stop = std::min(job.c + kLanes, 3 * h.channels / 2);                                                \
    if (h.quarter % kLanes == 0) return rotate_pairs<Lanes>(x, taps, h, out, job, job.c, scratch);                    \
    for (int64_t j = job.c; j < stop; ++j) rotate_pairs<float>(x, taps, h, out, job, j, scratch);                     \
  }                                                                                                                   \
  LPMRF_VECTORISED void head_job(const Map<T>& x, const Taps* taps, const Heads& h, T* const (&out)[3],               \
                                 const HeadJob& job, float* scratch) {                                                \
    if (h.quarter % kLanes == 0) return head_forward<Lanes>(x, taps, h, out, job, scratch);                           \
    head_forward<float>(x, taps, h, out, job, scratch);                                                               \
  }                                                                                                                   \
  LPMRF_VECTORISED float head_backward_job(const Map<T>& x, const Taps* taps, const Heads& h, const T* const (&g)[3], \
                                           const Map<T>& dconv, const HeadJob& job, float* scratch) {                 \
    if (h.quarter % kLanes == 0) return head_backward<Lanes>(x, taps, h, g, dconv, job, scratch);                     \
    return head_backward<float>(x, taps, h, g, dconv, job, scratch);                                                  \
  }
LPMRF_ROPE(float)
LPMRF_ROPE(BFloat16)
#undef LPMRF_ROPE

const float* floats_or_null(const Tensor& t, int64_t count) {
  if (t.numel() == 0) return nullptr;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == count,
                  "lpmrf_cpp: expected contiguous float32 tables and scale");
  return static_cast<const float*>(t.const_data_ptr());
}

Heads heads_of(const Tensor& qkv, int64_t heads, const Tensor& cos, const Tensor& sin, const Tensor& scale, double eps) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) % (12 * heads) == 0, "lpmrf_cpp: expected qkv (B, 3 heads D, H, W)");
  const int64_t channels = qkv.size(1) / 3, size = channels / heads;
  const int64_t entries = qkv.size(2) * qkv.size(3) * channels / 4;
  return {heads, size, size / 4, channels, qkv.size(2), qkv.size(3), floats_or_null(cos, entries),
          floats_or_null(sin, entries), floats_or_null(scale, heads), static_cast<float>(eps)};
}

template <class T>
T* data_of(const Tensor& t, const Tensor& qkv) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == qkv.scalar_type() && 3 * t.numel() == qkv.numel(),
                  "lpmrf_cpp: expected contiguous q, k and v (B, H, W, heads, D) in the dtype of qkv");
  return const_cast<T*>(static_cast<const T*>(t.const_data_ptr()));
}

void dwconv_rope_qkv(const Tensor& qkv, int64_t num_heads, const Tensor& weight, const Tensor& bias, const Tensor& cos,
                     const Tensor& sin, const Tensor& scale, double eps, Tensor q, Tensor k, Tensor v) {
  if (qkv.numel() == 0) return;
  const Heads h = heads_of(qkv, num_heads, cos, sin, scale, eps);
  dispatch_map(qkv.scalar_type(), [&](auto type) {
    using T = Element<decltype(type)>;
    const Map<T> x(qkv);
    T* const out[3] = {data_of<T>(q, qkv), data_of<T>(k, qkv), data_of<T>(v, qkv)};
    const int64_t ring = 3 * (x.width + 2) * kLanes, band = kRows * x.width * h.size;
    const int64_t jobs = 3 * h.heads * x.batch * ((x.height + kRows - 1) / kRows);
    if (weight.numel() == 0) {
      for_each_job(jobs, 4 * band, band + ring, [&](int64_t job, float* scratch) {
        head_job(x, nullptr, h, out, HeadJob(job, h), scratch);
      });
      return;
    }
    const Taps taps(weight, bias.numel() ? &bias : nullptr);
    if (h.scale != nullptr) {
      for_each_job(jobs, 10 * band, band + ring, [&](int64_t job, float* scratch) {
        head_job(x, &taps, h, out, HeadJob(job, h), scratch);
      });
    } else {
      const int64_t pairs = 3 * h.channels / 2;
      for_each_job(Job::count(x.batch, pairs, x.height), 20 * kRows * x.width * kLanes, 2 * ring,
                   [&](int64_t job, float* scratch) { pairs_job(x, taps, h, out, Job(job, pairs, x.height), scratch); });
    }
  });
}

// dconv: the gradient of the convolution's output, or of qkv without one. along (B * bands, 2, heads) float32: sums for
// dscale, where there is a scale.
void dwconv_rope_qkv_backward(const Tensor& gq, const Tensor& gk, const Tensor& gv, const Tensor& qkv, int64_t num_heads,
                              const Tensor& weight, const Tensor& bias, const Tensor& cos, const Tensor& sin,
                              const Tensor& scale, double eps, Tensor dconv_tensor, Tensor along) {
  if (qkv.numel() == 0) return;
  const Heads h = heads_of(qkv, num_heads, cos, sin, scale, eps);
  const int64_t bands = (h.height + kRows - 1) / kRows;
  STD_TORCH_CHECK(along.is_contiguous() && along.scalar_type() == ScalarType::Float &&
                      along.numel() == qkv.size(0) * bands * 2 * h.heads && dconv_tensor.numel() == qkv.numel() &&
                      dconv_tensor.scalar_type() == qkv.scalar_type(),
                  "lpmrf_cpp::dwconv_rope_qkv_backward: expected along (B * bands, 2, heads) and dconv like qkv");
  float* sums = static_cast<float*>(along.mutable_data_ptr());
  dispatch_map(qkv.scalar_type(), [&](auto type) {
    using T = Element<decltype(type)>;
    const Map<T> x(qkv), dconv(dconv_tensor);
    const T* const g[3] = {data_of<T>(gq, qkv), data_of<T>(gk, qkv), data_of<T>(gv, qkv)};
    const int64_t ring = 3 * (x.width + 2) * kLanes, band = kRows * x.width * h.size;
    const bool convolved = weight.numel() != 0;
    const auto run = [&](const Taps* taps) {
      for_each_job(3 * h.heads * x.batch * bands, 8 * band, band + ring + h.size, [&](int64_t job, float* scratch) {
        const HeadJob at(job, h);
        const float total = head_backward_job(x, taps, h, g, dconv, at, scratch);
        if (at.part < 2) sums[(at.band * 2 + at.part) * h.heads + at.head] = total;
      });
    };
    if (convolved && h.scale != nullptr) {
      const Taps taps(weight, bias.numel() ? &bias : nullptr);
      run(&taps);
    } else {
      run(nullptr);
    }
  });
}

}  // namespace

}  // namespace lpmrf::lanes

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def(
      "dwconv_rope_qkv(Tensor qkv, int num_heads, Tensor weight, Tensor bias, Tensor cos, Tensor sin, Tensor scale,"
      " float eps, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()");
  m.def(
      "dwconv_rope_qkv_backward(Tensor gq, Tensor gk, Tensor gv, Tensor qkv, int num_heads, Tensor weight, Tensor bias,"
      " Tensor cos, Tensor sin, Tensor scale, float eps, Tensor(a!) dconv, Tensor(b!) along) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) {
  m.impl("dwconv_rope_qkv", TORCH_BOX(&lpmrf::lanes::dwconv_rope_qkv));
  m.impl("dwconv_rope_qkv_backward", TORCH_BOX(&lpmrf::lanes::dwconv_rope_qkv_backward));
}
