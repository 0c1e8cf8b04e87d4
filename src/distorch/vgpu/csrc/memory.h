// The devices' memories: host bytes that are counted against a device's capacity.
#pragma once

#include "events.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <cstdlib>
#include <cstring>

namespace vgpu {

inline char* allocate_aligned(size_t nbytes) {
  void* data = std::aligned_alloc(kAlignment, (nbytes + kAlignment - 1) / kAlignment * kAlignment);
  TORCH_CHECK(data, "vgpu: the host has no ", nbytes, " bytes left to stand for device memory");
  return static_cast<char*>(data);
}

// The bytes live until the last queued operation lets go of the block; they are counted only until
// the tensor dies.
struct Block {
  char* data = nullptr;
  size_t nbytes = 0;
  StreamId stream;      // that it was allocated on
  c10::Storage adopted;  // a result of a CPU kernel that holds the bytes; else they are our own
  AccessLog log;

  ~Block() {
    if (data && !adopted) std::free(data);
  }
};

using BlockRef = std::shared_ptr<Block>;

struct BlockContext {  // what a DataPtr owns
  BlockRef block;
};

inline void reserve(int device, size_t nbytes) {
  Device& self = devices[device];
  const size_t live = (self.live_bytes += nbytes);
  if (live > self.capacity_bytes) {
    self.live_bytes -= nbytes;
    ++self.num_ooms;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "vgpu out of memory: tried to allocate ", nbytes,
                     " bytes on vgpu:", device, ", which has ", self.capacity_bytes.load(),
                     " bytes, ", live - nbytes, " of them in use");
  }
  size_t peak = self.peak_bytes;
  while (live > peak && !self.peak_bytes.compare_exchange_weak(peak, live)) {
  }
  ++self.num_allocations;
}

// Overwrite freed memory in the order of its streams, so that a late reader finds it. Memory that
// nothing queued refers to needs none: nobody can read it any more.
inline void poison_freed(const BlockRef& block) {
  auto poison = [block] { std::memset(block->data, kPoison, block->nbytes); };
  std::vector<EventRef> users;
  for (int slot : races.recorded(block->log)) {
    users.push_back(record_event(StreamId::of_slot(slot)));
  }
  if (users.empty()) {
    queue_of(block->stream).push_mark(poison);
    return;
  }
  users.push_back(record_event(block->stream));
  devices[block->stream.device].reaper.push_mark([users, poison] {
    for (const EventRef& user : users) user->wait();
    poison();
  });
}

inline void free_block(void* context) {
  std::unique_ptr<BlockContext> owner(static_cast<BlockContext*>(context));
  if (is_forked || is_stopping) {
    owner.release();  // the threads, and who knows which locks, stayed behind
    return;
  }
  const BlockRef block = std::move(owner->block);
  Device& device = devices[block->stream.device];
  device.live_bytes -= block->nbytes;
  ++device.num_frees;
  const std::string wrong = races.freed(block->log, block->stream);
  if (!wrong.empty() && settings.races == kRacesRaise) {
    set_error(block->stream.device, "vgpu race: " + wrong);  // destructors cannot raise
  }
  if (!settings.poison || block.use_count() == 1) return;
  try {
    poison_freed(block);
  } catch (const std::exception&) {  // the process is ending: nobody reads any more
  }
}

inline BlockRef block_of(const c10::Storage& storage) {
  auto* context = storage.data_ptr().cast_context<BlockContext>(&free_block);
  return context ? context->block : nullptr;
}

inline at::DataPtr data_ptr_of(BlockRef block) {
  char* const data = block->data;
  const at::Device device(kType, static_cast<c10::DeviceIndex>(block->stream.device));
  return {data, new BlockContext{std::move(block)}, &free_block, device};
}

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  at::DataPtr allocate(size_t nbytes) override {
    const int device = current_device;
    check_usable(device);
    if (nbytes == 0) return {nullptr, at::Device(kType, static_cast<c10::DeviceIndex>(device))};
    reserve(device, nbytes);
    auto block = std::make_shared<Block>();
    block->stream = current_stream(device);
    try {
      block->data = allocate_aligned(nbytes);
    } catch (...) {
      devices[device].live_bytes -= nbytes;
      throw;
    }
    block->nbytes = nbytes;
    if (settings.poison) std::memset(block->data, kPoison, nbytes);
    races.advance(block->stream);
    races.access(block->log, 0, nbytes, true, block->stream, "allocation", memory_name(device));
    return data_ptr_of(std::move(block));
  }

  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}

  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    auto* context = data.cast_context<BlockContext>(&free_block);
    if (!context) return;
    races.record_stream(context->block->log,
                        {stream.device_index(), static_cast<int>(stream.id())});
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    const Device& device = devices[check_index(index)];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes[0], &stats.reserved_bytes[0],
                        &stats.active_bytes[0], &stats.requested_bytes[0]}) {
      bytes->current = device.live_bytes;
      bytes->peak = device.peak_bytes;
    }
    stats.allocation[0].allocated = device.num_allocations;
    stats.allocation[0].freed = device.num_frees;
    stats.allocation[0].current = device.num_allocations - device.num_frees;
    stats.num_ooms = device.num_ooms;
    return stats;
  }

  void resetAccumulatedStats(c10::DeviceIndex) override {}

  void resetPeakStats(c10::DeviceIndex index) override {
    Device& device = devices[check_index(index)];
    device.peak_bytes = device.live_bytes.load();
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    const Device& device = devices[check_index(index)];
    const size_t capacity = device.capacity_bytes;
    return {capacity - std::min(capacity, device.live_bytes.load()), capacity};
  }
};

inline DeviceMemory& device_memory = *new DeviceMemory();

}  // namespace vgpu
