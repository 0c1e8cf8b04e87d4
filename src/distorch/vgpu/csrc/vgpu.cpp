// A virtual GPU: a backend of torch (PrivateUse1) whose devices behave as graphics cards do.
//
// One translation unit, since torch's headers take most of the time to compile. Python calls the
// functions below through ctypes, so no Python headers are needed. Each returns a text: what went
// wrong, or null.
//
//   base        settings, and the state of the process
//   races       the race detector
//   streams     queues with a thread each, and their devices;  events
//   memory      the devices' memories;  host_memory: pinned and registered bytes
//   links       how long transfers take;  trace: what ran when
//   alias       the same bytes seen as CPU tensors;  compute: where kernels run
//   fallback    an operator by its CPU kernel;  shapes: what it will return
//   copies      within a device, to and from the host, between devices
//   guard       what torch asks of a backend;  generator: random numbers;  autocast
//   operators   what is registered

#include "operators.h"

#define VGPU_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace vgpu;

template <typename Work>
const char* guarded(Work&& work) noexcept {
  static thread_local std::string text;
  try {
    work();
    return nullptr;
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

int check_memory(int memory) { return memory == kHost ? kHost : check_index(memory); }

uint64_t count_of_device(const Device& device, const std::string& name) {
  if (name == "capacity_bytes") return device.capacity_bytes;
  if (name == "live_bytes") return device.live_bytes;
  if (name == "peak_bytes") return device.peak_bytes;
  if (name == "num_allocations") return device.num_allocations;
  if (name == "num_frees") return device.num_frees;
  TORCH_CHECK(false, "vgpu: there is no counter ", name);
}

uint64_t count_of_all(const std::string& name) {
  if (name == "pinned_bytes") return pinned.live_bytes;
  if (name == "pinned_peak_bytes") return pinned.peak_bytes;
  if (name == "num_pageable_copies") return totals.pageable_copies;
  if (name == "num_host_syncs") return totals.host_syncs;
  if (name == "num_ops") return totals.operations;
  if (name == "num_races") return races.count();
  TORCH_CHECK(false, "vgpu: there is no counter ", name);
}

void wake_sleepers() {
  { std::lock_guard lock(pause_mutex); }
  pause_over.notify_all();
  traffic.wake();
}

void clear_counters() {
  for (int d = 0; d < num_devices; d++) {
    devices[d].peak_bytes = devices[d].live_bytes.load();
    devices[d].num_allocations = devices[d].num_frees = devices[d].num_ooms = 0;
  }
  pinned.peak_bytes = pinned.live_bytes.load();
  totals.host_syncs = totals.pageable_copies = totals.operations = 0;
  traffic.clear_counts();
  races.clear();
  trace.clear();
}

}  // namespace

VGPU_EXPORT const char* vgpu_init(int count) {
  return guarded([&] {
    TORCH_CHECK(count > 0 && count <= kMaxDevices, "vgpu: 1 to ", kMaxDevices, " devices");
    num_devices = count;
    for (int d = 0; d < kMaxDevices; d++) {
      for (int s = 0; s < kStreams; s++) devices[d].streams[s].id = {d, s};
      devices[d].reaper.id = {d, 0};
    }
    seed_streams(0);
    watch_forks();
    c10::SetAllocator(kType, &device_memory);
    at::setHostAllocator(kType, &host_allocator);
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
    at::globalContext().lazyInitDevice(kType);  // else is_pinned() says no without asking
  });
}

VGPU_EXPORT int vgpu_num_devices() { return num_devices; }
VGPU_EXPORT int vgpu_is_forked() { return is_forked; }

VGPU_EXPORT const char* vgpu_set_capacity(int device, uint64_t nbytes) {
  return guarded([&] { devices[check_index(device)].capacity_bytes = nbytes; });
}

VGPU_EXPORT const char* vgpu_set_link(int source, int target, double speed, const char* bus) {
  return guarded([&] { traffic.set_link(check_memory(source), check_memory(target), speed, bus); });
}

VGPU_EXPORT const char* vgpu_set_bus(const char* name, double speed) {
  return guarded([&] { traffic.set_bus(name, speed); });
}

VGPU_EXPORT const char* vgpu_clear_links() {
  return guarded([] { traffic.clear_links(); });
}

VGPU_EXPORT const char* vgpu_configure(int enqueued, int races_mode, double delay_seconds,
                                       uint64_t seed, double op_seconds, int poison,
                                       uint64_t pinned_limit, const int* refused, int num_refused) {
  return guarded([&] {
    check_process();
    drain_all();
    settings.enqueued = enqueued;
    settings.races = races_mode;
    settings.delay_seconds = delay_seconds;
    settings.op_seconds = op_seconds;
    settings.poison = poison;
    settings.pinned_limit = pinned_limit;
    for (auto& row : settings.refused) {
      for (auto& refuse : row) refuse = false;
    }
    for (int i = 0; i < num_refused; i++) {
      const int a = check_index(refused[2 * i]), b = check_index(refused[2 * i + 1]);
      settings.refused[a][b] = settings.refused[b][a] = true;
    }
    seed_streams(seed);
    races.everything_is_done();
  });
}

VGPU_EXPORT int vgpu_is_refused(int a, int b) {
  const bool are_there = a >= 0 && a < num_devices && b >= 0 && b < num_devices;
  return !are_there || a == b || settings.refused[a][b];
}

// Wait for everything; then raise what went wrong on any device.
VGPU_EXPORT const char* vgpu_synchronize_all() {
  return guarded([] {
    check_process();
    drain_all();
    for (int d = 0; d < num_devices; d++) {
      if (!devices[d].lost) raise_error(d);
    }
  });
}

VGPU_EXPORT const char* vgpu_reset() {
  return guarded([] {
    check_process();
    drain_all();
    for (int d = 0; d < num_devices; d++) {
      devices[d].lost = false;
      devices[d].next_stream = 0;
      current_streams[d] = 0;
      std::lock_guard lock(devices[d].error_mutex);
      devices[d].error.clear();
    }
    current_device = 0;
    clear_counters();
  });
}

VGPU_EXPORT const char* vgpu_lose(int device) {
  return guarded([&] {
    devices[check_index(device)].lost = true;
    wake_sleepers();
  });
}

VGPU_EXPORT const char* vgpu_register(void* data, uint64_t nbytes) {
  return guarded([&] { register_memory(data, nbytes); });
}

VGPU_EXPORT const char* vgpu_unregister(void* data) {
  return guarded([&] { unregister_memory(data); });
}

VGPU_EXPORT const char* vgpu_host_access(void* data, uint64_t nbytes, int is_write) {
  return guarded([&] {
    const HostBlockRef block = pinned.find(data, nbytes);
    if (!block) return;  // pageable: no stream uses it behind the host's back
    const size_t begin = static_cast<char*>(data) - block->data;
    races.host_access(block->log, begin, begin + nbytes, is_write, "pinned memory of the host");
  });
}

VGPU_EXPORT const char* vgpu_counter(const char* name, int device, uint64_t* value) {
  return guarded([&] {
    *value = device < 0 ? count_of_all(name) : count_of_device(devices[check_index(device)], name);
  });
}

VGPU_EXPORT const char* vgpu_link_counter(int source, int target, uint64_t* num_copies,
                                          uint64_t* nbytes) {
  return guarded([&] {
    const auto count = traffic.count_of(check_memory(source), check_memory(target));
    *num_copies = count.num_copies;
    *nbytes = count.nbytes;
  });
}

// The texts of the races that were found, each ended by a newline.
VGPU_EXPORT const char* vgpu_races() {
  static thread_local std::string text;
  text.clear();
  for (const std::string& race : races.found()) text += race + '\n';
  return text.c_str();
}

VGPU_EXPORT void vgpu_trace(int on) {
  if (on) trace.clear();
  trace.on = on;
}

VGPU_EXPORT uint64_t vgpu_trace_size() { return trace.size(); }
VGPU_EXPORT void vgpu_trace_copy(Span* out, uint64_t count) { trace.copy_to(out, count); }

// At the end of the process: queued work is dropped, sleepers wake, and threads become idle, so
// that none runs a kernel while libraries are torn down.
VGPU_EXPORT void vgpu_shutdown() {
  if (is_forked || is_stopping.exchange(true)) return;
  wake_sleepers();
  const auto deadline = Clock::now() + std::chrono::seconds(5);
  for (int d = 0; d < num_devices; d++) {
    for (StreamQueue& queue : devices[d].streams) {
      while (!queue.has_finished() && Clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }
}
