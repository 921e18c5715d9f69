// Which devices this process has, which one is current in this thread, and what they own: memory and generators.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>

#include <string>

namespace toyhw {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 4;

// Those that TOYHW_VISIBLE_DEVICES leaves, read once.
c10::DeviceIndex device_count() noexcept;
c10::DeviceIndex current_device() noexcept;
void set_device(c10::DeviceIndex index);
void set_device_unchecked(c10::DeviceIndex index) noexcept;

// Memory that a device counts as its own, on the device that is current.
c10::DeviceAllocator* device_allocator();
// The same for memory that somebody else made: it is counted, and `owner` is kept until the storage goes.
c10::DataPtr adopt(c10::Storage owner, c10::DeviceIndex index);
// Of a device's memory, how much this process may allocate.
void limit_memory(c10::DeviceIndex index, double fraction);
// A file's bytes as a tensor of the current device, uint8 [nbytes]; what is written into it other processes see.
at::Tensor map_file(const std::string& path);

c10::Allocator* pinned_allocator();
bool is_pinned(const void* place);

// Draws for a device, one default generator for each.
const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator new_generator(c10::DeviceIndex index);
// The generator of the host that does `generator`'s drawing.
at::Generator host_generator(const at::Generator& generator);

// The same memory as a tensor of the host, for as long as the result lives. `tensor` may be on the host itself.
at::Tensor on_host(const at::Tensor& tensor);

}  // namespace toyhw
