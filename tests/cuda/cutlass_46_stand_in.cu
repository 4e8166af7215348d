// With a CUTLASS that calls itself 4.6 sm12x defines nothing that CUTLASS then defines itself, and its own tags build as
// ever. The specialisations below stand for CUTLASS's: were one of them sm12x's too, it would be defined twice here, or
// ambiguous.
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <sm12x/cutlass.hpp>

static_assert(CUTLASS_MAJOR == 4 && CUTLASS_MINOR == 6, "compile with the stand-in's version.h");
static_assert(SM12X_BUILDS_UPSTREAM_TAGS == 0);

namespace stand_in {

struct Mainloop {};
struct Epilogue {};

template <class Tag>
inline constexpr bool is_upstream_v = false;
template <int N>
inline constexpr bool
    is_upstream_v<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<N>> = true;
template <int N>
inline constexpr bool
    is_upstream_v<cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<N>> = true;

}  // namespace stand_in

namespace cutlass::gemm::collective {

// The dense builder leaves the ptr-array tags alone.
namespace detail {
template <>
constexpr bool sm1xx_gemm_is_aligned<float_e4m3_t, 16, float_e4m3_t, 16,
                                     KernelPtrArrayTmaWarpSpecializedCooperativeSm120<2>>() {
  return false;
}
template <>
constexpr bool sm1xx_gemm_is_aligned<float_e5m2_t, 16, float_e4m3_t, 16,
                                     KernelPtrArrayTmaWarpSpecializedPingpongSm120<3>>() {
  return false;
}
}  // namespace detail

template <class ElementA, class LayoutA, int AlignmentA, class ElementB, class LayoutB,
          int AlignmentB, class ElementAccumulator, class TileShape, class ClusterShape,
          class StageCount, class Schedule>
struct CollectiveBuilder<arch::Sm120, arch::OpClassTensorOp, ElementA, LayoutA, AlignmentA,
                         ElementB, LayoutB, AlignmentB, ElementAccumulator, TileShape, ClusterShape,
                         StageCount, Schedule,
                         cute::enable_if_t<::stand_in::is_upstream_v<Schedule>>> {
  using CollectiveOp = ::stand_in::Mainloop;
};

}  // namespace cutlass::gemm::collective

namespace cutlass::epilogue::collective {

template <class OpClass, class TileShape, class ClusterShape, class EpilogueTile,
          class ElementAccumulator, class ElementCompute, class ElementC, class LayoutC,
          int AlignmentC, class ElementD, class LayoutD, int AlignmentD, class Schedule,
          class FusionOperation>
struct CollectiveBuilder<
    arch::Sm120, OpClass, TileShape, ClusterShape, EpilogueTile, ElementAccumulator, ElementCompute,
    ElementC, LayoutC, AlignmentC, ElementD, LayoutD, AlignmentD, Schedule, FusionOperation,
    cute::enable_if_t<cute::is_same_v<Schedule, PtrArrayNoSmemWarpSpecialized>>> {
  using CollectiveOp = ::stand_in::Epilogue;
};

}  // namespace cutlass::epilogue::collective

namespace {

using namespace cute;
using TileShape = Shape<_128, _128, _128>;
using PingpongTile = Shape<_64, _128, _128>;
using ClusterShape = Shape<_1, _1, _1>;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;

template <class ElementA, class Tile, class Schedule>
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, ElementA, Row*, 16, cutlass::float_e4m3_t,
    Column*, 16, float, Tile, ClusterShape, cutlass::gemm::collective::StageCount<2>,
    Schedule>::CollectiveOp;

template <class Schedule>
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, 8,
    cutlass::bfloat16_t, Row*, 8, Schedule>::CollectiveOp;

template <class Collective>
inline constexpr bool is_ours_v =
    is_same_v<typename Collective::DispatchPolicy,
              sm12x::MainloopPtrArrayTmaWarpSpecialized<
                  2, ClusterShape, typename Collective::DispatchPolicy::Schedule>>;

// Upstream names are CUTLASS's.
static_assert(
    is_same_v<Mainloop<cutlass::float_e4m3_t, TileShape,
                       cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeSm120<2>>,
              stand_in::Mainloop>);
static_assert(is_same_v<Mainloop<cutlass::float_e5m2_t, PingpongTile,
                                 cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongSm120<3>>,
                        stand_in::Mainloop>);
static_assert(
    is_same_v<Epilogue<cutlass::epilogue::PtrArrayNoSmemWarpSpecialized>, stand_in::Epilogue>);

// sm12x's names are sm12x's.
static_assert(
    is_ours_v<Mainloop<cutlass::float_e4m3_t, TileShape, sm12x::KernelPtrArrayCooperative<2>>>);
static_assert(
    is_ours_v<Mainloop<cutlass::float_e5m2_t, PingpongTile, sm12x::KernelPtrArrayPingpong<2>>>);
static_assert(is_ours_v<Mainloop<cutlass::float_e4m3_t, PingpongTile, sm12x::KernelScheduleAuto>>);
static_assert(sizeof(typename Epilogue<sm12x::epilogue::PtrArrayDirect>::SharedStorage) > 0);
static_assert(sizeof(typename Epilogue<sm12x::epilogue::PtrArrayTma>::SharedStorage) > 0);

}  // namespace
