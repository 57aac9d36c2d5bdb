// Cross-entropy of queries against all keys by their ids, on a CPU: what to allocate, and in which order the tasks of
// contrastive_ce.inl run. See there for the formulas. All products are of floats, whatever ``compute`` allows.
#include "contrastive_ce.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace fastrex::contrastive_ce {

using namespace contrastive;

constexpr const char* OP = "contrastive_ce";
constexpr int64_t KEPT_BYTES = 16 << 20;  // of dL/ds between the two gradients

#define FASTREX_LOOPS "contrastive_ce.inl"
#include "isa.h"

#include "contrastive_ce_setup.h"

namespace {

Loss loss_of(double temperature, double hardness, int64_t margin_kind, double margin) {
  TORCH_CHECK_VALUE(margin_kind >= 0 && margin_kind <= 2, OP, ": margin_kind must be 0, 1 or 2, got ", margin_kind);
  Loss loss{};
  const double scale = 1.0 / (std::log(2.0) * temperature);
  loss.positive = (float)scale, loss.negative = (float)((1.0 + hardness) * scale);
  loss.hard = (float)(hardness * scale);
  loss.margin_kind = (int)margin_kind, loss.margin = (float)margin;
  loss.cosine = (float)std::cos(margin), loss.sine = (float)std::sin(margin);
  const double most = margin_kind == 1 ? 1.0 - margin : 1.0;
  const double least = margin_kind == 0 ? -1.0 : margin_kind == 1 ? -1.0 - margin : -1.0 - std::abs(margin);
  loss.shift_positive = (float)(most * scale), loss.shift_negative = loss.negative, loss.shift_hard = loss.hard;
  // 2^-126 is the smallest; some of its exponent is left for sums to be exact.
  loss.online = !(std::max((most - least) * scale, 2.0 * (1.0 + hardness) * scale) <= 116.0);
  return loss;
}

// Sum of the splits' exponentials, each relative to its own shift, as a logarithm.
struct LogSum {
  double most = -INFINITY, total = 0.0;
  void add(double sum, double shift) {  // in units of log 2
    if (sum == 0.0) return;
    if (shift > most) total *= std::exp2(most - shift), most = shift;
    total += sum * std::exp2(shift - most);
  }
  float value() const { return (float)(std::log(total) + most * std::log(2.0)); }
};

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& keys, const Tensor& ids, const Tensor& key_ids,
                                   Optional instance, Optional key_instance, int64_t private_keys, int64_t ignore_index,
                                   double temperature, double hardness, int64_t margin_kind, double margin,
                                   at::ScalarType) {
  const Setup setup(input, keys, ids, key_ids, instance, key_instance, private_keys, ignore_index, false,
                    [](int64_t) { return true; });
  const Pairs& p = setup.pairs;
  const Loss loss = loss_of(temperature, hardness, margin_kind, margin);
  const int64_t N = input.size(0), splits = setup.splits(p.blocks, 4), span = setup.span;
  const Tensor parts = at::empty({splits, FIELDS, span}, at::kFloat);
  float* sums = parts.mutable_data_ptr<float>();
  each(p.tiles * splits, p.K * p.R, [&](int64_t task, float* own) {
    const int64_t split = task % splits;
    FASTREX_DISPATCH(statistics, p, loss, task / splits, p.blocks * split / splits, p.blocks * (split + 1) / splits,
                     sums + split * FIELDS * span, span, own);
  });

  const Tensor stats = at::full({6, N}, -INFINITY, at::kFloat), counts = at::zeros({2, N}, at::kLong);
  float* out = stats.mutable_data_ptr<float>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  std::fill(out + N, out + 2 * N, 0.0f);
  fastrex::parallel_for(0, p.query.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      LogSum positive, negative, hard;
      double logits = 0.0;
      float best_positive = -INFINITY, best_negative = -INFINITY;
      int64_t positives = 0, negatives = 0;
      for (int64_t s = 0; s < splits; ++s) {
        const float* part = sums + s * FIELDS * span + r;
        const auto of = [&](Field field) { return part[field * span]; };
        const bool on = loss.online;
        positive.add(of(SUM_POSITIVE), on ? of(BEST_MARGIN) * loss.positive : loss.shift_positive);
        negative.add(of(SUM_NEGATIVE), on ? of(BEST_NEGATIVE) * loss.negative : loss.shift_negative);
        hard.add(of(SUM_HARD), on ? of(BEST_NEGATIVE) * loss.hard : loss.shift_hard);
        logits += of(LOGIT_POSITIVE);
        best_positive = std::max(best_positive, of(BEST_POSITIVE));
        best_negative = std::max(best_negative, of(BEST_NEGATIVE));
        positives += ((const int32_t*)part)[POSITIVES * span], negatives += ((const int32_t*)part)[NEGATIVES * span];
      }
      const int64_t n = p.query.index[r];
      const auto set = [&](int64_t row, double value) { out[row * N + n] = (float)value; };
      // A maximum loses a NaN on the way, a sum does not.
      if (positives > 0) {
        set(0, positive.value()), set(1, logits / temperature);
        set(4, std::isnan(out[n]) ? NAN : best_positive / temperature);
      }
      if (negatives > 0) {
        set(2, negative.value());
        if (hardness > 0.0) set(3, hard.value());
        set(5, std::isnan(out[2 * N + n]) ? NAN : best_negative / temperature);
      }
      count[n] = positives, count[N + n] = negatives;
    }
  });
  return {stats, counts};
}

