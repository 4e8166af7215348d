/// Hands pieces of work, through shared memory, from the warp of a CTA that finds them to all that need
/// them: finding one takes a thousand cycles, of which there are none to spare before the first load.
#pragma once

#include <cstdint>

#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <sm12x/kernel/stage_ring.hpp>

namespace sm12x::kernel {

/// Work: a struct of 16-byte chunks. Slots: how far the finder may be ahead of the slowest reader.
template <class Work, int Slots>
class WorkQueue {
 public:
  using Ring = StageRing<Slots>;
  using State = typename Ring::State;
  static_assert(alignof(Work) == 16, "read 16 bytes at a time");

  struct Storage {
    Work work[Slots];
    typename Ring::Storage ring;
  };

  __device__ explicit WorkQueue(Storage& storage) : storage_(storage), ring_(storage.ring) {}

  /// One thread, before the CTA's first barrier.
  __device__ void init(uint32_t reader_warps) { ring_.init(1, reader_warps); }

  /// One thread of the finder. `at` begins at producer_start(); the caller advances it.
  __device__ void put(State const& at, Work const& work) {
    ring_.wait_empty(at);
    storage_.work[at.index] = work;
    ring_.arrive_full(at);
  }
  __device__ void advance(State& at) const { ring_.advance(at); }

  /// Both, by a whole warp.
  __device__ void hand_on(State& at, Work const& work) {
    if (cute::elect_one_sync()) {
      put(at, work);
    }
    __syncwarp();
    advance(at);
  }

  /// Each reader, a whole warp. `at` begins at State{}.
  __device__ Work take(State& at) {
    ring_.wait_full(at);
    Work const work = storage_.work[at.index];
    __syncwarp();
    ring_.release(at, 0);
    ring_.advance(at);
    return work;
  }

 private:
  Storage& storage_;
  Ring ring_;
};

}  // namespace sm12x::kernel
