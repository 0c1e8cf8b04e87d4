// Links between memories, and the buses that links share: how long a transfer takes.
//
// Speeds are shared fairly at every moment: two transfers that meet on a bus have half of it each,
// and what one cannot use, since its own link is slower, the others get.
#pragma once

#include "streams.h"

#include <limits>
#include <map>

namespace vgpu {

class Traffic {
 public:
  struct Count {
    uint64_t num_copies = 0, nbytes = 0;
  };

  // Speeds are bytes/s; 0 is infinitely fast. A bus of no name is none.
  void set_link(int source, int target, double speed, const std::string& bus) {
    change([&] {
      links_[{source, target}].speed = speed;
      links_[{source, target}].bus = bus.empty() ? nullptr : &buses_[bus];
    });
  }

  void set_bus(const std::string& name, double speed) {
    change([&] { buses_[name].speed = speed; });
  }

  void clear_links() {
    change([&] {
      for (auto& [ends, link] : links_) link.speed = 0, link.bus = nullptr;
      for (auto& [name, bus] : buses_) bus.speed = 0;
    });
  }

  void count(int source, int target, uint64_t nbytes) {
    std::lock_guard lock(mutex_);
    Count& count = counts_[{source, target}];
    ++count.num_copies;
    count.nbytes += nbytes;
  }

  Count count_of(int source, int target) {
    std::lock_guard lock(mutex_);
    return counts_[{source, target}];
  }

  void clear_counts() {
    std::lock_guard lock(mutex_);
    counts_.clear();
  }

  // Take as long as the bytes do on their link: `prepare` as it begins, and `move` so late that it
  // ends with them, as this machine's memory is known to be. Throws where an end is lost on the way.
  template <typename Prepare, typename Move>
  void carry(int source, int target, size_t nbytes, Prepare&& prepare, Move&& move) {
    std::unique_lock lock(mutex_);
    const auto found = links_.find({source, target});
    if (found == links_.end()) {
      lock.unlock();
      prepare();
      move();
      return;
    }
    Transfer transfer{double(nbytes), &found->second};
    advance();
    transfers_.push_back(&transfer);
    share();
    lock.unlock();
    prepare();
    lock.lock();
    advance();
    const double seconds = double(nbytes) / move_speed_;
    wait(lock, transfer, source, target, seconds);
    const bool moves = !is_cut(source, target);
    if (moves) {
      lock.unlock();
      const Clock::time_point began = Clock::now();
      move();
      const double took = std::chrono::duration<double>(Clock::now() - began).count();
      lock.lock();
      if (nbytes >= kMeasured && took > 0) move_speed_ += (nbytes / took - move_speed_) / 4;
      advance();
      wait(lock, transfer, source, target, 0);
    }
    std::erase(transfers_, &transfer);
    share();
    lock.unlock();
    for (int end : {source, target}) {
      if (end != kHost) check_usable(end);
    }
  }

  void wake() {
    std::lock_guard lock(mutex_);
    changed_.notify_all();
  }

 private:
  struct Road {
    double speed = 0;
    // while rates are worked out:
    double left = 0;
    int users = 0;
  };
  struct Link : Road {
    Road* bus = nullptr;  // buses are never removed
  };
  struct Transfer {
    double remaining;  // bytes
    Link* link;
    double rate = 0;
    bool has_rate = false;
  };
  using Ends = std::pair<int, int>;
  static constexpr double kInfinite = std::numeric_limits<double>::infinity();

  static bool is_cut(int source, int target) {
    auto lost = [](int memory) { return memory != kHost && devices[memory].lost; };
    return lost(source) || lost(target) || is_stopping;
  }

  template <typename Change>
  void change(Change&& apply) {
    std::lock_guard lock(mutex_);
    advance();
    apply();
    share();
  }

  // Move the bytes of the time that has passed, up to now; a transfer that ends on the way leaves
  // its share to the others from that moment on, even if its thread wakes later.
  void advance() {
    const Clock::time_point now = Clock::now();
    for (;;) {
      double step = std::chrono::duration<double>(now - now_).count();
      bool one_ends = false;
      for (const Transfer* transfer : transfers_) {
        if (transfer->remaining <= 0) continue;
        const double needed = transfer->remaining / transfer->rate;
        if (needed <= step) step = needed, one_ends = true;
      }
      for (Transfer* transfer : transfers_) {
        transfer->remaining -= transfer->rate == kInfinite ? transfer->remaining
                                                           : transfer->rate * step;
        if (transfer->remaining < kCrumb) transfer->remaining = 0;
      }
      if (!one_ends) break;
      now_ += duration(step);
      share();
    }
    now_ = now;
  }

  // Wait until what is left of a transfer takes no longer than so many seconds.
  void wait(std::unique_lock<std::mutex>& lock, const Transfer& transfer, int source, int target,
            double seconds) {
    while (transfer.remaining > 0 && transfer.rate != kInfinite && !is_cut(source, target)) {
      const double left = transfer.remaining / transfer.rate - seconds;
      if (left <= 0) break;
      changed_.wait_until(lock, now_ + duration(left));
      advance();
    }
  }

  static constexpr size_t kMeasured = 1 << 20;  // bytes: less says little of the memory's speed
  static constexpr double kCrumb = 1e-3;  // bytes: below what rounding leaves

  // Max-min fair rates: the road that is most crowded fixes the share of its users, and so on.
  void share() {
    std::vector<Transfer*> open;
    for (Transfer* transfer : transfers_) {
      transfer->rate = kInfinite;
      transfer->has_rate = false;
      if (transfer->remaining > 0) open.push_back(transfer);
    }
    for (Transfer* transfer : open) {
      for (Road* road : roads(*transfer)) road->left = road->speed, road->users = 0;
    }
    for (Transfer* transfer : open) {
      for (Road* road : roads(*transfer)) ++road->users;
    }
    while (Road* narrow = narrowest(open)) {
      const double rate = narrow->left / narrow->users;
      for (Transfer* transfer : open) {
        const auto used = roads(*transfer);
        if (transfer->has_rate || !std::count(used.begin(), used.end(), narrow)) continue;
        transfer->rate = rate;
        transfer->has_rate = true;
        for (Road* road : used) road->left -= rate, --road->users;
      }
    }
    changed_.notify_all();
  }

  static std::vector<Road*> roads(const Transfer& transfer) {
    std::vector<Road*> found;
    if (transfer.link->speed > 0) found.push_back(transfer.link);
    if (transfer.link->bus && transfer.link->bus->speed > 0) found.push_back(transfer.link->bus);
    return found;
  }

  static Road* narrowest(const std::vector<Transfer*>& open) {
    Road* narrow = nullptr;
    for (const Transfer* transfer : open) {
      if (transfer->has_rate) continue;
      for (Road* road : roads(*transfer)) {
        if (!narrow || road->left / road->users < narrow->left / narrow->users) narrow = road;
      }
    }
    return narrow;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  double move_speed_ = 8e9;  // bytes/s of this machine's own memory, as seen
  std::map<Ends, Link> links_;
  std::map<std::string, Road> buses_;
  std::map<Ends, Count> counts_;
  std::vector<Transfer*> transfers_;
  Clock::time_point now_ = Clock::now();  // up to when bytes have been moved
};

inline Traffic& traffic = *new Traffic();

}  // namespace vgpu
