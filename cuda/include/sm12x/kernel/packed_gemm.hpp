/// The kernel layer of the family fp8_packed: grouped FP8 GEMM over stacked weights, one launch a call.
///
/// Weights come through one 3-D tensor map, rows through another or, where a row index says which,
/// through 16-byte copies into the same swizzled layout. Nothing is rewritten, prepared or padded.
///
/// Roles, one warp each but for the MMA warps; every role finds its own work (packed_scheduler.hpp), so
/// none waits for another's answer:
///   warp 0    weights: TMA
///   warp 1    tokens: TMA, or cp.async by all lanes
///   others    MMA and epilogue; with two MMA groups (pingpong) they take the CTA's tiles in turns, and
///             one group's epilogue hides behind the other's main loop
/// Registers: at most 65,536 / threads, for all roles alike (no setmaxnreg): 192 threads 255, 320
/// threads 204 (rounded down to 200 by the launch bound).
///
/// A stage is complete when its bytes have landed and both producers have arrived; it is empty when
/// every MMA warp of the group that reads it has released it.
#pragma once

#include <cstdint>

#include <cutlass/cutlass.h>
#include <sm12x/abi.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/grid.hpp>
#include <sm12x/collective/limits.hpp>
#include <sm12x/collective/pipeline.hpp>
#include <sm12x/collective/warp_tile.hpp>
#include <sm12x/epilogue/row_store.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>
#include <sm12x/kernel/split_k.hpp>

namespace sm12x::kernel {

/// What a variant chooses. Tile M, N on the kernel's own sides: under swap_ab M is features. Warps M, N:
/// how one MMA group's warps divide the tile.
template <class Mma_, int TileM_, int TileN_, int TileK_, bool SwapAb_, int WarpsM_, int WarpsN_,
          int MmaGroups_, bool Pdl_>
struct PackedConfig {
  using Mma = Mma_;
  static constexpr int kTileM = TileM_;
  static constexpr int kTileN = TileN_;
  static constexpr int kTileK = TileK_;
  static constexpr bool kSwapAb = SwapAb_;
  static constexpr int kWarpsM = WarpsM_;
  static constexpr int kWarpsN = WarpsN_;
  static constexpr int kMmaGroups = MmaGroups_;
  static constexpr bool kPdl = Pdl_;
};

template <class Config>
class PackedGemm {
 public:
  // -----------------------------------------------------------------------------------------------
  // Compile-time checks and types
  // -----------------------------------------------------------------------------------------------

  using Params = sm12x_packed_params;
  static constexpr int kTokens = Config::kSwapAb ? Config::kTileN : Config::kTileM;
  static constexpr int kFeatures = Config::kSwapAb ? Config::kTileM : Config::kTileN;
  static constexpr int kTileK = Config::kTileK;
  static constexpr int kAtomsM = Config::kTileM / Config::kWarpsM / 16;
  static constexpr int kAtomsN = Config::kTileN / Config::kWarpsN / 8;
  static_assert(kAtomsM * Config::kWarpsM * 16 == Config::kTileM);
  static_assert(kAtomsN * Config::kWarpsN * 8 == Config::kTileN);
  static_assert(kTokens <= 256 && kFeatures <= 256, "a side of a TMA box is at most 256");

  static constexpr int kProducerWarps = 2;
  static constexpr int kGroupWarps = Config::kWarpsM * Config::kWarpsN;
  static constexpr int kMmaWarps = kGroupWarps * Config::kMmaGroups;
  static constexpr int kThreads = 32 * (kProducerWarps + kMmaWarps);

  static constexpr int kWeightBytes = kFeatures * kTileK;
  static constexpr int kTokenBytes = kTokens * kTileK;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  static constexpr int kSwizzleAtom = 8 * kTileK;  // bytes after which TMA's swizzle repeats
  static_assert(kWeightBytes % kSwizzleAtom == 0 && kTokenBytes % kSwizzleAtom == 0);
  static constexpr int kBarrierBytes = 20;  // of one stage: full, empty, word
  static constexpr int kStages = (detail::kSharedMemoryBytes - 64) / (kStageBytes + kBarrierBytes);
  static_assert(kStages >= 2);

