// What a CUTLASS program outside this project writes to run a grouped GEMM: kernel type, arguments,
// adapter.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

namespace outside {

using namespace cute;

using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using ClusterShape = Shape<_1, _1, _1>;

template <class ElementA, class ElementB, class ElementD, class LayoutD, class TileShape,
          class EpilogueTile, class EpilogueSchedule, class FusionOperation, class MainloopSchedule>
struct GroupedGemm {
  static constexpr int kAlignmentD = 128 / cutlass::sizeof_bits<ElementD>::value;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape, EpilogueTile,
      float, float, void, LayoutD*, kAlignmentD, ElementD, LayoutD*, kAlignmentD, EpilogueSchedule,
      FusionOperation>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, ElementA, cutlass::layout::RowMajor*,
      16, ElementB, cutlass::layout::ColumnMajor*, 16, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(
          typename CollectiveEpilogue::SharedStorage)>,
      MainloopSchedule>::CollectiveOp;

  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static_assert(Kernel::SharedStorageSize <= 101376);
  static_assert(CollectiveMainloop::DispatchPolicy::Stages >= 2);

  // Instantiates kernel and host side; never run in CI, which has no GPU.
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

}  // namespace outside
