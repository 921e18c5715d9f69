// The collective backend `tccl`: gloo over the same memory. What is under way holds the memory it reads and writes.
//
// And the module that Python imports.
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>

#include "devices.h"

namespace toyhw {
namespace {

using c10::intrusive_ptr;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;

Tensors on_host(const Tensors& tensors) {
  Tensors aliases;
  for (const at::Tensor& tensor : tensors) aliases.push_back(toyhw::on_host(tensor));
  return aliases;
}

Lists on_host(const Lists& lists) {
  Lists aliases;
  for (const Tensors& tensors : lists) aliases.push_back(on_host(tensors));
  return aliases;
}

using toyhw::on_host;

class Tccl final : public c10d::Backend {
 public:
  explicit Tccl(intrusive_ptr<Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "tccl"; }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  void abort() override { gloo_->abort(); }
  void shutdown() override { gloo_->shutdown(); }

  // `name` with one list of tensors, and with results and operands.
#define IN_PLACE(name, Options)                                                          \
  intrusive_ptr<Work> name(Tensors& tensors, const c10d::Options& options) override {    \
    auto aliases = on_host(tensors);                                                     \
    return gloo_->name(aliases, options);                                                \
  }
#define INTO(name, Results, Operands, Options)                                                               \
  intrusive_ptr<Work> name(Results& results, Operands& operands, const c10d::Options& options) override {    \
    auto result_aliases = on_host(results);                                                                  \
    auto operand_aliases = on_host(operands);                                                                \
    return gloo_->name(result_aliases, operand_aliases, options);                                            \
  }
  IN_PLACE(broadcast, BroadcastOptions)
  IN_PLACE(allreduce, AllreduceOptions)
  IN_PLACE(allreduce_coalesced, AllreduceCoalescedOptions)
  IN_PLACE(reduce, ReduceOptions)
  INTO(allgather, Lists, Tensors, AllgatherOptions)
  INTO(_allgather_base, at::Tensor, at::Tensor, AllgatherOptions)
  INTO(allgather_coalesced, Lists, Tensors, AllgatherOptions)
  INTO(allgather_into_tensor_coalesced, Tensors, Tensors, AllgatherOptions)
  INTO(reduce_scatter, Tensors, Lists, ReduceScatterOptions)
  INTO(_reduce_scatter_base, at::Tensor, at::Tensor, ReduceScatterOptions)
  INTO(reduce_scatter_tensor_coalesced, Tensors, Tensors, ReduceScatterOptions)
  INTO(gather, Lists, Tensors, GatherOptions)
  INTO(scatter, Tensors, Lists, ScatterOptions)
  INTO(alltoall, Tensors, Tensors, AllToAllOptions)
#undef IN_PLACE
#undef INTO

  intrusive_ptr<Work> alltoall_base(at::Tensor& result, at::Tensor& operand, std::vector<int64_t>& result_rows,
                                    std::vector<int64_t>& operand_rows,
                                    const c10d::AllToAllOptions& options) override {
    auto result_alias = on_host(result);
    auto operand_alias = on_host(operand);
    return gloo_->alltoall_base(result_alias, operand_alias, result_rows, operand_rows, options);
  }
  intrusive_ptr<Work> send(Tensors& tensors, int rank, int tag) override {
    auto aliases = on_host(tensors);
    return gloo_->send(aliases, rank, tag);
  }
  intrusive_ptr<Work> recv(Tensors& tensors, int rank, int tag) override {
    auto aliases = on_host(tensors);
    return gloo_->recv(aliases, rank, tag);
  }
  intrusive_ptr<Work> recvAnysource(Tensors& tensors, int tag) override {
    auto aliases = on_host(tensors);
    return gloo_->recvAnysource(aliases, tag);
  }
  intrusive_ptr<Work> barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }

 private:
  intrusive_ptr<Backend> gloo_;
};

}  // namespace
}  // namespace toyhw

// One of two files that include PyTorch's large headers, so it is here that Python finds what it calls.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::module_::import("torch.distributed");  // makes the class of backends known
  module.def("over_gloo", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<toyhw::Tccl>(std::move(gloo));
  });
  module.def("device_count", &toyhw::device_count);
  module.def("limit_memory", &toyhw::limit_memory);
  module.def("map_file", &toyhw::map_file);
  module.def("default_generator", &toyhw::default_generator);
}
