/// CollectiveBuilder for SM120 ptr-array (grouped) FP8 GEMM with plain layouts: what
/// NVIDIA/cutlass#3263 asks for.
///
///   tags                                                      CUTLASS < 4.6   CUTLASS >= 4.6
///   sm12x::KernelScheduleAuto                                 this builder    this builder
///   sm12x::KernelPtrArray{Cooperative,Pingpong}<...>          this builder    this builder
///   cutlass::gemm::KernelPtrArrayTmaWarpSpecialized
///       {Cooperative,Pingpong}Sm120<N>, N = 1, 2, 3           this builder    CUTLASS's own
///
/// Compiled against 4.2.0 and 4.5.0 in tests/cuda; a header set that calls itself 4.6 stands for the
/// rest. N is accepted for its name: CUTLASS's ptr-array shells have a scheduler depth of 8. CUTLASS's
/// own KernelScheduleAuto cannot be taken over, since nothing that switches its dense builder off sees
/// that the layouts are pointers.
///
/// Below 4.6 the dense SM120 builder matches the upstream tags too and then refuses them. It is
/// switched off for exactly those, through its alignment predicate, so that this specialisation is
/// the only match.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "sm12x/arch/mma.hpp"
#include "sm12x/collective/dispatch_policy.hpp"
#include "sm12x/collective/limits.hpp"
#include "sm12x/collective/ptr_array_mma.hpp"

