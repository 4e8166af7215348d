/// Copies between global memory, shared memory and registers.
#pragma once

#include <cstdint>

namespace sm12x::arch {

/// Address in the shared window, which ldmatrix, cp.async and TMA take.
__device__ __forceinline__ uint32_t shared_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Four 8x8 matrices of 16-bit elements (of FP8: 8 rows of 16 bytes each); lane l gives the address of
/// row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t& d0, uint32_t& d1,
                                              uint32_t& d2, uint32_t& d3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
               : "r"(address)
               : "memory");
}

/// Transposes an 8x8 matrix of 16-bit elements across a warp: lane l holds two neighbours of row l / 4.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t value) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(value));
  return transposed;
}

/// 16 bytes from global to shared memory, asynchronously; zeros, with nothing read, where not `valid`.
__device__ __forceinline__ void copy_16_bytes(uint32_t shared, void const* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

/// The mbarrier gets one arrival of this thread when all its copies so far have landed.
__device__ __forceinline__ void arrive_on_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Fetches a tensor map that TMA will need.
__device__ __forceinline__ void prefetch_tensor_map(void const* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// A box of a 3-D tensor into shared memory by TMA; out of bounds it is zeros. The mbarrier gets its
/// bytes, all of them.
__device__ __forceinline__ void load_box(void const* map, uint32_t barrier, uint32_t shared, int x,
                                         int y, int z) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define SM12X_TMA_DESTINATION "shared::cta"
#else
#define SM12X_TMA_DESTINATION "shared::cluster"
#endif
  asm volatile("cp.async.bulk.tensor.3d." SM12X_TMA_DESTINATION
               ".global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
               "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
               : "memory");
#undef SM12X_TMA_DESTINATION
}

}  // namespace sm12x::arch
