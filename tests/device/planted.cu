// SPDX-License-Identifier: Apache-2.0
// Kernels that look like the product's apply kernels of fp32, one sound and the others with one
// fault each that tests/device/machine_code.py must name.
#include <stdint.h>

namespace rules {
struct sound;
struct fused;
struct approximate;
struct local;
struct narrow;
struct few_bytes;
struct many_registers;
}  // namespace rules
struct stage0;
template <class Param, class Grad, class State, class Compute>
struct Storage;
using Stored = Storage<float, float, float, float>;

template <class Rule, class Stage, int kStage, class Storage>
__global__ void apply_kernel(float4* param, const float4* grad, float4* state, int64_t n);

#define KERNEL(rule)                                                                   \
  template <>                                                                          \
  __global__ void __launch_bounds__(256) apply_kernel<rules::rule, stage0, 0, Stored>( \
      float4 * param, const float4* grad, float4* state, int64_t n)
#define INDEX const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x

KERNEL(sound) {
  INDEX;
  if (i >= n) return;
  float4 p = param[i], g = grad[i], s = state[i];
  s.x += g.x / __fsqrt_rn(p.x);
  s.y += g.y / __fsqrt_rn(p.y);
  s.z += g.z / __fsqrt_rn(p.z);
  s.w += g.w / __fsqrt_rn(p.w);
  state[i] = s;
}
KERNEL(fused) {
  INDEX;
  if (i >= n) return;
  const float4 p = param[i], g = grad[i], s = state[i];
  state[i] =
      make_float4(__fmaf_rn(p.x, g.x, s.x), p.y + g.y + s.y, p.z + g.z + s.z, p.w + g.w + s.w);
}
KERNEL(approximate) {
  INDEX;
  if (i >= n) return;
  const float4 p = param[i], g = grad[i], s = state[i];
  state[i] =
      make_float4(__fdividef(p.x, g.x) + s.x, p.y + g.y + s.y, p.z + g.z + s.z, p.w + g.w + s.w);
}
KERNEL(local) {
  INDEX;
  if (i >= n) return;
  float4 values[16];
#pragma unroll 1
  for (int k = 0; k < 16; ++k) values[k] = param[i + k * n];
  const float4 g = grad[i], s = state[i];
  values[static_cast<int>(s.x) & 15] = g;
  values[static_cast<int>(s.y) & 15] = g;
  const float4 v = values[static_cast<int>(s.z) & 15];
  state[i] = make_float4(v.x + s.w, v.y, v.z, v.w);
}
KERNEL(narrow) {
  INDEX;
  if (i >= n) return;
  reinterpret_cast<float*>(state)[i] =
      reinterpret_cast<float*>(param)[i] + reinterpret_cast<const float*>(grad)[i];
}
KERNEL(few_bytes) {
  INDEX;
  if (i >= n) return;
  const float4 g = grad[i];
  param[i] = make_float4(g.x * 2, g.y, g.z, g.w);
}
KERNEL(many_registers) {
  INDEX;
  if (i >= n) return;
  float4 all[24];
#pragma unroll
  for (int k = 0; k < 24; ++k) all[k] = param[i + k * n];
  float4 sum = all[0];
#pragma unroll
  for (int k = 0; k < 24; ++k) sum.x += all[k].x * all[23 - k].w;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 24; ++k) state[i + k * n] = make_float4(sum.x, all[k].x, all[k].y, all[k].z);
}
