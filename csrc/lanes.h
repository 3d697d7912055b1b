// Sixteen channels at a time: float vectors of GCC's vector extension, or a single float for what is left of a row.
//
// Every function is a template on V, `Lanes` or `float`, and inlined into an LPMRF_VECTORISED caller, where the compiler
// makes one, two or four registers of a `Lanes`. No intrinsics.
#pragma once

#include "common.h"

#include <algorithm>
#include <type_traits>

#define LPMRF_INLINE inline __attribute__((always_inline))
#define LPMRF_LAMBDA __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
// a * b + c may be one instruction: AVX-512 has it. These ops round differently from one instruction set to the next.
#pragma GCC optimize("fp-contract=fast")
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
  using Word = WordLanes;
  static constexpr int64_t size = kLanes;
};
template <>
struct Traits<float> {
  using Int = int32_t;
  using Word = uint32_t;
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

// Neighbours added: eight sums of a's lanes, then eight of b's.
LPMRF_INLINE Lanes add_neighbours(Lanes a, Lanes b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  constexpr IntLanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

// Lane i is the sum of rows[i]. Sixteen sums at once cost little more than one.
LPMRF_INLINE Lanes sums(const Lanes (&rows)[kLanes]) {
  Lanes eighths[8], quarters[4];
  for (int i = 0; i < 8; ++i) eighths[i] = add_neighbours(rows[2 * i], rows[2 * i + 1]);
  for (int i = 0; i < 4; ++i) quarters[i] = add_neighbours(eighths[2 * i], eighths[2 * i + 1]);
  return add_neighbours(add_neighbours(quarters[0], quarters[1]), add_neighbours(quarters[2], quarters[3]));
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
  const V r2 = r * r;  // pairs of terms: short chains of dependent operations
  const V odd = 0.0013843555934727192f * r2 + (0.041668009012937546f + 0.008374236524105072f * r);
  const V y = odd * (r2 * r2) + ((0.4999999403953552f + 0.16666430234909058f * r) * r2 + (1.0f + r));
  const Int power = (as<Int>(shifted) - 0x4B400000 + 127) << 23;
  return y * as<V>(power);
}

// The same in fewer instructions, for what multiplies by x afterwards: of NaN some number; where an instruction set has
// no a * b + c, to |x| 6e-8 of itself. Beyond `most` it is e^most.
template <class V>
LPMRF_INLINE V exp_of_number(V x, float most = 88.0f) {
  using Int = typename Traits<V>::Int;
  using Word = typename Traits<V>::Word;
  // Bits of floats are ordered as integers are, those of negative ones backwards: selections of integers are one
  // instruction, those of floats are not.
  const Int high = as<Int>(splat<V>(most)), bits = as<Int>(x) < high ? as<Int>(x) : high;
  const Word low = as<Word>(splat<V>(-87.0f)), inside = as<Word>(bits) < low ? as<Word>(bits) : low;
  x = as<V>(inside);
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V r = x * 1.44269504f - (shifted - 12582912.0f), r2 = r * r;  // e^x = 2^n 2^r
  const V odd = 0.001326472731307149f * r2 + (0.05550733581185341f + 0.009671512991189957f * r);
  const V y = (odd * (r2 * r) + (0.24022242426872253f * r2 + 0.6931470036506653f * r)) + 1.0f;
  return as<V>(as<Int>(y) + (as<Int>(shifted) << 23));
}

// Of NaN some number: what multiplies by x is NaN all the same.
template <class V>
LPMRF_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp_of_number<V>(-x));
}

template <class V>
LPMRF_INLINE V silu(V x) {
  return x / (1.0f + exp_of_number<V>(-x));
}

// SiLU's derivative.
template <class V>
LPMRF_INLINE V silu_slope(V x) {
  const V s = sigmoid<V>(x);
  return s + x * s * (1.0f - s);
}

// The standard normal's distribution function less 1/2: x P(x^2) / Q(x^2), fitted here to 7e-9 on [-5.5, 5.5].
template <class V>
LPMRF_INLINE V normal_odd(V x) {
  const V t = x * x, t2 = t * t;
  const V p = ((6.3521001720801e-06f + 2.274937749291439e-08f * t) * t2 +
               (0.004677256103605032f + 0.00016882493218872696f * t)) * t2 +
              (0.398942232131958f + 0.03385258838534355f * t);
  const V q = ((7.364719203906134e-05f + 1.197502911054471e-06f * t) * t2 +
               (0.0286458358168602f + 0.0018844407750293612f * t)) * t2 +
              (1.0f + 0.2515217661857605f * t);
  return x * (p / q);
}

// The distribution function, of which GELU is x times: within 2e-7, and 0 or 1 outside, which is true to 2e-8.
template <class V>
LPMRF_INLINE V normal_cdf(V x) {
  const V y = normal_odd(x) + 0.5f, zero = {}, one = splat<V>(1.0f);
  return x > 5.5f ? one : (x < -5.5f ? zero : y);  // NaN compares false and stays
}

