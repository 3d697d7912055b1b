// Sums that come out alike on every instruction set.
#pragma once

#include <cstdint>

namespace lpmrf {
namespace {

constexpr int64_t kLanes = 16;  // partial sums: as many on every instruction set

// sums[0 ... kLanes) = partial sums over c < count of `term`, an expression in c. Twice as many inside: an addition
// takes several cycles, and a second one need not wait for it.
#define LPMRF_SUM(sums, count, term)                                       \
  {                                                                        \
    float lanes[2 * kLanes] = {};                                          \
    int64_t begin = 0;                                                     \
    for (; begin + 2 * kLanes <= count; begin += 2 * kLanes)               \
      for (int64_t l = 0; l < 2 * kLanes; ++l) {                           \
        const int64_t c = begin + l;                                       \
        lanes[l] += term;                                                  \
      }                                                                    \
    for (int64_t c = begin; c < count; ++c) lanes[c - begin] += term;      \
    for (int64_t l = 0; l < kLanes; ++l) sums[l] = lanes[l] + lanes[l + kLanes]; \
  }

inline __attribute__((always_inline)) float fold(const float* sums) {
  float half[8], quarter[4];
  for (int l = 0; l < 8; ++l) half[l] = sums[l] + sums[l + 8];
  for (int l = 0; l < 4; ++l) quarter[l] = half[l] + half[l + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

}  // namespace
}  // namespace lpmrf
