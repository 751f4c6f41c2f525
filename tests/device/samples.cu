// SPDX-License-Identifier: Apache-2.0
// Kernels that test the translator of PTX: right ones, whose results numpy knows, and ones with a
// planted fault each. No kernel of the product is here.
#include <stdint.h>

template <class T>
__device__ T at(const T* x, int64_t n, int64_t k) {
  return x[(blockIdx.x * blockDim.x + threadIdx.x + k) % n];
}

#define INDEX(n)                                                    \
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; \
  if (i >= n) return

// ----- arithmetic: out[k * n + i] is the k-th result for element i

template <class T, class Root>
__device__ void floats(const T* a, const T* b, T* out, int64_t n, Root root) {
  INDEX(n);
  const T x = a[i], y = b[i];
  const T results[] = {x + y,
                       x - y,
                       x * y,
                       x / y,
                       root(x),
                       -x,
                       x < y ? x : y,
                       x > y ? x : y,
                       x != y ? x : y,
                       x == y ? x : y,
                       x <= y ? x : y,
                       !(x < y) ? x : y,
                       x == x && y == y ? x : y};
  for (int k = 0; k < int(sizeof results / sizeof *results); ++k) out[k * n + i] = results[k];
}
extern "C" __global__ void floats32(const float* a, const float* b, float* out, int64_t n) {
  floats(a, b, out, n, [](float x) { return __fsqrt_rn(x); });
}
extern "C" __global__ void floats64(const double* a, const double* b, double* out, int64_t n) {
  floats(a, b, out, n, [](double x) { return __dsqrt_rn(x); });
}

extern "C" __global__ void extremes(const float* a, const float* b, float* out, int64_t n) {
  INDEX(n);
  const float x = a[i], y = b[i];
  out[i] = fminf(x, y);
  out[n + i] = fmaxf(x, y);
  out[2 * n + i] = fabsf(x);
  out[3 * n + i] = __fmaf_rn(x, y, x);
  out[4 * n + i] = copysignf(x, y);
}

template <class T>
__device__ void integers(const T* a, const T* b, T* out, int64_t n) {
  INDEX(n);
  const T x = a[i], y = b[i], z = y == 0 ? 1 : y;
  const T s = static_cast<T>(y & T(sizeof(T) * 8 - 1));
  const T results[] = {T(x + y),  T(x - y),           T(x * y),      T(x / z),
                       T(x % z),  T(x & y),           T(x | y),      T(x ^ y),
                       T(~x),     T(x << s),          T(x >> s),     T(x < y),
                       T(x >= y), T(x == y ? x : -y), x < y ? x : y, x > y ? x : y};
  for (int k = 0; k < int(sizeof results / sizeof *results); ++k) out[k * n + i] = results[k];
}
#define INTEGERS(T)                                                                    \
  extern "C" __global__ void integers_##T(const T* a, const T* b, T* out, int64_t n) { \
    integers(a, b, out, n);                                                            \
  }
INTEGERS(int16_t)
INTEGERS(uint16_t)
INTEGERS(int32_t)
INTEGERS(uint32_t)
INTEGERS(int64_t)
INTEGERS(uint64_t)

extern "C" __global__ void words(const uint32_t* a, const uint32_t* b, uint32_t* out, int64_t n) {
  INDEX(n);
  const uint32_t x = a[i], y = b[i];
  out[i] = __popc(x);
  out[n + i] = __clz(x);
  out[2 * n + i] = __brev(x);
  out[3 * n + i] = __byte_perm(x, y, 0x6142);
  out[4 * n + i] = __funnelshift_l(x, y, y);
  out[5 * n + i] = __funnelshift_r(x, y, y);
  out[6 * n + i] = __umulhi(x, y);
  out[7 * n + i] = static_cast<uint32_t>(__mulhi(int(x), int(y)));
  out[8 * n + i] = (x & y) | (~x & (y >> 7));
  out[9 * n + i] = x >> 5 & 0x7ff;
  out[10 * n + i] = static_cast<uint32_t>((uint64_t{x} * y) >> 9);
}

