// SPDX-License-Identifier: Apache-2.0
// What stands between the reduce and the apply pass: norm, multiplier, skip, step counts, hypers.
// By one block, from the same generated text that the cpu back end runs.
#pragma once
#include "../tagged.h"
#include "device.h"
#include "rules_generated.h"
#include "sums.cuh"

namespace pyupdate::cuda {

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

// What the gradients are multiplied by before anything else; see Request::scale.
__device__ __forceinline__ double unscale_of(const Request& request) {
  if (request.scale == nullptr) return request.unscale;
  const double reciprocal = divide(1.0, static_cast<double>(*request.scale));
  return request.unscale * static_cast<double>(static_cast<float>(reciprocal));
}

// Of a member; by one thread.
__device__ __forceinline__ void decide(const Tables& tables, int64_t member, const Request& request,
                                       double total, bool nonfinite) {
  const double unscale = unscale_of(request);
  const bool found = request.found_inf != nullptr && *request.found_inf != 0.0f;
  Outcome outcome;
  outcome.norm = request.reduce == 0 ? -1.0 : request.inf_norm != 0 ? total : sqrt(total);
  outcome.multiplier = request.reduce == 0
                           ? request.multiplier * unscale
                           : text::multiplier<double>(outcome.norm, unscale, request.max_norm);
  const bool skipped = found || (request.skip_nonfinite != 0 && nonfinite) ||
                       (request.finite_norm != 0 && !is_finite(outcome.norm));
  outcome.found_inf = found || nonfinite ? 1.0f : 0.0f;
  outcome.skipped = skipped ? 1.0f : 0.0f;
  tables.outcome[member] = outcome;
  tables.control[member] =
      Control{outcome.multiplier, skipped, request.clip_value, request.ema_weight, request.seed};
}

// ----- hypers

template <class Rule>
__device__ __forceinline__ void prepare(const Tables& tables, int64_t h) {
  HyperRow& hyper = tables.hyper_rows[h];
  const HyperSource source = tables.sources[h];
  const int64_t counter = tables.rows[source.row].step;
  double number[Rule::kNumbers + Rule::kCounted + 1];
  double out[Rule::kHypers + Rule::kCounted + 1];
  number[0] = (counter != 0 ? load_scalar(counter) : static_cast<double>(hyper.step)) + 1.0;
#pragma unroll
  for (int k = 1; k < Rule::kNumbers; ++k) {
    const int64_t i = source.numbers + k - 1;
    const int64_t at = tables.number_at[i];
    number[k] = at != 0 ? load_scalar(at) : tables.numbers[i];
  }
#pragma unroll
  for (int k = 0; k < Rule::kCounted; ++k) {
    number[Rule::kNumbers + k] = load_scalar(tables.scalars[source.row * tables.scalars_width + k]);
  }
  Rule::prepare(number, out);
#pragma unroll
  for (int k = 0; k < Rule::kHypers + Rule::kCounted; ++k) tables.hypers[hyper.offset + k] = out[k];
  hyper.step = static_cast<int64_t>(number[0]);
}

template <class... Rule>
__device__ __forceinline__ void prepare_any(const Tables& tables, int64_t h, List<Rule...>) {
  const int64_t rule = tables.hyper_rows[h].rule;
  int64_t index = 0;
  ((rule == index++ ? prepare<Rule>(tables, h) : void()), ...);
}

// A member's norm, multiplier and skip. By a whole block; `sums` are its rows' parts of the norm.
__device__ __forceinline__ void finish_member(const Tables& tables, int64_t member,
                                              const Request& request, double* sums, int64_t count,
                                              const uint32_t* nonfinite, double (&tree)[kThreads]) {
  double total = 0.0;
  __syncthreads();  // the last member's tree was read
  if (request.reduce != 0) {
    total = request.inf_norm != 0
                ? join_threads(fold(sums, count, threadIdx.x, kThreads, Larger()), tree, Larger())
                : join_threads(fold(sums, count, threadIdx.x, kThreads, Added()), tree, Added());
  }
  if (threadIdx.x != 0) return;
  decide(tables, member, request, total, request.reduce != 0 && *nonfinite != 0);
  atomicExch(&tables.tickets[1 + member], 0u);
}

// Of all members. `sums`, `count` and `nonfinite` are those of one that is alone.
__device__ __forceinline__ void finish(const Tables& tables, const Request& alone, double* sums,
                                       int64_t count, const uint32_t* nonfinite,
                                       double (&tree)[kThreads]) {
  if (tables.members == nullptr) {
    finish_member(tables, 0, alone, sums, count, nonfinite, tree);
  } else {
    int64_t begin = 0;
    for (int64_t member = 0; member < tables.member_count; ++member) {
      const Member& own = tables.members[member];
      finish_member(tables, member, own.request, tables.grad_sums + begin, own.rows_end - begin,
                    tables.tickets + 1 + member, tree);
      begin = own.rows_end;
    }
  }
  __syncthreads();
  for (int64_t h = threadIdx.x; h < tables.hyper_count; h += kThreads) {
    if (tables.control[tables.hyper_rows[h].member].skip == 0) prepare_any(tables, h, Rules());
  }
}

}  // namespace pyupdate::cuda
