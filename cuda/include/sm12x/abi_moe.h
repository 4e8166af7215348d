/* The launch structs of an expert layer's own kernels, in the words of abi.h and abi_packed.h: GEMM1 with its
 * activation (family fp8_up), GEMM2 that quantises its rows (fp8_down), and the small kernels around them
 * (families moe_route, quantize_fp8 and moe_combine). Mirrored in runtime/sm12x/abi.py and checked like abi.h.
 *
 * T tokens of k routes each; a row is a route to one of this device's experts, rows are sorted by expert.
 */
#ifndef SM12X_ABI_MOE_H_
#define SM12X_ABI_MOE_H_

#include <sm12x/abi_packed.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What GEMM1's kernel makes of a gate g and its up u, in FP32; without ups, of g alone. The limit (infinite:
 * none) comes first: g = min(g, limit), u = max(-limit, min(u, limit)). */
enum sm12x_activation {
  SM12X_ACTIVATION_SILU = 0,      /* g / (1 + exp(-alpha g)) (u + beta): swigluoai too */
  SM12X_ACTIVATION_GELU = 1,      /* g (1 + erf(g / sqrt 2)) / 2 u */
  SM12X_ACTIVATION_GELU_TANH = 2, /* the same with tanh's approximation of erf */
  SM12X_ACTIVATION_RELU2 = 3      /* max(g, 0)^2 u */
};

/* GEMM1: h = activation(a_scale * w1_scale * acc + bias1). gemm.n counts rows of w1, 2 I where gated; gemm.d is
 * h, (rows, I), and gemm.out_type SM12X_OUT_BFLOAT16, _FLOAT16 or _E4M3. Row r of w1's half h (0: gate, 1:
 * up) is row r * pair_stride + h * half_stride; gemm.map_b has them in that order: (k, 8, 2, I / 8,
 * num_groups). */
typedef struct sm12x_up_params {
  sm12x_packed_params gemm;
  uint64_t
      row_maxima; /* uint32_t (rows,): raised to the bits of max |h| of each row, h as stored; or 0 */
  uint64_t d_scale;    /* float*: one for all of an e4m3 d, or 0 */
  float d_scale_value; /* where d_scale is 0 */
  float alpha;
  float beta;
  float limit;
  int32_t activation; /* SM12X_ACTIVATION_* */
  int32_t half_stride;
  int32_t pair_stride;
  int32_t reserved;
} sm12x_up_params;

/* GEMM2 on rows that it quantises itself: gemm.a is h, (rows, k) of a_type, gemm.a_scale is not read. A row's
 * scale is max(maximum, 1 / 512) / 448. */
typedef struct sm12x_down_params {
  sm12x_packed_params gemm;
  uint64_t row_maxima; /* uint32_t (rows,): bits of max |h| of each row */
  int32_t a_type;      /* SM12X_OUT_BFLOAT16 or SM12X_OUT_FLOAT16 */
  int32_t reserved;
} sm12x_down_params;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SM12X_ABI_MOE_H_ */
