// The gradient of the losses on logits, for every device.
//
// The other ops register their gradients in Python. Here a call takes a few microseconds at ten
// classes; with autograd through Python it would take a hundred.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <string>

namespace fastadv {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                               const OptionalTensor&,
                                                               const OptionalTensor&,
                                                               c10::string_view, double, double,
                                                               bool, bool, bool);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The arguments of a call that are not differentiated.
struct Settings {
  OptionalTensor y;
  std::string kind;
  double weight, temperature;
  bool mean;
  bool wanted, other_wanted;                  // gradients to hand out
  bool differentiated, other_differentiated;  // gradients for the backward pass
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> call(const at::Tensor& logits,
                                                    const OptionalTensor& other,
                                                    const Settings& s) {
  static const auto forward = op<Forward>("fastadv::softmax_losses");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return forward.call(logits, other, s.y, s.kind, s.weight, s.temperature, s.mean,
                      s.wanted || s.differentiated, s.other_wanted || s.other_differentiated);
}

constexpr int64_t kLarge = 1 << 17;  // elements of a gradient that no cache near the core holds

// Whether grad is the number 1, as from `loss.backward()`. Asking a GPU would wait for it; zero
// tensors have no memory.
bool is_one(const at::Tensor& grad) {
  return grad.dim() == 0 && grad.is_cpu() && grad.scalar_type() == at::kFloat &&
         !grad._is_zerotensor() && *grad.const_data_ptr<float>() == 1;
}

// grad * gradient. An expendable gradient may itself become the result: unchanged, or, a large one,
// overwritten, which moves half as much.
at::Tensor scaled(const at::Tensor& grad, const at::Tensor& gradient, at::ScalarType dtype,
                  bool expendable) {
  static const auto backward = op<Backward>("fastadv::softmax_losses_backward");
  const at::AutoDispatchBelowADInplaceOrView guard;
  const bool plain = !at::isTensorSubclassLike(grad) && !at::isTensorSubclassLike(gradient);
  if (expendable && plain && gradient.scalar_type() == dtype) {
    if (is_one(grad)) return gradient;
    if (gradient.numel() >= kLarge) {
      return gradient.mul_(grad.dim() == 0 ? grad : grad.unsqueeze(1));
    }
  }
  return backward.call(grad, gradient, dtype);
}

// An empty tensor, which stands for a gradient that is not handed out.
at::Tensor nothing_like(const at::Tensor& gradient) {
  if (gradient.sym_size(1) == 0) return gradient;
  return at::empty_symint({gradient.sym_size(0), 0}, gradient.options());
}

// Connects a gradient to the logits if it is to be differentiated again; otherwise autograd would
// silently treat it as a constant.
class Refusal : public torch::autograd::Function<Refusal> {
 public:
  // The tensors after the gradient are what it depends on: logits, other logits, incoming gradient.
  static at::Tensor forward(AutogradContext*, const at::Tensor& gradient, const at::Tensor&,
                            const at::Tensor&, const at::Tensor&) {
    return gradient.alias();
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false, "softmax_losses has no second derivative");
  }
};

class Losses : public torch::autograd::Function<Losses> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits,
                               const OptionalTensor& other, const Settings& settings) {
    auto [losses, gradient, other_gradient] = call(logits, other, settings);
    ctx->save_for_backward({gradient, other_gradient, logits, other.value_or(logits)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["handed_out"] = settings.wanted || settings.other_wanted;
    ctx->saved_data["pair"] = settings.kind == "act";
    if (!settings.wanted) gradient = nothing_like(gradient);
    if (!settings.other_wanted) other_gradient = nothing_like(other_gradient);
    ctx->mark_non_differentiable({gradient, other_gradient});
    return {losses, gradient, other_gradient};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list results(3);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const bool pair = ctx->saved_data["pair"].toBool();
    // The graph is freed after this pass, and no one else has seen the gradients but for hooks on
    // saved tensors, which must copy what they keep.
    const bool expendable = !torch::autograd::get_current_graph_task_keep_graph() &&
                            !ctx->saved_data["handed_out"].toBool();
    for (int i = 0; i < 2; ++i) {
      if (saved[i].sym_size(1) == 0) continue;  // was not asked for
      results[i] = scaled(pair ? grads[0].select(-1, i) : grads[0], saved[i],
                          saved[2 + i].scalar_type(), expendable);
      if (at::GradMode::is_enabled()) {
        results[i] = Refusal::apply(results[i], saved[2], saved[3], grads[0]);
      }
    }
    return results;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_losses(const at::Tensor& logits,
                                                              const OptionalTensor& other,
                                                              const OptionalTensor& y,
                                                              c10::string_view kind, double weight,
                                                              double temperature, bool mean,
                                                              bool wanted, bool other_wanted) {
  const bool recording = at::GradMode::is_enabled();
  const Settings settings{y,
                          std::string(kind),
                          weight,
                          temperature,
                          mean,
                          wanted,
                          other_wanted,
                          recording && logits.requires_grad(),
                          recording && other && other->requires_grad()};
  if (!settings.differentiated && !settings.other_differentiated) {
    return call(logits, other, settings);
  }
  const variable_list results = Losses::apply(logits, other, settings);
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastadv, Autograd, m) { m.impl("softmax_losses", &softmax_losses); }

}  // namespace fastadv
