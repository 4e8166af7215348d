/// What a block of SM12x may use, and the checks that say by how much a kernel exceeds it.
///
/// A static_assert holds fixed text, so the numbers stand in the name of the template that fails:
/// the compiler prints it with its arguments, for example
/// SharedMemoryLimit<Needed=132608, Allowed=101376, Excess=31232>.
#pragma once

#include <cutlass/version.h>

#define SM12X_CUTLASS_VERSION (CUTLASS_MAJOR * 100 + CUTLASS_MINOR)
/// Whether the upstream schedule tags are built here: CUTLASS 4.6 and later builds them itself.
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

/// Room for what CUTLASS's SM120 epilogue takes with EpilogueTileAuto, where the caller did not say:
/// three 64x32 tiles in FP32 (C and D), or two of C and two of D.
inline constexpr int kDefaultEpilogueBytes = 24576;

/// Accumulators are FP32 registers. An MMA thread has 232 registers in CUTLASS's shells; two k-blocks
/// of fragments and the addresses need the rest.
inline constexpr int kMaxAccumulators = 128;

template <int Needed, int Allowed, int Excess = Needed - Allowed>
struct SharedMemoryLimit {
  static_assert(Excess <= 0,
                "sm12x: two stages of this tile (or the StageCount asked for), the epilogue and "
                "the kernel's barriers need more shared memory than a block of SM12x may use: see "
                "SharedMemoryLimit<Needed, Allowed, Excess> for the bytes; take a smaller tile, "
                "fewer stages or a direct-store epilogue");
  static constexpr bool kHolds = true;
};

template <int Needed, int Allowed, int Excess = Needed - Allowed>
struct AccumulatorLimit {
  static_assert(Excess <= 0,
                "sm12x: the tile needs more accumulator registers per thread than the register "
                "file leaves for them: see AccumulatorLimit<Needed, Allowed, Excess>; take a "
                "smaller tile, or Cooperative, which spreads a tile over 256 threads");
  static constexpr bool kHolds = true;
};

}  // namespace sm12x::detail

namespace sm12x {

/// True where a block of the kernel fits into the shared memory of SM12x, else an error with the
/// bytes: static_assert(sm12x::fits_v<Kernel>). With StageCount<k>, and with StageCountAuto beside an
/// epilogue tile of the caller's own, no builder sees both main loop and epilogue.
template <class Kernel>
inline constexpr bool fits_v =
    detail::SharedMemoryLimit<int(Kernel::SharedStorageSize), detail::kSharedMemoryBytes>::kHolds;

}  // namespace sm12x
