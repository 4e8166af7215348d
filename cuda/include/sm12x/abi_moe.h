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
 * num_groups).
 *
 * With topk_ids the weights are loaded before the grid in front has ended: the offsets, which that one may
 * still be writing, are counted from the routes themselves, of SM12X_MOST_COUNTED_EXPERTS experts and 65,535
 * routes at most. The ids and the map must be there before the grid in front lets dependents begin: where that is
 * moe_route with `early`, before it itself begins. */
#define SM12X_MOST_COUNTED_EXPERTS 256

typedef struct sm12x_up_params {
  sm12x_packed_params gemm;
  uint64_t row_maxima; /* uint32_t (rows,): raised to the bits of max |h| of each row of h; or 0 */
  uint64_t topk_ids;   /* int32 or int64 (routes,), or 0 */
  uint64_t expert_map; /* int32_t (map_size,): a global expert's local number, or 0 */
  uint64_t d_scale;    /* float*: one for all of an e4m3 d, or 0 */
  float d_scale_value; /* where d_scale is 0 */
  float alpha;
  float beta;
  float limit;
  int32_t activation; /* SM12X_ACTIVATION_* */
  int32_t half_stride;
  int32_t pair_stride;
  int32_t routes;
  int32_t map_size;
  int32_t ids_are_64_bit;
} sm12x_up_params;

/* GEMM2 on rows that it quantises itself: gemm.a is h, (rows, k) of a_type, gemm.a_scale is not read. A row's
 * scale is max(maximum, 1 / 512) / 448. gemm.bounds must be there before the grid in front lets dependents
 * begin: weights are loaded before it has ended. */
typedef struct sm12x_down_params {
  sm12x_packed_params gemm;
  uint64_t row_maxima; /* uint32_t (rows,): bits of max |h| of each row */
  int32_t a_type;      /* SM12X_OUT_BFLOAT16 or SM12X_OUT_FLOAT16 */
  int32_t reserved;
} sm12x_down_params;

/* A whole expert layer of few tokens in one launch (family fp8_layer). Rows lie in the order of the routes:
 * route j of token t has row t * top_k + j of h and y, and no row is written for a route without a local expert.
 * up.gemm.a is x, (tokens, k) of `type`, and up.gemm.d h, (routes, I); down.a is h and down.d y, (routes, n),
 * all of `type`; the kernel quantises the rows of x and h on their way in, each by its own largest magnitude, as
 * sm12x_down_params has it. up.topk_ids is not 0; bounds, row_index, a_scale, row_weight, row_maxima, d_scale,
 * partials and counters of either are not read. down.map_b has boxes of 16, 32, 64 and 128 features.
 *
 * At most SM12X_MOST_COUNTED_EXPERTS experts, SM12X_LAYER_ROUTES routes and 16 * SM12X_LAYER_STRIPS features
 * of y. The grid may be of any size: no CTA waits for one that is not running. */
#define SM12X_LAYER_ROUTES 512
#define SM12X_LAYER_STRIPS 1024
#define SM12X_LAYER_STATE 4 /* words in front of those of the strips */

typedef struct sm12x_layer_params {
  sm12x_up_params up;
  sm12x_packed_params down;
  uint64_t topk_weights; /* float (tokens, top_k), or 0: all count as 1 */
  uint64_t out;          /* (tokens, down.n) of type */
  uint64_t
      state; /* uint32_t[SM12X_LAYER_STATE + SM12X_LAYER_STRIPS], zero before the launch and after it */
  int64_t stride_out;
  int32_t tokens;
  int32_t top_k;
  int32_t type; /* SM12X_OUT_BFLOAT16 or SM12X_OUT_FLOAT16 */
  int32_t reserved;
} sm12x_layer_params;

/* Types of rows that are read or written: those of d, enum sm12x_out_type. */

/* Where the scale of a quantised row comes from. */
enum sm12x_quantize_mode {
  SM12X_QUANTIZE_ROWS = 0,   /* the row's own maximum */
  SM12X_QUANTIZE_MAXIMA = 1, /* of the row, given: uint32_t (rows,), its bits */
  SM12X_QUANTIZE_TENSOR = 2, /* the largest of `count` given maxima, for all rows */
  SM12X_QUANTIZE_STATIC = 3  /* one scale for all rows */
};

