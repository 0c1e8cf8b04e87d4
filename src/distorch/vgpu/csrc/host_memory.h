// Pinned and registered host memory, and the budget for it.
#pragma once

#include "memory.h"

#include <ATen/core/CachingHostAllocator.h>

#include <map>

namespace vgpu {

struct HostBlock {
  char* data;
  size_t nbytes;
  bool is_registered;  // somebody else's memory
  std::atomic<int> num_pending{0};
  AccessLog log;

  HostBlock(char* data, size_t nbytes, bool is_registered)
      : data(data), nbytes(nbytes), is_registered(is_registered) {}
  ~HostBlock() {
    if (!is_registered) std::free(data);
  }
};

using HostBlockRef = std::shared_ptr<HostBlock>;

class PinnedMemory {
 public:
  std::atomic<size_t> live_bytes{0}, peak_bytes{0};

  // The pinned range that holds all of these bytes, or none.
  HostBlockRef find(const void* data, size_t nbytes) {
    if (is_forked || !data) return nullptr;
    std::lock_guard lock(mutex_);
    const HostBlockRef block = below(address(data) + 1);
    if (!block || address(data) + nbytes > address(block->data) + block->nbytes) return nullptr;
    return block;
  }

  void add(HostBlockRef block) {
    std::lock_guard lock(mutex_);
    const HostBlockRef before = below(address(block->data) + block->nbytes);
    TORCH_CHECK(!before || address(before->data) + before->nbytes <= address(block->data),
                "vgpu: these bytes, or some of them, are pinned or registered already");
    check_budget(block->nbytes);
    live_bytes += block->nbytes;
    peak_bytes = std::max(peak_bytes.load(), live_bytes.load());
    blocks_[address(block->data)] = std::move(block);
  }

  void check_budget(size_t nbytes) const {
    const size_t limit = settings.pinned_limit;
    TORCH_CHECK(live_bytes + nbytes <= limit, "vgpu: cannot pin ", nbytes,
                " bytes of host memory: ", live_bytes.load(), " of the limit of ", limit,
                " are pinned");
  }

  HostBlockRef remove(const void* data) {
    std::lock_guard lock(mutex_);
    const auto found = blocks_.find(address(data));
    if (found == blocks_.end()) return nullptr;
    HostBlockRef block = found->second;
    live_bytes -= block->nbytes;
    blocks_.erase(found);
    return block;
  }

 private:
  static uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

  // The last range that begins before an address.
  HostBlockRef below(uintptr_t end) const {
    auto next = blocks_.lower_bound(end);
    return next == blocks_.begin() ? nullptr : std::prev(next)->second;
  }

  std::mutex mutex_;
  std::map<uintptr_t, HostBlockRef> blocks_;
};

inline PinnedMemory& pinned = *new PinnedMemory();

inline void free_pinned(void* data) {
  if (is_forked) return;
  pinned.remove(data);  // copies that are queued keep the bytes
}

inline void register_memory(void* data, size_t nbytes) {
  check_process();
  TORCH_CHECK(data && nbytes > 0, "vgpu: there are no bytes to register");
  pinned.check_budget(nbytes);
  pinned.add(std::make_shared<HostBlock>(static_cast<char*>(data), nbytes, true));
}

// Waits for the copies that use the memory. At the end of the process none is left.
inline void unregister_memory(void* data) {
  if (is_forked || is_stopping) return;
  const HostBlockRef block = pinned.find(data, 1);
  TORCH_CHECK(block && block->is_registered && block->data == data,
              "vgpu: no registered memory begins at this address");
  while (block->num_pending > 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
  pinned.remove(data);
}

class HostAllocator final : public at::HostAllocator {
 public:
  at::DataPtr allocate(size_t nbytes) override {
    check_process();
    if (nbytes == 0) return {nullptr, at::Device(at::kCPU)};
    pinned.check_budget(nbytes);
    char* const data = allocate_aligned(nbytes);
    if (settings.poison) std::memset(data, kPoison, nbytes);
    pinned.add(std::make_shared<HostBlock>(data, nbytes, false));
    return {data, data, &free_pinned, at::Device(at::kCPU)};
  }

  at::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

inline HostAllocator& host_allocator = *new HostAllocator();

}  // namespace vgpu
