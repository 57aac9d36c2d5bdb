// batch_norm_act on CPUs: statistics, normalisation with an optional sum and ReLU, and their gradients.
//
//   y  = relu((x - mean) * scale + shift + residual),   scale = weight / sqrt(var + eps),   g = dy where y > 0, else 0
//   dx = scale * (g - sum(g) / n - (x - mean) * sum(g * (x - mean)) / (n * (var + eps)))
//
// Channels lie side by side in memory, so a batch is a flat array that is read as `rows` of `width` elements: `fold`
// rows of C channels side by side, where width = lcm(C, BLOCK). Every block of BLOCK elements then has its own fixed
// channels and its own bytes of the mask, whatever C is, and only the end of the array is ragged.
//
// Rows are cut into segments by the shape alone, and every segment sums in chunks of CHUNK rows in fp32 and over chunks
// in fp64: the bits do not depend on the number of threads. The mean is used as an fp32 part and a rest that goes into
// `shift`, so that x - mean loses nothing where the mean is large. The second pass of each direction visits the
// segments backwards, the last ones read being still in the cache.
#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex::batch_norm_act {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t BLOCK = 32, CHUNK = 64, SEGMENTS = 64;

// How the flat array is cut. `counts` of a segment: the rows that its columns j * C ... (j + 1) * C have.
struct Shape {
  int64_t total, channels, fold, width, rows, segment_rows, segments;

  explicit Shape(const Tensor& input) {
    total = input.numel();
    channels = input.size(1);
    fold = channels ? BLOCK / std::gcd(channels, BLOCK) : 1;
    width = channels * fold;
    rows = total ? (total + width - 1) / width : 0;
    int64_t wanted = (rows + SEGMENTS - 1) / SEGMENTS;
    segment_rows = std::max((wanted + CHUNK - 1) / CHUNK, int64_t{1}) * CHUNK;
    segments = (rows + segment_rows - 1) / segment_rows;
  }
  int64_t samples() const { return channels ? total / channels : 0; }
  int64_t end(int64_t segment) const { return std::min((segment + 1) * segment_rows, rows); }
  int64_t count(int64_t first, int64_t last, int64_t j) const {
    bool lacks = last == rows && samples() % fold != 0 && j >= samples() % fold;
    return last - first - (lacks ? 1 : 0);
  }
};

enum class Gate { none, recomputed, stored };  // how the backward knows where the ReLU let through

template <typename T>
struct Forward {
  const T *x, *residual;
  const float *mean, *scale, *shift;
  T* y;
  uint8_t* mask;
  bool relu, stream;
};

template <typename T>
struct Backward {
  const T *grad, *x;
  const uint8_t* mask;
  const float *mean, *scale, *shift, *slope, *offset;
  T *dx, *dresidual;
  Gate gate;
  bool batch, stream;
};

// Results in (0, limit] round to zero in T, where torch's ReLU has no gradient: half of T's smallest number.
template <typename T>
constexpr float limit_of = 0.0f;
template <>
constexpr float limit_of<c10::BFloat16> = 0x1p-134f;
template <>
constexpr float limit_of<c10::Half> = 0x1p-25f;

#define FASTREX_LOOPS "batch_norm_act.inl"
#include "isa.h"

namespace {

template <typename F>
void by_dtype(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(c10::BFloat16{});
    case at::kHalf: return f(c10::Half{});
    default: TORCH_CHECK(false, "batch_norm_act: the C++ operators take fp32, bf16 and fp16, got ", t.scalar_type());
  }
}

template <typename T>
const T* pointer(const OptTensor& t) {
  return t.has_value() && t->numel() ? t->const_data_ptr<T>() : nullptr;
}

Tensor doubles(const Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kDouble));
}

// A pass over more than the last-level cache holds writes past it: then the lines written are not read first.
bool streams(int64_t bytes) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t size = 0;
#endif
  return bytes > (size > 0 ? size : int64_t{32} << 20);
}

// Runs `body(segment)` for all segments, backwards within each thread's share where `reverse`.
template <typename F>
void each_segment(const Shape& shape, bool reverse, F body) {
  fastrex::parallel_for(0, shape.segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(reverse ? begin + end - 1 - i : i);
  });
}

// Per-channel numbers of a call as the loops read them, fp32 and `fold` times side by side.
struct Vectors {
  int64_t width;
  std::vector<float> values;

