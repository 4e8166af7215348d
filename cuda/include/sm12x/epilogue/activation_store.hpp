/// Epilogue of GEMM1: scales, activation, and a row of h = activation(gates, ups) rounded and stored, with the
/// largest magnitude of each row raised on the way, or quantised with a static scale.
///
/// Where there are ups, the tile's features alternate between 8 gates and the 8 ups of the same outputs: the
/// tensor map of the weights brings them in this order. So a gate and its up lie in one lane, on whichever
/// side of the MMA the features are, and nothing is exchanged for the activation.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <sm12x/abi_moe.h>
#include <sm12x/arch/copy.hpp>
#include <sm12x/arch/store.hpp>
#include <sm12x/epilogue/activation.hpp>
#include <sm12x/epilogue/chunk_store.hpp>
#include <sm12x/epilogue/quantise.hpp>
#include <sm12x/epilogue/tile_scales.hpp>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::epilogue {

/// Rows of w1 that features of a tile are: 8 gates, 8 ups, 8 gates, ...
struct PairedChannels {
  int pair_stride;
  int half_stride;

  __device__ int operator()(int feature) const {
    return (feature / 16 * 8 + feature % 8) * pair_stride + feature / 8 % 2 * half_stride;
  }
};

/// Gated: there are ups. Steps and Listed: those of TileScales.
template <bool Gated, bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN,
          class Listed = void>