namespace sm12x::detail {

template <int Carveout, int StageBytes>
constexpr int stage_count() {
  constexpr int kBarrierBytes = 20;  // of one stage: two barriers and a word
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

/// What the caller reserved. A StageCount reserves nothing: what is left is the epilogue's.
template <int Stages>
constexpr int carveout_of(cutlass::gemm::collective::StageCount<Stages>) {
  return 0;
}
template <int Carveout>
constexpr int carveout_of(cutlass::gemm::collective::StageCountAutoCarveout<Carveout>) {
  return Carveout == 0 ? kDefaultEpilogueBytes : Carveout;
}

template <class Element>
inline constexpr bool is_fp8_v = cute::is_same_v<Element, cutlass::float_e4m3_t> ||
                                 cute::is_same_v<Element, cutlass::float_e5m2_t>;

/// Whether this builder takes the tag. Upstream tags only where the dense builder does not match:
/// where it was switched off, and where the alignment is wrong, so that the sentence is ours.
template <class Tag, class ElementA, int AlignmentA, class ElementB, int AlignmentB>
constexpr bool builds() {
  using Traits = ScheduleTraits<Tag>;
  if constexpr (SM12X_BUILDS_UPSTREAM_TAGS && Traits::kUpstream && is_fp8_v<ElementA> &&
                is_fp8_v<ElementB>) {
    return !cutlass::gemm::collective::detail::sm1xx_gemm_is_aligned<ElementA, AlignmentA, ElementB,
                                                                     AlignmentB, Tag>();
  } else {
    return Traits::kOwn;
  }
}

/// How many of the MMA warps lie along M; the others lie along N. A warp reads its rows of A and its
/// columns of B from shared memory for every k-block, so their sum should be small. Four columns of
/// warps at most, and four rows, so that CUTLASS's 64x32 epilogue tile holds whole MMA tiles; the
/// warps of a tile narrower than that all lie along M.
constexpr int warps_along_m(int tile_m, int tile_n, int warps) {
  if (tile_n < 32) {
    return warps;
  }
  int best = 0;
  for (int along_m = 4; along_m >= 1; along_m /= 2) {
    int const along_n = warps / along_m;
    bool const divides = tile_m % (16 * along_m) == 0 && tile_n % (16 * along_n) == 0;
    if (divides && along_n <= 4 &&
        (best == 0 ||
         tile_m / along_m + tile_n / along_n < tile_m / best + tile_n * best / warps)) {
      best = along_m;
    }
  }
  return best;
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

  static_assert(cute::is_static_v<TileShape_MNK> && cute::is_static_v<ClusterShape_MNK>,
                "sm12x: tile and cluster shapes must be static");
  using ScheduleTraits = ::sm12x::detail::ScheduleTraits<
      typename ::sm12x::detail::ResolvedSchedule<BuilderScheduleTag, TileShape_MNK>::Type>;
  static constexpr bool IsCooperative = ScheduleTraits::kCooperative;
  static constexpr int TileM = cute::size<0>(TileShape_MNK{});
  static constexpr int TileN = cute::size<1>(TileShape_MNK{});
  static constexpr int TileK = cute::size<2>(TileShape_MNK{});
  static constexpr int MmaWarps = IsCooperative ? 8 : 4;

  static_assert(::sm12x::detail::is_fp8_v<ElementA> && ::sm12x::detail::is_fp8_v<ElementB>,
                "sm12x: A and B must be float_e4m3_t or float_e5m2_t");
  static_assert(cute::is_same_v<ElementAccumulator, float>, "sm12x: the accumulator must be float");
  static_assert(
      AlignmentA % 16 == 0 && AlignmentB % 16 == 0,
      "sm12x: A and B must be aligned to multiples of 16 elements (16 bytes), as TMA requires");
  static_assert(cute::size(ClusterShape_MNK{}) == 1,
                "sm12x: SM12x has no clusters larger than 1x1x1");
  static_assert(
      cutlass::gemm::detail::is_k_major_A<GmemLayoutATag>() &&
          cutlass::gemm::detail::is_k_major_B<GmemLayoutBTag>(),
      "sm12x: A must be RowMajor and B ColumnMajor (both K-major): FP8 MMA reads no other layout");
  static_assert(cute::is_pointer_v<GmemLayoutATag> && cute::is_pointer_v<GmemLayoutBTag>,
                "sm12x: a grouped GEMM takes its layouts as pointers (RowMajor*, ColumnMajor*); "
                "batched GEMM (ArrayProblemShape) is not supported");
  static_assert(TileK == 32 || TileK == 64 || TileK == 128,
                "sm12x: the tile's K must be 32, 64 or 128");
  static_assert(TileM == 64 || TileM == 128 || TileM == 256,
                "sm12x: the tile's M must be 64 (Pingpong only), 128 or 256");
  static_assert(!(IsCooperative && TileM < 128),
                "sm12x: Cooperative spreads a tile over two warp groups and needs an M of 128 or "
                "more; take Pingpong for an M of 64");
  static_assert(TileN == 8 || TileN == 16 || TileN % 32 == 0,
                "sm12x: the tile's N must be 8, 16 or a multiple of 32");
  static_assert(
      ::sm12x::detail::AccumulatorLimit<TileM * TileN / (MmaWarps * cutlass::NumThreadsPerWarp),
                                        ::sm12x::detail::kMaxAccumulators>::kHolds);

  //
  // Types
  //

  static constexpr int WarpsM = ::sm12x::detail::warps_along_m(TileM, TileN, MmaWarps);
  static constexpr int WarpsN = MmaWarps / WarpsM;
  using AtomLayoutMNK = cute::Layout<cute::Shape<cute::Int<WarpsM>, cute::Int<WarpsN>, cute::_1>>;
  using PermTileM = cute::Int<cute::min(TileM, 128)>;
  // Two MMA atoms a warp, which one LDSM.x4 fills; a tile of 8 columns has but one.
  using PermTileN = cute::Int<cute::min(TileN, cute::max(32, 16 * WarpsN))>;
  using TiledMma = decltype(cute::make_tiled_mma(
      ::sm12x::detail::MmaOp<ScheduleTraits::kMma, ElementA, ElementB>{}, AtomLayoutMNK{},
      cute::Tile<PermTileM, PermTileN, cute::_32>{}));

  using SmemLayoutAtomA = decltype(detail::sm120_rr_smem_selector<uint8_t, cute::Int<TileK>>());
  using SmemLayoutAtomB = SmemLayoutAtomA;
  using SmemCopyAtomA = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, uint8_t>;
  using SmemCopyAtomB = cute::Copy_Atom<
      cute::conditional_t<TileN == 8, cute::SM75_U32x2_LDSM_N, cute::SM75_U32x4_LDSM_N>, uint8_t>;

  static constexpr int StageBytes = (TileM + TileN) * TileK;
  static constexpr int PipelineStages = ::sm12x::detail::stages_of<StageBytes>(StageCountType{});
  static_assert(::sm12x::detail::SharedMemoryLimit<
                cute::max(2, PipelineStages) * StageBytes + ::sm12x::detail::kShellBytes +
                    ::sm12x::detail::carveout_of(StageCountType{}),
                ::sm12x::detail::kSharedMemoryBytes>::kHolds);
  static_assert(PipelineStages >= 2, "sm12x: the ptr-array main loop needs at least 2 stages");

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
