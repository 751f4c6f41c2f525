// SPDX-License-Identifier: Apache-2.0
// Instantiates element.h and reduce.h with AdamW for a GPU. `make check-device` compiles it to PTX
// and demands that no fused multiply-add and no approximate operation is in it: the numeric
// contract must hold on a device that is not on the desk.
#include "element.h"
#include "plan.h"
#include "reduce.h"
#include "rules_generated.h"

namespace pyupdate {

template <class Storage>
__device__ void apply(void* const* role, const double* hyper, const Control* control,
                      int64_t size) {
  using T = typename Storage::Compute;
  using Stage = rules::adamw::stage0;
  T narrowed[Stage::kHypers];
  for (int k = 0; k < Stage::kHypers; ++k) narrowed[k] = static_cast<T>(hyper[k]);
  const Roles<Storage> at = Roles<Storage>::of(role);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    element<Stage, Storage, T>(
        at, i, Taken<T>{static_cast<T>(control->multiplier), static_cast<T>(control->clip_value)},
        narrowed, nullptr, nullptr, Place{control->seed, 1, 0});
  }
}

#define PYUPDATE_APPLY(name, ...)                                                                 \
  extern "C" __global__ void name(void* const* role, const double* hyper, const Control* control, \
                                  int64_t size) {                                                 \
    if (control->skip == 0) apply<__VA_ARGS__>(role, hyper, control, size);                       \
  }
PYUPDATE_APPLY(adamw_fp64, Storage<fp64, fp64, fp64, double>)
PYUPDATE_APPLY(adamw_fp32, Storage<fp32, fp32, fp32, float>)
PYUPDATE_APPLY(adamw_bf16, Storage<bf16, bf16, bf16, float>)
PYUPDATE_APPLY(adamw_fp16, Storage<fp16, fp16, fp16, float>)

// The sum of one chunk's squares by one thread: the order of reduce.h, not the speed of a kernel.
extern "C" __global__ void sum_of_squares(const float* grad, int64_t size, float* lanes,
                                          double* sum) {
  for (int64_t i = 0; i < size; ++i) lanes[i % kLanes] += text::squared(grad[i]);
  *sum = sum_of_lanes(lanes, size);
}

}  // namespace pyupdate
