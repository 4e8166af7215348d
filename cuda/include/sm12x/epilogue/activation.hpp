/// Activations of an expert layer, in FP32.
#pragma once

#include <cuda_runtime.h>
#include <sm12x/abi_moe.h>

namespace sm12x::epilogue {

/// What the launch says about the activation. Quotients are within 2 units in the last place of FP32, where a result
/// of 2 bytes rounds away far more, and 0 instead of less than 1e-35: a division exact to the last bit takes longer
/// than all else of it.
struct Activation {
  float alpha;
  float beta;
  float limit;

  /// Of gate `g` and up `u`; kGated = false: of g alone. Kind: SM12X_ACTIVATION_*.
  template <int Kind, bool kGated>
  __device__ float apply(float g, float u) const {
    g = g > limit ? limit : g;  // NaN stays
    float activated;
    if constexpr (Kind == SM12X_ACTIVATION_SILU) {
      activated = __fdividef(g, 1.0f + expf(-alpha * g));
    } else if constexpr (Kind == SM12X_ACTIVATION_GELU) {
      constexpr float kHalfRoot = 0.70710678118654752f;
      activated = 0.5f * g * erfcf(-g * kHalfRoot);  // 1 + erf would cancel
    } else if constexpr (Kind == SM12X_ACTIVATION_GELU_TANH) {
      // (1 + tanh(v)) / 2 = 1 / (1 + exp(-2 v)), without the cancellation where tanh is near -1.
      constexpr float kTwiceRoot = 1.5957691216057308f;  // 2 sqrt(2 / pi)
      float const v = kTwiceRoot * (g + 0.044715f * g * g * g);
      activated = __fdividef(g, 1.0f + expf(-v));
    } else {
      float const positive = g < 0.0f ? 0.0f : g;
      activated = positive * positive;
    }
    if constexpr (kGated) {
      u = u > limit ? limit : u < -limit ? -limit : u;
      activated *= Kind == SM12X_ACTIVATION_SILU ? u + beta : u;
    }
    return activated;
  }
};

}  // namespace sm12x::epilogue
