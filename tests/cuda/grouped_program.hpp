// What a CUTLASS program outside this project writes to run a grouped GEMM: epilogue, main loop,
// kernel, adapter. A Choice names the types; cuda/tools/compile_tests.py writes one from every line
// of matrix.toml.
#pragma once

#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

namespace outside {

template <class Choice>
struct GroupedGemm {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, typename Choice::TileShape,
      typename Choice::ClusterShape, typename Choice::EpilogueTile,
      typename Choice::ElementAccumulator, float, typename Choice::ElementC,
      typename Choice::LayoutC, Choice::kAlignmentC, typename Choice::ElementD,
      typename Choice::LayoutD, Choice::kAlignmentD, typename Choice::EpilogueSchedule,
      typename Choice::Fusion>::CollectiveOp;

  static constexpr int kEpilogueBytes = sizeof(typename CollectiveEpilogue::SharedStorage);
  using StageCount = typename Choice::template StageCount<kEpilogueBytes>;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, typename Choice::ElementA,
      typename Choice::LayoutA, Choice::kAlignmentA, typename Choice::ElementB,
      typename Choice::LayoutB, Choice::kAlignmentB, typename Choice::ElementAccumulator,
      typename Choice::TileShape, typename Choice::ClusterShape, StageCount,
      typename Choice::MainloopSchedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<typename Choice::ProblemShape,
                                                      CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static constexpr int kStages = CollectiveMainloop::DispatchPolicy::Stages;

  // Instantiates kernel and host side.
  static cutlass::Status run(typename Gemm::Arguments const& arguments, void* workspace,
                             cudaStream_t stream) {
    Gemm gemm;
    cutlass::Status status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
      status = gemm.initialize(arguments, workspace, stream);
    }
    return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
  }
};

/// A main loop with another number of stages, past the builder and its limits.
template <class Mainloop, int Stages>
struct WithStages;

template <int OldStages, class ClusterShape, class Schedule, bool SkipEmptyColumns, class... Rest,
          int Stages>
struct WithStages<cutlass::gemm::collective::CollectiveMma<
                      sm12x::MainloopPtrArrayTmaWarpSpecialized<OldStages, ClusterShape, Schedule,
                                                                SkipEmptyColumns>,
                      Rest...>,
                  Stages> {
  using Type = cutlass::gemm::collective::CollectiveMma<
      sm12x::MainloopPtrArrayTmaWarpSpecialized<Stages, ClusterShape, Schedule, SkipEmptyColumns>,
      Rest...>;
};

/// Shared memory that the kernel would take with one stage more.
template <class Choice>
inline constexpr int kBytesWithOneMoreStage = cutlass::gemm::kernel::GemmUniversal<
    typename Choice::ProblemShape,
    typename WithStages<typename GroupedGemm<Choice>::CollectiveMainloop,
                        GroupedGemm<Choice>::kStages + 1>::Type,
    typename GroupedGemm<Choice>::CollectiveEpilogue>::SharedStorageSize;

}  // namespace outside
