// Copies within a device, between the host and a device, and between devices.
#pragma once

#include "compute.h"
#include "guard.h"
#include "links.h"

#include <ATen/ops/empty_strided.h>
#include <c10/util/strides.h>

namespace vgpu {

// The bytes of a dense tensor, and who keeps them alive while a copy is queued.
struct Region {
  int memory = kHost;
  char* data = nullptr;
  size_t nbytes = 0;
  BlockRef block;
  HostBlockRef host;

  explicit Region(const Tensor& tensor)
      : data(static_cast<char*>(tensor.storage().mutable_data()) +
             tensor.storage_offset() * tensor.itemsize()),
        nbytes(tensor.nbytes()) {
    if (tensor.is_privateuseone()) {
      memory = tensor.device().index();
      block = block_of(tensor.storage());
    } else {
      host = pinned.find(data, nbytes);
    }
  }

  bool blocks_host() const { return memory == kHost && !host; }  // pageable

  void log(bool is_write, StreamId stream) const {
    AccessLog* const log = block ? &block->log : host ? &host->log : nullptr;
    if (!log || !races.on()) return;
    const size_t begin = data - (block ? block->data : host->data);
    races.access(*log, begin, begin + nbytes, is_write, stream, "copy",
                 block ? memory_name(memory) : "pinned memory of the host");
  }
};

// Counts a queued copy against the pinned memory that it uses, for as long as it is queued.
class PendingCopy {
 public:
  PendingCopy(HostBlockRef source, HostBlockRef target) : ends_{source, target} {
    for (auto& end : ends_) {
      if (end) ++end->num_pending;
    }
  }
  ~PendingCopy() {
    for (auto& end : ends_) {
      if (end) --end->num_pending;
    }
  }

 private:
  HostBlockRef ends_[2];
};

// The target is poisoned when the transfer begins and filled at its very end, from what the source
// then holds: reading too early, or writing the source too early, shows.
inline void transfer(StreamId stream, const Region& source, const Region& target) {
  random_delay(stream);
  const auto begin = Clock::now();
  traffic.carry(
      source.memory, target.memory, source.nbytes,
      [&] {
        if (settings.poison) std::memset(target.data, kPoison, target.nbytes);
      },
      [&] { std::memcpy(target.data, source.data, source.nbytes); });
  trace.add(stream, "copy", begin, source.nbytes, source.memory, target.memory);
}

inline void push_transfer(StreamId stream, const Region& source, const Region& target) {
  races.advance(stream);
  source.log(false, stream);
  target.log(true, stream);
  auto pending = std::make_shared<PendingCopy>(source.host, target.host);
  queue_of(stream).push([stream, source, target, pending] { transfer(stream, source, target); });
  traffic.count(source.memory, target.memory, source.nbytes);
}

inline bool has_same_layout(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.is_conj() == b.is_conj() &&
         a.is_neg() == b.is_neg() && a.sizes().equals(b.sizes()) &&
         a.strides().equals(b.strides()) && a.is_non_overlapping_and_dense();
}

// A dense tensor on `device` of another's dtype and sizes, and of its strides if those are dense.
inline Tensor dense_twin(const Tensor& like, c10::Device device) {
  const auto contiguous = c10::contiguous_strides(like.sizes());
  return at::empty_strided(
      like.sizes(), like.is_non_overlapping_and_dense() ? like.strides() : contiguous,
      at::TensorOptions(device).dtype(like.scalar_type()));
}

inline void copy_within(const Tensor& source, const Tensor& target) {
  const StreamId stream = current_stream(target.device().index());
  check_usable(stream.device);
  ++totals.operations;
  races.advance(stream);
  log_access(source, false, stream, "aten::copy_");
  log_access(target, true, stream, "aten::copy_");
  Aliases aliases;
  const Tensor from = aliases.add(source, false), to = aliases.add(target, true);
  run({stream, "aten::copy_", [from, to] { to.copy_(from); }, target.nbytes()});
}

// As CUDA: on the source's current stream, between barriers to the target's; the host goes on.
inline void copy_peer(const Tensor& source, const Tensor& target) {
  const StreamId here = current_stream(source.device().index());
  const StreamId there = current_stream(target.device().index());
  check_usable(here.device);
  check_usable(there.device);
  TORCH_CHECK(!settings.refused[here.device][there.device], "vgpu:", here.device,
              " and vgpu:", there.device, " cannot reach each other: copy through the host");
  barrier(there, here);
  push_transfer(here, Region(source), Region(target));
  barrier(here, there);
}

inline void copy_host(const Tensor& source, const Tensor& target, bool non_blocking) {
  const auto& device = source.is_privateuseone() ? source : target;
  const StreamId stream = current_stream(device.device().index());
  check_usable(stream.device);
  const Region from(source), to(target);
  const bool is_pageable = from.blocks_host() || to.blocks_host();
  push_transfer(stream, from, to);
  if (is_pageable) ++totals.pageable_copies;
  if (non_blocking && !is_pageable) return;
  ++totals.host_syncs;
  synchronize(stream);
}

// Between memories only dense bytes of one dtype travel; as with CUDA the source's side converts,
// and the target's side scatters.
inline void copy_between(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (!target.is_non_overlapping_and_dense()) {
    const Tensor dense = dense_twin(target, target.device());
    copy_between(source, dense, non_blocking && target.is_privateuseone());
    target.copy_(dense);
  } else if (!has_same_layout(source, target)) {
    const Tensor converted = dense_twin(target, source.device());
    converted.copy_(source);
    copy_between(converted, target, non_blocking);
  } else if (source.is_privateuseone() && target.is_privateuseone()) {
    copy_peer(source, target);
  } else {
    copy_host(source, target, non_blocking);
  }
}

inline Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  const BelowAutograd guard;
  if (target.is_conj()) return copy_from(source.conj(), target.conj(), non_blocking);
  if (target.is_neg()) return copy_from(source._neg_view(), target._neg_view(), non_blocking);
  TORCH_CHECK(source.layout() == at::kStrided && target.layout() == at::kStrided,
              "vgpu: only strided tensors (copy_)");
  const Tensor expanded =
      source.sizes().equals(target.sizes()) ? source : source.expand(target.sizes());
  if (target.numel() == 0) return target;
  if (source.device() == target.device()) {
    copy_within(expanded, target);
  } else {
    copy_between(expanded, target, non_blocking);
  }
  return target;
}

}  // namespace vgpu
