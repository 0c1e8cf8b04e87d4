// What torch asks a backend for: devices, streams and events; and the process-wide hooks.
#pragma once

#include "generator.h"
#include "host_memory.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace vgpu {

inline c10::Device torch_device(int device) {
  return {kType, static_cast<c10::DeviceIndex>(device)};
}

inline c10::Stream torch_stream(StreamId stream) {
  return c10::Stream(c10::Stream::UNSAFE, torch_device(stream.device), stream.index);
}

inline int index_of(c10::Device device) {  // an index of -1 means the current device
  return device.index() < 0 ? current_device : check_index(device.index());
}

inline StreamId id_of(const c10::Stream& stream) {
  const auto index = stream.id();
  TORCH_CHECK(index >= 0 && index < kStreams, "vgpu: there is no stream ", index);
  return {index_of(stream.device()), static_cast<int>(index)};
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }

  c10::Device exchangeDevice(c10::Device device) const override {
    return torch_device(std::exchange(current_device, index_of(device)));
  }
  c10::Device getDevice() const override { return torch_device(current_device); }
  void setDevice(c10::Device device) const override { current_device = index_of(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < num_devices) current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(num_devices.load());
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    return torch_stream(current_stream(index_of(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return torch_stream({index_of(device), 0});
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const int index = index_of(device);
    return torch_stream({index, 1 + int(devices[index].next_stream++ % kPoolStreams)});
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const StreamId id = id_of(stream);
    return torch_stream({id.device, std::exchange(current_streams[id.device], id.index)});
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return &queue_of(id_of(stream));
  }
  bool queryStream(const c10::Stream& stream) const override {
    const StreamId id = id_of(stream);
    check_usable(id.device);
    const VectorClock clock = races.snapshot(id);
    const bool finished = queue_of(id).has_finished();
    if (finished) races.host_waits(clock);
    return finished;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    ++totals.host_syncs;
    synchronize(id_of(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    const int device = index < 0 ? current_device : check_index(index);
    check_usable(device);
    ++totals.host_syncs;
    for (int s = 0; s < kStreams; s++) synchronize({device, s});
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device,
              const c10::EventFlag) const override {
    const StreamId id = id_of(stream);
    TORCH_CHECK(device < 0 || device == id.device, "vgpu: the event is of vgpu:", int(device),
                ", the stream of vgpu:", id.device);
    check_usable(id.device);
    if (!*event) *event = new EventHandle();
    static_cast<EventHandle*>(*event)->state = record_event(id);
  }
  void block(void* event, const c10::Stream& stream) const override {
    const StreamId id = id_of(stream);
    check_usable(id.device);
    if (const EventRef state = state_of(event)) wait_event(id, state);
  }
  bool queryEvent(void* event) const override {
    const EventRef state = state_of(event);
    if (!state) return true;  // never recorded
    const bool done = state->is_done();
    if (done) races.host_waits(state->clock);
    return done;
  }
  void synchronizeEvent(void* event) const override {
    ++totals.host_syncs;
    const EventRef state = state_of(event);
    if (!state) return;
    state->wait();
    races.host_waits(state->clock);
    raise_error(state->stream.device);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const EventRef begin = state_of(first), end = state_of(second);
    TORCH_CHECK(begin && end, "vgpu: both events must be recorded before the time between them");
    TORCH_CHECK(begin->is_done() && end->is_done(), "vgpu: both events must be complete");
    return std::chrono::duration<double, std::milli>(end->time() - begin->time()).count();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    if (!is_forked) delete static_cast<EventHandle*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    id_of(stream);
    device_memory.recordStream(data, stream);
  }

 private:
  static EventRef state_of(void* event) {
    check_process();
    const EventRef state = event ? static_cast<EventHandle*>(event)->state : nullptr;
    if (state) check_usable(state->stream.device);
    return state;
  }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return num_devices > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(num_devices.load());
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    current_device = check_index(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current_device);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const auto before = getCurrentDevice();
    if (device >= 0) setCurrentDevice(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < num_devices ? exchangeDevice(device) : getCurrentDevice();
  }
  bool isPinnedPtr(const void* data) const override { return pinned.find(data, 1) != nullptr; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
  at::Device getDeviceFromPtr(void*) const override { return torch_device(current_device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();  // one seed gives the CPU's numbers
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current_device : check_index(index));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
    const c10::DeviceGuard guard(impl->device());
    queue_of(current_stream(current_device)).drain();
    at::DataPtr data = device_memory.allocate(nbytes);
    const size_t kept = std::min(nbytes, impl->nbytes());
    if (kept > 0) std::memcpy(data.get(), impl->data(), kept);
    impl->set_data_ptr(std::move(data));
    impl->set_nbytes(nbytes);
  }
};

}  // namespace vgpu