  explicit Vectors(const Shape& shape) : width(shape.width), values(5 * shape.width) {}
  float* mean() { return values.data(); }
  float* scale() { return mean() + width; }
  float* shift() { return mean() + 2 * width; }
  float* slope() { return mean() + 3 * width; }
  float* offset() { return mean() + 4 * width; }
};

void prepare(const Shape& shape, Vectors& to, const Tensor& mean, const Tensor& var, const Tensor& weight,
             const Tensor& bias, double eps) {
  const Tensor m = mean.to(at::kDouble).contiguous(), v = var.to(at::kDouble).contiguous();
  const Tensor w = weight.contiguous(), b = bias.contiguous();
  FASTREX_DISPATCH(scale_and_shift, shape, m.const_data_ptr<double>(), v.const_data_ptr<double>(),
                   w.const_data_ptr<float>(), b.const_data_ptr<float>(), eps, to.mean(), to.scale(), to.shift());
}

// Joins the (count, mean, centred second moment) of `counts.size()` partial batches, `stride` doubles apart.
void join(int64_t channels, const std::vector<double>& counts, const double* means, const double* moments,
          int64_t stride, double* mean, double* moment) {
  fastrex::parallel_for(0, (channels + BLOCK - 1) / BLOCK, 1 + 1024 / (1 + static_cast<int64_t>(counts.size())),
                   [&](int64_t begin, int64_t end) {
                     int64_t first = begin * BLOCK, last = std::min(end * BLOCK, channels);
                     FASTREX_DISPATCH(join_moments, first, last, counts.data(), static_cast<int64_t>(counts.size()),
                                      means, moments, stride, mean, moment);
                   });
}

// Mean and centred second moment per channel, fp64. A segment gives `fold` partial batches, side by side.
void statistics(const Shape& shape, const Tensor& input, double* mean, double* moment) {
  const int64_t width = shape.width;
  Tensor partial = doubles(input, {2, shape.segments, width});
  double *means = partial.mutable_data_ptr<double>(), *moments = means + shape.segments * width;
  by_dtype(input, [&](auto tag) {
    const auto* x = input.const_data_ptr<decltype(tag)>();
    each_segment(shape, false, [&](int64_t s) {
      std::vector<float> work(3 * width);
      FASTREX_DISPATCH(segment_moments, shape, x, s * shape.segment_rows, shape.end(s), work.data(),
                       means + s * width, moments + s * width);
    });
  });
  std::vector<double> counts;
  for (int64_t s = 0; s < shape.segments; ++s)
    for (int64_t j = 0; j < shape.fold; ++j)
      counts.push_back(static_cast<double>(shape.count(s * shape.segment_rows, shape.end(s), j)));
  join(shape.channels, counts, means, moments, shape.channels, mean, moment);
}

