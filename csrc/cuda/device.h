// SPDX-License-Identifier: Apache-2.0
// What the kernels take from CUDA, and how they touch memory. Where the compiler is not nvcc, a
// header of that name runs them on a CPU (tests/device/cuda_on_cpu.h): the sources do not differ.
#pragma once
#include <stdint.h>

#include "../plan.h"
#include "../types.h"
#include "launch.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace pyupdate::cuda {
// The launch's own answer: cudaGetLastError() behind <<<>>> would also be what an earlier call
// left.
template <class... Arguments>
cudaError_t start(void (*kernel)(Arguments...), unsigned blocks, unsigned threads, void* stream,
                  Arguments... arguments) {
  void* given[] = {&arguments...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), given, 0,
                       static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) (void)cudaGetLastError();  // it has been told
  return error;
}
}  // namespace pyupdate::cuda
#else
#include "cuda_on_cpu.h"
#endif

namespace pyupdate::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Starts one kernel and tells what became of it, or of work before it (failure.h); what it comes to
// itself is told by a later call.
template <class... Arguments>
Launched launched(const char* name, void (*kernel)(Arguments...), int64_t blocks, void* stream,
                  Arguments... arguments) {
  const cudaError_t error =
      start(kernel, static_cast<unsigned>(blocks), kThreads, stream, arguments...);
  return {static_cast<int>(error), name, cudaGetErrorString(error)};
}

// ----- memory of the tensors. Their addresses come out of a table, so the compiler cannot know
// that
//       they are global memory; these functions say it, and move 16 bytes where a pack has them.

// The first W behind the others, so that the next W are found where those were: what is indexed by
// a loop's counter would stand in local memory.
template <int W, class S, int V>
__device__ __forceinline__ void turned(S (&x)[V]) {
  S first[W];
#pragma unroll
  for (int k = 0; k < W; ++k) first[k] = x[k];
#pragma unroll
  for (int k = 0; k < V - W; ++k) x[k] = x[k + W];
#pragma unroll
  for (int k = 0; k < W; ++k) x[V - W + k] = first[k];
}

template <class S, int V>
struct Pack {
  S at[V];

  __device__ __forceinline__ S get(int k) const { return at[k]; }
  __device__ __forceinline__ void set(int k, S value) { at[k] = value; }
  template <int W>
  __device__ __forceinline__ void turn() {
    turned<W>(at);
  }
};

// Halves stay two a word until one is asked for: apart, each of them would take a register.
template <class S, int V>
  requires(sizeof(S) == 2 && V > 1)
struct Pack<S, V> {
  uint32_t word[V / 2];

  __device__ __forceinline__ S get(int k) const {
    return {static_cast<uint16_t>(word[k / 2] >> 16 * (k % 2))};
  }
  __device__ __forceinline__ void set(int k, S value) {
    const uint32_t other = word[k / 2] & (k % 2 == 0 ? 0xffff0000u : 0x0000ffffu);
    word[k / 2] = other | uint32_t{value.bits} << 16 * (k % 2);
  }
  template <int W>
  __device__ __forceinline__ void turn() {
    turned<W / 2>(word);
  }
};

template <class S, int V>
__device__ __forceinline__ Pack<S, V> read(const S* from) {
  Pack<S, V> pack;
  if constexpr (V > 1) {
    static_assert(sizeof(pack) % 16 == 0);
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
      const uint4 bits = __ldca(reinterpret_cast<const uint4*>(from) + i);
      __builtin_memcpy(reinterpret_cast<char*>(&pack) + 16 * i, &bits, 16);
    }
  } else if constexpr (sizeof(S) == 2) {
    pack.at[0].bits = __ldca(reinterpret_cast<const unsigned short*>(from));
  } else {
    pack.at[0] = __ldca(from);
  }
  return pack;
}

template <class S, int V>
__device__ __forceinline__ void write(const Pack<S, V>& pack, S* to) {
  if constexpr (V > 1) {
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
      uint4 bits;
      __builtin_memcpy(&bits, reinterpret_cast<const char*>(&pack) + 16 * i, 16);
      __stwb(reinterpret_cast<uint4*>(to) + i, bits);
    }
  } else if constexpr (sizeof(S) == 2) {
    __stwb(reinterpret_cast<unsigned short*>(to), static_cast<unsigned short>(pack.at[0].bits));
  } else {
    __stwb(to, pack.at[0]);
  }
}

// How many elements a thread takes at once: 16 bytes of the narrowest type.
template <class Storage>
constexpr int kTaken = 16 / sizeof(typename Storage::Param);

// ----- whose turn a chunk is

// The chunk that an item of work names.
struct Chunk {
  int64_t row, index, begin;
  int count;  // elements

  static __device__ __forceinline__ Chunk of(const Tables& tables, int64_t item) {
    Chunk chunk;
    chunk.row = tables.items[item] >> 32;
    chunk.index = tables.items[item] & 0xffffffff;
    chunk.begin = chunk.index * kChunk;
    const int64_t left = tables.rows[chunk.row].size - chunk.begin;
    chunk.count = static_cast<int>(left < kChunk ? left : kChunk);
    return chunk;
  }
};

// Visits this thread's elements: packs of V from the aligned rows, single ones from the others and
// behind the last whole pack. An element's lane (reduce.h) is its index mod kLanes, so here a lane
// belongs to one thread in all of a chunk, which sees its elements in order. Of the packs so many
// are visited at once: more loads in flight, and more registers.
template <int V, int kAtOnce, class Whole, class Single>
__device__ __forceinline__ void visit(int count, bool aligned, const Whole& whole,
                                      const Single& single) {
  const int thread = static_cast<int>(threadIdx.x);
  if (aligned) {
    const int packs = count / V;
#pragma unroll kAtOnce
    for (int pack = thread; pack < packs; pack += kThreads) whole(pack * V);
    if (thread == packs % kThreads) {
#pragma unroll 1
      for (int i = packs * V; i < count; ++i) single(i);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < count; i += kThreads) single(i);
  }
}

}  // namespace pyupdate::cuda
