// SPDX-License-Identifier: Apache-2.0
// The order of sums (reduce.h) by the threads of a block: lanes of a chunk, chunks of a row, rows.
//
// An absent value is +0 here where halve() leaves it out. That is the same: sums of a pass are
// never -0, and magnitudes never below 0.
#pragma once
#include "../reduce.h"
#include "device.h"
#include "rules_generated.h"

namespace pyupdate::cuda {

// What makes one number of two: the sum, or the larger for the inf norm.
struct Added {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return text::larger<T>(a, b);
  }
};

constexpr int kTurns = kLanes / kThreads;  // lanes that a thread joins

// x[0..8) by a halving tree; in registers.
template <class Join>
__device__ __forceinline__ double join_own(double (&x)[kTurns], const Join& join) {
#pragma unroll
  for (int half = kTurns / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) x[k] = join(x[k], x[k + half]);
  }
  return x[0];
}

// One number a lane of a warp; the result is lane 0's.
template <class Join>
__device__ __forceinline__ double join_warp(double x, const Join& join) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    x = join(x, __shfl_down_sync(kWholeWarp, x, half));
  }
  return x;
}

// One number a thread; the result is thread 0's. `tree` is shared memory.
template <class Join>
__device__ __forceinline__ double join_threads(double x, double (&tree)[kThreads],
                                               const Join& join) {
  tree[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= kWarp) return 0.0;
  double own[kTurns];
#pragma unroll
  for (int k = 0; k < kTurns; ++k) own[k] = tree[threadIdx.x + k * kWarp];
  static_assert(kTurns * kWarp == kThreads);
  return join_warp(join_own(own, join), join);
}

// The lanes of a chunk, in shared memory, which are left at zero; the result is thread 0's.
template <class T, class Join>
__device__ __forceinline__ double join_lanes(T* lanes, double (&tree)[kThreads], const Join& join) {
  __syncthreads();
  double own[kTurns];
#pragma unroll
  for (int k = 0; k < kTurns; ++k) {
    T& lane = lanes[threadIdx.x + k * kThreads];
    own[k] = static_cast<double>(lane);
    lane = T(0);
  }
  return join_threads(join_own(own, join), tree, join);
}

// What `stride` threads make of x[0..n) before they join theirs: thread `first` joins every
// stride-th number by the upper levels of the tree, over numbers that nobody else touches.
template <class Join>
__device__ __forceinline__ double fold(double* x, int64_t n, int64_t first, int64_t stride,
                                       const Join& join) {
  if (first >= n) return 0.0;
  for (int64_t half = tree_width(n) / 2; half >= stride; half /= 2) {
    for (int64_t i = first; i < half && i + half < n; i += stride) x[i] = join(x[i], x[i + half]);
  }
  return x[first];
}

// Counts a chunk of a row whose sums thread 0 has written; called by the first warp. Tells it
// whether that was the row's last one, and then every chunk's sums can be seen.
__device__ __forceinline__ bool is_last(uint32_t* ticket, int64_t chunks) {
  __syncwarp();
  if (chunks == 1) return true;
  uint32_t before = 0;
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(ticket, 1u);
    __threadfence();
  }
  before = __shfl_sync(kWholeWarp, before, 0);
  if (before + 1 != chunks) return false;
  if (threadIdx.x == 0) atomicExch(ticket, 0u);
  __syncwarp();
  return true;
}

// The chunks of a row in one, by the first warp; the result is thread 0's. Overwrites them.
template <class Join>
__device__ __forceinline__ double join_chunks(double* chunk_sums, int64_t chunks,
                                              const Join& join) {
  return join_warp(fold(chunk_sums, chunks, threadIdx.x, kWarp, join), join);
}

}  // namespace pyupdate::cuda
