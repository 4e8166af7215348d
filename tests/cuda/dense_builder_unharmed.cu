// Switching the dense SM120 builder off for ptr-array tags leaves it on for dense ones.
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

using namespace cute;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, cutlass::float_e4m3_t,
    cutlass::layout::RowMajor, 16, cutlass::float_e4m3_t, cutlass::layout::ColumnMajor, 16, float,
    Shape<_128, _128, _128>, Shape<_1, _1, _1>, cutlass::gemm::collective::StageCount<2>,
    cutlass::gemm::collective::KernelScheduleAuto>::CollectiveOp;

static_assert(cute::is_same_v<typename Mainloop::DispatchPolicy,
                              cutlass::gemm::MainloopSm120TmaWarpSpecialized<
                                  2, 2, Shape<_1, _1, _1>,
                                  cutlass::gemm::KernelTmaWarpSpecializedCooperativeSm120<2>>>,
              "the dense builder no longer resolves as in CUTLASS alone");
