/// A ring of stages in shared memory between two producers and the MMA warps. How many stages there are
/// is known at run time: short tiles have more of them.
///
/// A stage is full when its bytes have landed and all producers have arrived, and empty when every
/// reader warp has released it: warp by warp, no barrier among the readers.
#pragma once

#include <cstdint>

#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <sm12x/arch/copy.hpp>

namespace sm12x::kernel {

template <int MostStages>
class StageRing {
 public:
  using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
  using EmptyBarrier = cutlass::arch::ClusterBarrier;

  struct Storage {
    FullBarrier full[MostStages];
    EmptyBarrier empty[MostStages];
  };

  /// A stage, and how often the ring has come round (modulo 2).
  struct State {
    uint32_t index = 0;
    uint32_t phase = 0;
  };

  __device__ explicit StageRing(Storage& storage) : storage_(storage) {}

  /// One thread, before the CTA's first barrier: mbarriers are made by uniform instructions, which for a warp's lanes
  /// come one after the other, with a fence each. Arrivals: of the producers, for one stage.
  __device__ void init(uint32_t producer_arrivals, uint32_t reader_warps) {
#pragma unroll
    for (int stage = 0; stage < MostStages; ++stage) {
      storage_.full[stage].init(producer_arrivals);
      storage_.empty[stage].init(reader_warps);
    }
    cutlass::arch::fence_barrier_init();
  }

  __device__ void set_stages(uint32_t stages) { stages_ = stages; }
  __device__ uint32_t stages() const { return stages_; }

  /// Where producers begin: all stages count as released.
  __device__ static State producer_start() { return {0, 1}; }

  __device__ void advance(State& state) const {
    if (++state.index == stages_) {
      state.index = 0;
      state.phase ^= 1;
    }
  }

  /// By so many stages at once.
  __device__ void advance(State& state, uint32_t count) const {
    state.index += count;
    while (state.index >= stages_) {
      state.index -= stages_;
      state.phase ^= 1;
    }
  }

  //
  // Producers
  //

  __device__ void wait_empty(State const& state) { storage_.empty[state.index].wait(state.phase); }

  /// One arrival, and bytes to wait for.
  __device__ void arrive_and_expect(State const& state, uint32_t bytes) {
    storage_.full[state.index].arrive_and_expect_tx(bytes);
  }

  /// One arrival without bytes.
  __device__ void arrive_full(State const& state) { storage_.full[state.index].arrive(); }

  __device__ uint32_t full_barrier(State const& state) const {
    return arch::shared_address(&storage_.full[state.index]);
  }

  //
  // Readers
  //

  __device__ void wait_full(State const& state) { storage_.full[state.index].wait(state.phase); }

  /// Hands the stage back. A whole warp. `loaded` depends on all that it has read from the stage; 0 where
  /// plain stores will write it, which queue behind loads.
  __device__ void release(State const& state, uint32_t loaded) {
    if (cute::elect_one_sync()) {
      arch::arrive_once_loaded(arch::shared_address(&storage_.empty[state.index]), loaded);
    }
  }

 private:
  Storage& storage_;
  uint32_t stages_ = MostStages;
};

}  // namespace sm12x::kernel
