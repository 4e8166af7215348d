/* The launch struct of the family fp8_packed, in the words of abi.h, which it extends: a file of its own, so
 * that a change here recompiles this family alone. Mirrored in runtime/sm12x/abi.py like abi.h, and checked
 * the same way.
 */
#ifndef SM12X_ABI_PACKED_H_
#define SM12X_ABI_PACKED_H_

#include <sm12x/abi.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Type of D where a kernel writes more than one. E4M3: fp8_up alone. */
enum sm12x_out_type {
  SM12X_OUT_FLOAT32 = 0,
  SM12X_OUT_BFLOAT16 = 1,
  SM12X_OUT_FLOAT16 = 2,
  SM12X_OUT_E4M3 = 3
};

/* How the rows of a packed kernel's call lie. */
enum sm12x_row_layout {
  SM12X_ROWS_PACKED = 0, /* group e has rows bounds[e] to bounds[e + 1] */
  SM12X_ROWS_MASKED = 1  /* group e has the first bounds[e] of its own `rows` rows */
};

/* What a packed kernel may do besides. */
enum sm12x_packed_flags {
  /* Bounds and weights are not what the grid in front writes, and are read before it has ended. The kernels of
   * fp8_up and fp8_down do so in any case. */
  SM12X_EARLY_WEIGHTS = 1,
  /* Results of two bytes leave L2 last, because what comes next reads them: they have to be few. */
  SM12X_KEEP_RESULTS = 2
};

/* Tensor maps of the weights of a packed kernel: they differ in the features of a box, of which map i has
 * twice as many as map i - 1. A variant uses as many of them as it needs to load any piece in few boxes. */
#define SM12X_WEIGHT_MAPS 6

/* GEMM kernels of the family fp8_packed: one launch per call, rows of groups read where they lie. Bounds
 * are not trusted: offsets are clamped to [0, rows] and to their running maximum, counts to [0, rows].
 *
 * A row of the call is a row of d. It takes the row of a with its own number, or the one that
 * row_index names; an index outside of a reads zeros. */
typedef struct sm12x_packed_params {
  sm12x_tensor_map map_a; /* (k, rows, 1 or num_groups), read where there is no row_index */
  sm12x_tensor_map map_b[SM12X_WEIGHT_MAPS]; /* (k, n, num_groups), see SM12X_WEIGHT_MAPS */
  uint64_t a;                                /* first row, read with a row_index */
  uint64_t d;
  uint64_t bounds;     /* int32 or int64: offsets (num_groups + 1,), or counts (num_groups,) */
  uint64_t row_index;  /* int32 or int64 (rows,), or 0 */
  uint64_t a_scale;    /* float*, see a_scale_mode; per row of a */
  uint64_t b_scale;    /* float*, see b_scale_mode */
  uint64_t bias;       /* (num_groups, n), or 0 */
  uint64_t row_weight; /* float (rows of d,), or 0: D's rows are multiplied by it */
  uint64_t partials;   /* split-K: scratch, workspace_per_cta bytes for each CTA */
  uint64_t
      counters; /* split-K: uint32_t[CTAs][warps of an MMA group], zero before the launch and after it */
  int64_t rows;           /* packed: rows of d; masked: rows of each group */
  int64_t a_rows;         /* rows of a, that a row_index may name */
  int64_t stride_a;       /* elements between rows of a */
  int64_t stride_d;       /* elements between rows of d */
  int64_t stride_d_group; /* masked: elements between groups of d; packed: 0 */
  int64_t stride_b_scale; /* elements between groups of a per-channel b_scale */
  int64_t stride_bias;    /* elements between groups of the bias */
  int32_t n;
  int32_t k;
  int32_t num_groups;
  int32_t row_layout; /* SM12X_ROWS_* */
  int32_t bounds_are_64_bit;
  int32_t row_index_is_64_bit;
  int32_t a_scale_mode;
  int32_t b_scale_mode;
  float a_scale_value;
  float b_scale_value;
  int32_t bias_type; /* SM12X_BIAS_* */
  int32_t out_type;  /* SM12X_OUT_* */
  int32_t
      least_units; /* 0: CTAs take whole tiles in turns, swapped kernels runs of strips. Else split-K: CTAs take equal runs of
                          k-tiles, of at least so many */
  int32_t flags;   /* of enum sm12x_packed_flags, or'ed */
} sm12x_packed_params;

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SM12X_ABI_PACKED_H_ */
