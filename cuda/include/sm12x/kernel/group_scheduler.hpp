/// Tile scheduler of the shipped ptr-array kernels, for CUTLASS's ptr-array shells.
///
/// Contract: CTA c of G takes tiles c, c + G, c + 2G, ... of all groups' tiles in a row; empty
/// groups have none. A warp looks at 32 groups at once, one per lane. Tile indices are 64-bit,
/// those inside one group 32-bit: 2^32 tiles of one group would need an output larger than any
/// memory.
///
/// Against CUTLASS's own scheduler: no 64-bit division (a call, in code that all warps share), no
/// swizzle and no clusters, and the side that varies fastest is known at compile time.
#pragma once

#include <cstdint>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/sm90_tile_scheduler_group.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace sm12x::kernel {

/// Which side's tiles follow each other.
enum class Raster {
  kAlongM,
  kAlongN
};

/// CUTLASS's grouped problem shape under a name of our own, which selects the scheduler below.
template <Raster kRaster_>
struct GroupProblemShape : cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>> {
  static constexpr Raster kRaster = kRaster_;
};

template <class ProblemShape, int Stages, int TileM, int TileN>
class GroupScheduler {
 public:
  //
  // Types that the shells use
  //

  using Upstream =
      cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Group<ProblemShape, Stages>;
  using WorkTileInfo = typename Upstream::WorkTileInfo;
  using SchedulerResponse = WorkTileInfo;
  using Pipeline = typename Upstream::Pipeline;
  using PipelineStorage = typename Upstream::PipelineStorage;
  using PipelineState = typename Upstream::PipelineState;
  static constexpr bool IsDynamicPersistent = false;

  struct Arguments {};
  struct Params {
    ProblemShape problem_shapes{};
  };

  //
  // Walking the groups: all lanes of a warp call these together
  //

  CUTLASS_DEVICE GroupScheduler(Params const& params, SchedulerResponse* responses)
      : problem_shapes_(params.problem_shapes), responses_(responses), linear_index_(blockIdx.x) {
    load_window();
  }

  template <class ClusterShape>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(ClusterShape) {
    return current_tile();
  }

  /// The scheduler warp: finds the CTA's next tile and publishes it.
  CUTLASS_DEVICE auto advance_to_next_work(Pipeline& pipeline, PipelineState state) {
    linear_index_ += gridDim.x;
    WorkTileInfo const tile = current_tile();
    pipeline.producer_acquire(state);
    if (cute::elect_one_sync()) {
      responses_[state.index()] = tile;
      cutlass::arch::fence_view_async_shared();
      pipeline.producer_commit(state);
    }
    return cute::make_tuple(tile, true);
  }

