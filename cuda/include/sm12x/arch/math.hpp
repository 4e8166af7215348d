/// Arithmetic that CUDA's headers do not have.
#pragma once

namespace sm12x::arch {

/// 1 / x within one unit in the last place or so, without the branch that denormals need.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace sm12x::arch