std::tuple<Tensor, Tensor> apply(const Shape& shape, const Tensor& input, const Tensor& mean, const Tensor& var,
                                 const Tensor& weight, const Tensor& bias, const OptTensor& residual, bool relu,
                                 double eps, bool save_mask) {
  Tensor output = at::empty_like(input);
  const bool stored = relu && residual.has_value() && save_mask;
  Tensor mask = at::empty({stored ? (shape.total + 7) / 8 : 0}, input.options().dtype(at::kByte));
  Vectors to(shape);
  prepare(shape, to, mean, var, weight, bias, eps);
  by_dtype(input, [&](auto tag) {
    using T = decltype(tag);
    Forward<T> job{input.const_data_ptr<T>(), pointer<T>(residual), to.mean(), to.scale(), to.shift(),
                   output.mutable_data_ptr<T>(), stored ? mask.mutable_data_ptr<uint8_t>() : nullptr, relu,
                   streams(input.nbytes() * (residual.has_value() ? 3 : 2))};
    each_segment(shape, true, [&](int64_t s) {
      FASTREX_DISPATCH(forward_rows, shape, job, s * shape.segment_rows, shape.end(s));
      if (job.stream) finish_stores();
    });
  });
  return {output, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                                  const OptTensor& residual, bool relu, double eps, bool save_mask) {
  Shape shape(input);
  Tensor mean = doubles(input, {shape.channels}), var = doubles(input, {shape.channels});
  double* moment = var.mutable_data_ptr<double>();
  statistics(shape, input, mean.mutable_data_ptr<double>(), moment);
  for (int64_t c = 0; c < shape.channels; ++c) moment[c] /= static_cast<double>(shape.samples());
  auto [output, mask] = apply(shape, input, mean, var, weight, bias, residual, relu, eps, save_mask);
  return {output, mean, var, mask};
}

Tensor bn_stats(const Tensor& input) {
  Shape shape(input);
  Tensor slot = doubles(input, {1 + 2 * shape.channels});
  double* to = slot.mutable_data_ptr<double>();
  to[0] = static_cast<double>(shape.samples());
  statistics(shape, input, to + 1, to + 1 + shape.channels);
  return slot;
}

std::tuple<Tensor, Tensor, Tensor> bn_join(const Tensor& slots) {
  const int64_t ranks = slots.size(0), stride = slots.size(1), channels = (stride - 1) / 2;
  const Tensor from = slots.contiguous();
  const double* data = from.const_data_ptr<double>();
  Tensor mean = doubles(slots, {channels}), var = doubles(slots, {channels}), count = doubles(slots, {});
  std::vector<double> counts;
  for (int64_t i = 0; i < ranks; ++i) counts.push_back(data[i * stride]);
  const double n = std::accumulate(counts.begin(), counts.end(), 0.0);
  double* moment = var.mutable_data_ptr<double>();
  join(channels, counts, data + 1, data + 1 + channels, stride, mean.mutable_data_ptr<double>(), moment);
  for (int64_t c = 0; c < channels; ++c) moment[c] /= n;
  *count.mutable_data_ptr<double>() = n;
  return {mean, var, count};
}

std::tuple<Tensor, Tensor> bn_apply(const Tensor& input, const Tensor& mean, const Tensor& var, const Tensor& weight,
                                    const Tensor& bias, const OptTensor& residual, bool relu, double eps,
                                    bool save_mask) {
  return apply(Shape(input), input, mean, var, weight, bias, residual, relu, eps, save_mask);
}

template <typename T>
Backward<T> backward_job(const Tensor& grad, const Tensor& input, const Tensor& mask, bool relu, Vectors& to) {
  const uint8_t* bits = mask.numel() ? mask.const_data_ptr<uint8_t>() : nullptr;
  const Gate gate = !relu ? Gate::none : bits ? Gate::stored : Gate::recomputed;
  return {grad.const_data_ptr<T>(), input.const_data_ptr<T>(), bits, to.mean(), to.scale(), to.shift(), to.slope(),
          to.offset(), nullptr, nullptr, gate, true, false};
}

// sum(g) and sum(g * (x - mean)) per channel as [2, C] fp64, and the gradients of weight and bias that follow.
std::tuple<Tensor, Tensor, Tensor> sums_of(const Shape& shape, const Tensor& grad, const Tensor& input,
                                           const Tensor& mask, const Tensor& mean, const Tensor& var, bool relu,
                                           double eps, Vectors& to) {
  const int64_t width = shape.width;
  Tensor partial = doubles(input, {2, shape.segments, width});
  double *left = partial.mutable_data_ptr<double>(), *right = left + shape.segments * width;
  by_dtype(input, [&](auto tag) {
    auto job = backward_job<decltype(tag)>(grad, input, mask, relu, to);
    each_segment(shape, false, [&](int64_t s) {
      std::vector<float> work(2 * width);
      FASTREX_DISPATCH(segment_sums, shape, job, s * shape.segment_rows, shape.end(s), work.data(), left + s * width,
                       right + s * width);
    });
  });
  Tensor sums = doubles(input, {2, shape.channels});
  Tensor grad_weight = at::empty({shape.channels}, input.options().dtype(at::kFloat));
  Tensor grad_bias = at::empty_like(grad_weight);
  const Tensor m = mean.to(at::kDouble).contiguous(), v = var.to(at::kDouble).contiguous();
  FASTREX_DISPATCH(join_sums, shape, left, right, m.const_data_ptr<double>(), v.const_data_ptr<double>(), eps,
                   sums.mutable_data_ptr<double>(), grad_weight.mutable_data_ptr<float>(),
                   grad_bias.mutable_data_ptr<float>());
  return {sums, grad_weight, grad_bias};
}

// dx and the gradient of the residual; `batch`: the statistics depend on x.
std::tuple<Tensor, Tensor> inputs_of(const Shape& shape, const Tensor& grad, const Tensor& input, const Tensor& mask,
                                     const Tensor& mean, const Tensor& var, const Tensor* sums, double count, bool relu,
                                     double eps, bool want_input, bool want_residual, Vectors& to) {
  const bool split = want_residual && relu;
  // Nobody asks for the residual's gradient alone: then dx is computed for nothing.
  Tensor dx = want_input || split ? at::empty_like(input) : at::empty({0}, input.options());
  Tensor dresidual = split ? at::empty_like(input) : at::empty({0}, input.options());
  if (sums) {
    const Tensor m = mean.contiguous(), v = var.contiguous();
    FASTREX_DISPATCH(slope_and_offset, shape, m.const_data_ptr<double>(), v.const_data_ptr<double>(),
                     sums->const_data_ptr<double>(), count, eps, to.scale(), to.slope(), to.offset());
  }
  if (!want_input && !split) return {dx, dresidual};
  by_dtype(input, [&](auto tag) {
    using T = decltype(tag);
    auto job = backward_job<T>(grad, input, mask, relu, to);
    job.dx = dx.mutable_data_ptr<T>();
    job.dresidual = split ? dresidual.mutable_data_ptr<T>() : nullptr;
    job.batch = sums != nullptr;
    job.stream = streams(input.nbytes() * (split ? 4 : 3));
    each_segment(shape, true, [&](int64_t s) {
      FASTREX_DISPATCH(backward_rows, shape, job, s * shape.segment_rows, shape.end(s));
      if (job.stream) finish_stores();
    });
  });
  if (!want_input) dx = at::empty({0}, input.options());
  return {dx, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_backward(const Tensor& grad, const Tensor& input, const Tensor& mask,
                                                       const Tensor& mean, const Tensor& var, const Tensor& weight,
                                                       const Tensor& bias, bool relu, double eps, bool batch,
                                                       bool want_input, bool want_residual) {
  Shape shape(input);
  Vectors to(shape);
  prepare(shape, to, mean, var, weight, bias, eps);
  auto [sums, grad_weight, grad_bias] = sums_of(shape, grad, input, mask, mean, var, relu, eps, to);
  auto [dx, dresidual] = inputs_of(shape, grad, input, mask, mean, var, batch ? &sums : nullptr,
                                   static_cast<double>(shape.samples()), relu, eps, want_input, want_residual, to);
  return {dx, grad_weight, grad_bias, dresidual};
}

std::tuple<Tensor, Tensor, Tensor> bn_backward_sums(const Tensor& grad, const Tensor& input, const Tensor& mask,
                                                    const Tensor& mean, const Tensor& var, const Tensor& weight,
                                                    const Tensor& bias, bool relu, double eps) {
  Shape shape(input);
  Vectors to(shape);
  prepare(shape, to, mean, var, weight, bias, eps);
  return sums_of(shape, grad, input, mask, mean, var, relu, eps, to);
}

std::tuple<Tensor, Tensor> bn_backward_apply(const Tensor& grad, const Tensor& input, const Tensor& mask,
                                             const Tensor& mean, const Tensor& var, const Tensor& weight,
                                             const Tensor& bias, const Tensor& sums, const Tensor& count, bool relu,
                                             double eps, bool want_residual) {
  Shape shape(input);
  Vectors to(shape);
  prepare(shape, to, mean, var, weight, bias, eps);
  const Tensor own = sums.contiguous();
  return inputs_of(shape, grad, input, mask, mean, var, &own, *count.const_data_ptr<double>(), relu, eps, true,
                   want_residual, to);
}

// running = (1 - momentum) * running + momentum * new, with the unbiased variance.
void bn_track_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
               const OptTensor& count, int64_t rows, double momentum) {
  const double n = count.has_value() ? *count->const_data_ptr<double>() : static_cast<double>(rows);
  const double *m = mean.const_data_ptr<double>(), *v = var.const_data_ptr<double>();
  by_dtype(running_mean, [&](auto tag) {
    using T = decltype(tag);
    auto step = [&](const Tensor& running, const double* value, double factor) {
      T* to = running.mutable_data_ptr<T>();
      const int64_t stride = running.stride(0);
      for (int64_t c = 0; c < running.numel(); ++c) {
        double old = static_cast<float>(to[c * stride]);
        to[c * stride] = static_cast<float>((1.0 - momentum) * old + momentum * factor * value[c]);
      }
      running.unsafeGetTensorImpl()->bump_version();
    };
    step(running_mean, m, 1.0);
    step(running_var, v, n / (n - 1.0));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) {
  m.impl("bn_act", bn_act);
  m.impl("bn_stats", bn_stats);
  m.impl("bn_join", bn_join);
  m.impl("bn_apply", bn_apply);
  m.impl("bn_backward", bn_backward);
  m.impl("bn_backward_sums", bn_backward_sums);
  m.impl("bn_backward_apply", bn_backward_apply);
  m.impl("bn_track_", bn_track_);
}

}  // namespace fastrex::batch_norm_act
