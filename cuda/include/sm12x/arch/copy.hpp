/// Copies between global memory, shared memory and registers.
#pragma once

#include <cstdint>

namespace sm12x::arch {

/// Address in the shared window, which ldmatrix, cp.async and TMA take.
__device__ __forceinline__ uint32_t shared_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Keeps the compiler from computing a value later than here.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

/// Bytes of dynamic shared memory that the launch brought.
__device__ __forceinline__ uint32_t dynamic_shared_bytes() {
  uint32_t bytes;
  asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

/// Zero, in a way that no compiler can know: whoever adds it to an address waits until `value` is in its
/// register.
__device__ __forceinline__ uint32_t zero_once_known(uint32_t value) {
  return value & (dynamic_shared_bytes() >> 24);
}

/// One arrival at an mbarrier of this CTA, once `loaded` is in its register.
///
/// A warp that loads from a stage and then arrives, to hand the stage back to TMA, needs that: the arrival
/// overtakes ldmatrix. Shared memory serves both in order as far as other threads can tell, which is why
/// ptxas lets no load be waited for, but TMA writes past that queue: behind a burst of stores of
/// other warps, fragments were read after the next bytes had landed (seen on an H200).
__device__ __forceinline__ void arrive_once_loaded(uint32_t barrier, uint32_t loaded) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier + zero_once_known(loaded))
               : "memory");
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

/// 8 bytes from registers to shared memory.
__device__ __forceinline__ void store_8_bytes(uint32_t shared, uint2 const& value) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(value.x), "r"(value.y)
               : "memory");
}

/// Fetches a tensor map that TMA will need.
__device__ __forceinline__ void prefetch_tensor_map(void const* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// How long L2 should keep what TMA reads: the policies of createpolicy.fractional, for all of it.
enum class CachePolicy : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12f0000000000000,
  kEvictLast = 0x14f0000000000000
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define SM12X_TMA_DESTINATION "shared::cta"
#else
#define SM12X_TMA_DESTINATION "shared::cluster"
#endif

/// A box of a 3-D tensor into shared memory by TMA; out of bounds it is zeros. The mbarrier gets its
/// bytes, all of them.
__device__ __forceinline__ void load_box(void const* map, uint32_t barrier, uint32_t shared, int x,
                                         int y, int z, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d." SM12X_TMA_DESTINATION
      ".global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::
          "r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

/// The same of a 5-D tensor whose second and third axes the box has whole.
__device__ __forceinline__ void load_paired_box(void const* map, uint32_t barrier, uint32_t shared,
                                                int x, int y, int z, CachePolicy policy) {
  asm volatile("cp.async.bulk.tensor.5d." SM12X_TMA_DESTINATION
               ".global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%3, %6, %6, %4, %5}], [%2], %7;" ::"r"(shared),
               "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(0), "l"(policy)
               : "memory");
}

#undef SM12X_TMA_DESTINATION

}  // namespace sm12x::arch
