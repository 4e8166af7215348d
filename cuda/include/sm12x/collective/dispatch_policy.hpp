/// Schedule tags and the main loop's dispatch policy.
#pragma once

#include <cute/container/tuple.hpp>
#include <cute/layout.hpp>
#include <cutlass/arch/arch.h>
#include <cutlass/gemm/dispatch_policy.hpp>

namespace sm12x {

/// Which FP8 tensor-core instruction the main loop issues. Results are the same to the bit of the
/// accumulation.
enum class MmaKind {
  kUnitScale,  ///< block-scaled MMA with unit scales: full rate on every SM12x part
  kPlain,      ///< plain f8f6f4 MMA: half rate on GeForce parts
};

/// Kernel schedule tags of our own. They derive from nothing of CUTLASS's, so that no builder of
/// any CUTLASS version claims them. SchedulerStages is CUTLASS's SchedulerPipelineStageCount; its
/// group scheduler has a fixed depth of 8.
///
/// SkipEmptyColumns: a tile computes only the columns inside the group's N, in steps of one MMA atom
/// per warp. For swapped operands, where N is tokens and a tile must be wide enough for the busiest
/// expert; the main loop's code is there once for every step.
template <int SchedulerStages = 2, MmaKind Kind = MmaKind::kUnitScale,
          bool SkipEmptyColumns = false>
struct KernelPtrArrayCooperative {};

template <int SchedulerStages = 2, MmaKind Kind = MmaKind::kUnitScale,
          bool SkipEmptyColumns = false>
struct KernelPtrArrayPingpong {};

/// Picks the schedule from the tile: Pingpong for a tile of 64 rows, which Cooperative cannot take,
/// else Cooperative. The tile is what decides speed; ../../../README.md says which to take.
struct KernelScheduleAuto {};

/// Dispatch policy of sm12x's ptr-array main loop. Schedule is CUTLASS's tag and picks CUTLASS's
/// kernel shell.
template <int Stages_, class ClusterShape_, class Schedule_, bool SkipEmptyColumns_ = false>
struct MainloopPtrArrayTmaWarpSpecialized {
  static constexpr int Stages = Stages_;
  static constexpr bool SkipEmptyColumns = SkipEmptyColumns_;
  using ClusterShape = ClusterShape_;
  using Schedule = Schedule_;
  static constexpr int PipelineAsyncMmaStages = 0;
  using ArchTag = cutlass::arch::Sm120;
};

namespace detail {

/// What a schedule tag says: is it one we build for, and with which shell and instruction.
template <class Tag>
struct ScheduleTraits {
  static constexpr bool kOwn = false;
  static constexpr bool kUpstream = false;
};

template <>
struct ScheduleTraits<KernelScheduleAuto> {
  static constexpr bool kOwn = true;
  static constexpr bool kUpstream = false;
};

template <int Stages, MmaKind Kind, bool Skip>
struct ScheduleTraits<KernelPtrArrayCooperative<Stages, Kind, Skip>> {
  static constexpr bool kOwn = true;
  static constexpr bool kUpstream = false;
  static constexpr bool kCooperative = true;
  static constexpr MmaKind kMma = Kind;
  static constexpr bool kSkipEmptyColumns = Skip;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>;
};

template <int Stages, MmaKind Kind, bool Skip>
struct ScheduleTraits<KernelPtrArrayPingpong<Stages, Kind, Skip>> {
  static constexpr bool kOwn = true;
  static constexpr bool kUpstream = false;
  static constexpr bool kCooperative = false;
  static constexpr MmaKind kMma = Kind;
  static constexpr bool kSkipEmptyColumns = Skip;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>;
};

template <int Stages>
struct ScheduleTraits<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>> {
  static constexpr bool kOwn = false;
  // Those whose dense builder ptr_array_builder.hpp switches off.
  static constexpr bool kUpstream = Stages >= 1 && Stages <= 3;
  static constexpr bool kCooperative = true;
  static constexpr MmaKind kMma = MmaKind::kUnitScale;
  static constexpr bool kSkipEmptyColumns = false;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>;
};

template <int Stages>
struct ScheduleTraits<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>> {
  static constexpr bool kOwn = false;
  // Those whose dense builder ptr_array_builder.hpp switches off.
  static constexpr bool kUpstream = Stages >= 1 && Stages <= 3;
  static constexpr bool kCooperative = false;
  static constexpr MmaKind kMma = MmaKind::kUnitScale;
  static constexpr bool kSkipEmptyColumns = false;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>;
};

/// The schedule that a tag stands for, once the tile is known.
template <class Tag, class TileShape>
struct ResolvedSchedule {
  using Type = Tag;
};

template <class TileShape>
struct ResolvedSchedule<KernelScheduleAuto, TileShape> {
  using Type = cute::conditional_t<(cute::size<0>(TileShape{}) < 128), KernelPtrArrayPingpong<>,
                                   KernelPtrArrayCooperative<>>;
};

}  // namespace detail
}  // namespace sm12x
