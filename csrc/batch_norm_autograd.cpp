// batch_norm_act in training as autograd sees it, in C++: its node in the graph costs no Python (see conv_autograd.cpp).
//
// Statistics of this process's batch only; over a group Python joins them.
#include "common.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

namespace fastrex::batch_norm_act {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Act = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Act act(const Tensor& input, const Tensor& weight, const Tensor& bias, const OptTensor& residual, bool relu, double eps,
        bool save_mask) {
  static const auto call =
      operation<Act(const Tensor&, const Tensor&, const Tensor&, const OptTensor&, bool, double, bool)>(
          "fastrex::bn_act");
  return call.call(input, weight, bias, residual, relu, eps, save_mask);
}

// running = (1 - momentum) * running + momentum * new, where there are running statistics.
void track(const OptTensor& running_mean, const OptTensor& running_var, const Tensor& mean, const Tensor& var,
           const Tensor& input, double momentum) {
  static const auto call =
      operation<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&, int64_t, double)>(
          "fastrex::bn_track_");
  if (!running_mean) return;
  const int64_t rows = input.numel() / std::max<int64_t>(input.size(1), 1);
  call.call(*running_mean, *running_var, mean, var, std::nullopt, rows, momentum);
}

struct Training : torch::autograd::Function<Training> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight, const Tensor& bias,
                        const OptTensor& residual, const OptTensor& running_mean, const OptTensor& running_var,
                        bool relu, double eps, double momentum) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, mean, var, mask] = act(input, weight, bias, residual, relu, eps, true);
    track(running_mean, running_var, mean, var, input, momentum);
    context->save_for_backward({input, mask, mean, var, weight, bias});
    context->saved_data["relu"] = relu;
    context->saved_data["eps"] = eps;
    context->set_materialize_grads(false);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto call =
        operation<Act(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&, bool, double, bool, bool, bool)>("fastrex::bn_backward");
    variable_list outputs(9);
    if (!grads[0].defined()) return outputs;
    const auto saved = context->get_saved_variables();
    const Tensor& input = saved[0];
    const auto format = input.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const Tensor grad = grads[0].contiguous(format);
    const bool relu = context->saved_data["relu"].toBool();
    const double eps = context->saved_data["eps"].toDouble();
    const bool want_input = context->needs_input_grad(0), want_residual = context->needs_input_grad(3);
    auto [to_input, to_weight, to_bias, to_residual] =
        call.call(grad, input, saved[1], saved[2], saved[3], saved[4], saved[5], relu, eps, true, want_input,
                  want_residual);
    if (want_input) outputs[0] = to_input;
    outputs[1] = to_weight;
    outputs[2] = to_bias;
    if (want_residual) outputs[3] = relu ? to_residual : grad;  // without a ReLU it is the output's
    if (!at::GradMode::is_enabled()) return outputs;
    // Asked for gradients of gradients: those come when this error is differentiated, as in Python.
    torch::autograd::DelayedError later("batch_norm_act: impl='cpp' is differentiable once; use impl='reference'", 9);
    return later(std::move(outputs));
  }
};

Tensor train(const Tensor& input, const Tensor& weight, const Tensor& bias, const OptTensor& residual,
             const OptTensor& running_mean, const OptTensor& running_var, bool relu, double eps, double momentum) {
  const auto wants = [](const Tensor& x) { return x.requires_grad(); };
  if (at::GradMode::is_enabled() && (wants(input) || wants(weight) || wants(bias) || (residual && wants(*residual))))
    return Training::apply(input, weight, bias, residual, running_mean, running_var, relu, eps, momentum);
  at::AutoDispatchBelowADInplaceOrView below;
  auto [output, mean, var, mask] = act(input, weight, bias, residual, relu, eps, false);
  track(running_mean, running_var, mean, var, input, momentum);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrex, CPU, m) { m.impl("bn_train", train); }
TORCH_LIBRARY_IMPL(fastrex, AutogradCPU, m) { m.impl("bn_train", train); }

}  // namespace fastrex::batch_norm_act
