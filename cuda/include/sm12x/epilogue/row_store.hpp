/// Epilogue of the packed kernels: a warp scales its accumulators and stores rows of D, 16 bytes at once.
///
/// D[row, f] = cast((a_scale * b_scale * acc + bias[f]) * row_weight[row]), in FP32, rounded once.
/// Stores are predicated by row and feature; N is a multiple of 8 and D's rows begin at multiples of 16
/// bytes, so 16 bytes are inside or outside as a whole. No shared memory: 2-byte outputs are transposed
/// in registers.
///
/// A warp's accumulators are atoms of 16 x 8 (m side x n side). Under swap_ab the m side is features
/// and the n side tokens, else the other way round.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <sm12x/abi_packed.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::epilogue {

/// StepM, StepN: rows from one atom on the m side, and from one pair of atoms on the n side, to the next.
template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
class RowStore {
 public:
  using Accumulators = float[AtomsM][AtomsN][4];

  /// The warp's part of the tile begins at `token` and `feature` of the tile. Requests all scales, which
  /// the main loop gives time to arrive.
  __device__ RowStore(sm12x_packed_params const& params, kernel::PackedWork const& tile, int token,
                      int feature)
      : params_(params), tile_(tile), token_(token), feature_(tile.feature + feature) {
    load_token_scales();
    load_feature_scales();
  }

  __device__ void store(Accumulators& accumulators) const {
#pragma unroll
    for (int m = 0; m < AtomsM; ++m) {
#pragma unroll
      for (int n = 0; n < AtomsN; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          int const on_m = 2 * m + r / 2;
          int const on_n = 2 * n + r % 2;
          int const t = SwapAb ? on_n : on_m;
          int const f = SwapAb ? on_m : on_n;
          float& value = accumulators[m][n][r];
          value = (token_scale_[t] * feature_scale_[f] * value + bias_[f]) * row_weight_[t];
        }
      }
    }
    if (params_.out_type == SM12X_OUT_FLOAT32) {
      store_float(accumulators);
    } else if (params_.out_type == SM12X_OUT_BFLOAT16) {
      store_half(accumulators, [](float low, float high) {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t const&>(pair);
      });
    } else {
      store_half(accumulators, [](float low, float high) {
        __half2 const pair = __floats2half2_rn(low, high);
        return reinterpret_cast<uint32_t const&>(pair);
      });
    }
  }

 private:
  // Tokens and features that one lane's accumulators lie at.
  static constexpr int kTokens = SwapAb ? 2 * AtomsN : 2 * AtomsM;
  static constexpr int kFeatures = SwapAb ? 2 * AtomsM : 2 * AtomsN;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int m_at(int i) { return i / 2 * StepM + i % 2 * 8 + lane() / 4; }
  __device__ static int n_at(int i) {
    return i / 4 * StepN + i / 2 % 2 * 8 + lane() % 4 * 2 + i % 2;
  }
  __device__ static int token_at(int i) { return SwapAb ? n_at(i) : m_at(i); }
  __device__ static int feature_at(int i) { return SwapAb ? m_at(i) : n_at(i); }

  // Row number, over all groups, of the row 0 that tile_.row counts from.
  __device__ int64_t first_row() const {
    return params_.row_layout == SM12X_ROWS_MASKED ? tile_.group * params_.rows : 0;
  }

  // Rows and features outside of the piece take the values of its last one, for results that are not
  // stored: no load depends on a branch.
  __device__ void load_token_scales() {
    auto const* const weight = reinterpret_cast<float const*>(params_.row_weight);
    int64_t const first = first_row() + tile_.row;
    int const mode = params_.a_scale_mode;
    float const* const scale = scale_of_group(mode, params_.a_scale, &params_.a_scale_value, 0);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      int64_t row = first + min(token_ + token_at(i), tile_.rows - 1);
      row_weight_[i] = weight != nullptr ? weight[row] : 1.0f;
      bool reads_zeros = false;
      if (mode == SM12X_SCALE_VECTOR && params_.row_index != 0) {
        row = kernel::indexed_row(params_, row);
        reads_zeros = row < 0;
      }
      token_scale_[i] = reads_zeros ? 0.0f : scale[mode == SM12X_SCALE_VECTOR ? row : 0];
    }
  }

  __device__ void load_feature_scales() {
    int const mode = params_.b_scale_mode;
    float const* const scale = scale_of_group(mode, params_.b_scale, &params_.b_scale_value,
                                              tile_.group * params_.stride_b_scale);
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      feature_scale_[i] = scale[mode == SM12X_SCALE_VECTOR ? feature_inside(i) : 0];
      bias_[i] = 0.0f;
    }
    if (params_.bias != 0) {
      int64_t const first = tile_.group * params_.stride_bias;
      if (params_.bias_type == SM12X_BIAS_FLOAT32) {
        load_bias(reinterpret_cast<float const*>(params_.bias) + first);
      } else if (params_.bias_type == SM12X_BIAS_BFLOAT16) {
        load_bias(reinterpret_cast<__nv_bfloat16 const*>(params_.bias) + first);
      } else {
        load_bias(reinterpret_cast<__half const*>(params_.bias) + first);
      }
    }
  }

  template <class Element>
  __device__ void load_bias(Element const* bias) {
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      bias_[i] = float(bias[feature_inside(i)]);
    }
  }

  __device__ int feature_inside(int i) const {
    return min(feature_ + feature_at(i), tile_.feature_end - 1);
  }

  // Where the group's scale is, or where its vector begins.
  __device__ float const* scale_of_group(int mode, uint64_t address, float const* value,
                                         int64_t vector_start) const {
    auto const* const scale = reinterpret_cast<float const*>(address);
    return mode == SM12X_SCALE_VALUE    ? value
           : mode == SM12X_SCALE_VECTOR ? scale + vector_start
           : mode == SM12X_SCALE_GROUP  ? scale + tile_.group
                                        : scale;
  }

  template <class Element>
  __device__ Element* address(int in_tile, int feature) const {
    return reinterpret_cast<Element*>(params_.d) + tile_.group * params_.stride_d_group +
           int64_t(tile_.row + in_tile) * params_.stride_d + feature;
  }

  __device__ void store_float(Accumulators const& accumulators) const {
#pragma unroll
    for (int m = 0; m < AtomsM; ++m) {
#pragma unroll
      for (int n = 0; n < AtomsN; ++n) {
#pragma unroll
        for (int r = 0; r < 4; r += SwapAb ? 1 : 2) {
          int const on_m = 2 * m + r / 2;
          int const on_n = 2 * n + r % 2;
          int const token = token_ + token_at(SwapAb ? on_n : on_m);
          int const feature = feature_ + feature_at(SwapAb ? on_m : on_n);
          if (token < tile_.rows && feature < tile_.feature_end) {
            float const* from = &accumulators[m][n][r];  // two neighbours of a row, unless swapped
            if constexpr (SwapAb) {
              *address<float>(token, feature) = from[0];
            } else {
              *reinterpret_cast<float2*>(address<float>(token, feature)) = {from[0], from[1]};
            }
          }
        }
      }
    }
  }

  // A chunk is 8 features of one token: 16 bytes. The four lanes of a quad hold 4 bytes of each of their
  // chunks; in groups of four chunks they swap them, so that every lane has one whole.
  template <class Pack>
  __device__ void store_half(Accumulators const& accumulators, Pack const& pack) const {
    constexpr int kBlocks = SwapAb ? 2 * AtomsM : AtomsN;   // chunks of one token
    constexpr int kRowSets = SwapAb ? AtomsN : 2 * AtomsM;  // tokens of one lane
    static_assert(kBlocks % 4 == 0 || kBlocks == 2);
    uint32_t pieces[kRowSets * kBlocks];
#pragma unroll
    for (int m = 0; m < AtomsM; ++m) {
#pragma unroll
      for (int n = 0; n < AtomsN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const* from = &accumulators[m][n][2 * half];
          uint32_t const pair = pack(from[0], from[1]);
          if constexpr (SwapAb) {
            pieces[n * kBlocks + 2 * m + half] = arch::transpose_matrix(pair);
          } else {
            pieces[(2 * m + half) * kBlocks + n] = pair;
          }
        }
      }
    }
    int const quad = lane() % 4;
