/// Epilogue of the packed kernels: a warp scales its accumulators and stores rows of D, 16 bytes at once.
///
/// D[row, f] = cast((a_scale * b_scale * acc + bias[f]) * row_weight[row]), in FP32, rounded once.
/// Stores are predicated by row and feature; N is a multiple of 8 and D's rows begin at multiples of 16
/// bytes, so 16 bytes are inside or outside as a whole. No shared memory: 2-byte outputs are transposed
/// in registers.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <sm12x/abi_packed.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/store.hpp>
#include <sm12x/epilogue/chunk_store.hpp>
#include <sm12x/epilogue/tile_scales.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::epilogue {

/// Where the warp's part of the tile lies, and its scales: TileScales, whose constructors these are.
template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN, class Listed = void>
class RowStore : private TileScales<SwapAb, AtomsM, AtomsN, StepM, StepN, true, Listed> {
  using Scales = TileScales<SwapAb, AtomsM, AtomsN, StepM, StepN, true, Listed>;
  using Scales::feature_;
  using Scales::feature_at;
  using Scales::lane;
  using Scales::params_;
  using Scales::row_of;
  using Scales::tile_;
  using Scales::token_;
  using Scales::token_at;

 public:
  using Scales::Scales;
  using typename Scales::Accumulators;
  __device__ explicit RowStore(Scales const& scales) : Scales(scales) {}

  /// `scale_of`: TileScales::apply.
  template <class... ScaleOf>
  __device__ void store(Accumulators& accumulators, ScaleOf const&... scale_of) const {
    Scales::apply(accumulators, scale_of...);
    if (!Scales::kIsListed && params_.out_type == SM12X_OUT_FLOAT32) {
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
  template <class Element>
  __device__ Element* address(int in_tile, int feature) const {
    return reinterpret_cast<Element*>(params_.d) + tile_.group * params_.stride_d_group +
           row_of(in_tile) * params_.stride_d + feature;
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

  template <class Pack>
  __device__ void store_half(Accumulators const& accumulators, Pack const& pack) const {
    constexpr int kBlocks = SwapAb ? 2 * AtomsM : AtomsN;   // chunks of one token
    constexpr int kRowSets = SwapAb ? AtomsN : 2 * AtomsM;  // tokens of one lane
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
    // Token row sets and feature blocks, both of 8, in pairs: an atom's on the m side, two atoms' on the n
    // side.
    constexpr int kTokenStep = SwapAb ? StepN : StepM;
    constexpr int kFeatureStep = SwapAb ? StepM : StepN;
    arch::CachePolicy const policy = params_.flags & SM12X_KEEP_RESULTS
                                         ? arch::CachePolicy::kEvictLast
                                         : arch::CachePolicy::kEvictNormal;
    store_chunks<kRowSets, kBlocks>(pieces, [&](int row_set, int block, uint4 const& chunk) {
      int const token = token_ + row_set / 2 * kTokenStep + row_set % 2 * 8 + lane() / 4;
      int const feature = feature_ + block / 2 * kFeatureStep + block % 2 * 8;
      if (token < tile_.rows && feature < tile_.feature_end) {
        arch::store_16_bytes(address<uint16_t>(token, feature), chunk, policy);
      }
    });
  }
};

}  // namespace sm12x::epilogue
