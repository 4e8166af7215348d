/// Schedule tags and the main loop's dispatch policy.
#pragma once

#include <cute/container/tuple.hpp>
#include <cute/layout.hpp>
#include <cutlass/arch/arch.h>
#include <cutlass/gemm/dispatch_policy.hpp>

namespace sm12x {

/// Which FP8 tensor-core instruction the main loop issues. Results are the same to the bit of the accumulation.
enum class MmaKind {
  kUnitScale,  ///< block-scaled MMA with unit scales: full rate on every SM12x part
  kPlain,      ///< plain f8f6f4 MMA: half rate on GeForce parts
};

/// Kernel schedule tags of our own. They derive from nothing of CUTLASS's, so that no builder of any CUTLASS version
/// claims them. SchedulerStages is CUTLASS's SchedulerPipelineStageCount; its group scheduler has a fixed depth of 8.
template <int SchedulerStages = 2, MmaKind Kind = MmaKind::kUnitScale>
struct KernelPtrArrayCooperative {};

template <int SchedulerStages = 2, MmaKind Kind = MmaKind::kUnitScale>
struct KernelPtrArrayPingpong {};

/// Dispatch policy of sm12x's ptr-array main loop. Schedule is CUTLASS's tag and picks CUTLASS's kernel shell.
template <int Stages_, class ClusterShape_, class Schedule_>
struct MainloopPtrArrayTmaWarpSpecialized {
  static constexpr int Stages = Stages_;
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

template <int Stages, MmaKind Kind>
struct ScheduleTraits<KernelPtrArrayCooperative<Stages, Kind>> {
  static constexpr bool kOwn = true;
  static constexpr bool kUpstream = false;
  static constexpr bool kCooperative = true;
  static constexpr MmaKind kMma = Kind;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>;
};

template <int Stages, MmaKind Kind>
struct ScheduleTraits<KernelPtrArrayPingpong<Stages, Kind>> {
  static constexpr bool kOwn = true;
  static constexpr bool kUpstream = false;
  static constexpr bool kCooperative = false;
  static constexpr MmaKind kMma = Kind;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>;
};

template <int Stages>
struct ScheduleTraits<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>> {
  static constexpr bool kOwn = false;
  static constexpr bool kUpstream = true;
  static constexpr bool kCooperative = true;
  static constexpr MmaKind kMma = MmaKind::kUnitScale;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<Stages>;
};

template <int Stages>
struct ScheduleTraits<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>> {
  static constexpr bool kOwn = false;
  static constexpr bool kUpstream = true;
  static constexpr bool kCooperative = false;
  static constexpr MmaKind kMma = MmaKind::kUnitScale;
  using Shell = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<Stages>;
};

}  // namespace detail
}  // namespace sm12x
