// What the kernels share: the stable ABI's names, input types, threads and the choice of instructions at run time.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

// The compiler makes one copy of such a function per instruction set and the loader picks: one binary for all CPUs.
// setup.py compiles with -ffp-contract=off, so the copies give the same bits (but see lanes.h).
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LPMRF_VECTORISED __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define LPMRF_VECTORISED
#endif

namespace lpmrf {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class To, class From>
inline To bit_cast(From from) {  // std::bit_cast is C++20
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float upcast(float x) { return x; }
inline float upcast(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }
inline float upcast(Half x) { return static_cast<float>(x); }

// Calls f with a null pointer of the tensor's element type: `f(static_cast<const T*>(nullptr))`.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<const float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<const Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "lpmrf_cpp: expected a float32, bfloat16 or float16 tensor");
  }
}

constexpr int64_t kGrain = 32768;  // elements a thread must get to be worth waking, as in ATen

}  // namespace lpmrf
