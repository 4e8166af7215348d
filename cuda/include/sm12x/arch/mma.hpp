/// The FP8 tensor-core instructions: m16n8k32, two K-major operands, FP32 accumulators.
///
/// Fragments are the same for all three instructions (PTX ISA, "Matrix Fragments for
/// mma.m16n8k32"), so a policy may change without anything else changing.
#pragma once

#include <cstdint>

#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/config.hpp>
#include <cute/numeric/numeric_types.hpp>

#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL) ||       \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1200 && \
     __CUDA_ARCH_FAMILY_SPECIFIC__ < 1300)
#define SM12X_ARCH_HAS_BLOCK_SCALED_MMA 1
#endif

namespace sm12x::arch {

/// Four copies of the UE8M0 code 127, which is 2^0: every scale that the instruction could pick is
/// exactly 1.
inline constexpr uint32_t kUnitScales = 0x7f7f7f7fu;

/// mma.kind::mxf8f6f4.block_scale with unit scales on SM12x (targets 120a, 121a, 120f, 121f). On
/// GeForce parts it runs at twice the rate of the plain instruction. Targets without it have the
/// sm_89 FP8 instruction in its place; sm_90a, the twin, what that instruction stands for there.
template <class ElementA, class ElementB>
struct UnitScaleMma;

/// mma.kind::f8f6f4 on SM12x, elsewhere as above.
template <class ElementA, class ElementB>
struct PlainMma;

// clang-format off
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
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
// The compiler has no FP8 datapath to map the sm_89 instruction to on Hopper: it widens the
// fragments to FP16, issues two m16n8k16 MMAs from zero and adds the result with four FADDs. This
// is the same without the FADDs: the sums of a k32 block go through the tensor core's accumulator,
// as they do on SM12x. Each 32-bit register holds four consecutive k; the low pairs of A and B meet
// in the first MMA, the high pairs in the second.
#define SM12X_MMA_PLAIN(TYPE_A, TYPE_B)                                                             \
  asm volatile(                                                                                     \
      "{\n"                                                                                         \
      ".reg .b16 l0, l1, l2, l3, l4, l5, h0, h1, h2, h3, h4, h5;\n"                                 \
      ".reg .b32 x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5;\n"                                 \
      ".reg .f32 s0, s1, s2, s3;\n"                                                                 \
      "mov.b32 {l0, h0}, %4;\n"                                                                     \
      "mov.b32 {l1, h1}, %5;\n"                                                                     \
      "mov.b32 {l2, h2}, %6;\n"                                                                     \
      "mov.b32 {l3, h3}, %7;\n"                                                                     \
      "mov.b32 {l4, h4}, %8;\n"                                                                     \
      "mov.b32 {l5, h5}, %9;\n"                                                                     \
      "cvt.rn.f16x2." TYPE_A "x2 x0, l0;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 x1, l1;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 x2, l2;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 x3, l3;\n"                                                         \
      "cvt.rn.f16x2." TYPE_B "x2 x4, l4;\n"                                                         \
      "cvt.rn.f16x2." TYPE_B "x2 x5, l5;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 y0, h0;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 y1, h1;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 y2, h2;\n"                                                         \
      "cvt.rn.f16x2." TYPE_A "x2 y3, h3;\n"                                                         \
      "cvt.rn.f16x2." TYPE_B "x2 y4, h4;\n"                                                         \
      "cvt.rn.f16x2." TYPE_B "x2 y5, h5;\n"                                                         \
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {s0, s1, s2, s3}, {x0, x1, x2, x3}, "      \
      "{x4, x5}, {%10, %11, %12, %13};\n"                                                           \
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {y0, y1, y2, y3}, "      \
      "{y4, y5}, {s0, s1, s2, s3};\n"                                                               \
      "}\n"                                                                                         \
      : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                                      \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3))
#define SM12X_MMA_UNIT_SCALE(TYPE_A, TYPE_B) SM12X_MMA_PLAIN(TYPE_A, TYPE_B)
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

// clang-format on
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
