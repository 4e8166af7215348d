/// Brings what the lanes of a warp hold of rows together, into stores of whole chunks of 8 features.
#pragma once

#include <cstdint>

namespace sm12x::epilogue {

/// Lane q of a quad gets what the four lanes hold in their q-th argument, in the order of the lanes.
__device__ inline uint4 swap_in_quad(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  int const lane = threadIdx.x % 32;
  bool const odd = lane % 2 != 0;
  bool const upper = lane % 4 >= 2;
  uint32_t const other_ab = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
  uint32_t const other_cd = __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
  uint32_t const first_ab = odd ? other_ab : a;
  uint32_t const second_ab = odd ? b : other_ab;
  uint32_t const first_cd = odd ? other_cd : c;
  uint32_t const second_cd = odd ? d : other_cd;
  uint32_t const other_first = __shfl_xor_sync(0xffffffffu, upper ? first_ab : first_cd, 2);
  uint32_t const other_second = __shfl_xor_sync(0xffffffffu, upper ? second_ab : second_cd, 2);
  return upper ? uint4{other_first, other_second, first_cd, second_cd}
               : uint4{first_ab, second_ab, other_first, other_second};
}

/// A chunk is 8 features of one token: 16 bytes of 2-byte elements. A lane has RowSets tokens, of each
/// Blocks chunks, and the four lanes of a quad each hold two features of theirs, one `piece`; in groups of
/// four chunks they swap them, so that every lane has one whole. Calls write(row_set, block, chunk).
template <int RowSets, int Blocks, class Write>
__device__ void store_chunks(uint32_t const (&pieces)[RowSets * Blocks], Write const& write) {
  static_assert(Blocks % 4 == 0 || Blocks == 2 || Blocks == 1);
  constexpr int kPieces = RowSets * Blocks;
  static_assert(kPieces % 4 == 0 || kPieces < 4);
  int const quad = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < kPieces; first += 4) {
    uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      four[i] = first + i < kPieces ? pieces[first + i < kPieces ? first + i : 0] : 0;
    }
    uint4 const chunk = swap_in_quad(four[0], four[1], four[2], four[3]);
    int const row_set = Blocks == 1   ? first + quad
                        : Blocks == 2 ? first / 2 + quad / 2
                                      : first / Blocks;
    int const block = Blocks == 1 ? 0 : Blocks == 2 ? quad % 2 : first % Blocks + quad;
    if (row_set < RowSets) {
      write(row_set, block, chunk);
    }
  }
}

}  // namespace sm12x::epilogue
