// Products of small float32 matrices that lie in the cache: what the attention kernels are made of.
#pragma once

#include "lanes.h"

namespace lpmrf::matmul {
namespace {  // each file has its own copies, compiled for its own clones

using lanes::kLanes;
using lanes::Lanes;

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

template <int N>
LPMRF_INLINE void panel(int64_t rows, int64_t inner, const float* a, int64_t a_row, int64_t a_column, const float* b,
                        int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    block<4, N>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner, add);
  }
  for (; r < rows; ++r) block<1, N>(a + r * a_row, a_row, a_column, b, b_row, c + r * c_row, c_row, inner, add);
}

// c (rows x columns) = a (rows x inner) b (inner x columns), or c += a b. a has any strides; the rows of b and c are
// contiguous, and columns is a multiple of kLanes.
LPMRF_VECTORISED void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_row,
                               int64_t a_column, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    panel<2>(rows, inner, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
  }
  if (n < columns) panel<1>(rows, inner, a, a_row, a_column, b + n, b_row, c + n, c_row, add);
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

}  // namespace
}  // namespace lpmrf::matmul
