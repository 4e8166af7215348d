/// What the lanes of a warp work out together.
#pragma once

#include <cstdint>

namespace sm12x::arch {

/// The sum of a value of this lane and all in front of it. All lanes of a warp.
__device__ __forceinline__ uint32_t sum_up_to_lane(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    // The shuffle's own predicate says whether there is such a lane (PTX ISA, "shfl.sync").
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        ".reg .b32 before;\n"
        "shfl.sync.up.b32 before|there, %0, %1, 0, 0xffffffff;\n"
        "@there add.u32 %0, %0, before;\n"
        "}"
        : "+r"(value)
        : "r"(distance));
  }
  return value;
}

}  // namespace sm12x::arch