  using Pipeline = collective::PipelineTmaWarpRelease<kStages>;
  using State = typename Pipeline::PipelineState;
  using Schedule = PackedSchedule<kTokens, kFeatures, kTileK>;
  using Tile = collective::WarpTile<typename Config::Mma, kAtomsM, kAtomsN, kTileK>;
  using Accumulators = typename Tile::Accumulators;
  static constexpr int kValues = kAtomsM * kAtomsN * 4;
  using Split = SplitK<kValues, kMmaWarps>;
  using Store = epilogue::RowStore<Config::kSwapAb, kAtomsM, kAtomsN>;

  // -----------------------------------------------------------------------------------------------
  // Shared memory
  // -----------------------------------------------------------------------------------------------

  struct alignas(1024) SharedMemory {
    char stages[kStages][kStageBytes];  // weights, then tokens
    typename Pipeline::SharedStorage pipeline;
  };
  static_assert(sizeof(SharedMemory) <= detail::kSharedMemoryBytes,
                "the kernel needs more shared memory than a block of SM12x may use");

  // -----------------------------------------------------------------------------------------------
  // Roles
  // -----------------------------------------------------------------------------------------------

  __device__ static void load_weights(Params const& params, SharedMemory& shared,
                                      Pipeline& pipeline) {
    Schedule schedule(params);
    PackedWork work;
    State state = cutlass::make_producer_start_state<Pipeline>();
    while (schedule.next(work)) {
      for (int k = work.k_begin; k < work.k_end; ++k) {
        if (threadIdx.x % 32 == 0) {
          pipeline.producer_acquire(state);
          arch::load_box(&params.map_b, barrier_of(pipeline, state),
                         arch::shared_address(shared.stages[state.index()]), k * kTileK,
                         work.tile.feature, work.tile.group);
        }
        ++state;
      }
    }
  }

  __device__ static void load_tokens(Params const& params, SharedMemory& shared,
                                     Pipeline& pipeline) {
    Schedule schedule(params);
    PackedWork work;
    State state = cutlass::make_producer_start_state<Pipeline>();
    bool const masked = params.row_layout == SM12X_ROWS_MASKED;
    while (schedule.next(work)) {
      for (int k = work.k_begin; k < work.k_end; ++k) {
        if (threadIdx.x % 32 == 0) {
          pipeline.producer_acquire(state);
          arch::load_box(&params.map_a, barrier_of(pipeline, state),
                         arch::shared_address(shared.stages[state.index()]) + kWeightBytes,
                         k * kTileK, work.tile.row, masked ? work.tile.group : 0);
        }
        ++state;
      }
    }
  }

  // The same into the same places, row by row. Lanes lie along k first: 16 bytes each.
  __device__ static void gather_tokens(Params const& params, SharedMemory& shared,
                                       Pipeline& pipeline) {
    constexpr int kChunks = kTileK / 16;
    constexpr int kRowsAtOnce = 32 / kChunks;
    constexpr int kRows = kTokens / kRowsAtOnce;  // of one lane
    static_assert(kRows * kRowsAtOnce == kTokens);
    int const lane = threadIdx.x % 32;
    int const chunk = lane % kChunks;
    int const row_in_tile = lane / kChunks;
    Schedule schedule(params);
    PackedWork work;
    State state = cutlass::make_producer_start_state<Pipeline>();
    auto const* const a = reinterpret_cast<char const*>(params.a);
    while (schedule.next(work)) {
      int rows[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int const row = row_in_tile + i * kRowsAtOnce;
        rows[i] = row < work.tile.rows ? int(indexed_row(params, work.tile.row + row)) : -1;
      }
      for (int k = work.k_begin; k < work.k_end; ++k) {
        pipeline.producer_wait(state);
        uint32_t const to = arch::shared_address(shared.stages[state.index()]) + kWeightBytes;
        int const at = k * kTileK + chunk * 16;
        bool const inside = at < params.k;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          bool const valid = inside && rows[i] >= 0;
          arch::copy_16_bytes(to + Tile::swizzled(row_in_tile + i * kRowsAtOnce, chunk),
                              valid ? a + rows[i] * params.stride_a + at : a, valid);
        }
        arch::arrive_on_copies(barrier_of(pipeline, state));
        ++state;
      }
    }
  }

