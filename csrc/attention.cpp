// Global attention. The specification is kernels/lpmrf_kernels/attention.py.
//
// A task is a block of queries of one head. Its thread keeps that head's keys and values as float32, the keys transposed
// in tiles, so that both products run along vectors; the softmax is online, tile by tile, in the cache.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lpmrf {
namespace {

using lanes::kLanes;
using lanes::Lanes;
using matmul::float_or_bfloat16;
using matmul::gather;
using matmul::padded;
using matmul::scatter;

constexpr int64_t kQueries = 48;  // of a task: eight times the rows of a product's block
constexpr int64_t kKeys = 64;     // of a tile

// Scores (rows x kKeys) → weights in their place, given and leaving each row's largest score and its sums by lane.
// Sets shrink[r]: what the row's earlier weights are to be multiplied by.
LPMRF_VECTORISED void soften(int64_t rows, float* scores, float* largest, float* sums, float* shrink) {
  constexpr int64_t n = kKeys / kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    Lanes s[n];
    for (int64_t i = 0; i < n; ++i) s[i] = lanes::load<Lanes>(scores + r * kKeys + i * kLanes);
    Lanes most = s[0];
    for (int64_t i = 1; i < n; ++i) most = s[i] > most ? s[i] : most;
    const float now = std::max(largest[r], matmul::largest(most));
    shrink[r] = lanes::exp<float>(largest[r] - now);  // 1 where the largest stays
    largest[r] = now;
    Lanes sum = shrink[r] * lanes::load<Lanes>(sums + r * kLanes);
    for (int64_t i = 0; i < n; ++i) {
      const Lanes p = lanes::exp<Lanes>(s[i] - now);
      sum += p;
      lanes::store<Lanes>(scores + r * kKeys + i * kLanes, p);
    }
    lanes::store<Lanes>(sums + r * kLanes, sum);
  }
}

LPMRF_VECTORISED void rescale(int64_t rows, int64_t width, const float* factors, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    if (factors[r] == 1.0f) continue;
    for (int64_t d = 0; d < width; d += kLanes) {
      lanes::store<Lanes>(out + r * width + d, factors[r] * lanes::load<Lanes>(out + r * width + d));
    }
  }
}

std::vector<int64_t> rows_of(const Tensor& t) {
  std::vector<int64_t> offsets(t.size(2));
  for (int64_t i = 0; i < t.size(2); ++i) offsets[i] = i * t.stride(2);
  return offsets;
}

// q, out (B, heads, Lq, D), k, v (B, heads, Lk, D) with any strides, out's channels contiguous; lse (B, heads, Lq).
void attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor out, Tensor lse) {
  const int64_t B = q.size(0), heads = q.size(1), queries = q.size(2), D = q.size(3), keys = k.size(2);
  STD_TORCH_CHECK(keys > 0 && out.stride(3) == 1 && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float &&
                      q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                      q.scalar_type() == out.scalar_type(),
                  "lpmrf_cpp::attention: unexpected arguments");
  const int64_t width = padded(D), tiles = (keys + kKeys - 1) / kKeys, blocks = (queries + kQueries - 1) / kQueries;
  float* lse_data = static_cast<float*>(lse.mutable_data_ptr());
  float_or_bfloat16(q.scalar_type(), [&](auto type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* q_data = static_cast<const T*>(q.const_data_ptr());
    const T* k_data = static_cast<const T*>(k.const_data_ptr());
    const T* v_data = static_cast<const T*>(v.const_data_ptr());
    T* out_data = static_cast<T*>(out.mutable_data_ptr());
    const auto q_rows = rows_of(q), k_rows = rows_of(k), v_rows = rows_of(v), out_rows = rows_of(out);
    const int64_t grain = std::max<int64_t>(1, kGrain / (kQueries * keys));
    torch::stable::parallel_for(0, B * heads * blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> keys_t(tiles * D * kKeys), values(tiles * kKeys * width), room(kKeys * width);
      std::vector<float> q_block(kQueries * width), o_block(kQueries * width), scores(kQueries * kKeys);
      std::vector<float> sums(kQueries * kLanes), largest(kQueries), shrink(kQueries);
      int64_t packed = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocks, b = head / heads, n = head % heads;
        const auto at = [&](const Tensor& t) { return b * t.stride(0) + n * t.stride(1); };
        if (packed != head) {
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = tile * kKeys, count = std::min(kKeys, keys - first);
            gather(k_data + at(k), k_rows.data() + first, count, D, k.stride(3), 1.0f, room.data(), width,
                   keys_t.data() + first * D, kKeys);
            gather(v_data + at(v), v_rows.data() + first, count, D, v.stride(3), 1.0f, values.data() + first * width,
                   width, nullptr, 0);
          }
          packed = head;
        }
        const int64_t top = task % blocks * kQueries, rows = std::min(kQueries, queries - top);
        gather(q_data + at(q), q_rows.data() + top, rows, D, q.stride(3), static_cast<float>(scale), q_block.data(),
               width, nullptr, 0);
        std::fill(o_block.begin(), o_block.end(), 0.0f);
        std::fill(sums.begin(), sums.end(), 0.0f);
        std::fill(largest.begin(), largest.end(), -std::numeric_limits<float>::infinity());
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t first = tile * kKeys, count = std::min(kKeys, keys - first);
          matmul::multiply(rows, kKeys, D, q_block.data(), width, 1, keys_t.data() + first * D, kKeys, scores.data(),
                           kKeys, false);
          if (count < kKeys) {
            for (int64_t r = 0; r < rows; ++r) {
              std::fill(&scores[r * kKeys + count], &scores[r * kKeys] + kKeys,
                        -std::numeric_limits<float>::infinity());
            }
          }
          soften(rows, scores.data(), largest.data(), sums.data(), shrink.data());
          rescale(rows, width, shrink.data(), o_block.data());
          matmul::multiply(rows, width, count, scores.data(), kKeys, 1, values.data() + first * width, width,
                           o_block.data(), width, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
          float total = 0;
          for (int64_t i = 0; i < kLanes; ++i) total += sums[r * kLanes + i];
          lse_data[head * queries + top + r] = largest[r] + std::log(total);
          shrink[r] = 1.0f / total;
        }
        scatter(o_block.data(), width, 1.0f, shrink.data(), out_rows.data() + top, rows, D, out_data + at(out));
      }
    });
  });
}

}  // namespace
}  // namespace lpmrf

STABLE_TORCH_LIBRARY_FRAGMENT(lpmrf_cpp, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lpmrf_cpp, CPU, m) { m.impl("attention", TORCH_BOX(&lpmrf::attention)); }