/* q[row, i] = e4m3(x[row, i] * weight[row] / scale), the product rounded to x's type. A scale from a maximum is
 * max(maximum, 1 / 512) / 448. */
typedef struct sm12x_quantize_params {
  uint64_t x;         /* (rows, k) of x_type */
  uint64_t q;         /* (rows, k) */
  uint64_t scale;     /* float: written, (rows,) with ROWS and MAXIMA, else one; or 0 */
  uint64_t source;    /* MAXIMA, TENSOR: the maxima; STATIC: float*, or 0: static_scale */
  uint64_t weight;    /* float (rows,), or 0 */
  uint64_t row_count; /* int32_t*: of the rows only so many are there, behind them `padding` rows of
                         zeros, for a GEMM's last tile; or 0 */
  int64_t rows;
  int64_t stride_x;
  int64_t stride_q;
  int32_t k;
  int32_t x_type;
  int32_t mode;
  int32_t count;
  float static_scale;
  int32_t padding;
} sm12x_quantize_params;

/* maxima[block] = bits of the largest |x| of its share of the rows. */
typedef struct sm12x_maxima_params {
  uint64_t x;
  uint64_t maxima; /* uint32_t, one for each CTA */
  int64_t rows;
  int64_t stride_x;
  int32_t k;
  int32_t x_type;
} sm12x_maxima_params;

/* Routes that one CTA sorts. With more of them, a launch counts and another one places. */
#define SM12X_ROUTES_PER_CTA 8192

enum sm12x_route_phase {
  SM12X_ROUTE_ALL = 0,   /* one CTA counts and places */
  SM12X_ROUTE_COUNT = 1, /* CTAs count their routes */
  SM12X_ROUTE_PLACE = 2  /* CTAs place them, after a launch that has counted */
};

/* Sorts routes by expert and, in the same launch, quantises the tokens' rows: the first route_ctas CTAs sort,
 * each of the others takes a row. Not with PLACE. */
typedef struct sm12x_route_params {
  sm12x_quantize_params tokens; /* rows 0: none are quantised */
  uint64_t topk_ids;            /* int32 or int64 (tokens, top_k) */
  uint64_t topk_weights;        /* float (tokens, top_k), or 0 */
  uint64_t expert_map;          /* int32_t (map_size,): a global expert's local number, or 0 */
  uint64_t offsets;             /* int32_t (num_experts + 1,) */
  uint64_t row_index;           /* int32_t (routes,): token of a row, -1 behind the last row */
  uint64_t route_row;           /* int32_t (routes,): row of a route, -1 where it has none */
  uint64_t row_weight;          /* float (routes,), 0 behind the last row; or 0 */
  uint64_t row_maxima;          /* uint32_t (routes,): zeroed; or 0 */
  uint64_t counts;              /* COUNT, PLACE: int32_t (route_ctas, num_experts) */
  uint64_t
      padded; /* rows of padded_bytes, of which `padding` behind the last row are zeroed; or 0 */
  int32_t routes;
  int32_t top_k;
  int32_t num_experts;
  int32_t map_size;
  int32_t ids_are_64_bit;
  int32_t phase;
  int32_t route_ctas;
  int32_t padded_bytes; /* a multiple of 16 */
  int32_t padding;
  int32_t early; /* not 0: dependents begin before the grid in front has ended */
} sm12x_route_params;

/* out[t] = sum over j in order of rows[route_row[t, j]], those that there are, in FP32, rounded once. route_row must
 * be there before the grid in front lets dependents begin: it is read before that one has ended. */
typedef struct sm12x_combine_params {
  uint64_t rows;      /* (rows, n) of type */
  uint64_t out;       /* (tokens, n) of type */
  uint64_t route_row; /* int32_t (tokens, top_k) */
  int64_t stride_rows;
  int64_t stride_out;
  int32_t tokens;
  int32_t top_k;
  int32_t n;
  int32_t type;
} sm12x_combine_params;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SM12X_ABI_MOE_H_ */
