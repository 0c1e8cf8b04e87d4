// What an operator will return, known before it has run: its Meta kernel says so.
//
// Many Meta kernels are Python and take 0.1 to 0.6 ms, so answers are kept for each operator and
// description of its arguments.
#pragma once

#include "values.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <mutex>
#include <unordered_map>

namespace vgpu {

using Shapes = std::vector<at::Tensor>;  // meta tensors; none where they are not known

class ArgumentKey {
 public:
  std::string text;
  bool is_complete = true;  // else the arguments are not told apart by it

  void add(const c10::IValue& value) {
    text += '|';
    if (value.isNone()) {
      text += 'n';
    } else if (value.isTensor()) {
      add_tensor(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) add_tensor(tensor);
    } else if (value.isInt()) {
      add_bytes('i', value.toInt());
    } else if (value.isDouble()) {
      add_bytes('d', value.toDouble());
    } else if (value.isBool()) {
      text += value.toBool() ? '1' : '0';
    } else if (value.isIntList()) {
      for (int64_t item : value.toIntVector()) add_bytes('l', item);
    } else if (value.isString()) {
      text += value.toStringRef();
    } else if (value.isDevice()) {
      text += 'D';
    } else {
      is_complete = false;
    }
  }

  template <typename T>
  void add_bytes(char kind, const T& item) {
    text += kind;
    text.append(reinterpret_cast<const char*>(&item), sizeof item);
  }

 private:
  void add_tensor(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      text += 'u';
      return;
    }
    add_bytes('t', tensor.scalar_type());
    text += tensor.unsafeGetTensorImpl()->is_wrapped_number() ? 'w' : '.';
    for (int64_t size : tensor.sizes()) add_bytes('s', size);
    for (int64_t stride : tensor.strides()) add_bytes('x', stride);
  }
};

// `is_device` tells the tensors that stand for device tensors. A scalar of the CPU stays one, since
// Meta kernels ask for it.
template <typename IsDevice>
Shapes ask_meta_kernel(const c10::OperatorHandle& op, const torch::jit::Stack& arguments,
                       IsDevice&& is_device) {
  torch::jit::Stack stack(arguments);
  for (c10::IValue& value : stack) {
    if (value.isDevice()) value = c10::IValue(c10::Device(at::kMeta));
    map_tensors(value, [&](const at::Tensor& tensor) -> at::Tensor {
      if (tensor.dim() == 0 && !is_device(tensor)) return tensor;
      at::Tensor meta(at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(),
                                                     tensor.scalar_type()));
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
        meta.unsafeGetTensorImpl()->set_wrapped_number(true);
      }
      return meta;
    });
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  try {
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &stack);
  } catch (const std::exception&) {
    return {};  // no Meta kernel for these arguments, or wrong ones: the CPU kernel will tell
  }
  Shapes shapes;
  for (const c10::IValue& value : stack) shapes.push_back(value.toTensor());
  for (const at::Tensor& shape : shapes) {
    if (!shape.defined()) return {};
  }
  return shapes;
}

template <typename IsDevice>
Shapes shapes_of(const c10::OperatorHandle& op, const torch::jit::Stack& arguments,
                 IsDevice&& is_device) {
  constexpr size_t kMaxEntries = 20000;
  static std::mutex& mutex = *new std::mutex();
  static auto& known = *new std::unordered_map<std::string, Shapes>();
  if (!op.hasKernelForDispatchKey(c10::DispatchKey::Meta)) return {};
  ArgumentKey key;
  key.add_bytes('o', &op.schema());
  for (const c10::IValue& value : arguments) key.add(value);
  if (!key.is_complete) return ask_meta_kernel(op, arguments, is_device);
  {
    std::lock_guard lock(mutex);
    const auto found = known.find(key.text);
    if (found != known.end()) return found->second;
  }
  Shapes shapes = ask_meta_kernel(op, arguments, is_device);
  std::lock_guard lock(mutex);
  if (known.size() >= kMaxEntries) known.clear();
  return known[key.text] = std::move(shapes);
}

}  // namespace vgpu
