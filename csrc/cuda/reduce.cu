// SPDX-License-Identifier: Apache-2.0
// The reduce pass on a GPU: reads every gradient once, whatever its storage. A chunk's sum is made
// by a block, a row's by the block that met its last chunk, the norm and all that follows from it
// by the last block of all.
#include "../element.h"
#include "device.h"
#include "finish.cuh"
#include "sums.cuh"

namespace pyupdate::cuda {
namespace {

// One chunk into the lanes of the block. Returns whether this thread met an inf or nan.
template <class Stage, class Storage, class Join>
__device__ __forceinline__ bool reduce_chunk(const typename Storage::Grad* grad, int count,
                                             double unscale, void* shared, const Join& join) {
  using T = typename Storage::Compute;
  using S = typename Storage::Grad;
  constexpr int V = kTaken<Storage>;
  T* lanes = static_cast<T*>(shared);
  const T multiplier = static_cast<T>(unscale);
  bool nonfinite = false;
  const auto add = [&](T value, T& lane) {
    T element[kGrad + 1] = {T(0), value * multiplier}, left[1];
    Stage::template run<T>(element, nullptr, nullptr, left);
    lane = join(lane, left[0]);
    nonfinite = nonfinite || text::nonfinite<T>(element[kGrad]) != T(0);
  };
  visit<V, 4>(
      count, reinterpret_cast<uintptr_t>(grad) % 16 == 0,
      [&](int i) {
        const Pack<S, V> pack = read<S, V>(grad + i);
#pragma unroll
        for (int k = 0; k < V; ++k) add(load(pack.get(k)), lanes[i % kLanes + k]);
      },
      [&](int i) { add(load(read<S, 1>(grad + i).get(0)), lanes[i % kLanes]); });
  return nonfinite;
}

// What a Request asks of a chunk. A choice between whole requests would be one of addresses, for
// which sm_100 copies the launch's own to local memory.
struct Asked {
  bool reduce, inf_norm;
  double unscale;

  static __device__ __forceinline__ Asked of(const Request& request) {
    return {request.reduce != 0, request.inf_norm != 0, unscale_of(request)};
  }
};

template <class Storage>
__device__ __forceinline__ double sum_of_chunk(int64_t address, int count, const Asked& asked,
                                               void* shared, double (&tree)[kThreads],
                                               bool& nonfinite) {
  using T = typename Storage::Compute;
  const auto* grad = reinterpret_cast<const typename Storage::Grad*>(address);
  T* lanes = static_cast<T*>(shared);
  if (asked.inf_norm) {
    nonfinite |=
        reduce_chunk<magnitude_stage, Storage>(grad, count, asked.unscale, shared, Larger());
    return join_lanes(lanes, tree, Larger());
  }
  nonfinite |= reduce_chunk<squared_stage, Storage>(grad, count, asked.unscale, shared, Added());
  return join_lanes(lanes, tree, Added());
}

// The storages that differ in their gradients; the last two have those of the halves.
using Gradients = List<Storage<fp64, fp64, fp64, double>, Storage<fp32, fp32, fp32, float>,
                       Storage<bf16, bf16, bf16, float>, Storage<fp16, fp16, fp16, float>>;
__device__ __forceinline__ int64_t gradients_of(int64_t storage) {
  return storage < Gradients::size ? storage : storage - 2;
}

template <class... Storage>
__device__ __forceinline__ double sum_of_any(int64_t storage, int64_t address, int64_t begin,
                                             int count, const Asked& asked, void* shared,
                                             double (&tree)[kThreads], bool& nonfinite,
                                             List<Storage...>) {
  double sum = 0.0;
  int64_t index = 0;
  ((storage == index++ ? void(sum = sum_of_chunk<Storage>(
                                  address + begin * int64_t{sizeof(typename Storage::Grad)}, count,
                                  asked, shared, tree, nonfinite))
                       : void()),
   ...);
  return sum;
}

struct Reduce {
  Tables tables;
  Request request;
  int64_t items;
  double* sums;  // of the rows, or what takes their place
  int64_t count;
  const uint32_t* nonfinite;
};

__device__ __forceinline__ void reduce_items(const Reduce& work, double (&tree)[kThreads]) {
  alignas(16) __shared__ double lanes[kLanes];
  const Tables& tables = work.tables;
  for (int i = static_cast<int>(threadIdx.x); i < kLanes; i += kThreads) lanes[i] = 0.0;
  __syncthreads();
  for (int64_t item = blockIdx.x; item < work.items; item += gridDim.x) {
    const Chunk chunk = Chunk::of(tables, item);
    const Row& row = tables.rows[chunk.row];
    const HyperRow& hyper = tables.hyper_rows[row.hyper];
    const Asked asked = tables.members == nullptr ? Asked::of(work.request)
                                                  : Asked::of(tables.members[hyper.member].request);
    if (!asked.reduce) continue;
    bool nonfinite = false;
    const double sum =
        sum_of_any(gradients_of(hyper.storage), tables.addresses[chunk.row * tables.width + kGrad],
                   chunk.begin, chunk.count, asked, lanes, tree, nonfinite, Gradients());
    if (nonfinite) atomicExch(&tables.tickets[1 + hyper.member], 1u);
    if (threadIdx.x >= kWarp) continue;
    double* sums = tables.chunk_sums + row.chunk;
    const int64_t chunks = chunks_of(row.size);
    if (threadIdx.x == 0) sums[chunk.index] = sum;
    if (!is_last(tables.row_tickets + chunk.row, chunks)) continue;
    const double total =
        asked.inf_norm ? join_chunks(sums, chunks, Larger()) : join_chunks(sums, chunks, Added());
    if (threadIdx.x == 0) tables.grad_sums[chunk.row] = total;
  }
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const Reduce work) {
  __shared__ double tree[kThreads];
  __shared__ bool last;
  reduce_items(work, tree);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&work.tables.tickets[0], 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) atomicExch(&work.tables.tickets[0], 0u);
  if (work.request.leave_open != 0) return;
  finish(work.tables, work.request, work.sums, work.count, work.nonfinite, tree);
}

}  // namespace

Launched reduce(const Tables& tables, const Request& request, int64_t items, int blocks,
                void* stream) {
  if (request.reduce == 0 || items < 0) items = 0;
  const int64_t wanted = items < 1 ? 1 : items < blocks ? items : blocks;
  const Reduce work{tables, request, items, tables.grad_sums, tables.row_count, tables.tickets + 1};
  return launched("reduce", reduce_kernel, wanted, stream, work);
}

Launched finish(const Tables& tables, const Request& request, double* grad_sums, int64_t count,
                uint32_t* nonfinite, void* stream) {
  Request closed = request;
  closed.leave_open = 0;
  return launched("finish", reduce_kernel, int64_t{1}, stream,
                  Reduce{tables, closed, 0, grad_sums, count, nonfinite});
}

}  // namespace pyupdate::cuda
