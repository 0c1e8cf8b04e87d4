// The trace: what ran when, on which stream.
#pragma once

#include "base.h"

#include <cstring>
#include <vector>

namespace vgpu {

// Read by Python through ctypes: keep both in step.
struct Span {
  double begin, end;  // seconds of the steady clock
  uint64_t nbytes;
  int32_t device, stream, source, target;
  char operation[64];
};

class Trace {
 public:
  std::atomic<bool> on{false};

  void add(StreamId stream, const std::string& operation, Clock::time_point begin, uint64_t nbytes,
           int source, int target) {
    if (!on) return;
    Span span{seconds(begin), seconds(Clock::now()), nbytes, stream.device,
              stream.index,   source,                target, {}};
    std::strncpy(span.operation, operation.c_str(), sizeof span.operation - 1);
    std::lock_guard lock(mutex_);
    spans_.push_back(span);
  }

  size_t size() {
    std::lock_guard lock(mutex_);
    return spans_.size();
  }

  void copy_to(Span* out, size_t count) {
    std::lock_guard lock(mutex_);
    std::copy_n(spans_.begin(), std::min(count, spans_.size()), out);
  }

  void clear() {
    std::lock_guard lock(mutex_);
    spans_.clear();
  }

 private:
  std::mutex mutex_;
  std::vector<Span> spans_;
};

inline Trace& trace = *new Trace();

}  // namespace vgpu
