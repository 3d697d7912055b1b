// Sixteen channels at a time: float vectors of GCC's vector extension, or a single float for what is left of a row.
//
// Every function is a template on V, `Lanes` or `float`, and inlined into an LPMRF_VECTORISED caller, where the compiler
// makes one, two or four registers of a `Lanes`. No intrinsics, and the same bits on every instruction set.
#pragma once

#include "common.h"

#include <algorithm>

#define LPMRF_INLINE inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace lpmrf::lanes {
namespace {  // each file has its own copies, compiled for its own clones

constexpr int64_t kLanes = 16;

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kLanes)));
using WordLanes = uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfWordLanes = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class V>
struct Traits {
  using Int = IntLanes;
  static constexpr int64_t size = kLanes;
};
template <>
struct Traits<float> {
  using Int = int32_t;
  static constexpr int64_t size = 1;
};

// bit_cast that is inlined for certain: a call would pass vectors by another clone's convention.
template <class To, class From>
LPMRF_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- memory

template <class V>
LPMRF_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
LPMRF_INLINE V load(const BFloat16* p) {
  if constexpr (Traits<V>::size == 1) {
    return upcast(*p);
  } else {
    HalfWordLanes bits;
    std::memcpy(&bits, p, sizeof bits);
    return as<V>(__builtin_convertvector(bits, WordLanes) << 16);
  }
}

template <class V>
LPMRF_INLINE void store(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class V>
LPMRF_INLINE void store(BFloat16* p, V v) {  // to the nearest, ties to even; NaN stays NaN
  if constexpr (Traits<V>::size == 1) {
    const uint32_t word = as<uint32_t>(v), rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    p->x = static_cast<uint16_t>(v == v ? rounded : 0x7FC0);
  } else {
    const WordLanes word = as<WordLanes>(v), rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    const HalfWordLanes bits = __builtin_convertvector(v == v ? rounded : WordLanes{} + 0x7FC0, HalfWordLanes);
    std::memcpy(p, &bits, sizeof bits);
  }
}

template <class V>
LPMRF_INLINE V splat(float x) {
  return V{} + x;
}

LPMRF_INLINE float sum(float v) { return v; }
LPMRF_INLINE float sum(Lanes v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// ---- functions

// e^x to 1e-7 of itself for x in [-87, 88], constant outside: never 0, never infinite.
template <class V>
LPMRF_INLINE V exp(V x) {
  using Int = typename Traits<V>::Int;
  const V low = splat<V>(-87.0f), high = splat<V>(88.0f);
  x = x < low ? low : x;  // NaN compares false and stays
  x = x > high ? high : x;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part in the lowest bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  V y = splat<V>(0.0013843555934727192f);
  y = y * r + 0.008374236524105072f;
  y = y * r + 0.041668009012937546f;
  y = y * r + 0.16666430234909058f;
  y = y * r + 0.4999999403953552f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Int power = (as<Int>(shifted) - 0x4B400000 + 127) << 23;
  return y * as<V>(power);
}

template <class V>
LPMRF_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp<V>(-x));
}

// The standard normal's distribution function (GELU is x * cdf) and density. cdf(-z) for z > 0 is e^(-z^2/2) times a
// polynomial of degree 8 in 1 / (1 + 0.3 z), fitted here to 1.3e-7 of itself: so the tail keeps its relative precision.
template <class V>
LPMRF_INLINE void normal(V x, V& cdf, V& density) {
  const V z = x < 0.0f ? -x : x;
  const V t = 1.0f / (1.0f + 0.3f * z);
  const V e = exp<V>(x * x * -0.5f);
  V p = splat<V>(0.07186371833086014f);
  p = p * t + -0.31655293703079224f;
  p = p * t + 0.41641467809677124f;
  p = p * t + -0.11078887432813644f;
  p = p * t + 0.2589389383792877f;
  p = p * t + 0.19927485287189484f;
  p = p * t + 0.24159672856330872f;
  p = p * t + 0.23925277590751648f;
  const V tail = 0.5f * e * (p * t);
  cdf = x < 0.0f ? tail : 1.0f - tail;
  density = 0.398942280f * e;
}

}  // namespace
}  // namespace lpmrf::lanes
