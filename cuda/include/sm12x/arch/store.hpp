/// Stores to global memory that say how long L2 should keep what they write.
#pragma once

#include <cstdint>

#include <sm12x/arch/copy.hpp>

namespace sm12x::arch {

/// 16 bytes.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 const& value, CachePolicy policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
               : "memory");
}

}  // namespace sm12x::arch
