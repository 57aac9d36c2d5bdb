// sgd_ema_: for every value of every tensor, in one pass,
//
//   b = momentum * b + (g * inv_scale + decay * p);   p = p - lr * b;   e = e + (1 - ema_momentum) * (p - e)
//
// and rounded copies of p and e. Four values are read and three written, each once. Threads share the values of all
// tensors evenly, not the tensors: the largest of a ResNet50 has a tenth of them. No value depends on another one.
#include "common.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrex::sgd_ema {

struct Step {
  float lr, momentum, rate, inv_scale;  // rate = 1 - ema_momentum
  bool near;                            // rate < 1/2
};

#define FASTREX_LOOPS "sgd_ema.inl"
#include "isa.h"

using at::ScalarType;
using at::Tensor;

constexpr int64_t GRAIN = 32 * 1024;  // values that are worth another thread
constexpr int64_t BLOCK = 1024;       // values between the step and their rounded copies: four streams stay in 16 KiB

// A tensor and what belongs to it, as flat memory in one layout.
struct Entry {
  int64_t end;  // values of all entries up to this one
  int64_t size;
  float decay;
  float *param, *buffer, *ema;
  const void* grad;
  void *param_copy, *ema_copy;
  ScalarType grad_type, param_copy_type, ema_copy_type;
};

std::string shape(const Tensor& x) {
  std::ostringstream out;
  out << "(";
  for (int64_t d = 0; d < x.dim(); ++d) out << (d ? ", " : "") << x.size(d);
  out << (x.dim() == 1 ? ",)" : ")");
  return out.str();
}

