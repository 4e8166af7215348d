/// Where a lane's accumulators lie in a tile, and what they are multiplied with.
///
/// A warp's accumulators are atoms of 16 x 8 (m side x n side). Under swap_ab the m side is features
/// and the n side tokens, else the other way round.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/util/type_traits.hpp>
#include <sm12x/abi_packed.h>
#include <sm12x/kernel/packed_scheduler.hpp>

namespace sm12x::epilogue {

/// Output features are rows of the weights, in their order.
struct OwnChannels {
  __device__ int operator()(int feature) const { return feature; }
};

/// Rows of a tile that lie anywhere in d, and what is known of them; in shared memory.
template <int Tokens>
struct ListedRows {
  int32_t row[Tokens];
  float scale[Tokens];
  float weight[Tokens];
};

/// StepM, StepN: rows from one atom on the m side, and from one pair of atoms on the n side, to the next.
/// Weighted: there may be a row_weight. Listed: the ListedRows of a tile, or void: rows follow each other.
template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN, bool Weighted = true,
          class Listed = void>
class TileScales {
 public:
  static constexpr bool kIsListed = !cute::is_void_v<Listed>;
  using Accumulators = float[AtomsM][AtomsN][4];

  // Tokens and features that one lane's accumulators lie at.
  static constexpr int kTokens = SwapAb ? 2 * AtomsN : 2 * AtomsM;
  static constexpr int kFeatures = SwapAb ? 2 * AtomsM : 2 * AtomsN;

  /// The warp's part of the tile begins at `token` and `feature` of the tile. Requests all scales, which
  /// the main loop gives time to arrive. `channel_of`: the row of the weights that a feature is.
  template <class Channels>
  __device__ TileScales(sm12x_packed_params const& params, kernel::PackedWork const& tile,
                        int token, int feature, Channels const& channel_of)
      : params_(params), tile_(tile), token_(token), feature_(tile.feature + feature) {
    load_token_scales();
    load_feature_scales(channel_of);
  }

  /// The same with one number for each row instead of a_scale, of which apply() makes the row's scale.
  template <class Channels>
  __device__ TileScales(sm12x_packed_params const& params, kernel::PackedWork const& tile,
                        int token, int feature, Channels const& channel_of, float const* of_rows)
      : params_(params), tile_(tile), token_(token), feature_(tile.feature + feature) {
    load_token_scales(of_rows);
    load_feature_scales(channel_of);
  }

  /// The same with rows of their own, which are read when the main loop has ended.
  template <class Channels, int Tokens>
  __device__ TileScales(sm12x_packed_params const& params, kernel::PackedWork const& tile,
                        int token, int feature, Channels const& channel_of,
                        ListedRows<Tokens> const& rows)
      : params_(params),
        tile_(tile),
        token_(token),
        feature_(tile.feature + feature),
        listed_(&rows) {
    load_feature_scales(channel_of);
  }

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int m_at(int i) { return i / 2 * StepM + i % 2 * 8 + lane() / 4; }
  __device__ static int n_at(int i) {
    return i / 4 * StepN + i / 2 % 2 * 8 + lane() % 4 * 2 + i % 2;
  }
  __device__ static int token_at(int i) { return SwapAb ? n_at(i) : m_at(i); }
  __device__ static int feature_at(int i) { return SwapAb ? m_at(i) : n_at(i); }

  /// Replaces accumulators by what they stand for: scaled, biased, weighted. `scale_of`: the scale of a
  /// token, from what was loaded for it.
  template <class ScaleOf>
  __device__ void apply(Accumulators& accumulators, ScaleOf const& scale_of) const {
    float token_scale[kTokens];
    float row_weight[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if constexpr (kIsListed) {
        token_scale[i] = scale_of(listed_->scale[token_ + token_at(i)]);
        row_weight[i] = listed_->weight[token_ + token_at(i)];
      } else {
        token_scale[i] = scale_of(token_scale_[i]);
        row_weight[i] = row_weight_[i];
      }
    }
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
          value = (token_scale[t] * feature_scale_[f] * value + bias_[f]) * row_weight[t];
        }
      }
    }
  }

  __device__ void apply(Accumulators& accumulators) const {
    apply(accumulators, [](float scale) { return scale; });
  }

 protected:
  // Of d, without what stride_d_group adds.
  __device__ int64_t row_of(int token) const {
    if constexpr (kIsListed) {
      return listed_->row[token];
    } else {
      return tile_.row + token;
    }
  }

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
      row_weight_[i] = Weighted && weight != nullptr ? weight[row] : 1.0f;
      bool reads_zeros = false;
      if (mode == SM12X_SCALE_VECTOR && params_.row_index != 0) {
        row = kernel::indexed_row(params_, row);
        reads_zeros = row < 0;
      }
      token_scale_[i] = reads_zeros ? 0.0f : scale[mode == SM12X_SCALE_VECTOR ? row : 0];
    }
  }

  __device__ void load_token_scales(float const* of_rows) {
    auto const* const weight = reinterpret_cast<float const*>(params_.row_weight);
    int64_t const first = first_row() + tile_.row;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      int64_t const row = first + min(token_ + token_at(i), tile_.rows - 1);
      row_weight_[i] = Weighted && weight != nullptr ? weight[row] : 1.0f;
      token_scale_[i] = of_rows[row];
    }
  }

  template <class Channels>
  __device__ void load_feature_scales(Channels const& channel_of) {
    int const mode = params_.b_scale_mode;
    float const* const scale = scale_of_group(mode, params_.b_scale, &params_.b_scale_value,
                                              tile_.group * params_.stride_b_scale);
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      feature_scale_[i] = scale[mode == SM12X_SCALE_VECTOR ? channel_of(feature_inside(i)) : 0];
      bias_[i] = 0.0f;
    }
    if (params_.bias != 0) {
      int64_t const first = tile_.group * params_.stride_bias;
      if (params_.bias_type == SM12X_BIAS_FLOAT32) {
        load_bias(reinterpret_cast<float const*>(params_.bias) + first, channel_of);
      } else if (params_.bias_type == SM12X_BIAS_BFLOAT16) {
        load_bias(reinterpret_cast<__nv_bfloat16 const*>(params_.bias) + first, channel_of);
      } else {
        load_bias(reinterpret_cast<__half const*>(params_.bias) + first, channel_of);
      }
    }
  }

  template <class Element, class Channels>
  __device__ void load_bias(Element const* bias, Channels const& channel_of) {
#pragma unroll
    for (int i = 0; i < kFeatures; ++i) {
      bias_[i] = float(bias[channel_of(feature_inside(i))]);
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

  sm12x_packed_params const& params_;
  kernel::PackedWork tile_;
  int token_;
  int feature_;
  Listed const* listed_ = nullptr;
  float token_scale_[kTokens];
  float row_weight_[kTokens];
  float feature_scale_[kFeatures];
  float bias_[kFeatures];
};

}  // namespace sm12x::epilogue
