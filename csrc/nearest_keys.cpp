// nearest_keys: the k keys of largest cosine to each query among those that it may see, without the matrix of cosines.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "contrastive_ce.h"

namespace fastrex::nearest_keys {

using namespace contrastive;

constexpr const char* OP = "nearest_keys";
constexpr int64_t PASS_BYTES = 64 << 20;  // of candidates of the queries that are searched at once

// A cosine, infinite where it is a NaN, and a key among those that count, as one number: larger is better, of equal
// cosines the first key.
using Candidate = uint64_t;

inline Candidate candidate(float cosine, int64_t key) {
  cosine += 0.0f;  // -0 is equal to 0
  uint32_t bits;
  std::memcpy(&bits, &cosine, sizeof(bits));
  bits ^= (uint32_t)((int32_t)bits >> 31) | 0x80000000u;
  return (Candidate)bits << 32 | ~(uint32_t)key;
}
inline float cosine_of(Candidate c) {
  uint32_t bits = (uint32_t)(c >> 32);
  bits ^= (uint32_t)((int32_t)~bits >> 31) | 0x80000000u;
  float cosine;
  std::memcpy(&cosine, &bits, sizeof(cosine));
  return cosine;
}

// Leaves the k best; returns the cosine of the last of them. Outside the loops, as it comes from the standard library.
float cut(Candidate* own, int32_t& count, int64_t k) {
  if (count < k) return -INFINITY;
  std::nth_element(own, own + k - 1, own + count, std::greater<Candidate>());
  count = (int32_t)k;
  return cosine_of(own[k - 1]);
}

#define FASTREX_LOOPS "nearest_keys.inl"
#include "isa.h"

#include "contrastive_ce_setup.h"

namespace {

std::tuple<Tensor, Tensor> nearest_keys(const Tensor& input, const Tensor& keys, const Tensor& ids,
                                        const Tensor& key_ids, Optional instance, Optional key_instance,
                                        int64_t private_keys, int64_t ignore_index, int64_t k, at::ScalarType) {
  TORCH_CHECK_VALUE(k >= 0 && k <= keys.size(0), OP, ": k must be in [0, ", keys.size(0), "], got ", k);
  const Setup setup(input, keys, ids, key_ids, instance, key_instance, private_keys, ignore_index, false,
                    [](int64_t) { return true; });
  const Pairs& p = setup.pairs;
  const int64_t N = input.size(0);
  const Tensor cosine = at::full({N, k}, -INFINITY, at::kFloat), index = at::full({N, k}, -1, at::kLong);
  const int64_t most = std::min(k, p.key.count);  // that a query can have
  if (most == 0 || p.tiles == 0) return {cosine, index};
  float* value = cosine.mutable_data_ptr<float>();
  int64_t* where = index.mutable_data_ptr<int64_t>();

  // Every split finds its own k best, which costs as much as the cosines of a hundred times as many keys.
  const int64_t splits = setup.splits(p.blocks, std::max<int64_t>(8, 128 * most / p.K));
  const int64_t capacity = std::min(2 * most, p.key.count) + 1, tile_floats = p.R * capacity * 2;
  const int64_t per_pass =
      std::clamp<int64_t>(PASS_BYTES / (splits * tile_floats * (int64_t)sizeof(float)), 1, p.tiles);
  const Tensor buffer = at::empty({per_pass * splits, tile_floats}, at::kFloat);
  const Tensor numbers = at::empty({per_pass * splits, p.R}, at::kInt);
  Candidate* found = (Candidate*)buffer.mutable_data_ptr<float>();
  int32_t* count = numbers.mutable_data_ptr<int32_t>();
  for (int64_t tile0 = 0; tile0 < p.tiles; tile0 += per_pass) {
    const int64_t tiles = std::min(per_pass, p.tiles - tile0);
    each(tiles * splits, (p.K + 1) * p.R, [&](int64_t task, float* own) {
      const int64_t split = task % splits;
      FASTREX_DISPATCH(search, p, tile0 + task / splits, p.blocks * split / splits, p.blocks * (split + 1) / splits,
                       most, capacity, found + task * p.R * capacity, count + task * p.R, own);
    });
    const int64_t first = p.row(tile0), last = std::min(p.query.count, first + tiles * p.R);
    fastrex::parallel_for(first, last, 16, [&](int64_t begin, int64_t end) {
      std::vector<Candidate> all;
      for (int64_t r = begin; r < end; ++r) {
        all.clear();
        for (int64_t split = 0; split < splits; ++split) {
          const int64_t place = ((r - first) / p.R * splits + split) * p.R + (r - first) % p.R;
          all.insert(all.end(), found + place * capacity, found + place * capacity + count[place]);
        }
        const int64_t there = std::min<int64_t>(most, (int64_t)all.size()), n = p.query.index[r];
        if (there < (int64_t)all.size())
          std::nth_element(all.begin(), all.begin() + there, all.end(), std::greater<Candidate>());
        std::sort(all.begin(), all.begin() + there, std::greater<Candidate>());
        for (int64_t i = 0; i < there; ++i) {
          const float best = cosine_of(all[i]);
          value[n * k + i] = best == INFINITY ? NAN : best;
          where[n * k + i] = p.key.index[~(uint32_t)all[i]];
        }
      }
    });
  }
  return {cosine, index};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) { m.impl("nearest_keys", nearest_keys); }

}  // namespace fastrex::nearest_keys
