/* The launch structs of every shipped kernel: plain C, no pointers to C++ objects, the one truth that
 * runtime/sm12x/abi.py mirrors. cuda/tools/abi_dump.cpp writes the size and the offset of every field
 * into cubins/manifest.json and a unit test compares the mirror with it.
 *
 * Device addresses travel as uint64_t, so that the same header reads the same on every host and in NVRTC.
 */
#ifndef SM12X_ABI_H_
#define SM12X_ABI_H_

#if defined(__CUDACC_RTC__)
#include <cuda/std/cstdint>
#else
#include <stdint.h>
#endif

#ifdef __cplusplus
#define SM12X_ALIGN(bytes) alignas(bytes)
extern "C" {
#else
#define SM12X_ALIGN(bytes) _Alignas(bytes)
#endif

/* ------------------------------------------------------------------------------------------------
 * Constants
 * ---------------------------------------------------------------------------------------------- */

/* Where a scale comes from. Scales multiply (dequantise). */
enum sm12x_scale_mode {
  SM12X_SCALE_VALUE = 0, /* one float in the launch struct */
  SM12X_SCALE_ONE = 1,   /* one float on the device */
  SM12X_SCALE_GROUP = 2, /* one float per group: scale[e] */
  SM12X_SCALE_VECTOR =
      3 /* a: one per row, scale[row]; b: one per output feature, scale[e * stride + n] */
};

enum sm12x_bias_type {
  SM12X_BIAS_FLOAT32 = 0,
  SM12X_BIAS_BFLOAT16 = 1,
  SM12X_BIAS_FLOAT16 = 2
};

/* Bits of the status word that the preparation kernels leave behind the group arrays. */
enum sm12x_status {
  SM12X_STATUS_OK = 0,
  SM12X_STATUS_OFFSETS_DECREASE = 1, /* offsets[e + 1] < offsets[e] */
  SM12X_STATUS_OFFSETS_RANGE = 2     /* an offset is negative or greater than M */
};

/* Kernel parameters are at most 32,764 bytes; 340 records and their header fit. */
#define SM12X_LIST_CAPACITY 340

/* ------------------------------------------------------------------------------------------------
 * Group arrays: what the preparation kernels write and the GEMM kernels read
 *
 * One block of device memory, 16-byte aligned, structure of arrays. P is the group count rounded up to
 * a multiple of four; each array starts at its factor times P bytes. "a", "b" and "m", "n" are the
 * kernel's sides: under swap_ab the kernel's A operand and m side are the weights and their features.
 * ---------------------------------------------------------------------------------------------- */

/* clang-format off */
#define SM12X_GROUPS_PADDED(groups) (((groups) + 3) / 4 * 4)
#define SM12X_OFFSET_PTR_A 0            /* uint64_t[P]  first element of A */
#define SM12X_OFFSET_PTR_B 8            /* uint64_t[P]  first element of B */
#define SM12X_OFFSET_PTR_D 16           /* uint64_t[P]  first element of D */
#define SM12X_OFFSET_STRIDE_A 24        /* int64_t[P]   elements between rows of A (both operands K-major) */
#define SM12X_OFFSET_STRIDE_B 32        /* int64_t[P]   elements between rows of B */
#define SM12X_OFFSET_STRIDE_D 40        /* int64_t[P]   elements between rows of D (columns under swap_ab) */
#define SM12X_OFFSET_M_SCALE 48         /* uint64_t[P]  float const*: scale along the m side */
#define SM12X_OFFSET_N_SCALE 56         /* uint64_t[P]  float const*: scale along the n side */
#define SM12X_OFFSET_BIAS 64            /* uint64_t[P]  bias along the features, or 0 */
#define SM12X_OFFSET_M_SCALE_STRIDE 72  /* int32_t[P]   0: one value for the group, 1: a vector */
#define SM12X_OFFSET_N_SCALE_STRIDE 76  /* int32_t[P]   likewise */
#define SM12X_OFFSET_M_VALUE 80         /* float[P]     storage for scales that came by value */
#define SM12X_OFFSET_N_VALUE 84         /* float[P]     likewise */
#define SM12X_OFFSET_SHAPE 88           /* int32_t[P][3]  M, N, K as the kernel sees them */
#define SM12X_OFFSET_STATUS 100         /* int32_t: SM12X_STATUS_* bits */
#define SM12X_GROUP_ARRAYS_BYTES(groups) (SM12X_GROUPS_PADDED(groups) * 100 + 16)
/* clang-format on */

/* ------------------------------------------------------------------------------------------------
 * Launch structs
 * ---------------------------------------------------------------------------------------------- */

/* A CUtensorMap, opaque here. cuda.h is not needed to read this header. */
typedef struct sm12x_tensor_map {
  SM12X_ALIGN(64) uint64_t opaque[16];
} sm12x_tensor_map;

/* GEMM kernels of the family fp8_ptr_array. The tensor maps are prototypes: box, swizzle and element
 * type hold for every group; the kernel replaces address, shape and strides group by group. */
typedef struct sm12x_ptr_array_params {
  sm12x_tensor_map map_a;
  sm12x_tensor_map map_b;
  sm12x_tensor_map map_d;
  uint64_t group_arrays; /* written by a preparation kernel, read only here */
  uint64_t tensor_maps;  /* 128-byte aligned scratch, ctas * workspace_per_cta bytes */
  int32_t num_groups;
  int32_t ctas;      /* CTAs launched; each owns one slice of tensor_maps */
  int32_t bias_type; /* SM12X_BIAS_* */
  int32_t reserved;
} sm12x_ptr_array_params;

/* fp8_ptr_array_prepare_packed: fills the group arrays of a packed call from device-side offsets.
 * Offsets are clamped to [0, rows] and to their running maximum, so no group ever reaches outside
 * its tensors or into another group's rows. */
typedef struct sm12x_prepare_packed_params {
  uint64_t a;       /* (rows, k) */
  uint64_t b;       /* (num_groups, n, k) */
  uint64_t d;       /* (rows, n) */
  uint64_t offsets; /* (num_groups + 1,) int32 or int64 */
  uint64_t a_scale; /* float*, see a_scale_mode */
  uint64_t b_scale; /* float*, see b_scale_mode */
  uint64_t bias;    /* (num_groups, n), or 0 */
  uint64_t group_arrays;
  int64_t rows;
  int64_t stride_a;       /* elements between rows of a */
  int64_t stride_b;       /* elements between rows of one expert's weights */
  int64_t stride_b_group; /* elements between experts */
  int64_t stride_d;       /* elements between rows of d */
  int64_t stride_b_scale; /* elements between experts of a per-channel b_scale */
  int64_t stride_bias;    /* elements between experts of the bias */
  int32_t n;
  int32_t k;
  int32_t num_groups;
  int32_t offsets_are_64_bit;
  int32_t a_scale_mode;
  int32_t b_scale_mode;
  float a_scale_value;
  float b_scale_value;
  int32_t d_element_bytes;
  int32_t bias_element_bytes;
  int32_t swap_ab;
  int32_t reserved;
} sm12x_prepare_packed_params;

/* One group of a list call. Scale modes: VALUE, ONE or VECTOR. */
typedef struct sm12x_group_record {
  uint64_t a; /* (m, k) */
  uint64_t b; /* (n, k) */
  uint64_t d; /* (m, n) */
  uint64_t a_scale;
  uint64_t b_scale;
  uint64_t bias; /* (n,), or 0 */
  int64_t stride_a;
  int64_t stride_b;
  int64_t stride_d;
  int32_t m;
  int32_t n;
  int32_t k;
  float a_scale_value;
  float b_scale_value;
  uint16_t a_scale_mode;
  uint16_t b_scale_mode;
} sm12x_group_record;

/* fp8_ptr_array_prepare_list: copies up to SM12X_LIST_CAPACITY groups from its parameters into the
 * group arrays, at first_group. More groups are as many launches. */
typedef struct sm12x_prepare_list_params {
  uint64_t group_arrays;
  int32_t num_groups;  /* of the whole call: fixes the layout of the group arrays */
  int32_t first_group; /* of this launch */
  int32_t count;       /* records in this launch */
  int32_t swap_ab;
  sm12x_group_record groups[SM12X_LIST_CAPACITY];
} sm12x_prepare_list_params;

/* mma_probe: a register-only kernel for `sm12x validate`. */
typedef struct sm12x_mma_probe_params {
  uint64_t in;  /* uint32_t[128][6]: operands a[4], b[2] of every thread */
  uint64_t out; /* float[ctas][128][32] */
  int32_t iterations;
  int32_t reserved;
} sm12x_mma_probe_params;

#ifdef __cplusplus
} /* extern "C" */

static_assert(sizeof(sm12x_tensor_map) == 128, "a CUtensorMap has 128 bytes");
static_assert(sizeof(sm12x_group_record) == 96, "the record is packed without holes");
static_assert(sizeof(sm12x_prepare_list_params) <= 32764, "kernel parameters end at 32,764 bytes");
#endif

#endif /* SM12X_ABI_H_ */
