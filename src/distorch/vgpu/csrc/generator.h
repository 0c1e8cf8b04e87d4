// torch.Generator(device="vgpu"): a CPU generator that says it is of a virtual GPU.
#pragma once

#include "base.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>

namespace vgpu {

class Generator final : public c10::GeneratorImpl {
 public:
  explicit Generator(int device, at::Generator numbers = at::detail::createCPUGenerator())
      : c10::GeneratorImpl({kType, static_cast<c10::DeviceIndex>(device)},
                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        numbers_(std::move(numbers)) {}

  const at::Generator& numbers() const { return numbers_; }

  void set_current_seed(uint64_t seed) override { numbers_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { numbers_.set_offset(offset); }
  uint64_t get_offset() const override { return numbers_.get_offset(); }
  uint64_t current_seed() const override { return numbers_.current_seed(); }
  uint64_t seed() override { return numbers_.seed(); }
  void set_state(const c10::TensorImpl& state) override { impl().set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return impl().get_state(); }

 private:
  Generator* clone_impl() const override { return new Generator(device_.index(), numbers_.clone()); }
  c10::GeneratorImpl& impl() const { return *numbers_.unsafeGetGeneratorImpl(); }

  at::Generator numbers_;
};

}  // namespace vgpu