std::tuple<Tensor, Tensor> backward(const Tensor& input, const Tensor& keys, const Tensor& ids, const Tensor& key_ids,
                                    Optional instance, Optional key_instance, int64_t private_keys,
                                    int64_t ignore_index, double temperature, double hardness, int64_t margin_kind,
                                    double margin, at::ScalarType, const Tensor& stats, const Tensor& coefficients,
                                    bool input_grad, int64_t learnt_keys) {
  const int64_t N = input.size(0);
  TORCH_CHECK_VALUE(stats.dim() == 2 && stats.size(0) == 6 && stats.size(1) == N && coefficients.dim() == 2 &&
                        coefficients.size(0) == 4 && coefficients.size(1) == N,
                    "contrastive_ce_backward: stats and coefficients must be [6, N] and [4, N], got ", stats.sizes(),
                    " and ", coefficients.sizes());
  TORCH_CHECK_VALUE(learnt_keys >= 0 && learnt_keys <= keys.size(0),
                    "contrastive_ce_backward: learnt_keys must be in [0, ", keys.size(0), "], got ", learnt_keys);
  const Tensor stat = stats.to(at::kFloat).contiguous(), coefficient = coefficients.to(at::kFloat).contiguous();
  const float *lse = stat.const_data_ptr<float>(), *c = coefficient.const_data_ptr<float>();
  const Setup setup(input, keys, ids, key_ids, instance, key_instance, private_keys, ignore_index, learnt_keys > 0,
                    [&](int64_t n) { return c[n] != 0 || c[N + n] != 0 || c[2 * N + n] != 0 || c[3 * N + n] != 0; });
  const Pairs& p = setup.pairs;
  const Loss loss = loss_of(temperature, hardness, margin_kind, margin);
  const int64_t learnt = setup.counted_below(learnt_keys), span = setup.span;
  const int64_t learnt_blocks = (learnt + p.K - 1) / p.K;
  const bool all_queries = p.query.count == N && p.key.count > 0, all_keys = learnt == learnt_keys && p.tiles > 0;
  const Tensor dx = !input_grad   ? at::empty({0}, input.options())
                    : all_queries ? at::empty({N, p.D}, input.options())
                                  : at::zeros({N, p.D}, input.options());
  const Tensor dk = all_keys ? at::empty({learnt_keys, p.D}, keys.options())
                             : at::zeros({learnt_keys, p.D}, keys.options());
  if (p.tiles == 0 || p.blocks == 0 || p.D == 0 || (!input_grad && learnt == 0)) return {dx, dk};

  const Tensor terms = at::zeros({TERMS, span}, at::kFloat);
  float* term = terms.mutable_data_ptr<float>();
  for (int64_t r = 0; r < p.query.count; ++r) {
    const int64_t n = p.query.index[r];
    for (const Term t : {A, B, C, H}) term[t * span + r] = c[t * N + n];
    term[LOG_POSITIVE * span + r] = (float)(lse[n] / std::log(2.0));
    term[LOG_NEGATIVE * span + r] = (float)(lse[2 * N + n] / std::log(2.0));
    term[LOG_HARD * span + r] = (float)(lse[3 * N + n] / std::log(2.0));
  }
  // Learnt keys in ranges whose dL/ds is kept, then all others at once.
  const int64_t most = std::max<int64_t>(1, KEPT_BYTES / (span * p.K * (int64_t)sizeof(float)));
  const int64_t per_range = std::min(most, learnt_blocks), others = p.blocks - learnt_blocks;
  const int64_t splits = setup.splits(std::max(per_range, input_grad ? others : 0), 1);
  const Tensor parts = at::zeros({input_grad ? splits : 0, span, p.Dp}, at::kFloat);
  const Tensor keep = at::empty({span * per_range * p.K}, at::kFloat);
  float *kept = keep.mutable_data_ptr<float>(), *part = parts.mutable_data_ptr<float>();
  const auto sweep = [&](int64_t first, int64_t blocks, bool kept_range) {
    each(p.tiles * splits, p.K * p.R, [&](int64_t task, float* own) {
      const int64_t tile = task / splits, split = task % splits, begin = blocks * split / splits;
      float* sums = input_grad ? part + split * span * p.Dp : nullptr;
      FASTREX_DISPATCH(query_gradient, p, loss, tile, first + begin, first + blocks * (split + 1) / splits, term, span,
                       kept_range ? kept + (tile * blocks + begin) * p.K * p.R : nullptr, sums, own);
    });
  };
  const float scale = (float)(1.0 / temperature);
  const Kind key_kind = kind_of(OP, keys), query_kind = kind_of(OP, input);
  char* dk_data = (char*)dk.mutable_data_ptr();
  for (int64_t block = 0; block < learnt_blocks; block += per_range) {
    const int64_t blocks = std::min(per_range, learnt_blocks - block), begin = block * p.K;
    const int64_t end = std::min(learnt, begin + blocks * p.K), chunk = baseline::CHUNK;
    sweep(block, blocks, true);
    each((end - begin + chunk - 1) / chunk, (chunk + 1) * p.Dp, [&](int64_t task, float* own) {
      FASTREX_DISPATCH(key_gradient, p, kept, begin, blocks * p.K, begin + task * chunk, end, scale, own, key_kind,
                       dk_data);
    });
  }
  if (!input_grad) return {dx, dk};
  if (others > 0) sweep(learnt_blocks, others, false);
  char* dx_data = (char*)dx.mutable_data_ptr();
  each(p.tiles, 2 * p.Dp, [&](int64_t tile, float* own) {
    FASTREX_DISPATCH(finish_queries, p, tile, splits, part, span, scale, own, query_kind, dx_data);
  });
  return {dx, dk};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  m.impl("contrastive_ce", forward);
  m.impl("contrastive_ce_backward", backward);
}

}  // namespace fastrex::contrastive_ce
