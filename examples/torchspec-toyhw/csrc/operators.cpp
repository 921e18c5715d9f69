// Operators: making, viewing and copying tensors are the device's own; all others run on the host over the same memory,
// after a look at where their tensors are: a real device would refuse to compute with those of another place.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/resize_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "devices.h"

namespace toyhw {
namespace {

const c10::DispatchKeySet kKey(c10::DispatchKey::PrivateUse1);

// `tensor`'s view of `storage`.
at::Tensor view_of(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  at::Tensor made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return made;
}

void drop(void* context) { delete static_cast<c10::Storage*>(context); }

// A host's result becomes the device's: its storage is taken over.
at::Tensor on_device(const at::Tensor& result, c10::Device device) {
  if (!result.defined() || result.device().type() == kType) return result;
  const c10::Storage& storage = result.storage();
  c10::Storage adopted(c10::Storage::use_byte_size_t(), storage.nbytes(), adopt(storage, device.index()),
                       device_allocator(), true);
  return view_of(result, std::move(adopted), c10::DispatchKey::PrivateUse1);
}

// One call of an operator: its arguments as the host sees them, and what each was.
class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(stack), device_(kType, current_device()) {
    const size_t count = op.schema().arguments().size();
    const auto arguments = torch::jit::last(*stack, count);
    given_.assign(arguments.begin(), arguments.end());
    for (const auto& argument : given_) each_tensor(argument, [this](const at::Tensor& tensor) { look(tensor); });
    for (size_t place = 0; place < count; ++place) {
      (*stack)[stack->size() - count + place] = hosted(given_[place], place);
    }
  }

  void run() {
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (const auto& [tensor, alias] : written_) keep_resized(tensor, alias);
    const auto& returns = op_.schema().returns();
    const size_t first = stack_->size() - returns.size();
    for (size_t place = 0; place < returns.size(); ++place) {
      auto& result = (*stack_)[first + place];
      const auto* alias = returns[place].alias_info();
      if (alias != nullptr) {
        TORCH_CHECK(alias->isWrite(), "toyhw: ", op_.schema().name(), " makes a view, which only the device can");
        result = given_.at(argument_of(*alias));
      } else if (result.isTensor()) {
        result = on_device(result.toTensor(), device_);
      } else if (result.isTensorList()) {
        c10::List<at::Tensor> moved;
        for (const at::Tensor& tensor : result.toTensorVector()) moved.push_back(on_device(tensor, device_));
        result = moved;
      }
    }
  }

 private:
  template <typename Visit>
  static void each_tensor(const c10::IValue& value, Visit visit) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) visit(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        if (tensor.has_value() && tensor->defined()) visit(*tensor);
      }
    }
  }

  // As on other devices: a number of the host may meet the device's tensors, nothing larger.
  void look(const at::Tensor& tensor) {
    if (tensor.device().type() == kType) {
      TORCH_CHECK(!seen_ || tensor.device() == device_, "toyhw: ", op_.schema().name(), " was given tensors on ",
                  device_, " and ", tensor.device());
      device_ = tensor.device();
      seen_ = true;
    } else if (tensor.dim() > 0) {
      elsewhere_ = true;
    }
    TORCH_CHECK(!(seen_ && elsewhere_), "toyhw: ", op_.schema().name(), " was given tensors on ", device_,
                " and on the host");
  }

  at::Tensor hosted_tensor(const at::Tensor& tensor, bool written) {
    if (!tensor.defined() || tensor.device().type() != kType) return tensor;
    at::Tensor alias = on_host(tensor);
    if (written) written_.emplace_back(tensor, alias);
    return alias;
  }

  c10::IValue hosted(const c10::IValue& value, size_t place) {
    const auto& argument = op_.schema().arguments()[place];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) return hosted_tensor(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(hosted_tensor(tensor, written));
      return tensors;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        tensors.push_back(tensor.has_value() ? std::optional(hosted_tensor(*tensor, written)) : std::nullopt);
      }
      return tensors;
    }
    if (value.isDevice() && value.toDevice().type() == kType) {
      if (!seen_ && value.toDevice().has_index()) device_ = value.toDevice();
      return c10::Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator()) return host_generator(value.toGenerator());
    // No generator was named: the host would draw with its own.
    if (value.isNone() && argument.name() == "generator") return host_generator(default_generator(device_.index()));
    return value;
  }

  // An `out` that was too small has got other memory.
  static void keep_resized(const at::Tensor& tensor, const at::Tensor& alias) {
    if (alias.sizes() == tensor.sizes() && alias.const_data_ptr() == tensor.const_data_ptr()) return;
    tensor.resize_(alias.sizes());
    on_host(tensor).copy_(alias);
  }

  size_t argument_of(const c10::AliasInfo& alias) const {
    const auto& arguments = op_.schema().arguments();
    for (size_t place = 0; place < arguments.size(); ++place) {
      const auto* info = arguments[place].alias_info();
      if (info != nullptr && info->isWrite() && info->beforeSets() == alias.beforeSets()) return place;
    }
    TORCH_INTERNAL_ASSERT(false, "no argument of ", op_.schema(), " is returned");
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::vector<c10::IValue> given_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
  c10::Device device_;
  bool seen_ = false, elsewhere_ = false;
};

void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { HostCall(op, stack).run(); }

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, device_allocator(), kKey, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKey, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::cpu::resize_(self, size, format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::cpu::set_(self, std::move(source), 0, {size}, {1});
}

at::Tensor& set_nothing(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, device_allocator(), true);
  return at::cpu::set_(self, std::move(storage), 0, {0}, {1});
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::as_strided(self, size, stride, self.storage_offset());
}

void record_stream(at::Tensor&, c10::Stream) {}  // nothing is queued

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("as_strided", TORCH_FN(at::cpu::as_strided));
  library.impl("view", TORCH_FN(at::cpu::view));
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", TORCH_FN(at::cpu::unfold));
  library.impl("resize_", &resize);
  library.impl("set_", &set_nothing);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Storage_storage_offset",
               static_cast<at::Tensor& (*)(at::Tensor&, at::Storage, int64_t, at::IntArrayRef, at::IntArrayRef)>(
                   &at::cpu::set_));
  library.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

}  // namespace

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kType) return tensor;
  TORCH_CHECK(tensor.layout() == c10::kStrided, "toyhw: only strided tensors");
  const c10::Storage& storage = tensor.storage();
  // The alias holds the device's storage: it may be read long after `tensor` went, by a collective under way.
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), &drop, c10::Device(c10::DeviceType::CPU));
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return view_of(tensor, std::move(shared), c10::DispatchKey::CPU);
}

}  // namespace toyhw
