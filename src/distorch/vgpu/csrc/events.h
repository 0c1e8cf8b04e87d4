// Events: each record is a new state, so a wait means the record of that moment.
#pragma once

#include "streams.h"

#include <memory>

namespace vgpu {

class EventState {
 public:
  const StreamId stream;
  const VectorClock clock;

  EventState(StreamId stream, VectorClock clock) : stream(stream), clock(std::move(clock)) {}

  void finish() {
    {
      std::lock_guard lock(mutex_);
      done_ = true;
      failed_ = devices[stream.device].lost;
      time_ = Clock::now();
    }
    finished_.notify_all();
  }

  bool is_done() {
    std::lock_guard lock(mutex_);
    return done_;
  }

  // Returns whether the work before the event was done; false where its device was lost.
  bool wait() {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return done_; });
    return !failed_;
  }

  Clock::time_point time() {
    std::lock_guard lock(mutex_);
    return time_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false, failed_ = false;
  Clock::time_point time_;
};

using EventRef = std::shared_ptr<EventState>;

// What torch holds as an event; it is made by the first record.
struct EventHandle {
  EventRef state;
};

inline EventRef record_event(StreamId stream) {
  races.advance(stream);
  auto state = std::make_shared<EventState>(stream, races.snapshot(stream));
  queue_of(stream).push_mark([state] { state->finish(); });
  return state;
}

inline void wait_event(StreamId stream, const EventRef& state) {
  races.stream_waits(stream, state->clock);
  if (state->stream == stream) return;
  queue_of(stream).push_mark([state, stream] {
    if (!state->wait()) set_error(stream.device, memory_name(state->stream.device) + " is lost");
  });
}

// `after` continues when `before` has done what is in it now.
inline void barrier(StreamId before, StreamId after) {
  if (!(before == after)) wait_event(after, record_event(before));
}

}  // namespace vgpu