#pragma unroll
    for (int first = 0; first < kRowSets * kBlocks; first += 4) {
      constexpr bool kPadded = kRowSets * kBlocks < 4;
      uint4 const chunk = swap_in_quad(pieces[first], pieces[first + 1],
                                       kPadded ? 0 : pieces[first + 2 - 2 * kPadded],
                                       kPadded ? 0 : pieces[first + 3 - 2 * kPadded]);
      int const row_set = kBlocks == 2 ? first / 2 + quad / 2 : first / kBlocks;
      int const block = kBlocks == 2 ? quad % 2 : first % kBlocks + quad;
      // Token row sets and feature blocks, both of 8, in pairs: an atom's on the m side, two atoms' on
      // the n side.
      constexpr int kTokenStep = SwapAb ? StepN : StepM;
      constexpr int kFeatureStep = SwapAb ? StepM : StepN;
      int const token = token_ + row_set / 2 * kTokenStep + row_set % 2 * 8 + lane() / 4;
      int const feature = feature_ + block / 2 * kFeatureStep + block % 2 * 8;
      if (row_set < kRowSets && token < tile_.rows && feature < tile_.feature_end) {
        *reinterpret_cast<uint4*>(address<uint16_t>(token, feature)) = chunk;
      }
    }
  }

  // Lane q of a quad gets what the four lanes hold in their q-th argument, in the order of the lanes.
  __device__ static uint4 swap_in_quad(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    bool const odd = lane() % 2 != 0;
    bool const upper = lane() % 4 >= 2;
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

  sm12x_packed_params const& params_;
  kernel::PackedWork tile_;
  int token_;
  int feature_;
  float token_scale_[kTokens];
  float row_weight_[kTokens];
  float feature_scale_[kFeatures];
  float bias_[kFeatures];
};

}  // namespace sm12x::epilogue
