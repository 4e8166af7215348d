/// The two GEMMs of a layer that is one launch (layer_gemm.hpp), as operations of the packed layer
/// (packed_operations.hpp). Both quantise their rows on their way in and share weights out in strips of 16
/// features, so that their stages are alike.
#pragma once

#include <cstdint>

#include <sm12x/abi_moe.h>
#include <sm12x/epilogue/activation_store.hpp>
#include <sm12x/epilogue/row_store.hpp>
#include <sm12x/epilogue/tile_scales.hpp>
#include <sm12x/kernel/packed_operations.hpp>

namespace sm12x::kernel {

struct LayerOperation : PlainOperation {
  static constexpr int kStrip = 16;
  static constexpr bool kQuantisesRows = true;
  static constexpr int mma_registers(bool, int) { return 184; }
  static constexpr bool kLoadsWeightsEarly = false;
  static constexpr Bounds kBounds = Bounds::kCounted;
};

/// GEMM1 with its activation. Gated: w1 has gates and ups.
template <bool Gated>
struct LayerUp : LayerOperation, FirstWeights<Gated> {
  using Extra = sm12x_up_params;
  using FirstWeights<Gated>::load_weights;

  template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
  using Store = epilogue::ActivationStore<Gated, SwapAb, AtomsM, AtomsN, StepM, StepN,
                                          epilogue::ListedRows<AtomsN * 8>>;
};

/// GEMM2.
struct LayerDown : LayerOperation {
  using Extra = sm12x_packed_params;

  template <bool SwapAb, int AtomsM, int AtomsN, int StepM, int StepN>
  using Store =
      epilogue::RowStore<SwapAb, AtomsM, AtomsN, StepM, StepN, epilogue::ListedRows<AtomsN * 8>>;
};

/// Rows of the weights that features of either GEMM are: of GEMM1 where gated, 8 gates and 8 ups in turns.
struct LayerChannels {
  epilogue::PairedChannels paired;
  bool is_paired;

  __device__ int operator()(int feature) const { return is_paired ? paired(feature) : feature; }
};

}  // namespace sm12x::kernel
