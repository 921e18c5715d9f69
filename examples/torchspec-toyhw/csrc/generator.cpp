// A device's generator draws as the host's does, but has a state of its own: one seed gives both the same numbers.
#include <ATen/CPUGeneratorImpl.h>

#include <vector>

#include "devices.h"

namespace toyhw {
namespace {

struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex index, at::Generator host = at::detail::createCPUGenerator())
      : GeneratorImpl(c10::Device(kType, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host_(std::move(host)) {}

  void set_current_seed(uint64_t seed) override { host_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host_.set_offset(offset); }
  uint64_t get_offset() const override { return host_.get_offset(); }
  uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override { return host_.seed(); }
  void set_state(const c10::TensorImpl& state) override { host_.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }

  at::Generator host_;

 private:
  GeneratorImpl* clone_impl() const override { return new Generator(device().index(), host_.clone()); }
};

}  // namespace

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index < 0 ? current_device() : index);
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex each = 0; each < kDevices; ++each) made.push_back(new_generator(each));
    return made;
  }();
  return generators.at(index < 0 ? current_device() : index);
}

at::Generator host_generator(const at::Generator& generator) {
  return generator.device().type() == kType ? static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host_
                                            : generator;
}

}  // namespace toyhw
