// Device memory is host memory that is counted; pinned memory is host memory that is remembered.
#include <ATen/EmptyTensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/alloc_cpu.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "devices.h"

namespace toyhw {
namespace {

struct Usage {
  std::atomic<int64_t> allocated{0}, peak{0};
  std::atomic<int64_t> limit{INT64_MAX};
};
std::array<Usage, kDevices> usages;

// The devices share the host's memory evenly.
int64_t total_bytes() { return sysconf(_SC_PHYS_PAGES) / kDevices * sysconf(_SC_PAGE_SIZE); }

void count(c10::DeviceIndex index, int64_t nbytes) {
  Usage& usage = usages.at(index);
  const int64_t allocated = usage.allocated += nbytes;
  if (allocated > std::min(usage.limit.load(), total_bytes())) {
    usage.allocated -= nbytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "toyhw: device ", static_cast<int>(index), " has no ", nbytes,
                     " bytes left; ", allocated - nbytes, " are allocated");
  }
  int64_t peak = usage.peak;
  while (allocated > peak && !usage.peak.compare_exchange_weak(peak, allocated)) {
  }
}

// What a device's storage holds: bytes of its own, or another's storage.
struct Block {
  void* place;
  c10::Storage owner;
  int64_t nbytes;
  c10::DeviceIndex index;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  usages[block->index].allocated -= block->nbytes;
  if (block->place != nullptr) c10::free_cpu(block->place);
  delete block;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const c10::DeviceIndex index = current_device();
    const c10::Device device(kType, index);
    if (nbytes == 0) return {nullptr, device};
    count(index, static_cast<int64_t>(nbytes));
    void* place = c10::alloc_cpu(nbytes);
    return {place, new Block{place, {}, static_cast<int64_t>(nbytes), index}, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}                       // nothing is cached
  void recordStream(const c10::DataPtr&, c10::Stream) override {}     // nothing is queued
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex index) override { usages.at(index).peak = usages[index].allocated.load(); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    bytes.current = usages.at(index).allocated;
    bytes.peak = usages[index].peak;
    stats.reserved_bytes = stats.allocated_bytes;
    return stats;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    return {total_bytes() - usages.at(index).allocated, total_bytes()};
  }
};
Allocator allocator;

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;  // where a block begins, and its size

void release_pinned(void* place) {
  const std::lock_guard<std::mutex> locked(pinned_mutex);
  pinned.erase(static_cast<const char*>(place));
  c10::free_cpu(place);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* place = c10::alloc_cpu(std::max<size_t>(nbytes, 1));
    const std::lock_guard<std::mutex> locked(pinned_mutex);
    pinned[static_cast<const char*>(place)] = std::max<size_t>(nbytes, 1);
    return {place, place, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }
};
PinnedAllocator pinned_memory;

struct Mapping {
  void* place;
  size_t nbytes;
};

void unmap(void* context) {
  auto* mapping = static_cast<Mapping*>(context);
  munmap(mapping->place, mapping->nbytes);
  delete mapping;
}

const bool registered = [] {
  c10::SetAllocator(kType, &allocator);
  return true;
}();

}  // namespace

c10::DeviceAllocator* device_allocator() { return &allocator; }

c10::DataPtr adopt(c10::Storage owner, c10::DeviceIndex index) {
  const auto nbytes = static_cast<int64_t>(owner.nbytes());
  count(index, nbytes);
  void* place = owner.mutable_data();
  return {place, new Block{nullptr, std::move(owner), nbytes, index}, &release, c10::Device(kType, index)};
}

void limit_memory(c10::DeviceIndex index, double fraction) {
  TORCH_CHECK_VALUE(fraction > 0 && fraction <= 1, "toyhw: a part of the memory is in (0, 1], not ", fraction);
  usages.at(index).limit = static_cast<int64_t>(fraction * static_cast<double>(total_bytes()));
}

at::Tensor map_file(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  TORCH_CHECK(file >= 0, "toyhw: cannot open ", path, ": ", std::strerror(errno));
  struct stat facts{};
  void* place = MAP_FAILED;
  if (fstat(file, &facts) == 0) place = mmap(nullptr, facts.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  const int reason = errno;
  close(file);
  TORCH_CHECK(place != MAP_FAILED, "toyhw: cannot map ", path, ": ", std::strerror(reason));
  const auto nbytes = static_cast<size_t>(facts.st_size);
  c10::DataPtr data(place, new Mapping{place, nbytes}, &unmap, c10::Device(kType, current_device()));
  c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), nullptr, false);
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), caffe2::TypeMeta::Make<uint8_t>());
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({static_cast<int64_t>(nbytes)});
  return tensor;
}

c10::Allocator* pinned_allocator() { return &pinned_memory; }

bool is_pinned(const void* place) {
  const std::lock_guard<std::mutex> locked(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(place));
  if (after == pinned.begin()) return false;
  const auto& [start, nbytes] = *std::prev(after);
  return static_cast<const char*>(place) < start + nbytes;
}

}  // namespace toyhw
