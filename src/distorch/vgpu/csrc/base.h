// What every part shares: names, the settings, and the state of the process.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

#include <pthread.h>

namespace vgpu {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kHost = -1;  // the host's memory, where a device index is asked for
constexpr int kMaxDevices = 16;
constexpr int kPoolStreams = 32;           // as with CUDA: more streams than these repeat
constexpr int kStreams = 1 + kPoolStreams;  // index 0 is the default stream
constexpr size_t kQueueLimit = 1024;        // operations waiting in a stream; then the host waits
constexpr int kPoison = 0xFF;               // a NaN in every floating dtype
constexpr size_t kAlignment = 64;           // as torch's CPU allocator: the same kernels, same bits

using Clock = std::chrono::steady_clock;

inline double seconds(Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

inline Clock::duration duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

inline std::string memory_name(int memory) {
  return memory == kHost ? "cpu" : "vgpu:" + std::to_string(memory);
}

// A stream of a device. `slot` numbers the streams of all devices: its place in a vector clock.
struct StreamId {
  int device = 0;
  int index = 0;
  int slot() const { return device * kStreams + index; }
  static StreamId of_slot(int slot) { return {slot / kStreams, slot % kStreams}; }
  bool operator==(const StreamId& other) const { return slot() == other.slot(); }
  std::string name() const {
    return "stream " + std::to_string(index) + " of " + memory_name(device);
  }
};

enum Races { kRacesOff, kRacesCount, kRacesRaise };

struct Settings {
  std::atomic<bool> enqueued{false};
  std::atomic<int> races{kRacesOff};
  std::atomic<double> delay_seconds{0};
  std::atomic<double> op_seconds{0};
  std::atomic<bool> poison{true};
  std::atomic<size_t> pinned_limit{SIZE_MAX};
  std::atomic<bool> refused[kMaxDevices][kMaxDevices]{};
};

// Events of the whole process that are counted.
struct Totals {
  std::atomic<uint64_t> host_syncs{0};
  std::atomic<uint64_t> pageable_copies{0};
  std::atomic<uint64_t> operations{0};
};

// All state is leaked on purpose: threads of streams may outlive static destructors.
inline Settings& settings = *new Settings();
inline Totals& totals = *new Totals();
inline std::atomic<int> num_devices{0};
inline std::atomic<bool> is_forked{false};    // this process is a child: the threads stayed behind
inline std::atomic<bool> is_stopping{false};  // the process ends: queued work is dropped

inline void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
}

inline void check_process() {
  TORCH_CHECK(!is_forked, "vgpu does not work in a forked child: start processes with 'spawn'");
  TORCH_CHECK(!is_stopping, "vgpu: the process is ending");
}

inline int check_index(int device) {
  TORCH_CHECK(device >= 0 && device < num_devices, "vgpu:", device, " is not there: ",
              num_devices.load(), " devices, the first is vgpu:0");
  return device;
}

}  // namespace vgpu
