// Family fp8_ptr_array: copies the groups of a list call from the kernel's parameters into the
// group arrays. One CTA.

#include <sm12x/kernel/group_arrays.hpp>

// -------------------------------------------------------------------------------------------------
// Compile-time checks and types
// -------------------------------------------------------------------------------------------------

namespace {

constexpr int kThreads = 352;  // one thread per record
static_assert(kThreads >= SM12X_LIST_CAPACITY && kThreads % 32 == 0);

}  // namespace

// -------------------------------------------------------------------------------------------------
// Facts for the manifest (read from the PTX by cuda/tools)
// -------------------------------------------------------------------------------------------------

extern "C" {
extern __device__ const unsigned sm12x_variant_info[5];
__device__ const unsigned sm12x_variant_info[5] = {kThreads, 0u, 0u, 0u, 0u};
}

// -------------------------------------------------------------------------------------------------
// Body
// -------------------------------------------------------------------------------------------------

namespace {

// Writes one scale of the record: its address and whether it is a vector. A scale that came by
// value is stored first.
__device__ void write_scale(sm12x::kernel::GroupArrays const& arrays, int group, uint16_t mode,
                            uint64_t address, float value, int pointer_array, int stride_array,
                            int value_array) {
  if (mode == SM12X_SCALE_VALUE) {
    float* slot = arrays.at<float>(value_array) + group;
    *slot = value;
    address = reinterpret_cast<uint64_t>(slot);
  }
  arrays.at<uint64_t>(pointer_array)[group] = address;
  arrays.at<int32_t>(stride_array)[group] = mode == SM12X_SCALE_VECTOR ? 1 : 0;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    SM12X_SYMBOL(__grid_constant__ sm12x_prepare_list_params const launch) {
  int const index = threadIdx.x;
  sm12x::kernel::GroupArrays const arrays(launch.group_arrays, launch.num_groups);
  if (index == 0) {
    *arrays.at<int32_t>(SM12X_OFFSET_STATUS) = SM12X_STATUS_OK;
  }
  if (index >= launch.count) {
    return;
  }

  sm12x_group_record const& record = launch.groups[index];
  int const group = launch.first_group + index;
  bool const swap = launch.swap_ab != 0;
  arrays.at<uint64_t>(SM12X_OFFSET_PTR_A)[group] = swap ? record.b : record.a;
  arrays.at<uint64_t>(SM12X_OFFSET_PTR_B)[group] = swap ? record.a : record.b;
  arrays.at<uint64_t>(SM12X_OFFSET_PTR_D)[group] = record.d;
  arrays.at<int64_t>(SM12X_OFFSET_STRIDE_A)[group] = swap ? record.stride_b : record.stride_a;
  arrays.at<int64_t>(SM12X_OFFSET_STRIDE_B)[group] = swap ? record.stride_a : record.stride_b;
  arrays.at<int64_t>(SM12X_OFFSET_STRIDE_D)[group] = record.stride_d;
  arrays.at<uint64_t>(SM12X_OFFSET_BIAS)[group] = record.bias;
  write_scale(arrays, group, record.a_scale_mode, record.a_scale, record.a_scale_value,
              swap ? SM12X_OFFSET_N_SCALE : SM12X_OFFSET_M_SCALE,
              swap ? SM12X_OFFSET_N_SCALE_STRIDE : SM12X_OFFSET_M_SCALE_STRIDE,
              swap ? SM12X_OFFSET_N_VALUE : SM12X_OFFSET_M_VALUE);
  write_scale(arrays, group, record.b_scale_mode, record.b_scale, record.b_scale_value,
              swap ? SM12X_OFFSET_M_SCALE : SM12X_OFFSET_N_SCALE,
              swap ? SM12X_OFFSET_M_SCALE_STRIDE : SM12X_OFFSET_N_SCALE_STRIDE,
              swap ? SM12X_OFFSET_M_VALUE : SM12X_OFFSET_N_VALUE);
  int32_t* shape = arrays.at<int32_t>(SM12X_OFFSET_SHAPE) + 3 * group;
  shape[0] = swap ? record.n : record.m;
  shape[1] = swap ? record.m : record.n;
  shape[2] = record.k;
}
