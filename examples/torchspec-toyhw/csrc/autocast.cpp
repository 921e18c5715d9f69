// Autocast: products in the lower precision, sums and softmaxes in fp32; the operators that language models have.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "devices.h"

namespace at::autocast {
// Of ATen/autocast_mode.h, which includes every operator there is.
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
}  // namespace at::autocast

namespace toyhw {
namespace {

void run_in(at::ScalarType dtype, const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  for (size_t place = stack->size() - op.schema().arguments().size(); place < stack->size(); ++place) {
    c10::IValue& argument = (*stack)[place];
    if (!argument.isTensor()) continue;
    const at::Tensor& tensor = argument.toTensor();
    const bool fitting = tensor.defined() && tensor.device().type() == kType && tensor.is_floating_point();
    if (fitting && tensor.scalar_type() != at::kDouble) argument = tensor.to(dtype);
  }
  op.callBoxed(stack);
}

void lower(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_in(at::autocast::get_autocast_dtype(kType), op, stack);
}

void single(const c10::OperatorHandle& op, torch::jit::Stack* stack) { run_in(at::kFloat, op, stack); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  for (const char* name : {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&lower>());
  }
  for (const char* name : {"softmax.int", "log_softmax.int", "logsumexp", "layer_norm", "sum", "sum.dim_IntList",
                           "cumsum", "nll_loss", "cross_entropy_loss", "kl_div", "exp", "log", "rsqrt"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&single>());
  }
}

}  // namespace
}  // namespace toyhw