  /// All other warps: read what the scheduler warp published.
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo, Pipeline& pipeline, PipelineState state) {
    pipeline.consumer_wait(state);
    WorkTileInfo const tile = responses_[state.index()];
    cutlass::arch::fence_view_async_shared();
    pipeline.consumer_release(state);
    return cute::make_tuple(tile, true);
  }

  //
  // Facts about a tile: whole K, no splits
  //

  template <class ProblemShape_MNKL, class TileShape>
  CUTLASS_DEVICE static int get_work_k_tile_count(WorkTileInfo const&,
                                                  ProblemShape_MNKL problem_shape, TileShape) {
    constexpr int kTileK = cute::size<2>(TileShape{});
    return (int(cute::get<2>(problem_shape)) + kTileK - 1) / kTileK;
  }
  CUTLASS_DEVICE static uint32_t get_work_k_tile_start(WorkTileInfo const&) { return 0; }
  CUTLASS_DEVICE static bool valid_warpgroup_in_work_tile(WorkTileInfo const&) { return true; }
  CUTLASS_DEVICE static bool compute_epilogue(WorkTileInfo const&, Params const&) { return true; }
  template <class FrgTensorC>
  CUTLASS_DEVICE static void fixup(Params const&, WorkTileInfo const&, FrgTensorC&, uint32_t,
                                   uint32_t) {}

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  // Counts the tiles of this lane's group and those of the lanes before it.
  CUTLASS_DEVICE void load_window() {
    int const lane = cutlass::canonical_lane_idx();
    int const group = window_ + lane;
    tiles_ = 0;
    minor_tiles_ = 1;
    if (group < problem_shapes_.groups()) {
      auto const shape = problem_shapes_.get_problem_shape(group);
      uint32_t const tiles_m = (uint32_t(cute::get<0>(shape)) + TileM - 1) / TileM;
      uint32_t const tiles_n = (uint32_t(cute::get<1>(shape)) + TileN - 1) / TileN;
      minor_tiles_ = ProblemShape::kRaster == Raster::kAlongM ? tiles_m : tiles_n;
      tiles_ = tiles_m * tiles_n;
    }
    tiles_up_to_ = tiles_;
    CUTLASS_PRAGMA_UNROLL
    for (int distance = 1; distance < cutlass::NumThreadsPerWarp; distance *= 2) {
      uint64_t const before = __shfl_up_sync(kAllLanes, tiles_up_to_, distance);
      tiles_up_to_ += lane >= distance ? before : 0;
    }
  }

  CUTLASS_DEVICE WorkTileInfo current_tile() {
    while (true) {
      uint32_t const lanes_behind =
          __ballot_sync(kAllLanes, linear_index_ < window_start_ + tiles_up_to_);
      if (lanes_behind != 0) {
        int const lane = __ffs(lanes_behind) - 1;
        uint64_t const group_end = window_start_ + __shfl_sync(kAllLanes, tiles_up_to_, lane);
        uint32_t const index =
            uint32_t(linear_index_ - (group_end - __shfl_sync(kAllLanes, tiles_, lane)));
        uint32_t const minor_tiles = __shfl_sync(kAllLanes, minor_tiles_, lane);
        int32_t const major = static_cast<int32_t>(index / minor_tiles);
        int32_t const minor = static_cast<int32_t>(index % minor_tiles);
        if constexpr (ProblemShape::kRaster == Raster::kAlongM) {
          return {minor, major, window_ + lane, 1};
        } else {
          return {major, minor, window_ + lane, 1};
        }
      }
      window_start_ += __shfl_sync(kAllLanes, tiles_up_to_, cutlass::NumThreadsPerWarp - 1);
      window_ += cutlass::NumThreadsPerWarp;
      if (window_ >= problem_shapes_.groups()) {
        return WorkTileInfo::invalid_work_tile();
      }
      load_window();
    }
  }

  ProblemShape problem_shapes_;
  SchedulerResponse* responses_;
  uint64_t linear_index_;      // of this CTA's current tile, over all groups
  uint64_t window_start_ = 0;  // tiles of all groups before the window
  uint64_t tiles_up_to_;       // tiles of the window up to and with this lane's group
  uint32_t tiles_;             // of this lane's group
  uint32_t minor_tiles_;       // of this lane's group, along the side that varies fastest
  int32_t window_ = 0;         // first group of the window
};

}  // namespace sm12x::kernel

namespace cutlass::gemm::kernel::detail {

template <class TileShape, class ClusterShape, uint32_t SchedulerPipelineStageCount,
          ::sm12x::kernel::Raster kRaster>
struct TileSchedulerSelector<GroupScheduler, arch::Sm120, TileShape, ClusterShape,
                             SchedulerPipelineStageCount,
                             ::sm12x::kernel::GroupProblemShape<kRaster>> {
  using Scheduler =
      ::sm12x::kernel::GroupScheduler<::sm12x::kernel::GroupProblemShape<kRaster>,
                                      SchedulerPipelineStageCount, cute::size<0>(TileShape{}),
                                      cute::size<1>(TileShape{})>;
};

}  // namespace cutlass::gemm::kernel::detail