class ActivationStore
    : private TileScales<SwapAb, AtomsM, AtomsN, StepM, StepN, !cute::is_void_v<Listed>, Listed> {
  using Scales = TileScales<SwapAb, AtomsM, AtomsN, StepM, StepN, !cute::is_void_v<Listed>, Listed>;
  using Scales::feature_;
  using Scales::lane;
  using Scales::params_;
  using Scales::row_of;
  using Scales::tile_;
  using Scales::token_;
  using Scales::token_at;

 public:
  using typename Scales::Accumulators;

  __device__ ActivationStore(sm12x_packed_params const& params, sm12x_up_params const& up,
                             kernel::PackedWork const& tile, int token, int feature)
      : Scales(params, tile, token, feature, channels(up)), up_(up) {}

  __device__ ActivationStore(Scales const& scales, sm12x_up_params const& up)
      : Scales(scales), up_(up) {}

  __device__ void store(Accumulators& accumulators) const {
    Scales::apply(accumulators);
    if (up_.activation == SM12X_ACTIVATION_SILU) {
      activate<SM12X_ACTIVATION_SILU>(accumulators);
    } else if (up_.activation == SM12X_ACTIVATION_GELU) {
      activate<SM12X_ACTIVATION_GELU>(accumulators);
    } else if (up_.activation == SM12X_ACTIVATION_GELU_TANH) {
      activate<SM12X_ACTIVATION_GELU_TANH>(accumulators);
    } else {
      activate<SM12X_ACTIVATION_RELU2>(accumulators);
    }
    if (params_.out_type == SM12X_OUT_BFLOAT16) {
      store_rounded<__nv_bfloat16>(accumulators);
    } else if (Scales::kIsListed || params_.out_type == SM12X_OUT_FLOAT16) {
      store_rounded<__half>(accumulators);
    } else if constexpr (!Scales::kIsListed) {
      store_quantised(accumulators);
    }
  }

 private:
  // Of one token 8 results in a row are a chunk. A lane has some tokens (row sets), of each the same
  // chunks (blocks), and of a chunk the two results at a quad's place.
  static constexpr int kPiecesOnM = SwapAb && Gated ? AtomsM : 2 * AtomsM;
  static constexpr int kPiecesOnN = !SwapAb && Gated ? AtomsN / 2 : AtomsN;
  static constexpr int kBlocks = SwapAb ? kPiecesOnM : kPiecesOnN;
  static constexpr int kRowSets = SwapAb ? kPiecesOnN : kPiecesOnM;
  static_assert(SwapAb || !Gated || AtomsN % 2 == 0, "atoms of gates and ups come in pairs");

  __device__ static auto channels(sm12x_up_params const& up) {
    if constexpr (Gated) {
      return PairedChannels{up.pair_stride, up.half_stride};
    } else {
      return OwnChannels{};
    }
  }

  // Two results that an MMA instruction left in a lane: with swap_ab of two tokens, else of two features.
  // They take the places of the gates that they come from.
  __device__ static float* results(Accumulators& accumulators, int row_set, int block) {
    int const m = SwapAb ? block : row_set;
    int const n = SwapAb ? row_set : block;
    return SwapAb && Gated ? &accumulators[m][n][0]
           : Gated         ? &accumulators[m / 2][2 * n][m % 2 * 2]
                           : &accumulators[m / 2][n][m % 2 * 2];
  }
  __device__ static float* ups(Accumulators& accumulators, int row_set, int block) {
    return SwapAb ? &accumulators[block][row_set][2]
                  : &accumulators[row_set / 2][2 * block + 1][row_set % 2 * 2];
  }

  // Of d. Features of the tile are twice as many where gated, but blocks then lie twice as far apart.
  __device__ int first_feature(int block) const {
    constexpr int kStep = SwapAb ? StepM : StepN;
    return Gated ? (feature_ + block * kStep) / 2 : feature_ + block / 2 * kStep + block % 2 * 8;
  }
  __device__ bool holds(int block) const {
    return first_feature(block) < (Gated ? tile_.feature_end / 2 : tile_.feature_end);
  }
  // Of the lane's rows once chunks are whole.
  __device__ int chunk_token(int row_set) const {
    constexpr int kStep = SwapAb ? StepN : StepM;
    return token_ + row_set / 2 * kStep + row_set % 2 * 8 + lane() / 4;
  }

  template <int Kind>
  __device__ void activate(Accumulators& accumulators) const {
    Activation const activation = {up_.alpha, up_.beta, up_.limit};
#pragma unroll
    for (int row_set = 0; row_set < kRowSets; ++row_set) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float* const values = results(accumulators, row_set, block);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float const up = Gated ? ups(accumulators, row_set, block)[i] : 0.0f;
          values[i] = activation.template apply<Kind, Gated>(values[i], up);
        }
      }
    }
  }

  template <class Address>
  __device__ Address* address(int token, int feature) const {
    return reinterpret_cast<Address*>(params_.d) + row_of(token) * params_.stride_d + feature;
  }

  template <class Element>
  __device__ void store_rounded(Accumulators& accumulators) const {
    uint32_t pieces[kRowSets * kBlocks];
    // Of the tokens of a lane's accumulators, which under swap_ab are two of each row set.
    constexpr int kOfSet = SwapAb ? 2 : 1;
    float maxima[kRowSets * kOfSet];
#pragma unroll
    for (int row_set = 0; row_set < kRowSets; ++row_set) {
#pragma unroll
      for (int i = 0; i < kOfSet; ++i) {
        maxima[row_set * kOfSet + i] = 0.0f;
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float const* const values = results(accumulators, row_set, block);
        uint32_t const pair = Pair<Element>::pack(values[0], values[1]);
        float2 const rounded = Pair<Element>::unpack(pair);
        if (holds(block)) {
          float& first = maxima[row_set * kOfSet];
          first = fmaxf(first, fabsf(rounded.x));
          float& second = maxima[row_set * kOfSet + kOfSet - 1];
          second = fmaxf(second, fabsf(rounded.y));
        }
        pieces[row_set * kBlocks + block] = SwapAb ? arch::transpose_matrix(pair) : pair;
      }
    }
    arch::CachePolicy const policy = params_.flags & SM12X_KEEP_RESULTS
                                         ? arch::CachePolicy::kEvictLast
                                         : arch::CachePolicy::kEvictNormal;
    store_chunks<kRowSets, kBlocks>(pieces, [&](int row_set, int block, uint4 const& chunk) {
      int const token = chunk_token(row_set);
      if (token < tile_.rows && holds(block)) {
        arch::store_16_bytes(address<uint16_t>(token, first_feature(block)), chunk, policy);
      }
    });
    if (!Scales::kIsListed && up_.row_maxima != 0) {
      raise_maxima<kRowSets * kOfSet>(maxima);
    }
  }

  // Magnitudes are raised as the integers that their bits are: the order is the same, and the result does not
  // depend on who comes first.
  template <int Tokens>
  __device__ void raise_maxima(float (&maxima)[Tokens]) const {
    static_assert(Tokens == Scales::kTokens);
    auto* const of_rows = reinterpret_cast<uint32_t*>(up_.row_maxima) + tile_.row;
#pragma unroll
    for (int i = 0; i < Tokens; ++i) {
      // The lanes that share a token: of a quad, or of its place in all quads.
#pragma unroll
      for (int apart = SwapAb ? 4 : 1; apart < (SwapAb ? 32 : 4); apart *= 2) {
        maxima[i] = fmaxf(maxima[i], __shfl_xor_sync(0xffffffffu, maxima[i], apart));
      }
      int const token = token_ + token_at(i);
      bool const speaks = SwapAb ? lane() < 4 : lane() % 4 == 0;
      if (speaks && token < tile_.rows) {
        atomicMax(of_rows + token, __float_as_uint(maxima[i]));
      }
    }
  }

  __device__ void store_quantised(Accumulators& accumulators) const {
    float const scale =
        up_.d_scale != 0 ? *reinterpret_cast<float const*>(up_.d_scale) : up_.d_scale_value;
    uint32_t pieces[kRowSets * kBlocks];
#pragma unroll
    for (int row_set = 0; row_set < kRowSets; ++row_set) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        float const* const values = results(accumulators, row_set, block);
        // A code in each half of the word, because a matrix of 16-bit elements is what can be transposed.
        uint32_t const codes = __byte_perm(
            e4m3_pair(__fdiv_rn(values[0], scale), __fdiv_rn(values[1], scale)), 0, 0x4140);
        pieces[row_set * kBlocks + block] = SwapAb ? arch::transpose_matrix(codes) : codes;
      }
    }
    store_chunks<kRowSets, kBlocks>(pieces, [&](int row_set, int block, uint4 const& chunk) {
      int const token = chunk_token(row_set);
      if (token < tile_.rows && holds(block)) {
        *reinterpret_cast<uint2*>(address<uint8_t>(token, first_feature(block))) = {
            __byte_perm(chunk.x, chunk.y, 0x6420), __byte_perm(chunk.z, chunk.w, 0x6420)};
      }
    });
  }

  sm12x_up_params const& up_;
};

}  // namespace sm12x::epilogue
