// The race detector: vector clocks on the host side, so what it finds does not depend on timing.
//
// Each stream has a clock with a place for every stream: how far it has waited for that one. The
// host has one clock for all its threads: what they have waited for. An access is ordered after
// an earlier one if the accessing stream's clock covers the moment of the earlier one.
#pragma once

#include "base.h"

#include <algorithm>
#include <vector>

namespace vgpu {

using VectorClock = std::vector<uint64_t>;

struct Access {
  size_t begin, end;  // bytes of the block
  int slot;
  uint64_t time;
  bool is_write;
  std::string what;
};

// What streams have done with a block of memory. Guarded by the detector's mutex.
struct AccessLog {
  std::vector<Access> accesses;
  std::vector<int> recorded;  // slots given to record_stream
};

class RaceDetector {
 public:
  bool on() const { return settings.races != kRacesOff; }

  // A new operation of a stream begins; it comes after all that the host has waited for.
  void advance(StreamId stream) {
    if (!on()) return;
    std::lock_guard lock(mutex_);
    merge(clock_of(stream.slot()), host_);
    ++clock_of(stream.slot())[stream.slot()];
  }

  void access(AccessLog& log, size_t begin, size_t end, bool is_write, StreamId stream,
              const std::string& what, const std::string& memory) {
    if (!on() || begin >= end) return;
    std::string found;
    {
      std::lock_guard lock(mutex_);
      const Access now{begin, end, stream.slot(), clock_of(stream.slot())[stream.slot()],
                       is_write, what};
      found = conflict(log, now, clock_of(now.slot), stream.name(), memory);
      forget_covered(log, now);
      log.accesses.push_back(now);
    }
    if (!found.empty()) report(found);
  }

  // The host itself reads or writes memory that streams use.
  void host_access(AccessLog& log, size_t begin, size_t end, bool is_write,
                   const std::string& memory) {
    if (!on() || begin >= end) return;
    std::string found;
    {
      std::lock_guard lock(mutex_);
      const Access now{begin, end, -1, 0, is_write, is_write ? "host write" : "host read"};
      found = conflict(log, now, host_clock(), "the host", memory);
    }
    if (!found.empty()) report(found);
  }

  // A block is freed on its own stream; returns what is wrong about it, or nothing.
  std::string freed(const AccessLog& log, StreamId owner) {
    if (!on()) return {};
    std::lock_guard lock(mutex_);
    VectorClock clock = clock_of(owner.slot());
    merge(clock, host_);
    for (const Access& access : log.accesses) {
      const bool recorded = std::count(log.recorded.begin(), log.recorded.end(), access.slot) > 0;
      if (access.slot == owner.slot() || recorded || clock[access.slot] >= access.time) continue;
      return remember("a block of " + owner.name() + " is freed while " + text(access) +
                      " may still use it: record_stream is missing");
    }
    return {};
  }

  VectorClock snapshot(StreamId stream) {
    if (!on()) return {};
    std::lock_guard lock(mutex_);
    return clock_of(stream.slot());
  }

  void stream_waits(StreamId stream, const VectorClock& clock) {
    if (!on()) return;
    std::lock_guard lock(mutex_);
    merge(clock_of(stream.slot()), clock);
  }

  void host_waits(const VectorClock& clock) {
    if (!on()) return;
    std::lock_guard lock(mutex_);
    merge(host_clock(), clock);
  }

  // Everything queued has run, and the host knows: no earlier access can race any more.
  void everything_is_done() {
    std::lock_guard lock(mutex_);
    for (const VectorClock& clock : clocks_) merge(host_clock(), clock);
  }

  void record_stream(AccessLog& log, StreamId stream) {
    std::lock_guard lock(mutex_);
    log.recorded.push_back(stream.slot());
  }

  std::vector<int> recorded(const AccessLog& log) {
    std::lock_guard lock(mutex_);
    return log.recorded;
  }

  uint64_t count() const { return count_; }

  std::vector<std::string> found() {
    std::lock_guard lock(mutex_);
    return found_;
  }

  void clear() {
    std::lock_guard lock(mutex_);
    found_.clear();
    count_ = 0;
  }

 private:
  static constexpr size_t kMaxTexts = 1000;
  static constexpr size_t kManyAccesses = 64;

  static void merge(VectorClock& into, const VectorClock& from) {
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
  }

  VectorClock& clock_of(int slot) {
    if (clocks_.empty()) clocks_.assign(num_devices * kStreams, VectorClock(num_devices * kStreams));
    return clocks_[slot];
  }

  VectorClock& host_clock() {
    if (host_.empty()) host_.assign(num_devices * kStreams, 0);
    return host_;
  }

  static std::string text(const Access& access) {
    return std::string(access.is_write ? "the write" : "the read") + " by " + access.what +
           " on " + StreamId::of_slot(access.slot).name();
  }

  std::string conflict(const AccessLog& log, const Access& now, const VectorClock& clock,
                       const std::string& where, const std::string& memory) {
    for (const Access& old : log.accesses) {
      const bool overlap = old.begin < now.end && now.begin < old.end;
      if (!overlap || !(old.is_write || now.is_write) || old.slot == now.slot) continue;
      if (clock[old.slot] >= old.time) continue;
      return remember(std::string(now.is_write ? "the write" : "the read") + " by " + now.what +
                      " on " + where + " is not ordered after " + text(old) + ": bytes " +
                      std::to_string(std::max(old.begin, now.begin)) + " to " +
                      std::to_string(std::min(old.end, now.end)) + " of a block on " + memory);
    }
    return {};
  }

  // An access that is ordered before `now`, and lies within it, says nothing that `now` does not.
  void forget_covered(AccessLog& log, const Access& now) {
    const VectorClock& clock = clock_of(now.slot);
    const bool many = log.accesses.size() > kManyAccesses;
    std::erase_if(log.accesses, [&](const Access& old) {
      if (many && host_clock()[old.slot] >= old.time) return true;  // nothing can race with it
      const bool within = now.begin <= old.begin && old.end <= now.end;
      const bool stronger = now.is_write || (!old.is_write && old.slot == now.slot);
      return within && stronger && clock[old.slot] >= old.time;
    });
  }

  std::string remember(const std::string& text) {
    ++count_;
    if (found_.size() < kMaxTexts) found_.push_back(text);
    return text;
  }

  static void report(const std::string& text) {
    TORCH_CHECK(settings.races != kRacesRaise, "vgpu race: ", text);
  }

  std::mutex mutex_;
  std::vector<VectorClock> clocks_;
  VectorClock host_;
  std::vector<std::string> found_;
  std::atomic<uint64_t> count_{0};
};

inline RaceDetector& races = *new RaceDetector();

}  // namespace vgpu