extern "C" __global__ void conversions(const double* a, double* out, int64_t n) {
  INDEX(n);
  const double x = a[i];
  const float narrow = static_cast<float>(x);
  out[i] = narrow;
  out[n + i] = static_cast<int32_t>(x);
  out[2 * n + i] = static_cast<uint32_t>(narrow);
  out[3 * n + i] = static_cast<double>(static_cast<int64_t>(narrow));
  out[4 * n + i] = static_cast<float>(static_cast<int64_t>(x));
  out[5 * n + i] = static_cast<int8_t>(static_cast<int64_t>(x));
  out[6 * n + i] = rint(x);
  out[7 * n + i] = floorf(narrow);
  out[8 * n + i] = ceil(x);
  out[9 * n + i] = trunc(x);
}

// ----- memory and other threads

struct Params {
  const float* x;
  double factor;
  int offset[4];
};
__constant__ float table[4] = {1, 2, 4, 8};
__device__ int counted;

extern "C" __global__ void memory(const __grid_constant__ Params params, double* out, int64_t n) {
  INDEX(n);
  float local[8];  // indexed by what is not known: local memory
  for (int k = 0; k < 8; ++k) local[(k + params.offset[k & 3]) & 7] = at(params.x, n, k);
  out[i] = params.factor * local[i & 7] * table[i & 3];
  atomicAdd(&counted, 1);
}
extern "C" __global__ void get_counted(int* out) { *out = atomicExch(&counted, 0); }

extern "C" __global__ void vectors(const float4* x, float4* out, int64_t n) {
  INDEX(n);
  const float4 v = x[i];
  out[i] = make_float4(v.w, v.z, v.y, v.x);
}

// The sum of a block by shuffles and shared memory, its ballots, and the last block's ticket.
template <bool kBarrier, int kPast>
__device__ void sum_block(const int* x, int* partial, int* out, unsigned* ticket, int64_t n) {
  __shared__ int warps[8];
  __shared__ bool last;
  int sum = 0;
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * 256)
    sum += x[i];
  for (int k = 16; k > 0; k /= 2) sum += __shfl_down_sync(~0u, sum, k);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32 + kPast] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    int all = 0;
    for (int k = 0; k < 8; ++k) all += warps[k];
    partial[blockIdx.x] = all;
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  int all = 0;
  for (int k = 0; k < int(gridDim.x); ++k) all += partial[k];
  *out = all;
}
#define SUM(name, ...)                                                                    \
  extern "C" __global__ void name(const int* x, int* partial, int* out, unsigned* ticket, \
                                  int64_t n) {                                            \
    sum_block<__VA_ARGS__>(x, partial, out, ticket, n);                                   \
  }
SUM(sum, true, 0)
SUM(sum_without_barrier, false, 0)
SUM(sum_shared_past_the_end, true, 1)

extern "C" __global__ void warps(const unsigned* x, unsigned* out, int64_t n) {
  const int64_t i = threadIdx.x;
  const unsigned v = x[i];
  out[i] = __shfl_xor_sync(~0u, v, 5);
  out[n + i] = __shfl_up_sync(~0u, v, 3, 16);
  out[2 * n + i] = __shfl_sync(~0u, v, 9, 16);
  out[3 * n + i] = __ballot_sync(~0u, v & 1);
  out[4 * n + i] = __reduce_add_sync(~0u, v);
  out[5 * n + i] = __reduce_max_sync(~0u, v);
  out[6 * n + i] = __reduce_xor_sync(~0u, v);
  out[7 * n + i] = __any_sync(~0u, v == 7) + 2 * __all_sync(~0u, v < 1000000);
  out[8 * n + i] = __syncthreads_count(v & 1);
  out[9 * n + i] = __syncthreads_or(v == 7) + 2 * __syncthreads_and(v < 1000000);
}

extern "C" __global__ void dynamic(float* out, int n) {
  extern __shared__ float space[];
  if (int(threadIdx.x) < n) space[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = space[blockDim.x - 1 - threadIdx.x];
}

// ----- planted faults

extern "C" __global__ void one_too_far(float* out, int64_t n) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i <= n) out[i] = 1;
}
extern "C" __global__ void index_of_32_bits(const char* x, char* out, int64_t offset) {
  out[threadIdx.x] = x[static_cast<int>(offset) + int(threadIdx.x)];
}
extern "C" __global__ void barrier_in_a_branch(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] += 1;
  }
}
extern "C" __global__ void half_a_warp(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}
extern "C" __global__ void divide(int* out, int by) { out[threadIdx.x] = 7 / by; }
extern "C" __global__ void trap(int* out) {
  if (out[threadIdx.x] != 0) __trap();
}
