// Autocast with torch's own lists of operators.
//
// torch's macros make a function of each; one boxed function for each policy compiles in a third
// less time.
#pragma once

#include "base.h"
#include "values.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace vgpu {

enum class Cast { lower, full, widest };

inline at::ScalarType widest_dtype(const torch::jit::Stack& stack, size_t base) {
  at::ScalarType dtype = at::autocast::get_autocast_dtype(kType);
  for (size_t i = base; i < stack.size(); i++) {
    visit_tensors(stack[i], [&](const at::Tensor& tensor) {
      dtype = at::autocast::prioritize(dtype, tensor, kType);
    });
  }
  return dtype;
}

// Who names a dtype for the result gets it, from the inputs as they are.
inline bool names_dtype(const c10::OperatorHandle& op, const torch::jit::Stack& stack,
                        size_t base) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i].name() == "dtype" && !stack[base + i].isNone()) return true;
  }
  return false;
}

template <Cast cast>
void autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  const size_t base = stack->size() - op.schema().arguments().size();
  if (cast != Cast::full || !names_dtype(op, *stack, base)) {
    const at::ScalarType dtype = cast == Cast::full    ? at::kFloat
                                 : cast == Cast::lower ? at::autocast::get_autocast_dtype(kType)
                                                       : widest_dtype(*stack, base);
    for (size_t i = base; i < stack->size(); i++) {
      map_tensors((*stack)[i], [&](const at::Tensor& tensor) {
        return at::autocast::cached_cast(dtype, tensor, kType);
      });
    }
  }
  op.callBoxed(stack);
}

#define VGPU_OP(op) #op,
#define VGPU_OVERLOAD(op, overload) #op "." #overload,
#define VGPU_PICK(first, second, macro, ...) macro
#define VGPU_NAME(...) VGPU_PICK(__VA_ARGS__, VGPU_OVERLOAD, VGPU_OP)(__VA_ARGS__)

inline constexpr const char* kLowerPrecision[] = {AT_FORALL_LOWER_PRECISION_FP(VGPU_NAME)};
inline constexpr const char* kFullPrecision[] = {
    AT_FORALL_FP32(VGPU_NAME) AT_FORALL_FP32_SET_OPT_DTYPE(VGPU_NAME)
    // torch's list of those with another signature
    "norm.Scalar", "norm.ScalarOpt_dim"};
inline constexpr const char* kWidestInput[] = {AT_FORALL_PROMOTE(VGPU_NAME)};

template <Cast cast, size_t count>
void register_autocast(torch::Library& library, const char* const (&names)[count]) {
  for (const char* name : names) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&autocast<cast>>());
  }
}

}  // namespace vgpu