  __device__ static void multiply(Params const& params, SharedMemory& shared, Pipeline& pipeline,
                                  int mma_warp) {
    int const mma_group = mma_warp / kGroupWarps;
    int const warp_m = mma_warp % kGroupWarps % Config::kWarpsM;
    int const warp_n = mma_warp % kGroupWarps / Config::kWarpsM;
    int const at_m = warp_m * kAtomsM * 16;
    int const at_n = warp_n * kAtomsN * 8;
    uint32_t const weights = arch::shared_address(shared.stages);
    uint32_t const tokens = weights + kWeightBytes;
    typename Tile::Stages const stages = {Config::kSwapAb ? weights : tokens,
                                          Config::kSwapAb ? tokens : weights, kStageBytes};
    Tile const tile(at_m, at_n);
    Split const split(params, mma_warp);
    Schedule schedule(params);
    PackedWork work;
    State state;
    int turn = 0;
    int const k_tiles = int(schedule.k_tiles());
    int const blocks_of_last =
        (params.k - (k_tiles - 1) * kTileK + Tile::kBlockK - 1) / Tile::kBlockK;
    while (schedule.next(work)) {
      int const count = work.k_end - work.k_begin;
      if constexpr (Config::kMmaGroups > 1) {
        if (turn++ % Config::kMmaGroups != mma_group) {
          state.advance(count);
          continue;
        }
      }
      Store const store(params, work.tile, Config::kSwapAb ? at_n : at_m,
                        Config::kSwapAb ? at_m : at_n);
      Accumulators accumulators = {};
      int const last_blocks = work.k_end == k_tiles ? blocks_of_last : Tile::kBlocks;
      run<2>(tile, pipeline, state, stages, count, last_blocks, work.tile.rows, accumulators);
      if (count < k_tiles) {
        uint32_t const first = schedule.run_of(work.first_unit);
        uint32_t const last = schedule.run_of(work.first_unit + k_tiles - 1);
        if (!split.finishes(first, last, blockIdx.x,
                            reinterpret_cast<float (&)[kValues]>(accumulators))) {
          continue;
        }
      }
      store.store(accumulators);
    }
  }

  // -----------------------------------------------------------------------------------------------
  // Body
  // -----------------------------------------------------------------------------------------------

  __device__ static void body(Params const& params, SharedMemory& shared) {
    int const warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    bool const gathers = params.row_index != 0;
    if (threadIdx.x == 0) {
      arch::prefetch_tensor_map(&params.map_b);
      if (!gathers) {
        arch::prefetch_tensor_map(&params.map_a);
      }
    }
    typename Pipeline::Params pipeline_params;
    pipeline_params.transaction_bytes = warp == 0 ? kWeightBytes : kTokenBytes;
    pipeline_params.num_consumers = 32 * kGroupWarps;
    pipeline_params.producer_arrivals = 1 + (gathers ? 32 : 1);
    Pipeline pipeline(shared.pipeline, pipeline_params,
                      cute::Shape<cute::_1, cute::_1, cute::_1>{});
    __syncthreads();
    if constexpr (Config::kPdl) {
      arch::wait_on_prerequisite_grids();
      arch::launch_dependent_grids();
    }
    if (warp == 0) {
      load_weights(params, shared, pipeline);
    } else if (warp == 1) {
      if (gathers) {
        gather_tokens(params, shared, pipeline);
      } else {
        load_tokens(params, shared, pipeline);
      }
    } else {
      multiply(params, shared, pipeline, warp - kProducerWarps);
    }
  }

 private:
  __device__ static uint32_t barrier_of(Pipeline& pipeline, State const& state) {
    return arch::shared_address(pipeline.producer_get_barrier(state));
  }

  // A swapped tile of many tokens computes only the atoms that hold the group's, in steps of two.
  template <int ActiveN>
  __device__ static void run(Tile const& tile, Pipeline& pipeline, State& state,
                             typename Tile::Stages const& stages, int count, int last_blocks,
                             int rows, Accumulators& accumulators) {
    if constexpr (!Config::kSwapAb || kAtomsN < 8 || ActiveN >= kAtomsN) {
      tile.run(pipeline, state, stages, count, last_blocks, accumulators);
    } else if (rows <= ActiveN * 8) {
      tile.template run<ActiveN>(pipeline, state, stages, count, last_blocks, accumulators);
    } else {
      run<ActiveN + 2>(tile, pipeline, state, stages, count, last_blocks, rows, accumulators);
    }
  }
};

}  // namespace sm12x::kernel
