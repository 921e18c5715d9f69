// The count of devices, and the current one of each thread.
#include "devices.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <sstream>

namespace toyhw {
namespace {

thread_local c10::DeviceIndex current = 0;

// As other makers read their variable: a list of numbers, which ends at the first that is none of a device.
c10::DeviceIndex count_visible() {
  const char* listed = std::getenv("TOYHW_VISIBLE_DEVICES");
  if (listed == nullptr) return kDevices;
  std::istringstream numbers(listed);
  std::string number;
  c10::DeviceIndex count = 0;
  while (std::getline(numbers, number, ',')) {
    char* end = nullptr;
    const long index = std::strtol(number.c_str(), &end, 10);
    if (end == number.c_str() || *end != '\0' || index < 0 || index >= kDevices) break;
    ++count;
  }
  return count;
}

}  // namespace

c10::DeviceIndex device_count() noexcept {
  static const c10::DeviceIndex count = count_visible();
  return count;
}

c10::DeviceIndex current_device() noexcept { return current; }

void set_device_unchecked(c10::DeviceIndex index) noexcept { current = index; }

void set_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "toyhw: there is no device ", static_cast<int>(index), ": ",
              static_cast<int>(device_count()), " are visible");
  current = index;
}

}  // namespace toyhw
