/// Between grids and between CTAs of one grid: programmatic dependent launch, words that another grid wrote, the
/// acquire and release of words in global memory.
///
/// CUTLASS's wrappers of griddepcontrol become nothing unless a macro is set on the command line;
/// ours are what they say (PTX ISA, "griddepcontrol").
#pragma once

#include <cstdint>

namespace sm12x::arch {

/// Waits until every grid that this one depends on has completed and its writes are visible. Nothing
/// where the grid was launched without the attribute.
__device__ __forceinline__ void wait_on_prerequisite_grids() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets grids that depend on this one begin, once every CTA has called it or ended.
__device__ __forceinline__ void launch_dependent_grids() {
  asm volatile("griddepcontrol.launch_dependents;");
}

/// Global memory that an earlier grid may have written not long before this one began: not kept in L1, so that none of
/// our grids leaves there what is old to the next one. It is a hint. What others have left in L1, launching a grid
/// makes it forget; nobody documents that for a launch before the end of the grid in front, where what is read is two grids
/// old (that grid's own waits make L1 forget too, on the SMs that it runs on).
///
/// Not ld.global.cg (__ldcg), nor a fence. ptxas takes either for synchronisation (LDG.STRONG) and puts a YIELD into the
/// loops around and behind it, the one of the thread that loads the weights among them, whose warp is diverged: on
/// an H200 a GEMM with stages of 8 KB took a quarter longer, with 16 KB 2 %.
__device__ __forceinline__ uint32_t load_past_l1(uint32_t const* address) {
  uint32_t value;
  asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ int32_t load_past_l1(int32_t const* address) {
  return int32_t(load_past_l1(reinterpret_cast<uint32_t const*>(address)));
}
__device__ __forceinline__ int64_t load_past_l1(int64_t const* address) {
  int64_t value;
  asm volatile("ld.global.L1::no_allocate.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ int4 load_past_l1(int4 const* address) {
  int4 value;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

/// The word, and with it all that was written before whoever released it.
__device__ __forceinline__ uint32_t load_acquire(uint32_t const* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

/// The word, however old; acquire_all() after it makes it as good as load_acquire(), which costs more where it is
/// asked for again and again.
__device__ __forceinline__ uint32_t load_relaxed(uint32_t const* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void acquire_all() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Adds to the word; releases what this thread knows of.
__device__ __forceinline__ void add_release(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/// Adds to the word and returns what it was; releases what this thread knows of, acquires what the
/// others released.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(value)
               : "memory");
  return before;
}

}  // namespace sm12x::arch
