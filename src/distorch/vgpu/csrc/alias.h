// The same bytes seen as CPU tensors, and results of CPU kernels seen as device tensors: no copies.
#pragma once

#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

namespace vgpu {

using at::Tensor;

inline Tensor with_layout_of(const Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                         c10::DispatchKeySet(key), like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return tensor;
}

inline at::DataPtr adopt(const c10::Storage& storage, StreamId stream) {
  const size_t nbytes = storage.nbytes();
  const at::Device device(kType, static_cast<c10::DeviceIndex>(stream.device));
  if (nbytes == 0) return {nullptr, device};
  reserve(stream.device, nbytes);
  auto block = std::make_shared<Block>();
  block->data = static_cast<char*>(storage.mutable_data());
  block->nbytes = nbytes;
  block->stream = stream;
  block->adopted = storage;
  return data_ptr_of(std::move(block));
}

// The CPU tensors that stand for device tensors during one operator: one storage for each storage,
// so that views still share.
class Aliases {
 public:
  struct Pair {
    Tensor device, cpu;
    bool is_written;
  };

  Tensor add(const Tensor& tensor, bool is_written) {
    Tensor cpu = with_layout_of(tensor, shadow_of(tensor.storage()), c10::DispatchKey::CPU);
    if (tensor.is_conj()) cpu._set_conj(true);
    if (tensor.is_neg()) cpu._set_neg(true);
    pairs_.push_back({tensor, cpu, is_written});
    return cpu;
  }

  const std::vector<Pair>& pairs() const { return pairs_; }

  // out= tensors that the kernel gave other sizes, or other memory.
  void take_resized(StreamId stream) const {
    for (const Pair& pair : pairs_) {
      if (!pair.is_written) continue;
      if (pair.cpu.storage().data() != pair.device.storage().data()) {
        auto* storage = pair.device.storage().unsafeGetStorageImpl();
        storage->set_data_ptr(adopt(pair.cpu.storage(), stream));
        storage->set_nbytes(pair.cpu.storage().nbytes());
      }
      if (is_resized(pair)) {
        pair.device.unsafeGetTensorImpl()->set_sizes_and_strides(pair.cpu.sizes(),
                                                                 pair.cpu.strides());
      }
    }
  }

  static bool is_resized(const Pair& pair) {
    return !pair.cpu.sizes().equals(pair.device.sizes()) ||
           !pair.cpu.strides().equals(pair.device.strides());
  }

  // The device tensor for a result of the kernel: the argument itself, a view of an argument, or a
  // new tensor over the result's memory.
  Tensor result(const Tensor& cpu, StreamId stream) {
    if (!cpu.defined() || !cpu.is_cpu()) return cpu;
    for (const Pair& pair : pairs_) {
      if (pair.cpu.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) return pair.device;
    }
    const auto* storage = cpu.storage().unsafeGetStorageImpl();
    for (const auto& [device, shadow] : shadows_) {
      if (shadow.unsafeGetStorageImpl() == storage) return on_device(cpu, device);
    }
    shadows_.emplace_back(c10::Storage(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(),
                                       adopt(cpu.storage(), stream), &device_memory, true),
                          cpu.storage());
    return on_device(cpu, shadows_.back().first);
  }

 private:
  static Tensor on_device(const Tensor& cpu, const c10::Storage& storage) {
    return with_layout_of(cpu, storage, c10::DispatchKey::PrivateUse1);
  }

  c10::Storage shadow_of(const c10::Storage& storage) {
    for (const auto& [device, shadow] : shadows_) {
      if (device.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return shadow;
    }
    auto* block = new BlockRef(block_of(storage));
    at::DataPtr data(storage.mutable_data(), block,
                     [](void* held) { delete static_cast<BlockRef*>(held); }, at::kCPU);
    shadows_.emplace_back(storage, c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                                std::move(data), c10::GetAllocator(at::kCPU),
                                                true));
    return shadows_.back().second;
  }

  std::vector<Pair> pairs_;
  std::vector<std::pair<c10::Storage, c10::Storage>> shadows_;  // of the device, and of the CPU
};

// The bytes of its storage that a tensor may touch.
inline std::pair<size_t, size_t> byte_range(const Tensor& tensor) {
  if (tensor.numel() == 0) return {0, 0};
  size_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); i++) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {tensor.storage_offset() * tensor.itemsize(), (last + 1) * tensor.itemsize()};
}

inline void log_access(const Tensor& tensor, bool is_write, StreamId stream,
                       const std::string& what) {
  if (!races.on()) return;
  const BlockRef block = block_of(tensor.storage());
  if (!block) return;
  const auto [begin, end] = byte_range(tensor);
  races.access(block->log, begin, end, is_write, stream, what, memory_name(block->stream.device));
}

inline Tensor empty_on(int device, at::IntArrayRef sizes, at::IntArrayRef strides,
                       at::ScalarType dtype) {
  const c10::DeviceGuard guard(c10::Device(kType, static_cast<c10::DeviceIndex>(device)));
  return at::detail::empty_strided_generic(
      sizes, strides, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

}  // namespace vgpu
