// What is registered with torch's dispatcher.
#pragma once

#include "autocast.h"
#include "copies.h"
#include "fallback.h"

#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

namespace vgpu {

inline Tensor empty_memory_format(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                                  std::optional<at::Layout>, std::optional<at::Device> device,
                                  std::optional<bool>,
                                  std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(sizes, &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), memory_format);
}

inline Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                            std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                            std::optional<at::Device> device, std::optional<bool>) {
  return empty_on(index_of(c10::device_or_default(device)), sizes, strides,
                  c10::dtype_or_default(dtype));
}

inline const Tensor& resize_(const Tensor& self, at::IntArrayRef sizes,
                             std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(self.device());
  queue_of(current_stream(self.device().index())).drain();
  return at::native::resize_(self, sizes, memory_format);
}

inline Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (!source.sizes().equals(target.sizes())) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

inline Tensor& set_storage(Tensor& self, at::Storage storage) {
  return at::native::set_(self, std::move(storage));
}

inline Tensor& set_storage_offset(Tensor& self, at::Storage storage, int64_t offset,
                                  at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, sizes, strides);
}

inline Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return at::native::set_tensor_(self, source);
}

inline void record_stream(Tensor& self, at::Stream stream) {
  id_of(stream);
  device_memory.recordStream(self.storage().data_ptr(), stream);
}

// Else `parameter.data = tensor` raises for another device, and Module.to makes new parameters.
inline bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& from) {
  auto is_plain = [](const Tensor& tensor) {
    return (tensor.is_cpu() || tensor.is_privateuseone()) && tensor.layout() == at::kStrided;
  };
  return is_plain(self) && is_plain(from);
}

// The CPU's choice of attention, so that its bits, and its backward, are the CPU's.
inline int64_t attention_choice(const Tensor& query, const Tensor& key, const Tensor& value,
                                const std::optional<Tensor>& mask, double dropout, bool is_causal,
                                std::optional<double> scale, bool enable_gqa) {
  Aliases aliases;
  auto alias = [&](const Tensor& tensor) {
    if (!tensor.is_privateuseone()) return tensor;
    Tensor cpu = aliases.add(tensor, false);
    if (tensor.requires_grad()) cpu.set_requires_grad(true);
    return cpu;
  };
  std::optional<Tensor> cpu_mask;
  if (mask && mask->defined()) cpu_mask = alias(*mask);
  return at::_fused_sdp_choice(alias(query), alias(key), alias(value), cpu_mask, dropout,
                               is_causal, scale, enable_gqa);
}

// Recurrent layers choose other kernels where the device is not the CPU: they go to the CPU whole,
// and so have no gradient.
inline void without_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                             torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
      visit_tensors((*stack)[i], [&](const Tensor& tensor) {
        TORCH_CHECK(!tensor.requires_grad(), "vgpu: ", op.schema().operator_name().name,
                    " has no gradient here: call it under torch.no_grad()");
      });
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

inline constexpr const char* kRecurrent[] = {
    "lstm.input",     "lstm.data",      "lstm_cell",     "gru.input",       "gru.data",
    "gru_cell",       "rnn_tanh.input", "rnn_tanh.data", "rnn_tanh_cell",   "rnn_relu.input",
    "rnn_relu.data",  "rnn_relu_cell"};

inline torch::CppFunction boxed_fallback() {
  return torch::CppFunction::makeFromBoxedFunction<&fallback>();
}

// Every operator that has a CPU kernel goes straight to it. Else the composite kernels that torch
// holds for other devices would win, and their bits differ from the CPU's.
inline void prefer_cpu_kernels(torch::Library& library) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "aten") continue;
    const auto op = dispatcher.findSchema(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    library.impl(c10::toString(name).c_str(), boxed_fallback());
  }
}

}  // namespace vgpu

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &vgpu::attention_choice)
}  // namespace at::native

namespace {

C10_REGISTER_GUARD_IMPL(PrivateUse1, vgpu::Guard)

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(vgpu::boxed_fallback());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", vgpu::empty_memory_format);
  library.impl("empty_strided", vgpu::empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("resize_", vgpu::resize_);
  library.impl("_copy_from", vgpu::copy_from);
  library.impl("_copy_from_and_resize", vgpu::copy_from_and_resize);
  library.impl("set_.source_Storage", vgpu::set_storage);
  library.impl("set_.source_Storage_storage_offset", vgpu::set_storage_offset);
  library.impl("set_.source_Tensor", vgpu::set_tensor);
  library.impl("record_stream", vgpu::record_stream);
  library.impl("_has_compatible_shallow_copy_type", vgpu::has_compatible_shallow_copy_type);
  // Composite, and they choose their algorithm by the device.
  for (const char* name : {"convolution", "convolution_backward"}) {
    library.impl(name, vgpu::boxed_fallback());
  }
  for (const char* name : vgpu::kRecurrent) library.impl(name, vgpu::boxed_fallback());
  vgpu::prefer_cpu_kernels(library);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  for (const char* name : vgpu::kRecurrent) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&vgpu::without_gradient>());
  }
}

// copy_ falls through for lazy conjugation and negation, _copy_from does not: without these two it
// would call itself until the stack is full.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// What is in no list computes in the dtypes it is given.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, library) {
  vgpu::register_autocast<vgpu::Cast::lower>(library, vgpu::kLowerPrecision);
  vgpu::register_autocast<vgpu::Cast::full>(library, vgpu::kFullPrecision);
  vgpu::register_autocast<vgpu::Cast::widest>(library, vgpu::kWidestInput);
}

}  // namespace
