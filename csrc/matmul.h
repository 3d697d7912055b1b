// What the attention kernels are made of: tokens gathered as small float32 matrices in the cache, and their products.
#pragma once

#include "lanes.h"

namespace lpmrf::matmul {
namespace {  // each file has its own copies, compiled for its own clones

using lanes::kLanes;
using lanes::Lanes;

inline bool many_registers() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

// R rows and N vectors of c = a b, or of c += a b; the sums stay in registers.
template <int R, int N>
LPMRF_INLINE void block(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                        int64_t c_row, int64_t inner, bool add) {
  Lanes sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = add ? lanes::load<Lanes>(c + r * c_row + n * kLanes) : Lanes{};
  }
  for (int64_t k = 0; k < inner; ++k) {
    Lanes row[N];
    for (int n = 0; n < N; ++n) row[n] = lanes::load<Lanes>(b + k * b_row + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const float factor = a[r * a_row + k * a_column];
      for (int n = 0; n < N; ++n) sums[r][n] += factor * row[n];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) lanes::store<Lanes>(c + r * c_row + n * kLanes, sums[r][n]);
  }
}

template <int R, int N>
LPMRF_INLINE void panel(int64_t rows, int64_t inner, const float* a, int64_t a_row, int64_t a_column, const float* b,
                        int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    block<R, N>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner, add);
  }
  for (; r < rows; ++r) block<1, N>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner, add);
}

// c (rows x columns) = a (rows x inner) b (inner x columns), or c += a b. a has any strides; the rows of b and c are
// contiguous, and columns is a multiple of kLanes.
[[maybe_unused]] LPMRF_VECTORISED void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_row,
                               int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  // Twenty-four sums need the 32 registers of AVX-512.
  static const bool wide = many_registers();
  int64_t n = 0;
  if (wide) {
    for (; n + 4 * kLanes <= columns; n += 4 * kLanes) {
      panel<6, 4>(rows, inner, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
    }
  }
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    panel<4, 2>(rows, inner, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
  }
  if (n < columns) panel<4, 1>(rows, inner, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
}

// The largest of the lanes; NaN is passed over.
LPMRF_INLINE float largest(Lanes v) {
  float x[kLanes];
  std::memcpy(x, &v, sizeof v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
}

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

template <class F>
void float_or_bfloat16(ScalarType dtype, const F& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "lpmrf_cpp: expected a float32 or bfloat16 tensor");
  dtype == ScalarType::Float ? f(static_cast<float*>(nullptr)) : f(static_cast<BFloat16*>(nullptr));
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

}  // namespace
}  // namespace lpmrf::matmul
