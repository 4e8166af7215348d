/// The FP8 tensor-core instructions: m16n8k32, two K-major operands, FP32 accumulators.
///
/// Fragments are the same for all three instructions (PTX ISA, "Matrix Fragments for mma.m16n8k32"), so a
/// policy may change without anything else changing.
#pragma once

#include <cstdint>

#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/config.hpp>
#include <cute/numeric/numeric_types.hpp>

#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define SM12X_ARCH_HAS_BLOCK_SCALED_MMA 1
#endif

namespace sm12x::arch {

/// Four copies of the UE8M0 code 127, which is 2^0: every scale that the instruction could pick is exactly 1.
inline constexpr uint32_t kUnitScales = 0x7f7f7f7fu;

/// mma.kind::mxf8f6f4.block_scale with unit scales on SM12x. On GeForce parts it runs at twice the rate of the
/// plain instruction. On targets without it (the sm_90a twin) the sm_89 instruction takes its place.
template <class ElementA, class ElementB>
struct UnitScaleMma;

/// mma.kind::f8f6f4 on SM12x, the sm_89 instruction elsewhere.
template <class ElementA, class ElementB>
struct PlainMma;

#if defined(SM12X_ARCH_HAS_BLOCK_SCALED_MMA)
#define SM12X_MMA_UNIT_SCALE(TYPE_A, TYPE_B)                                                        \
  asm volatile(                                                                                     \
      "mma.sync.aligned.kind::mxf8f6f4.block_scale.scale_vec::1X.m16n8k32.row.col.f32." TYPE_A      \
      "." TYPE_B                                                                                    \
      ".f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, "             \
      "{%14}, {0, 0}, {%14}, {0, 0};"                                                               \
      : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                                      \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3),   \
        "r"(kUnitScales))
#define SM12X_MMA_PLAIN(TYPE_A, TYPE_B)                                                             \
  asm volatile("mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32." TYPE_A "." TYPE_B              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"           \
               : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                             \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),   \
                 "f"(c3))
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define SM12X_MMA_PLAIN(TYPE_A, TYPE_B)                                                             \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32." TYPE_A "." TYPE_B                           \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"           \
               : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                             \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),   \
                 "f"(c3))
#define SM12X_MMA_UNIT_SCALE(TYPE_A, TYPE_B) SM12X_MMA_PLAIN(TYPE_A, TYPE_B)
#else
#define SM12X_MMA_PLAIN(TYPE_A, TYPE_B) \
  CUTE_INVALID_CONTROL_PATH("sm12x: FP8 MMA needs sm_89 or newer; compile for sm_120a, sm_121a or sm_90a")
#define SM12X_MMA_UNIT_SCALE(TYPE_A, TYPE_B) SM12X_MMA_PLAIN(TYPE_A, TYPE_B)
#endif

#define SM12X_DEFINE_MMA(NAME, INSTRUCTION, ELEMENT_A, ELEMENT_B, TYPE_A, TYPE_B)                   \
  template <>                                                                                       \
  struct NAME<ELEMENT_A, ELEMENT_B> {                                                               \
    using DRegisters = float[4];                                                                    \
    using ARegisters = uint32_t[4];                                                                 \
    using BRegisters = uint32_t[2];                                                                 \
    using CRegisters = float[4];                                                                    \
                                                                                                    \
    CUTE_HOST_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0, \
                                     uint32_t const& a1, uint32_t const& a2, uint32_t const& a3,    \
                                     uint32_t const& b0, uint32_t const& b1, float const& c0,       \
                                     float const& c1, float const& c2, float const& c3) {           \
      INSTRUCTION(TYPE_A, TYPE_B);                                                                  \
    }                                                                                               \
  };

SM12X_DEFINE_MMA(UnitScaleMma, SM12X_MMA_UNIT_SCALE, cute::float_e4m3_t, cute::float_e4m3_t, "e4m3", "e4m3")
SM12X_DEFINE_MMA(UnitScaleMma, SM12X_MMA_UNIT_SCALE, cute::float_e4m3_t, cute::float_e5m2_t, "e4m3", "e5m2")
SM12X_DEFINE_MMA(UnitScaleMma, SM12X_MMA_UNIT_SCALE, cute::float_e5m2_t, cute::float_e4m3_t, "e5m2", "e4m3")
SM12X_DEFINE_MMA(UnitScaleMma, SM12X_MMA_UNIT_SCALE, cute::float_e5m2_t, cute::float_e5m2_t, "e5m2", "e5m2")
SM12X_DEFINE_MMA(PlainMma, SM12X_MMA_PLAIN, cute::float_e4m3_t, cute::float_e4m3_t, "e4m3", "e4m3")
SM12X_DEFINE_MMA(PlainMma, SM12X_MMA_PLAIN, cute::float_e4m3_t, cute::float_e5m2_t, "e4m3", "e5m2")
SM12X_DEFINE_MMA(PlainMma, SM12X_MMA_PLAIN, cute::float_e5m2_t, cute::float_e4m3_t, "e5m2", "e4m3")
SM12X_DEFINE_MMA(PlainMma, SM12X_MMA_PLAIN, cute::float_e5m2_t, cute::float_e5m2_t, "e5m2", "e5m2")

#undef SM12X_DEFINE_MMA
#undef SM12X_MMA_UNIT_SCALE
#undef SM12X_MMA_PLAIN

}  // namespace sm12x::arch

namespace cute {

/// Shape, thread and value layouts are the sm_89 instruction's; only the element types differ.
template <class ElementA, class ElementB>
struct MMA_Traits<sm12x::arch::UnitScaleMma<ElementA, ElementB>>
    : MMA_Traits<SM89_16x8x32_F32E4M3E4M3F32_TN> {
  using ValTypeA = ElementA;
  using ValTypeB = ElementB;
};

template <class ElementA, class ElementB>
struct MMA_Traits<sm12x::arch::PlainMma<ElementA, ElementB>>
    : MMA_Traits<SM89_16x8x32_F32E4M3E4M3F32_TN> {
  using ValTypeA = ElementA;
  using ValTypeB = ElementB;
};

}  // namespace cute
