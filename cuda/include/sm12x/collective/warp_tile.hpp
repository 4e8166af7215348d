/// The main loop of one warp: its part of a tile, from two K-major operands in swizzled shared memory.
///
/// Operand tiles are rows of TileK bytes under TMA's swizzle of that many bytes (64 or 128), beginning at
/// a multiple of 1024. The warp's fragments are those of m16n8k32 (PTX ISA, "Matrix Fragments for
/// mma.m16n8k32"): atoms of 16 rows of A by 8 rows of B, k-blocks of 32 bytes.
///
/// All addresses of a stage are the stage's plus one of a few numbers that the warp computes once:
/// k-blocks differ in bits that the swizzle only flips, atoms by multiples of eight rows, which it does
/// not see. So the loop has no address arithmetic but one addition per operand and k-block.
#pragma once

#include <cstdint>

#include <cute/config.hpp>
#include <sm12x/arch/copy.hpp>

namespace sm12x::collective {

/// ShortA: A's tile may end before the warp's last atom.
template <class Mma, int AtomsM_, int AtomsN_, int TileK_, int StepM_, int StepN_, bool ShortA>
class WarpTile {
 public:
  static constexpr int kAtomsM = AtomsM_;
  static constexpr int kAtomsN = AtomsN_;
  static constexpr int kTileK = TileK_;
  static constexpr int kStepM = StepM_;  // rows from one atom of A to the warp's next
  static constexpr int kStepN = StepN_;  // rows from one pair of atoms of B to the next
  static constexpr int kBlockK = 32;
  static constexpr int kBlocks = kTileK / kBlockK;
  static_assert(kTileK == 64 || kTileK == 128, "a row is one swizzle row of TMA");
  static_assert(kStepM % 16 == 0 && kStepN % 16 == 0, "steps that the swizzle does not see");
  static_assert(kAtomsN == 1 || kAtomsN % 2 == 0, "four matrices are two atoms, or two k-blocks");

  using Accumulators = float[kAtomsM][kAtomsN][4];

  /// Addresses of the first stage's tiles, and bytes from one stage to the next.
  struct Stages {
    uint32_t a;
    uint32_t b;
    uint32_t bytes;
  };

  /// Offsets of 16-byte chunk `chunk` of row `row` in an operand tile.
  __device__ static uint32_t swizzled(int row, int chunk) {
    int const flip = kTileK == 128 ? row % 8 : row / 2 % 4;
    return uint32_t(row * kTileK + ((chunk ^ flip) * 16));
  }

  /// The warp's first rows in the tiles of A and B. Of A's rows only `rows_a`, a multiple of 8, are there:
  /// an atom's upper half that is not reads the lower one instead, for results that nobody wants.
  __device__ WarpTile(int row_a, int row_b, int rows_a) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kOffsetsA; ++m) {
      int const row = row_a + m * kStepM + lane % 16;
      offset_a_[m] = swizzled(!ShortA || row < rows_a ? row : row - 8, lane / 16);
    }
    if constexpr (kAtomsN == 1) {
      offset_b_ = swizzled(row_b + lane % 8, lane / 8);
    } else {
      offset_b_ = swizzled(row_b + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
    if constexpr (!ShortA) {
      // Or ptxas computes them again and again, to save two registers.
      offset_a_[0] = __shfl_sync(0xffffffffu, offset_a_[0], lane);
      offset_b_ = __shfl_sync(0xffffffffu, offset_b_, lane);
    }
  }

  /// Adds the products of `k_tiles` stages, of which the last one has `last_blocks` k-blocks (1 to
  /// kBlocks). Waits for each stage and releases it as soon as its last fragments have arrived.
  /// ActiveM, ActiveN: atoms that count, from the first. LapStages: stages of the ring, where that is known
  /// (else 0) and the loop is to be unrolled over them.
  template <int ActiveM, int ActiveN, int LapStages, class Ring, class State>
  __device__ void run(Ring& ring, State& state, Stages const& stages, int k_tiles, int last_blocks,
                      Accumulators& accumulators) const {
    if constexpr (ActiveM == 0) {
      // Waits too: a warp that ran ahead would release a stage of the ring's next turn.
      for (int tile = 0; tile < k_tiles; ++tile) {
        ring.wait_full(state);
        ring.release(state, 0);
        ring.advance(state);
      }
    } else {
      Fragments<ActiveM, ActiveN> fragments;
      // An MMA waits for the one before it on the same accumulators: few atoms take turns with more sets.
      constexpr int kChains = ActiveM * ActiveN >= 8 ? 1 : (ActiveM * ActiveN >= 4 ? 2 : 4);
      float more[kChains][ActiveM][ActiveN][4] = {};  // the first set stays zero
      int const whole = last_blocks == kBlocks ? k_tiles : k_tiles - 1;
      auto k_tile = [&](State const& at) {
        uint32_t const a = stages.a + at.index * stages.bytes;
        uint32_t const b = stages.b + at.index * stages.bytes;
        ring.wait_full(at);
        uint32_t all_loaded = 0;
        if constexpr (prefetches<ActiveM, ActiveN>()) {
          load(fragments, a, b, 0);
        }
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          if constexpr (!prefetches<ActiveM, ActiveN>()) {
            load(fragments, a, b, block);
          } else if (block + 1 < kBlocks) {
            load(fragments, a, b, block + 1);
          }
          // With many atoms the fragments of earlier blocks have been multiplied by then: the static check of
          // the machine code (tests/static/test_sass.py) sees to it.
          if (block + 1 == kBlocks || ActiveM * ActiveN < 8) {
            all_loaded |= loaded(fragments, block);
          }
          if (block + 1 == kBlocks) {
            ring.release(at, all_loaded);
          }
          multiply<kChains>(fragments, block, accumulators, more);
        }
      };
      int left = whole;
      if constexpr (LapStages > 1) {
        // Equal in all lanes, which the compiler does not know: uniform registers.
        left = int(__reduce_max_sync(0xffffffffu, uint32_t(left)));
        state.index = __reduce_max_sync(0xffffffffu, state.index);
        state.phase = __reduce_max_sync(0xffffffffu, state.phase);
      }
#pragma unroll 1
      while (left > 0) {
        if constexpr (LapStages > 1) {
          if (state.index == 0 && left >= LapStages) {
            // Whole laps of the ring: all addresses of a stage are constants.
#pragma unroll 1
            do {
#pragma unroll
              for (uint32_t stage = 0; stage < LapStages; ++stage) {
                k_tile({stage, state.phase});
              }
              state.phase ^= 1;
              left -= LapStages;
            } while (left >= LapStages);
            continue;
          }
        }
        k_tile(state);
        ring.advance(state);
        --left;
      }
      if (whole < k_tiles) {
        uint32_t const a = stages.a + state.index * stages.bytes;
        uint32_t const b = stages.b + state.index * stages.bytes;
        ring.wait_full(state);
        uint32_t all_loaded = 0;
#pragma unroll
        for (int block = 0; block + 1 < kBlocks; ++block) {
          if (block < last_blocks) {
            load(fragments, a, b, block);
            all_loaded |= loaded(fragments, block);
            multiply<kChains>(fragments, block, accumulators, more);
          }
        }
        ring.release(state, all_loaded);
        ring.advance(state);
      }
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int m = 0; m < ActiveM; ++m) {
#pragma unroll
          for (int n = 0; n < ActiveN; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              accumulators[m][n][i] += more[chain][m][n][i];
            }
          }
        }
      }
    }
  }

 private:
  // Whether fragments of the next k-block are loaded before this one's MMAs. On the sm_90a twin every
  // fragment is widened to FP16 in registers, which beside many accumulators would spill.
  template <int ActiveM, int ActiveN>
  __device__ static constexpr bool prefetches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
    return ActiveM * ActiveN < 8;
