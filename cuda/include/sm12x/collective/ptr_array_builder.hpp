/// CollectiveBuilder for SM120 ptr-array (grouped) FP8 GEMM with plain layouts: what
/// NVIDIA/cutlass#3263 asks for.
///
///   tags                                                      CUTLASS < 4.6   CUTLASS >= 4.6
///   sm12x::KernelPtrArray{Cooperative,Pingpong}<...>          this builder    this builder
///   cutlass::gemm::KernelPtrArrayTmaWarpSpecialized
///       {Cooperative,Pingpong}Sm120<N>, N = 1, 2, 3           this builder    CUTLASS's own
///
/// Below 4.6 the dense SM120 builder matches the upstream tags too and then refuses them. It is
/// switched off for exactly those, through its alignment predicate, so that this specialisation is
/// the only match.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/version.h>

#include "sm12x/arch/mma.hpp"
#include "sm12x/collective/dispatch_policy.hpp"
#include "sm12x/collective/ptr_array_mma.hpp"

#define SM12X_CUTLASS_VERSION (CUTLASS_MAJOR * 100 + CUTLASS_MINOR)
#if SM12X_CUTLASS_VERSION < 406
#define SM12X_BUILDS_UPSTREAM_TAGS 1
#else
#define SM12X_BUILDS_UPSTREAM_TAGS 0
#endif

namespace sm12x::detail {

/// Shared memory that one block may use on SM12x.
inline constexpr int kSharedMemoryBytes = 101376;

/// What CUTLASS's ptr-array shells keep beside the tensors: scheduler and pipeline barriers, tensor
/// maps, and the padding that the 1024-byte alignment of the operand tiles can cost.
inline constexpr int kShellBytes = 1536;

/// Room for two 64x32 epilogue tiles in FP32, where the caller did not say what its epilogue takes.
inline constexpr int kDefaultEpilogueBytes = 17408;

template <int Carveout, int StageBytes>
constexpr int stage_count() {
  constexpr int kBarrierBytes = 16;
  return (kSharedMemoryBytes - kShellBytes - Carveout) / (StageBytes + kBarrierBytes);
}

template <int StageBytes, int Stages>
constexpr int stages_of(cutlass::gemm::collective::StageCount<Stages>) {
  return Stages;
}
template <int StageBytes, int Carveout>
constexpr int stages_of(cutlass::gemm::collective::StageCountAutoCarveout<Carveout>) {
  return stage_count<Carveout, StageBytes>();
}
template <int StageBytes>
constexpr int stages_of(cutlass::gemm::collective::StageCountAutoCarveout<0>) {
  return stage_count<kDefaultEpilogueBytes, StageBytes>();
}

template <class Element>
inline constexpr bool is_fp8_v = cute::is_same_v<Element, cutlass::float_e4m3_t> ||
                                 cute::is_same_v<Element, cutlass::float_e5m2_t>;

/// Whether this builder takes the tag. Upstream tags only where the dense builder was switched off.
template <class Tag, class ElementA, int AlignmentA, class ElementB, int AlignmentB>
constexpr bool builds() {
  using Traits = ScheduleTraits<Tag>;
  return Traits::kOwn || (SM12X_BUILDS_UPSTREAM_TAGS && Traits::kUpstream && is_fp8_v<ElementA> &&
                          is_fp8_v<ElementB> && AlignmentA == 16 && AlignmentB == 16);
}

template <MmaKind Kind, class ElementA, class ElementB>
using MmaOp =
    cute::conditional_t<Kind == MmaKind::kUnitScale, arch::UnitScaleMma<ElementA, ElementB>,
                        arch::PlainMma<ElementA, ElementB>>;

}  // namespace sm12x::detail

