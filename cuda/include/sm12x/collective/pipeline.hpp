/// A TMA pipeline whose consumers release a stage warp by warp.
///
/// CUTLASS's PipelineTmaAsync counts one arrival per consumer warp group, sent by one thread, so a
/// warp-level main loop must first bring all its warps to a named barrier in every k-tile. Here
/// every warp arrives for itself: the barrier, and with it the lock step of the warps, goes away.
/// Clusters are 1x1x1 on SM12x, so barriers are local.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>
#include <sm12x/arch/copy.hpp>

namespace sm12x::collective {

template <int Stages_>
class PipelineTmaWarpRelease {
 public:
  static constexpr uint32_t Stages = Stages_;
  using PipelineState = cutlass::PipelineState<Stages_>;
  using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
  using EmptyBarrier = cutlass::arch::ClusterBarrier;
  using ProducerBarrierType = FullBarrier::ValueType;

  struct SharedStorage {
    FullBarrier full[Stages_];
    EmptyBarrier empty[Stages_];
    int32_t word[Stages_];  // from the producer to the consumers of the stage
  };

  enum class ThreadCategory {
    NonParticipant,
    Producer,
    Consumer,
    ProducerConsumer
  };

  /// The fields that CUTLASS's kernel shells fill in.
  struct Params {
    uint32_t transaction_bytes = 0;
    ThreadCategory role = ThreadCategory::NonParticipant;
    uint32_t is_leader = 0;
    uint32_t num_consumers = 0;  ///< threads that read one stage
    uint32_t num_producers = 1;
    int initializing_warp = 0;
  };

  /// All threads of the CTA call this; the caller synchronises the CTA before the first use.
  template <class ClusterShape>
  CUTLASS_DEVICE PipelineTmaWarpRelease(SharedStorage& storage, Params params, ClusterShape)
      : storage_(storage), transaction_bytes_(params.transaction_bytes) {
    static_assert(cute::size(ClusterShape{}) == 1,
                  "sm12x: SM12x has no clusters larger than 1x1x1");
    if (cutlass::canonical_warp_idx_sync() == params.initializing_warp && cute::elect_one_sync()) {
      uint32_t const consumer_warps = params.num_consumers / cutlass::NumThreadsPerWarp;
      CUTLASS_PRAGMA_UNROLL
      for (int stage = 0; stage < Stages_; ++stage) {
        storage_.full[stage].init(1);
        storage_.empty[stage].init(consumer_warps);
      }
    }
    cutlass::arch::fence_barrier_init();
  }

  /// Waits until the stage is empty and announces the bytes that will arrive. One thread.
  CUTLASS_DEVICE void producer_acquire(PipelineState state) {
    storage_.empty[state.index()].wait(state.phase());
    storage_.full[state.index()].arrive_and_expect_tx(transaction_bytes_);
  }

  /// Likewise, with a word for the stage's consumers.
  CUTLASS_DEVICE void producer_acquire(PipelineState state, int32_t word) {
    storage_.empty[state.index()].wait(state.phase());
    storage_.word[state.index()] = word;
    storage_.full[state.index()].arrive_and_expect_tx(transaction_bytes_);
  }

  /// The producer's word, between consumer_wait() and consumer_release().
  CUTLASS_DEVICE int32_t consumer_word(PipelineState state) { return storage_.word[state.index()]; }

  CUTLASS_DEVICE ProducerBarrierType* producer_get_barrier(PipelineState state) {
    return reinterpret_cast<ProducerBarrierType*>(&storage_.full[state.index()]);
  }

  /// Waits until every stage has been released, so that nothing is in flight. Changes no phase. One
  /// thread.
  CUTLASS_DEVICE void producer_tail(PipelineState state) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (int stage = 0; stage < Stages_; ++stage) {
      storage_.empty[state.index()].wait(state.phase());
      ++state;
    }
  }

  /// Waits until the stage's bytes have landed. Every consumer thread.
  CUTLASS_DEVICE void consumer_wait(PipelineState state) {
    storage_.full[state.index()].wait(state.phase());
  }

  /// Hands the stage back. A whole warp. `loaded` depends on all that it has read from the stage.
  CUTLASS_DEVICE void consumer_release(PipelineState state, uint32_t loaded) {
    __syncwarp();
    if (cute::elect_one_sync()) {
      arch::arrive_once_loaded(arch::shared_address(&storage_.empty[state.index()]), loaded);
    }
  }

 private:
  SharedStorage& storage_;
  uint32_t transaction_bytes_;
};

}  // namespace sm12x::collective