#else
    return true;
#endif
  }

  // Two k-blocks in turns. With one atom of B, four matrices are its next two k-blocks: two pairs in
  // turns.
  template <int ActiveM, int ActiveN>
  struct Fragments {
    static constexpr int kActiveM = ActiveM;
    static constexpr int kActiveN = ActiveN;
    uint32_t a[2][ActiveM][4];
    uint32_t b[2][ActiveN][kAtomsN == 1 ? 4 : 2];
  };

  template <class Fragments>
  __device__ void load(Fragments& to, uint32_t a, uint32_t b, int block) const {
    uint32_t const from_b = b + (offset_b_ ^ (block * kBlockK));
#pragma unroll
    for (int m = 0; m < Fragments::kActiveM; ++m) {
      auto& atom = to.a[block % 2][m];
      uint32_t const from_a = ShortA ? a + (offset_a_[m] ^ (block * kBlockK))
                                     : a + (offset_a_[0] ^ (block * kBlockK)) + m * kStepM * kTileK;
      arch::load_matrices(from_a, atom[0], atom[1], atom[2], atom[3]);
    }
    if constexpr (kAtomsN == 1) {
      if (block % 2 == 0) {
        auto& atom = to.b[block / 2 % 2][0];
        arch::load_matrices(from_b, atom[0], atom[1], atom[2], atom[3]);
      }
    } else {
#pragma unroll
      for (int n = 0; n < Fragments::kActiveN; n += 2) {
        auto& atoms = to.b[block % 2];
        arch::load_matrices(from_b + n / 2 * kStepN * kTileK, atoms[n][0], atoms[n][1],
                            atoms[n + 1][0], atoms[n + 1][1]);
      }
    }
  }

  // Something of every load of a k-block. Some come twice, so not by exclusive or.
  template <class Fragments>
  __device__ static uint32_t loaded(Fragments const& from, int block) {
    uint32_t all = 0;
#pragma unroll
    for (int m = 0; m < Fragments::kActiveM; ++m) {
      all |= from.a[block % 2][m][0];
    }
#pragma unroll
    for (int n = 0; n < Fragments::kActiveN; n += 2) {
      all |= from.b[kAtomsN == 1 ? block / 2 % 2 : block % 2][n][0];
    }
    return all;
  }

  template <int Chains, class Fragments, class More>
  __device__ static void multiply(Fragments const& from, int block, Accumulators& accumulators,
                                  More& more) {
    int const chain = block % Chains;
#pragma unroll
    for (int n = 0; n < Fragments::kActiveN; ++n) {
      uint32_t const* b =
          kAtomsN == 1 ? &from.b[block / 2 % 2][n][block % 2 * 2] : from.b[block % 2][n];
#pragma unroll
      for (int m = 0; m < Fragments::kActiveM; ++m) {
        uint32_t const(&a)[4] = from.a[block % 2][m];
        float* const d = chain == 0 ? accumulators[m][n] : more[chain][m][n];
        Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2],
                 d[3]);
      }
    }
  }

  static constexpr int kOffsetsA = ShortA ? kAtomsM : 1;
  uint32_t offset_a_[kOffsetsA];
  uint32_t offset_b_;
};

}  // namespace sm12x::collective