namespace cutlass::gemm::collective {

#if SM12X_BUILDS_UPSTREAM_TAGS
namespace detail {
#define SM12X_SWITCH_OFF_DENSE(A, B, TAG)                     \
  template <>                                                 \
  constexpr bool sm1xx_gemm_is_aligned<A, 16, B, 16, TAG>() { \
    return false;                                             \
  }
#define SM12X_SWITCH_OFF_DENSE_TAGS(A, B)                                           \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedCooperativeSm120<1>) \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedCooperativeSm120<2>) \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedCooperativeSm120<3>) \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedPingpongSm120<1>)    \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedPingpongSm120<2>)    \
  SM12X_SWITCH_OFF_DENSE(A, B, KernelPtrArrayTmaWarpSpecializedPingpongSm120<3>)
SM12X_SWITCH_OFF_DENSE_TAGS(float_e4m3_t, float_e4m3_t)
SM12X_SWITCH_OFF_DENSE_TAGS(float_e4m3_t, float_e5m2_t)
SM12X_SWITCH_OFF_DENSE_TAGS(float_e5m2_t, float_e4m3_t)
SM12X_SWITCH_OFF_DENSE_TAGS(float_e5m2_t, float_e5m2_t)
#undef SM12X_SWITCH_OFF_DENSE_TAGS
#undef SM12X_SWITCH_OFF_DENSE
}  // namespace detail
#endif

template <class ElementA, class GmemLayoutATag, int AlignmentA, class ElementB,
          class GmemLayoutBTag, int AlignmentB, class ElementAccumulator, class TileShape_MNK,
          class ClusterShape_MNK, class StageCountType, class BuilderScheduleTag>
struct CollectiveBuilder<
    arch::Sm120, arch::OpClassTensorOp, ElementA, GmemLayoutATag, AlignmentA, ElementB,
    GmemLayoutBTag, AlignmentB, ElementAccumulator, TileShape_MNK, ClusterShape_MNK, StageCountType,
    BuilderScheduleTag,
    cute::enable_if_t<not cute::is_tuple_v<ElementA> && not cute::is_tuple_v<ElementB> &&
                      not cute::is_tuple_v<GmemLayoutATag> &&
                      not cute::is_tuple_v<GmemLayoutBTag> &&
                      ::sm12x::detail::builds<BuilderScheduleTag, ElementA, AlignmentA, ElementB,
                                              AlignmentB>()>> {
  //
  // Compile-time checks
  //

  using ScheduleTraits = ::sm12x::detail::ScheduleTraits<BuilderScheduleTag>;
  static constexpr bool IsCooperative = ScheduleTraits::kCooperative;
  static constexpr int TileM = cute::size<0>(TileShape_MNK{});
  static constexpr int TileN = cute::size<1>(TileShape_MNK{});
  static constexpr int TileK = cute::size<2>(TileShape_MNK{});

  static_assert(::sm12x::detail::is_fp8_v<ElementA> && ::sm12x::detail::is_fp8_v<ElementB>,
                "sm12x: A and B must be float_e4m3_t or float_e5m2_t");
  static_assert(cute::is_same_v<ElementAccumulator, float>, "sm12x: the accumulator must be float");
  static_assert(AlignmentA == 16 && AlignmentB == 16,
                "sm12x: A and B must be aligned to 16 elements (16 bytes), as TMA requires");
  static_assert(cute::is_static_v<TileShape_MNK> && cute::is_static_v<ClusterShape_MNK>,
                "sm12x: tile and cluster shapes must be static");
  static_assert(cute::size(ClusterShape_MNK{}) == 1,
                "sm12x: SM12x has no clusters larger than 1x1x1");
  static_assert(
      cutlass::gemm::detail::is_k_major_A<GmemLayoutATag>() &&
          cutlass::gemm::detail::is_k_major_B<GmemLayoutBTag>(),
      "sm12x: A must be RowMajor and B ColumnMajor (both K-major): FP8 MMA reads no other layout");
  static_assert(cute::is_pointer_v<GmemLayoutATag> && cute::is_pointer_v<GmemLayoutBTag>,
                "sm12x: a grouped GEMM takes its layouts as pointers (RowMajor*, ColumnMajor*)");
  static_assert(TileK % 32 == 0, "sm12x: the tile's K must be a multiple of 32");
  static_assert(TileM % 128 == 0 || (!IsCooperative && TileM == 64),
                "sm12x: the tile's M must be a multiple of 128, or 64 (Pingpong only)");
  static_assert(TileN == 16 || TileN % 32 == 0,
                "sm12x: the tile's N must be 16 or a multiple of 32");

  //
  // Types
  //

  // Few columns: all warps along M, so that each reads its own rows of A once. Else two columns of
  // warps.
  static constexpr bool IsNarrow = TileN <= 32;
  using AtomLayoutMNK = cute::conditional_t<
      IsCooperative,
      cute::conditional_t<IsNarrow, cute::Layout<cute::Shape<cute::_8, cute::_1, cute::_1>>,
                          cute::Layout<cute::Shape<cute::_4, cute::_2, cute::_1>>>,
      cute::conditional_t<IsNarrow, cute::Layout<cute::Shape<cute::_4, cute::_1, cute::_1>>,
                          cute::Layout<cute::Shape<cute::_2, cute::_2, cute::_1>>>>;
  using PermTileM = cute::Int<cute::min(TileM, 128)>;
  using PermTileN = cute::Int<cute::min(TileN, 32)>;
  using TiledMma = decltype(cute::make_tiled_mma(
      ::sm12x::detail::MmaOp<ScheduleTraits::kMma, ElementA, ElementB>{}, AtomLayoutMNK{},
      cute::Tile<PermTileM, PermTileN, cute::_32>{}));

  using SmemLayoutAtomA = decltype(detail::sm120_rr_smem_selector<uint8_t, cute::Int<TileK>>());
  using SmemLayoutAtomB = SmemLayoutAtomA;
  using SmemCopyAtomA = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, uint8_t>;
  using SmemCopyAtomB = SmemCopyAtomA;

  static constexpr int StageBytes = (TileM + TileN) * TileK;
  static constexpr int PipelineStages = ::sm12x::detail::stages_of<StageBytes>(StageCountType{});
  static_assert(PipelineStages >= 2,
                "sm12x: the tile leaves shared memory for fewer than 2 stages; take a smaller tile "
                "or epilogue");

  using DispatchPolicy =
      ::sm12x::MainloopPtrArrayTmaWarpSpecialized<PipelineStages, ClusterShape_MNK,
                                                  typename ScheduleTraits::Shell,
                                                  ScheduleTraits::kSkipEmptyColumns>;
  using CollectiveOp =
      CollectiveMma<DispatchPolicy, TileShape_MNK, ElementA,
                    cutlass::gemm::TagToStrideA_t<GmemLayoutATag>, ElementB,
                    cutlass::gemm::TagToStrideB_t<GmemLayoutBTag>, TiledMma, cute::SM90_TMA_LOAD,
                    SmemLayoutAtomA, SmemCopyAtomA, cute::identity, cute::SM90_TMA_LOAD,
                    SmemLayoutAtomB, SmemCopyAtomB, cute::identity>;
};

}  // namespace cutlass::gemm::collective
