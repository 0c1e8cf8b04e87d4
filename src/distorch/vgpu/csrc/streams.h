// Streams: a queue and a thread each. And the devices they belong to.
#pragma once

#include "races.h"

#include <condition_variable>
#include <deque>
#include <functional>
#include <random>
#include <thread>

namespace vgpu {

void run_task(StreamId stream, const std::function<void()>& work) noexcept;

class StreamQueue {
 public:
  StreamId id;
  std::minstd_rand random;  // used by the stream's own thread; seeded while it is idle

  // Work of a device: waits for room, and is dropped once the device is lost.
  void push(std::function<void()> work) {
    check_process();
    std::unique_lock lock(mutex_);
    finished_one_.wait(lock, [&] { return tasks_.size() < kQueueLimit; });
    add(lock, [stream = id, work = std::move(work)] { run_task(stream, work); });
  }

  // A mark between pieces of work: never waits for room, and is passed by lost devices too.
  void push_mark(std::function<void()> mark) {
    check_process();
    std::unique_lock lock(mutex_);
    add(lock, std::move(mark));
  }

  // Wait until all that is queued now has run.
  void drain() {
    check_process();
    std::unique_lock lock(mutex_);
    finished_one_.wait(lock, [&, last = num_pushed_] { return num_finished_ >= last; });
  }

  bool has_finished() {
    std::lock_guard lock(mutex_);
    return num_finished_ >= num_pushed_;
  }

 private:
  void add(std::unique_lock<std::mutex>& lock, std::function<void()> task) {
    if (!std::exchange(has_thread_, true)) std::thread([this] { work(); }).detach();
    tasks_.push_back(std::move(task));
    ++num_pushed_;
    lock.unlock();
    pushed_one_.notify_one();
  }

  void work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        pushed_one_.wait(lock, [&] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
      task = nullptr;  // what it holds is let go before its end is announced
      {
        std::lock_guard lock(mutex_);
        ++num_finished_;
      }
      finished_one_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable pushed_one_, finished_one_;
  std::deque<std::function<void()>> tasks_;
  uint64_t num_pushed_ = 0, num_finished_ = 0;
  bool has_thread_ = false;
};

struct Device {
  std::atomic<size_t> capacity_bytes{0}, live_bytes{0}, peak_bytes{0};
  std::atomic<uint64_t> num_allocations{0}, num_frees{0}, num_ooms{0};
  std::atomic<bool> lost{false};
  std::atomic<unsigned> next_stream{0};
  StreamQueue streams[kStreams];
  StreamQueue reaper;  // waits for the last user of freed memory
  std::mutex error_mutex;
  std::string error;  // of an operation on a stream: told at the next synchronisation
};

inline Device* const devices = new Device[kMaxDevices];
inline thread_local int current_device = 0;
inline thread_local int current_streams[kMaxDevices] = {};

inline StreamId current_stream(int device) { return {device, current_streams[device]}; }
inline StreamQueue& queue_of(StreamId stream) {
  return devices[stream.device].streams[stream.index];
}

inline void check_usable(int device) {
  check_process();
  TORCH_CHECK(!devices[device].lost, "vgpu:", device, " is lost: it has disappeared");
}

inline void set_error(int device, const std::string& text) {
  std::lock_guard lock(devices[device].error_mutex);
  if (devices[device].error.empty()) devices[device].error = text;
}

// An error of queued work surfaces here, once.
inline void raise_error(int device) {
  check_usable(device);
  std::string error;
  {
    std::lock_guard lock(devices[device].error_mutex);
    error.swap(devices[device].error);
  }
  TORCH_CHECK(error.empty(), error, " (of an operation queued earlier on vgpu:", device, ")");
}

inline void run_task(StreamId stream, const std::function<void()>& work) noexcept {
  if (devices[stream.device].lost || is_stopping) return;
  try {
    work();
  } catch (const c10::Error& error) {
    set_error(stream.device, error.what_without_backtrace());
  } catch (const std::exception& error) {
    set_error(stream.device, error.what());
  } catch (...) {
    set_error(stream.device, "vgpu: an operation failed without saying why");
  }
}

// Wait for a stream as the host does: it learns what the stream has done, and its errors.
inline void synchronize(StreamId stream) {
  check_usable(stream.device);
  const VectorClock clock = races.snapshot(stream);
  queue_of(stream).drain();
  races.host_waits(clock);
  raise_error(stream.device);
}

inline void drain_all() {
  for (int d = 0; d < num_devices; d++) {
    for (StreamQueue& queue : devices[d].streams) queue.drain();
    devices[d].reaper.drain();
  }
  races.everything_is_done();
}

// Sleeps that end early where a device is lost or the process ends.
inline std::mutex& pause_mutex = *new std::mutex();
inline std::condition_variable& pause_over = *new std::condition_variable();

inline void pause(double seconds, int device) {
  if (seconds <= 0) return;
  std::unique_lock lock(pause_mutex);
  pause_over.wait_for(lock, duration(seconds),
                      [&] { return devices[device].lost || is_stopping; });
  lock.unlock();
  check_usable(device);
}

// On a stream's own thread: a random part of the delay that was set.
inline void random_delay(StreamId stream) {
  const double most = settings.delay_seconds;
  if (most <= 0) return;
  pause(std::uniform_real_distribution<double>(0, most)(queue_of(stream).random), stream.device);
}

inline void seed_streams(uint64_t seed) {
  for (int d = 0; d < kMaxDevices; d++) {
    for (StreamQueue& queue : devices[d].streams) {
      queue.random.seed(static_cast<unsigned>(seed * 1009 + queue.id.slot() + 1));
    }
  }
}

}  // namespace vgpu
