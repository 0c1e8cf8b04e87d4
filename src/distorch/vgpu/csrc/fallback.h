// Every operator without a kernel of its own: the CPU kernel over the same bytes.
//
// torch's own at::native::cpu_fallback copies the arguments, lets devices mix and knows no views.
#pragma once

#include "compute.h"
#include "generator.h"
#include "shapes.h"

#include <ATen/core/enum_tag.h>

#include <set>

namespace vgpu {

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op),
        stack_(*stack),
        base_(stack->size() - op.schema().arguments().size()),
        name_(op.schema().operator_name().name) {
    find_device();
    read_returns();
    replace_arguments();
    stream_ = current_stream(device_);
  }

  void run() {
    if (returns_view_) return call_cpu_kernel();
    check_usable(device_);
    ++totals.operations;
    races.advance(stream_);
    for (const Aliases::Pair& pair : aliases_.pairs()) {
      log_access(pair.device, pair.is_written, stream_, name_);
    }
    if (settings.enqueued && enqueue()) return;
    if (blocks_host()) ++totals.host_syncs;
    run_here({stream_, name_, [this] { call_cpu_kernel(); }});
    if (!returns_written_) log_results();
  }

 private:
  size_t num_returns() const { return op_.schema().returns().size(); }

  void find_device() {
    bool has_host = false;
    for (size_t i = base_; i < stack_.size(); i++) {
      visit_tensors(stack_[i], [&](const Tensor& tensor) { see(tensor, has_host); });
    }
    TORCH_CHECK(device_ < 0 || !has_host || takes_host_tensors(),
                "Expected all tensors to be on the same device, but found at least two devices, ",
                "vgpu:", device_, " and cpu! (", name_, ")");
  }

  void see(const Tensor& tensor, bool& has_host) {
    if (!tensor.is_privateuseone()) {
      has_host |= tensor.is_cpu() && tensor.dim() > 0;  // scalars of the host go anywhere
      return;
    }
    TORCH_CHECK(tensor.layout() == at::kStrided, "vgpu: only strided tensors (", name_, ")");
    const int device = tensor.device().index();
    TORCH_CHECK(device_ < 0 || device_ == device,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                "vgpu:", device_, " and vgpu:", device, "! (", name_, ")");
    device_ = device;
  }

  bool takes_host_tensors() const {  // as with CUDA: indices may be the host's
    static const auto& names = *new std::set<std::string>{
        "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
        "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::set_"};
    return names.count(name_) > 0;
  }

  void read_returns() {
    returns_written_ = num_returns() > 0;
    for (const auto& returned : op_.schema().returns()) {
      const auto* alias = returned.alias_info();
      returns_written_ &= alias && alias->isWrite();
      returns_view_ |= alias && !alias->isWrite();
      returns_tensors_ &= returned.type()->kind() == c10::TypeKind::TensorType;
    }
  }

  void replace_arguments() {
    const auto& arguments = op_.schema().arguments();
    for (size_t i = 0; i < arguments.size(); i++) {
      c10::IValue& value = stack_[base_ + i];
      const auto* alias = arguments[i].alias_info();
      const bool is_written = alias && alias->isWrite();
      map_tensors(value, [&](const Tensor& tensor) {
        return tensor.is_privateuseone() ? aliases_.add(tensor, is_written) : tensor;
      });
      if (value.isDevice() && value.toDevice().type() == kType) {
        const auto index = value.toDevice().index();
        if (device_ < 0) device_ = index < 0 ? current_device : check_index(index);
        value = c10::IValue(c10::Device(at::kCPU));
      } else if (value.isGenerator() && value.toGenerator().device().type() == kType) {
        value = c10::IValue(value.toGenerator().get<Generator>()->numbers());
      }
    }
    if (device_ < 0) device_ = current_device;
  }

  // Whether a GPU would have to wait here, since the host needs to know a value.
  bool blocks_host() const {
    return name_ == "aten::_local_scalar_dense" || name_ == "aten::equal" ||
           op_.hasTag(at::Tag::dynamic_output_shape);
  }

  bool enqueue() {
    if (!returns_tensors_ || num_returns() == 0) return false;
    if (op_.hasTag(at::Tag::nondeterministic_seeded)) return false;
    if (op_.hasTag(at::Tag::dynamic_output_shape)) return false;
    const torch::jit::Stack arguments(stack_.begin() + base_, stack_.end());
    const Shapes shapes = shapes_of(op_, arguments, [&](const Tensor& tensor) {
      return is_alias(tensor);
    });
    if (shapes.size() != num_returns()) return false;
    std::vector<Tensor> outputs;
    if (returns_written_) {
      for (const Aliases::Pair& pair : aliases_.pairs()) {
        if (pair.is_written) outputs.push_back(pair.device);
      }
      if (outputs.size() != shapes.size()) return false;
      for (size_t i = 0; i < outputs.size(); i++) {
        if (!outputs[i].sizes().equals(shapes[i].sizes())) return false;  // out= is resized
      }
    } else {
      for (const Tensor& shape : shapes) {
        outputs.push_back(
            empty_on(device_, shape.sizes(), shape.strides(), shape.scalar_type()));
      }
    }
    push(outputs);
    return true;
  }

  void push(const std::vector<Tensor>& outputs) {
    std::vector<Tensor> targets;
    if (!returns_written_) {
      for (const Tensor& output : outputs) {
        targets.push_back(aliases_.add(output, true));
        log_access(output, true, stream_, name_);
      }
    }
    auto arguments = std::make_shared<torch::jit::Stack>(
        std::make_move_iterator(stack_.begin() + base_), std::make_move_iterator(stack_.end()));
    stack_.resize(base_);
    keep_host_tensors(*arguments);
    run_on_stream({stream_, name_, [op = op_, arguments, targets] {
                     op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU),
                                        arguments.get());
                     fill(targets, *arguments);
                   }});
    for (const Tensor& output : outputs) stack_.emplace_back(output);
  }

  // What the host passes is read now, as a GPU does, whatever the host does with it next.
  void keep_host_tensors(torch::jit::Stack& arguments) const {
    const BelowAutograd guard;
    for (c10::IValue& value : arguments) {
      map_tensors(value, [&](const Tensor& tensor) {
        const bool is_number = tensor.unsafeGetTensorImpl()->is_wrapped_number();
        return is_number || is_alias(tensor) ? tensor : tensor.clone();
      });
    }
  }

  static void fill(const std::vector<Tensor>& targets, const torch::jit::Stack& results) {
    for (size_t i = 0; i < targets.size(); i++) {
      const Tensor result = results[i].toTensor();
      // Of auxiliary outputs (batch_norm's, embedding_bag's) some kernels leave empty what others
      // give a size.
      if (result.defined() && (result.numel() == 0) == (targets[i].numel() == 0)) {
        targets[i].copy_(result);
      }
    }
  }

  bool is_alias(const Tensor& tensor) const {
    for (const Aliases::Pair& pair : aliases_.pairs()) {
      if (pair.cpu.is_same(tensor)) return true;
    }
    return false;
  }

  void call_cpu_kernel() {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    aliases_.take_resized(stream_);
    for (size_t i = stack_.size() - num_returns(); i < stack_.size(); i++) {
      map_tensors(stack_[i], [&](const Tensor& t) { return aliases_.result(t, stream_); });
    }
  }

  void log_results() const {
    for (size_t i = stack_.size() - num_returns(); i < stack_.size(); i++) {
      visit_tensors(stack_[i], [&](const Tensor& tensor) {
        if (tensor.is_privateuseone()) log_access(tensor, true, stream_, name_);
      });
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  const size_t base_;
  const std::string& name_;
  int device_ = -1;
  StreamId stream_;
  Aliases aliases_;
  bool returns_written_ = false;  // in place, or out=
  bool returns_view_ = false;
  bool returns_tensors_ = true;
};

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call(op, stack).run();
}

}  // namespace vgpu
