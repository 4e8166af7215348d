// Family fp8_ptr_array: grouped FP8 GEMM in which every group has its own pointers, strides and M,
// N, K.
//
// One translation unit is one variant; cuda/kernels/variants.toml says which, through these macros:
//   SM12X_SYMBOL      name of the exported kernel
//   SM12X_TILE_M/N/K  tile on the kernel's own sides
//   SM12X_PINGPONG    1: Pingpong, 0: Cooperative
//   SM12X_SWAP_AB     1: the kernel's M side carries weights, its N side tokens; D stored by columns
//   SM12X_OUT         cutlass type of D
//
// Roles (CUTLASS's ptr-array shell):
//   warp group 0  warp 0 loads A and B by TMA, warp 3 schedules tiles      40 registers a thread
//   warp group 1  MMA and epilogue                                        232 registers
//   warp group 2  MMA and epilogue: the same tile, or its own (Pingpong)  232 registers

#include <sm12x/cutlass.hpp>
#include <sm12x/kernel/group_scheduler.hpp>
#include <sm12x/kernel/ptr_array_launch.hpp>

#ifndef SM12X_SYMBOL
#error "compile through cuda/tools/build.py: the variant table gives SM12X_SYMBOL and its kin"
#endif

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

using namespace cute;

using ElementAb = cutlass::float_e4m3_t;
using ElementD = SM12X_OUT;
constexpr bool kSwapAb = SM12X_SWAP_AB;
constexpr bool kPingpong = SM12X_PINGPONG;

using TileShape = Shape<Int<SM12X_TILE_M>, Int<SM12X_TILE_N>, Int<SM12X_TILE_K>>;
using ClusterShape = Shape<_1, _1, _1>;

// Tiles that share weights follow each other, so that the weights are still in L2: tokens vary
// fastest.
using ProblemShape = sm12x::kernel::GroupProblemShape<kSwapAb ? sm12x::kernel::Raster::kAlongN
                                                              : sm12x::kernel::Raster::kAlongM>;
using LayoutD =
    cute::conditional_t<kSwapAb, cutlass::layout::ColumnMajor*, cutlass::layout::RowMajor*>;
constexpr int kBiasSide = kSwapAb ? sm12x::epilogue::kAlongM : sm12x::epilogue::kAlongN;

// A tile that is one 64x32 wide or less is stored whole.
using EpilogueTile =
    cute::conditional_t<(SM12X_TILE_N > 32), cutlass::epilogue::collective::EpilogueTileAuto,
                        sm12x::epilogue::NarrowTile<TileShape>>;

using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape, EpilogueTile,
    float, float, void, LayoutD, 8, ElementD, LayoutD, 8,
    cutlass::epilogue::collective::EpilogueScheduleAuto,
    sm12x::epilogue::GroupScaledAcc<ElementD, kBiasSide>>::CollectiveOp;

// A swapped tile of 64 tokens is for experts of which some have 64 rows; most have fewer.
constexpr bool kSkipEmptyColumns = kSwapAb && SM12X_TILE_N >= 64;
using Schedule = cute::conditional_t<
    kPingpong, sm12x::KernelPtrArrayPingpong<2, sm12x::MmaKind::kUnitScale, kSkipEmptyColumns>,
    sm12x::KernelPtrArrayCooperative<2, sm12x::MmaKind::kUnitScale, kSkipEmptyColumns>>;

using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm120, cutlass::arch::OpClassTensorOp, ElementAb, cutlass::layout::RowMajor*, 16,
    ElementAb, cutlass::layout::ColumnMajor*, 16, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(
        typename CollectiveEpilogue::SharedStorage)>,
    Schedule>::CollectiveOp;

using GemmKernel =
    cutlass::gemm::kernel::GemmUniversal<ProblemShape, CollectiveMainloop, CollectiveEpilogue>;
using Launch = sm12x::kernel::PtrArrayLaunch<GemmKernel>;

static_assert(GemmKernel::SharedStorageSize <= sm12x::detail::kSharedMemoryBytes,
              "the kernel needs more shared memory than a block of SM12x may use");
static_assert(sizeof(typename CollectiveMainloop::InternalStrideA) == 8 &&
                  sizeof(typename CollectiveEpilogue::InternalStrideD) == 8 &&
                  sizeof(typename ProblemShape::UnderlyingProblemShape) == 12,
              "the group arrays of abi.h hold 64-bit strides and three 32-bit extents");

// The prototype tensor maps that the host encodes: rank, box (innermost first), swizzle, element
// size. The box of an operand is one swizzle row wide; the box of D follows from the shared-memory
// layout of the epilogue tile.
constexpr unsigned kOperandSwizzle = SM12X_TILE_K >= 128 ? 128 : SM12X_TILE_K;
constexpr unsigned kEpilogueM = size<0>(typename CollectiveEpilogue::EpilogueTile{});
constexpr unsigned kEpilogueN = size<1>(typename CollectiveEpilogue::EpilogueTile{});
constexpr unsigned kInnerD = kSwapAb ? kEpilogueM : kEpilogueN;
constexpr unsigned kOuterD = kSwapAb ? kEpilogueN : kEpilogueM;
constexpr unsigned kSwizzleD = kInnerD * sizeof(ElementD) >= 128 ? 128 : kInnerD * sizeof(ElementD);
constexpr unsigned kBoxInnerD = kSwizzleD / sizeof(ElementD);
static_assert(SM12X_TILE_K % kOperandSwizzle == 0);
static_assert(kOperandSwizzle == 128 || kOperandSwizzle == 64 || kOperandSwizzle == 32);
static_assert(kSwizzleD == 128 || kSwizzleD == 64 || kSwizzleD == 32);

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[20];
__device__ const unsigned sm12x_variant_info[20] = {
    GemmKernel::MaxThreadsPerBlock,
    GemmKernel::SharedStorageSize,
    CollectiveMainloop::DispatchPolicy::Stages,
    0u,  // the CTAs lie along x
    Launch::kMainloopBytesPerCta + Launch::kEpilogueBytesPerCta,
    // clang-format off
    2u, kOperandSwizzle, SM12X_TILE_M, kOperandSwizzle, 1u,  // A
    2u, kOperandSwizzle, SM12X_TILE_N, kOperandSwizzle, 1u,  // B
    2u, kBoxInnerD, kOuterD, kSwizzleD, sizeof(ElementD),    // D
    // clang-format on
};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(GemmKernel::MaxThreadsPerBlock, 1)
    SM12X_SYMBOL(__grid_constant__ sm12x_ptr_array_params const launch) {
  extern __shared__ char shared_memory[];
  auto const params = Launch::params(launch);
  GemmKernel{}(params, shared_memory);
}