// Whether both hold their values in the same order; the stride of an axis of length 1 says nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Tensors of another layout than the parameter's are worked on in a copy that has it.
class Layouts {
 public:
  void* writable(const Tensor& x, const Tensor& like) {
    if (same_layout(x, like) && like.is_non_overlapping_and_dense()) return x.mutable_data_ptr();
    Tensor copy = at::empty_like(like, x.options());
    copy.copy_(x);
    borrowed_.emplace_back(x, copy);
    return copy.mutable_data_ptr();
  }
  const void* readable(const Tensor& x, const Tensor& like) {
    if (same_layout(x, like) && like.is_non_overlapping_and_dense()) return x.const_data_ptr();
    kept_.push_back(at::empty_like(like, x.options()).copy_(x));
    return kept_.back().const_data_ptr();
  }
  void give_back() {
    for (auto& [owner, copy] : borrowed_) owner.copy_(copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> borrowed_;
  std::vector<Tensor> kept_;
};

void check(const char* name, int64_t index, const Tensor& x, const Tensor& param, bool low, bool full) {
  TORCH_CHECK_VALUE(x.sizes() == param.sizes(), "sgd_ema_: ", name, "[", index, "] must have the parameter's shape ",
                    shape(param), ", got ", shape(x));
  const ScalarType type = x.scalar_type();
  TORCH_CHECK_VALUE((full && type == at::kFloat) || (low && (type == at::kBFloat16 || type == at::kHalf)), "sgd_ema_: ",
                    name, "[", index, "] must be ", full ? "float32" : "", full && low ? ", " : "",
                    low ? "bfloat16 or float16" : "", ", got ", type);
  TORCH_CHECK_VALUE(x.is_cpu(), "sgd_ema_: ", name, "[", index, "] must be on cpu like the parameter, got ", x.device());
}

template <bool EMA>
void stretch(const Step& step, const Entry& x, int64_t from, int64_t size) {
  float* ema = EMA ? x.ema + from : nullptr;
  float *param = x.param + from, *buffer = x.buffer + from;
  switch (x.grad_type) {
    case at::kFloat: {
      const float* grad = static_cast<const float*>(x.grad) + from;
      return FASTREX_DISPATCH(stretch<EMA>, step, x.decay, size, grad, param, buffer, ema);
    }
    case at::kBFloat16: {
      const c10::BFloat16* grad = static_cast<const c10::BFloat16*>(x.grad) + from;
      return FASTREX_DISPATCH(stretch<EMA>, step, x.decay, size, grad, param, buffer, ema);
    }
    default: {
      const c10::Half* grad = static_cast<const c10::Half*>(x.grad) + from;
      return FASTREX_DISPATCH(stretch<EMA>, step, x.decay, size, grad, param, buffer, ema);
    }
  }
}

void round_to(void* copy, ScalarType type, const float* source, int64_t from, int64_t size) {
  if (!copy) return;
  if (type == at::kBFloat16)
    FASTREX_DISPATCH(round_to, size, source + from, static_cast<c10::BFloat16*>(copy) + from);
  else
    FASTREX_DISPATCH(round_to, size, source + from, static_cast<c10::Half*>(copy) + from);
}

// The values [from, to) of one entry.
void advance(const Step& step, const Entry& x, int64_t from, int64_t to) {
  const int64_t block = x.param_copy || x.ema_copy ? BLOCK : to - from;
  for (; from < to; from += block) {
    const int64_t size = std::min(block, to - from);
    x.ema ? stretch<true>(step, x, from, size) : stretch<false>(step, x, from, size);
    round_to(x.param_copy, x.param_copy_type, x.param, from, size);
    round_to(x.ema_copy, x.ema_copy_type, x.ema, from, size);
  }
}

double number(const std::optional<Tensor>& x, double otherwise) { return x ? x->item().toDouble() : otherwise; }

void sgd_ema_(at::TensorList params, at::TensorList grads, at::TensorList buffers, at::TensorList emas,
              at::IntArrayRef ema_index, at::TensorList param_copies, at::IntArrayRef param_copy_index,
              at::TensorList ema_copies, at::IntArrayRef ema_copy_index, at::ArrayRef<double> decay, const Tensor& lr,
              double momentum, const std::optional<Tensor>& momentum_scalar, double ema_momentum,
              const std::optional<Tensor>& ema_momentum_scalar, const std::optional<Tensor>& inv_scale,
              const std::optional<Tensor>& skip) {
  const auto given = [](at::TensorList list, at::IntArrayRef index, size_t i) -> const Tensor* {
    return i < index.size() && index[i] >= 0 ? &list[index[i]] : nullptr;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    check("params", i, params[i], params[i], false, true);
    check("grads", i, grads[i], params[i], true, true);
    check("momentum_buffers", i, buffers[i], params[i], false, true);
    if (const Tensor* x = given(emas, ema_index, i)) check("ema_params", i, *x, params[i], false, true);
    if (const Tensor* x = given(param_copies, param_copy_index, i)) check("param_copies", i, *x, params[i], true, false);
    if (const Tensor* x = given(ema_copies, ema_copy_index, i)) check("ema_copies", i, *x, params[i], true, false);
  }
  if (skip && skip->item().toDouble() != 0) return;
  Layouts layouts;
  std::vector<Entry> entries;
  entries.reserve(params.size());
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    if (!param.numel()) continue;
    const Tensor *ema = given(emas, ema_index, i), *param_copy = given(param_copies, param_copy_index, i),
                 *ema_copy = given(ema_copies, ema_copy_index, i);
    Entry x{};
    x.size = param.numel();
    x.end = total += x.size;
    x.decay = static_cast<float>(decay[i]);
    x.grad_type = grads[i].scalar_type();
    x.param = static_cast<float*>(layouts.writable(param, param));
    x.grad = layouts.readable(grads[i], param);
    x.buffer = static_cast<float*>(layouts.writable(buffers[i], param));
    if (ema) x.ema = static_cast<float*>(layouts.writable(*ema, param));
    if (param_copy) {
      x.param_copy_type = param_copy->scalar_type();
      x.param_copy = layouts.writable(*param_copy, param);
    }
    if (ema && ema_copy) {
      x.ema_copy_type = ema_copy->scalar_type();
      x.ema_copy = layouts.writable(*ema_copy, param);
    }
    entries.push_back(x);
  }
  Step step{};
  step.lr = static_cast<float>(number(lr, 0));
  step.momentum = static_cast<float>(number(momentum_scalar, momentum));
  step.rate = static_cast<float>(1 - number(ema_momentum_scalar, ema_momentum));
  step.inv_scale = static_cast<float>(number(inv_scale, 1));
  step.near = step.rate < 0.5f;
  fastrex::parallel_for(0, total, GRAIN, [&](int64_t begin, int64_t end) {
    auto x = std::upper_bound(entries.begin(), entries.end(), begin,
                              [](int64_t value, const Entry& entry) { return value < entry.end; });
    for (; x != entries.end() && x->end - x->size < end; ++x) {
      const int64_t start = x->end - x->size;
      advance(step, *x, std::max<int64_t>(0, begin - start), std::min(x->size, end - start));
    }
    finish_stores();
  });
  layouts.give_back();
  // Autograd then refuses a backward through values that were saved before this step, as after torch's own in-place ops.
  for (const at::TensorList& written : {params, buffers, emas, param_copies, ema_copies})
    for (const Tensor& x : written)
      if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
}

}  // namespace fastrex::sgd_ema

TORCH_LIBRARY_IMPL(fastrex, CPU, m) { m.impl("sgd_ema_", fastrex::sgd_ema::sgd_ema_); }