// With the density, for GELU's derivative. Beyond 1 the function's tail is e^(-x^2/2) times a polynomial of degree 8 in
// 1 / (1 + 0.3 |x|), fitted here to 1.3e-7 of itself; below, the other form is as good: within 7e-8 of the function.
template <class V>
LPMRF_INLINE void normal(V x, V& cdf, V& density) {
  const V e = exp<V>(x * x * -0.5f), z = x < 0.0f ? -x : x;
  const V t = 1.0f / (1.0f + 0.3f * z);
  V p = splat<V>(0.07186371833086014f);
  p = p * t + -0.31655293703079224f;
  p = p * t + 0.41641467809677124f;
  p = p * t + -0.11078887432813644f;
  p = p * t + 0.2589389383792877f;
  p = p * t + 0.19927485287189484f;
  p = p * t + 0.24159672856330872f;
  p = p * t + 0.23925277590751648f;
  const V tail = 0.5f * e * (p * t), outside = 1.0f - tail;
  const V inside = normal_odd(x) + 0.5f;
  cdf = x > 1.0f ? outside : (x < -1.0f ? tail : inside);
  density = 0.398942280f * e;
}

// ---- pairs

// 2 kLanes elements in the order that costs least: of bfloat16 those with even indices, then those with odd ones, for
// which a word's halves need no instruction that moves them to another lane. Parameters and sums that meet them are
// float32 in the same order (`place`), in rows of whole pairs (`padded`).
struct Pair {
  Lanes a, b;
};

constexpr int64_t kPair = 2 * kLanes;

LPMRF_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
LPMRF_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
LPMRF_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
LPMRF_INLINE Pair operator-(Pair x, float y) { return {x.a - y, x.b - y}; }
LPMRF_INLINE Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }
// One division for both: it takes as long as ten multiplications. Each denominator stays below e^43, so that their product
// is finite; below -43 the result is that of -43 in proportion, less than 1e-17.
LPMRF_INLINE Pair silu(Pair x) {
  const Lanes a = 1.0f + exp_of_number(-x.a, 43.0f), b = 1.0f + exp_of_number(-x.b, 43.0f), r = 1.0f / (a * b);
  return {x.a * (b * r), x.b * (a * r)};
}
LPMRF_INLINE Pair silu_slope(Pair x) { return {silu_slope(x.a), silu_slope(x.b)}; }

[[maybe_unused]] inline int64_t padded(int64_t count) { return (count + kPair - 1) / kPair * kPair; }

// Where element i is in a row of pairs of T.
template <class T>
int64_t place(int64_t i) {
  return std::is_same_v<T, BFloat16> ? i / kPair * kPair + i % 2 * kLanes + i % kPair / 2 : i;
}

// `count` elements, at most kPair; zeros in the other places. One and two vectors are loads without detours.
LPMRF_INLINE Pair load_pair(const float* p, int64_t count = kPair) {
  if (count == kPair) return {load<Lanes>(p), load<Lanes>(p + kLanes)};
  if (count == kLanes) return {load<Lanes>(p), Lanes{}};
  float some[kPair] = {};
  std::memcpy(some, p, count * sizeof(float));
  return {load<Lanes>(some), load<Lanes>(some + kLanes)};
}

LPMRF_INLINE Pair load_pair(const BFloat16* p, int64_t count = kPair) {
  WordLanes words = {};
  if (count == kPair) {
    std::memcpy(&words, p, sizeof words);
  } else if (count == kLanes) {
    using HalfOfWords = uint32_t __attribute__((vector_size(2 * kLanes)));
    HalfOfWords half;
    std::memcpy(&half, p, sizeof half);
#if defined(__clang__) || __GNUC__ >= 12
    words = __builtin_shufflevector(half, HalfOfWords{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    std::memcpy(&words, &half, sizeof half);
#endif
  } else {
    std::memcpy(&words, p, count * sizeof(BFloat16));
  }
  return {as<Lanes>(words << 16), as<Lanes>(words & 0xFFFF0000u)};
}

LPMRF_INLINE void store_pair(float* p, Pair v, int64_t count = kPair) {
  if (count == kPair) {
    store<Lanes>(p, v.a);
    store<Lanes>(p + kLanes, v.b);
  } else if (count == kLanes) {
    store<Lanes>(p, v.a);
  } else {
    float some[kPair];
    store<Lanes>(some, v.a);
    store<Lanes>(some + kLanes, v.b);
    std::memcpy(p, some, count * sizeof(float));
  }
}

// The bits of the nearest bfloat16, ties to even, in the upper half; NaN stays NaN.
LPMRF_INLINE WordLanes nearest(Lanes v) {
  const WordLanes word = as<WordLanes>(v);
  return v == v ? word + 0x7FFF + (word >> 16 & 1) : WordLanes{} + 0x7FC00000u;
}

LPMRF_INLINE void store_pair(BFloat16* p, Pair v, int64_t count = kPair) {
  const WordLanes words = nearest(v.a) >> 16 | (nearest(v.b) & 0xFFFF0000u);
  if (count == kPair) {
    std::memcpy(p, &words, sizeof words);
  } else if (count == kLanes) {
    std::memcpy(p, &words, sizeof words / 2);
  } else {
    std::memcpy(p, &words, count * sizeof(BFloat16));
  }
}

// x with zeros from element `count` on.
template <class T>
LPMRF_INLINE Pair keep(Pair x, int64_t count) {
  if (count == kPair) return x;
  constexpr IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr bool even_odd = std::is_same_v<T, BFloat16>;
  constexpr IntLanes first = even_odd ? 2 * lane : lane, second = even_odd ? 2 * lane + 1 : lane + 16;
  const int32_t n = static_cast<int32_t>(count);
  return {first < n ? x.a : Lanes{}, second < n ? x.b : Lanes{}};
}

}  // namespace
}  // namespace lpmrf::lanes
