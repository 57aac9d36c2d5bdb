// Cosine cross-entropy on a CPU: what to allocate, in which order the tasks of cosine_ce.inl run, and on how many rows
// at a time. See there for the formulas.
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"
#include "cosine_ce.h"

namespace fastrex::cosine_ce {

constexpr int64_t MAX_R = 192;
constexpr int64_t KEPT_BYTES = 48 << 20;  // of e between the two gradients
constexpr int64_t TASKS = 16;             // of a pass at least, where rows are few: then the classes are split

#define FASTREX_LOOPS "cosine_ce.inl"
#include "isa.h"

#include "cosine_ce_setup.h"

namespace {

// All rows over all classes. With ``dw`` the classes are taken in ranges whose e of a few tiles can be kept; the
// forward, which knows no lse, must see all classes at once: ``fits``.
void run(Setup& setup, bool want_dw, const Tensor& dw) {
  Job& job = setup.job;
  const int64_t tiles = setup.tiles;
  const bool low = setup.low;
  const bool given = job.given != nullptr;
  if (job.N == 0) return;
  int64_t per_pass = std::min<int64_t>(tiles, 256), range = job.C;
  if (want_dw) {
    per_pass = std::min(tiles, std::max<int64_t>(1, KEPT_BYTES / (job.C * setup.kept_per_class())));
    if (!setup.fits()) {
      per_pass = std::min<int64_t>(tiles, 4);
      range = std::max<int64_t>(job.K, KEPT_BYTES / (per_pass * setup.kept_per_class()) / job.K * job.K);
    }
  }
  const int64_t blocks = (range + job.K - 1) / job.K, ranges = (job.C + range - 1) / range;
  // Every split sums its own gradient of the rows, which costs as much as some hundred classes.
  const int64_t least = (per_pass < 8 ? 512 : 2048) / job.K;
  job.S = std::max<int64_t>(1, std::min((TASKS + per_pass - 1) / per_pass, blocks / least));
  const bool partial = job.S > 1 || (given && ranges > 1);
  job.span = given && ranges > 1 ? job.N : per_pass * job.R;
  Tensor parts, dx, block_m, keep, packed, accumulated;
  const int64_t step = job.S * job.span;
  parts = at::empty({5, step}, at::kFloat);
  float* p = parts.mutable_data_ptr<float>();
  job.part_m = p, job.part_s = p + step, job.part_count = (int32_t*)(p + 2 * step), job.part_along = p + 3 * step;
  job.part_soft = job.q.data ? p + 4 * step : nullptr;
  if (job.want_dx && partial) {
    dx = at::empty({job.S, job.span, setup.vectors()}, at::kFloat);
    job.partial_dx = dx.mutable_data_ptr<float>();
  } else if (partial) {
    dx = at::empty({1}, at::kFloat);  // says that no task finishes a tile
    job.partial_dx = dx.mutable_data_ptr<float>();
  }
  if (want_dw) {
    keep = at::empty({per_pass * range * setup.kept_per_class()}, at::kByte);
    packed = at::empty({per_pass * FASTREX_DISPATCH(packed_bytes, job, low)}, at::kByte);
    job.keep = (char*)keep.mutable_data_ptr(), job.packed_rows = (char*)packed.mutable_data_ptr();
    job.dw = (char*)dw.mutable_data_ptr(), job.dw_kind = kind_of(OP, dw);
    if (per_pass < tiles && job.dw_kind != Kind::f32) accumulated = at::empty({range, job.D}, at::kFloat);
    if (job.online && !given) {
      block_m = at::empty({blocks, job.span}, at::kFloat);
      job.block_m = block_m.mutable_data_ptr<float>();
    }
    setup.sum_of_rows();
  }
  const auto finish_pass = [&] {
    setup.each((job.row1 - job.row0 + job.R - 1) / job.R, [&](int64_t tile, float* own) {
      const int64_t place = job.row0 + tile * job.R - job.base;
      const float* p = job.partial_dx + (job.want_dx ? place * setup.vectors() : 0);
      if (low) FASTREX_DISPATCH(finish<true>, job, tile, p, job.span * setup.vectors(), own);
      else FASTREX_DISPATCH(finish<false>, job, tile, p, job.span * setup.vectors(), own);
    });
  };
  for (job.class0 = 0; job.class0 < job.C; job.class0 += range) {
    job.class1 = std::min(job.C, job.class0 + range);
    job.add = job.class0 > 0;
    if (accumulated.defined()) job.accumulated = accumulated.mutable_data_ptr<float>();
    else if (want_dw && job.dw_kind == Kind::f32) job.accumulated = dw.mutable_data_ptr<float>() + job.class0 * job.D;
    for (int64_t tile0 = 0; tile0 < tiles; tile0 += per_pass) {
      job.row0 = tile0 * job.R, job.row1 = std::min(job.N, (tile0 + per_pass) * job.R);
      job.base = given && ranges > 1 ? 0 : job.row0;
      const int64_t count = (job.row1 - job.row0 + job.R - 1) / job.R;
      setup.each(count * job.S, [&](int64_t task, float* own) {
        if (low) FASTREX_DISPATCH(sweep<true>, job, task / job.S, task % job.S, own);
        else FASTREX_DISPATCH(sweep<false>, job, task / job.S, task % job.S, own);
      });
      if (job.S > 1 && (!given || (job.want_dx && ranges == 1))) finish_pass();
      if (!want_dw) continue;
      job.first = tile0 == 0, job.last = tile0 + per_pass >= tiles;
      setup.each(count, [&](int64_t tile, float* own) {
        if (low) FASTREX_DISPATCH(pack_tile<true>, job, tile, own);
        else FASTREX_DISPATCH(pack_tile<false>, job, tile, own);
      });
      const int64_t chunks = (job.class1 - job.class0 + baseline::CHUNK - 1) / baseline::CHUNK;
      setup.each(chunks, [&](int64_t chunk, float* own) {
        if (low) FASTREX_DISPATCH(class_gradient<true>, job, chunk, own);
        else FASTREX_DISPATCH(class_gradient<false>, job, chunk, own);
      });
    }
  }
  if (given && ranges > 1 && job.want_dx) {
    job.row0 = 0, job.row1 = job.N;
    finish_pass();
  }
  job.keep = nullptr, job.partial_dx = nullptr;
}

void want_input(Setup& setup, const Tensor& dx, const Tensor& radial) {
  setup.job.want_dx = true;
  setup.job.dx = (char*)dx.mutable_data_ptr(), setup.job.dx_kind = kind_of(OP, dx);
  setup.job.radial = radial.mutable_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& weight, const Tensor& target, Optional temperature, double temperature_value,
    Optional class_weight, Optional threshold, int64_t first_class, int64_t num_classes, int64_t ignore_index,
    double label_smoothing, int64_t reduction, at::ScalarType compute, bool input_grad, bool weight_grad) {
  Setup setup(input, weight, target, temperature, temperature_value, class_weight, first_class, num_classes,
              ignore_index, label_smoothing, compute);
  Job& job = setup.job;
  const int64_t N = job.N, C = job.C, D = job.D;
  const Tensor lse = at::empty({N}, at::kFloat), target_logit = at::empty({N}, at::kFloat);
  const Tensor rank = at::empty({N}, at::kLong), radial = at::zeros({N}, at::kFloat);
  const auto dx_type = input.scalar_type() == at::kHalf ? at::kFloat : input.scalar_type();
  const Tensor grad_input = at::empty({input_grad ? N : 0, D}, at::TensorOptions(dx_type));
  Tensor grad_weight = at::empty({weight_grad ? C : 0, D}, at::kFloat);
  job.lse = lse.mutable_data_ptr<float>(), job.target_logit = target_logit.mutable_data_ptr<float>();
  job.rank = rank.mutable_data_ptr<int64_t>();
  Tensor thresholds;
  if (threshold) {
    thresholds = threshold->to(at::kFloat).contiguous();
    job.threshold = thresholds.const_data_ptr<float>();
  }
  if (weight_grad && N == 0) grad_weight.zero_();
  const bool soft = job.q.data != nullptr, at_once = !soft && (!weight_grad || setup.fits());
  if (input_grad && !soft) want_input(setup, grad_input, radial);
  run(setup, weight_grad && at_once, grad_weight);
  const bool again_x = input_grad && soft, again_w = weight_grad && !at_once;
  if (again_x || again_w) {
    job.given = lse.const_data_ptr<float>(), job.want_dx = false;
    for (int64_t n = 0; n < N; ++n) job.factor[n] = setup.known[n] * job.inv_tau * job.inv_x[n];
    if (again_x) want_input(setup, grad_input, radial);
    run(setup, again_w, grad_weight);
  }

  Tensor loss = at::empty({N}, at::kFloat);
  float* row_loss = loss.mutable_data_ptr<float>();
  double sum = 0, divisor = 0;
  for (int64_t n = 0; n < N; ++n) {
    const float value = job.total[n] * job.lse[n] - job.target_logit[n];
    row_loss[n] = setup.bad[n] != 0.0f ? NAN : setup.known[n] != 0.0f ? value : 0.0f;
    sum += row_loss[n], divisor += setup.factors[n];
  }
  Tensor scale = at::empty({}, at::kFloat);
  // Without a row that counts the mean is NaN, and no row has a gradient.
  *scale.mutable_data_ptr<float>() = reduction != 1 ? 1.0f : divisor == 0.0 ? 0.0f : (float)(1.0 / divisor);
  if (reduction != 0) {
    loss = at::empty({}, at::kFloat);
    *loss.mutable_data_ptr<float>() = (float)(reduction == 1 ? sum / divisor : sum);
  }
  return {loss, scale, lse, rank, target_logit, input_grad ? grad_input : at::empty({0}, at::TensorOptions(dx_type)),
          weight_grad ? grad_weight : at::empty({0}, at::kFloat), radial};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& input, const Tensor& weight, const Tensor& target, Optional temperature, double temperature_value,
    Optional class_weight, int64_t first_class, int64_t num_classes, int64_t ignore_index, double label_smoothing,
    at::ScalarType compute, const Tensor& lse, const Tensor& grad_rows, Optional uniform_grad_weight, bool input_grad,
    bool weight_grad) {
  const Tensor grads = grad_rows.to(at::kFloat).contiguous(), sums = lse.to(at::kFloat).contiguous();
  const float* grad = grads.const_data_ptr<float>();
  const int64_t N = input.size(0), C = weight.size(0), D = input.size(1);
  Tensor dx = at::empty({input_grad ? N : 0, D}, input.options()), dw;
  const Tensor radial = at::zeros({N}, at::kFloat);
  if (weight_grad && uniform_grad_weight && N > 0) {
    bool same = true;
    for (int64_t n = 1; n < N; ++n) same &= grad[n] == grad[0];
    if (same) dw = uniform_grad_weight->mul(grad[0]).to(weight.scalar_type());
  }
  const bool weights = weight_grad && !dw.defined();
  if (!dw.defined()) dw = at::empty({weight_grad ? C : 0, D}, weight.options());
  if (weights && N == 0) dw.zero_();
  if (weights || input_grad) {
    Setup setup(input, weight, target, temperature, temperature_value, class_weight, first_class, num_classes,
                ignore_index, label_smoothing, compute);
    Job& job = setup.job;
    job.given = sums.const_data_ptr<float>(), job.grad = grad;
    for (int64_t n = 0; n < N; ++n) job.factor[n] = setup.known[n] * job.inv_tau * job.inv_x[n] * grad[n];
    if (input_grad) want_input(setup, dx, radial);
    run(setup, weights, dw);
  }
  if (!input_grad) dx = at::empty({0}, input.options());
  if (!weight_grad) dw = at::empty({0}, weight.options());
  return {dx, dw, radial};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  m.impl("cosine_ce", forward);
  m.impl("cosine_ce_backward", backward);
}

}  // namespace fastrex::cosine_ce
