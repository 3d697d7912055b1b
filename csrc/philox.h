// Philox4x32-10 and the float32 Box-Muller of kernels/lpmrf_kernels/add_source_noise.py, which defines them exactly.
#pragma once

#include "common.h"

#include <array>
#include <cmath>

namespace lpmrf {

using Words = std::array<uint32_t, 4>;

constexpr Words philox_4x32_10(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Random123's known answers, checked by the compiler.
constexpr bool gives(Words c, uint32_t k0, uint32_t k1, Words want) {
  const Words x = philox_4x32_10(c, k0, k1);
  return x[0] == want[0] && x[1] == want[1] && x[2] == want[2] && x[3] == want[3];
}
static_assert(gives({0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
static_assert(gives({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
static_assert(gives({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0,
                    {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));

struct Pair {
  float x, y;
};

// Branch-free, so that a loop over it becomes vector instructions.
inline Pair box_muller(uint32_t a, uint32_t b) {
  // ln u: u = 2^e (1 + f) with f in [sqrt(1/2) - 1, sqrt(2) - 1], both from the bits of the float
  const int32_t bits = bit_cast<int32_t>(static_cast<float>(static_cast<int32_t>(a >> 8) + 1));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // 0x3F3504F3 is sqrt(1/2)
  const float f = bit_cast<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent - 24);
  float p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float log_u = f + (p * f * f * f - 2.12194440e-4f * e - 0.5f * f * f) + 0.693359375f * e;
  const float r = std::sqrt(-2.0f * log_u);

  // the circle: quadrant and an angle within +-pi/4
  const int32_t m = static_cast<int32_t>(b >> 8);
  const int32_t quadrant = (m + 0x200000) >> 22;
  const float t = static_cast<float>(m - (quadrant << 22)) * 3.7450703e-07f;  // (pi/2) / 2^22
  const float t2 = t * t;
  const float sin = ((-1.9515295891e-4f * t2 + 8.3321608736e-3f) * t2 - 1.6666654611e-1f) * t2 * t + t;
  const float cos =
      ((2.443315711809948e-5f * t2 - 1.388731625493765e-3f) * t2 + 4.166664568298827e-2f) * t2 * t2 - 0.5f * t2 + 1.0f;
  const bool swap = quadrant & 1;
  const float x = swap ? sin : cos, y = swap ? cos : sin;
  return {r * ((quadrant + 1) & 2 ? -x : x), r * (quadrant & 2 ? -y : y)};
}

}  // namespace lpmrf
