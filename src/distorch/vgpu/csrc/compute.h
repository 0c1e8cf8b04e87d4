// Where kernels run: on the stream's own thread, or on the calling thread.
#pragma once

#include "alias.h"
#include "trace.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

namespace vgpu {

struct Kernel {
  StreamId stream;
  std::string name;
  std::function<void()> run;
  uint64_t nbytes = 0;
};

// CPU kernels only: no autograd, and no autocast, which the caller has been through.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

inline void run_timed(const Kernel& kernel) {
  const auto begin = Clock::now();
  pause(settings.op_seconds, kernel.stream.device);
  {
    const BelowAutograd guard;
    kernel.run();
  }
  const int device = kernel.stream.device;
  trace.add(kernel.stream, kernel.name, begin, kernel.nbytes, device, device);
}

inline void run_on_stream(Kernel kernel) {
  StreamQueue& queue = queue_of(kernel.stream);
  queue.push([kernel = std::move(kernel)] {
    random_delay(kernel.stream);
    run_timed(kernel);
  });
}

// Once the stream has done what is in it.
inline void run_here(const Kernel& kernel) {
  queue_of(kernel.stream).drain();
  raise_error(kernel.stream.device);
  run_timed(kernel);
}

inline void run(Kernel kernel) {
  if (settings.enqueued) {
    run_on_stream(std::move(kernel));
  } else {
    run_here(kernel);
  }
}

}  // namespace vgpu
