// SPDX-License-Identifier: Apache-2.0
// The apply pass on a GPU: one stage of a rule over the rows of a bucket, a block a chunk.
//
//   a thread reads 16 bytes or more of each role, widens an element, multiplies and clips its
//   gradient, runs the rule (element.h's body), rounds, moves the average, writes 16 bytes or more
//
// A stage that leaves sums adds them into lanes in shared memory; who meets the last chunk of a row
// joins the row's sums and runs the rule's turn, so the next stage finds its numbers.
#pragma once
#include "../element.h"
#include "../rounding.h"
#include "../tagged.h"
#include "device.h"
#include "rules_generated.h"
#include "sums.cuh"

namespace pyupdate::cuda {

struct Apply {
  Tables tables;
  int64_t begin, end;  // items
  bool backwards;
};
using ApplyKernel = void (*)(Apply);

// ----- what a chunk needs

// How halves are rounded: by chance with a key a role, if `on`.
struct Chance {
  bool on;
  uint64_t key[kMaxRoles];
  int64_t begin;  // index in its row of the chunk's first element

  template <class S, class T>
  __device__ __forceinline__ S rounded(T value, int role, int i) const {
    S result;
    if constexpr (sizeof(S) == 2) {
      if (on) {
        const auto element = static_cast<uint64_t>(begin + i);
        const auto low = static_cast<uint32_t>(element);
        store(value, &result, draw(key[role], low, static_cast<uint32_t>(element >> 32)));
        return result;
      }
    }
    store(value, &result);
    return result;
  }
};

// A stage at a chunk. It stands in shared memory, filled by several threads at once: in registers,
// addresses and hypers alone would take 20 of the 64.
template <class Rule, class Stage, int kStage, class Storage>
class Step {
  using T = typename Storage::Compute;
  using Param = typename Storage::Param;
  using Grad = typename Storage::Grad;
  using State = typename Storage::State;
  using Wide = pyupdate::Storage<T, T, T, T>;
  static constexpr int kStates = Stage::kElements - kFirstState;
  static constexpr bool kIsLast = kStage + 1 == Rule::Stages::size;
  // Five roles, or sums: of its elements of halves four side by side spilled up to 116 bytes, and
  // two of Adan's or LAMB's up to 28 on sm_120; so one comes after the other.
  static constexpr bool kIsLarge = Stage::kElements > 4 || Stage::kSums > 0;
  static __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
  static __device__ constexpr bool reads(int role) { return (Stage::kReads >> role & 1u) != 0; }
  static __device__ constexpr bool writes(int role) { return (Stage::kWrites >> role & 1u) != 0; }
  // Then one pack at a time is too few bytes in flight.
  static constexpr bool kReadsGradientAlone = Stage::kReads == 1u << kGrad;

 public:
  // By a whole block, which must not use it before a barrier.
  __device__ __forceinline__ void fill(const Tables& tables, const Chunk& chunk) {
    const Row& row = tables.rows[chunk.row];
    const HyperRow& hyper = tables.hyper_rows[row.hyper];
    const Control& control = tables.control[hyper.member];
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarp;
    if (thread / kWarp == 0 && lane < Stage::kHypers) {
      hyper_[lane] = static_cast<T>(tables.hypers[hyper.offset + lane]);
    }
    if (thread / kWarp == 1 && lane < Stage::kPerTensorRead) {
      per_tensor_[lane] = static_cast<T>(tables.row_sums[chunk.row * tables.per_tensor + lane]);
    }
    if (thread / kWarp == 2 && lane < Stage::kElements) {
      chance_.key[lane] =
          tables.identities == nullptr || sizeof(Param) != 2
              ? 0
              : key_of(control.seed, hyper.step, tables.identities[chunk.row], kStage, lane);
    }
    if (thread == 3 * kWarp) {
      taken_ = {static_cast<T>(control.multiplier * hyper.sign),
                static_cast<T>(control.clip_value)};
      ema_weight_ = static_cast<T>(control.ema_weight);
      chance_.on = tables.identities != nullptr;
      chance_.begin = chunk.begin;
      skipped_ = control.skip != 0;
    }
    if (thread == 4 * kWarp) find_roles(tables, chunk);
    if (thread == 5 * kWarp) chunk_ = chunk;
  }

  // Whether nothing of this chunk is to be written.
  __device__ __forceinline__ bool skipped() const { return skipped_; }

  // What `fill` was given, for what comes behind `run`: kept meanwhile it would take registers.
  __device__ __forceinline__ const Chunk& chunk() const {
    forget();
    return chunk_;
  }

  __device__ __forceinline__ void run(T* lanes) const {
    constexpr int V = kTaken<Storage>;
    const int count = chunk_.count;
    if constexpr (kReadsGradientAlone) {
      const Grad* const grad = grad_;  // not read anew behind a write to the lanes
      visit<V, 2>(
          count, misaligned_ == 0, [&](int i) { move<V>(grad, i, lanes); },
          [&](int i) { move<1>(grad, i, lanes); });
    } else {
      visit<V, 1>(
          count, misaligned_ == 0, [&](int i) { move<V>(nullptr, i, lanes); },
          [&](int i) { move<1>(nullptr, i, lanes); });
    }
    if (!kIsLast || average_ == nullptr) return;
    visit<V, 1>(
        count, misaligned_ == 0, [&](int i) { move_average<V>(i); },
        [&](int i) { move_average<1>(i); });
  }

 private:
  // The addresses, and whether all that are used are those of 16 bytes.
  __device__ __forceinline__ void find_roles(const Tables& tables, const Chunk& chunk) {
    const int64_t* address = tables.addresses + chunk.row * tables.width;
    int64_t used = 0;
    const auto at = [&](int role, int64_t itemsize) {
      const int64_t place = address[role] + chunk.begin * itemsize;
      if (reads(role) || writes(role)) used |= place;
      return reinterpret_cast<void*>(place);
    };
    param_ = static_cast<Param*>(at(kParam, sizeof(Param)));
    grad_ = static_cast<const Grad*>(at(kGrad, sizeof(Grad)));
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      state_[k] = static_cast<State*>(at(kFirstState + k, sizeof(State)));
    }
    average_ = nullptr;
    if (kIsLast && tables.averages != 0 && address[tables.width - 1] != 0) {
      const int64_t place = address[tables.width - 1] + chunk.begin * int64_t{sizeof(T)};
      used |= place | reinterpret_cast<int64_t>(param_);
      average_ = reinterpret_cast<T*>(place);
    }
    misaligned_ = used & 15;
  }

  // V elements from `i` on. Of a pack of halves W are computed at once, and a state of fp32 is
  // moved as they need it: all eight together take up to 110 registers.
  template <int V>
  __device__ __forceinline__ void move(const Grad* kept, int i, T* lanes) const {
    constexpr int U = sizeof(State) == 2 ? V : smaller(V, 4);
    constexpr int W = U > 4 && kIsLarge ? 2 : smaller(V, 4);
    Pack<Param, V> param = {};
    Pack<Grad, V> grad = {};
    Pack<State, U> state[kStates + 1] = {};
    if constexpr (reads(kParam)) param = read<Param, V>(param_ + i);
    if constexpr (reads(kGrad)) grad = read<Grad, V>((kReadsGradientAlone ? kept : grad_) + i);
#pragma unroll 1
    for (int from = i; from < i + V; from += U) {
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (reads(kFirstState + s)) state[s] = read<State, U>(state_[s] + from);
      }
#pragma unroll 1
      for (int at = from; at < from + U; at += W) {
        if constexpr (W != V) forget();
#pragma unroll
        for (int k = 0; k < W; ++k) {
          if constexpr (kIsLarge && W < V) forget();
          move_one(param, grad, state, k, at + k, lanes);
        }
        param.template turn<W>();
        grad.template turn<W>();
#pragma unroll
        for (int s = 0; s < kStates; ++s) state[s].template turn<W>();
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        if (writes(kFirstState + s)) write(state[s], state_[s] + from);
      }
    }
    if constexpr (writes(kParam)) write(param, param_ + i);
  }

  // What the compiler has read of shared memory it reads again: hypers and keys that it keeps for
  // all of a loop take registers.
  static __device__ __forceinline__ void forget() { asm volatile("" ::: "memory"); }

  // Element `i`, which is the k-th of these packs.
  template <class Params, class Grads, class States>
  __device__ __forceinline__ void move_one(Params& param, const Grads& grad, States& state, int k,
                                           int i, T* lanes) const {
    T value[kMaxRoles], left[Stage::kSums + 1];
    if constexpr (reads(kParam)) value[kParam] = load(param.get(k));
    if constexpr (reads(kGrad)) value[kGrad] = load(grad.get(k));
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (reads(kFirstState + s)) value[kFirstState + s] = load(state[s].get(k));
    }
    Roles<Wide> at{value + kParam, value + kGrad, {}};
#pragma unroll
    for (int s = 0; s < kStates; ++s) at.state[s] = value + kFirstState + s;
    element<Stage, Wide>(at, 0, taken_, hyper_, per_tensor_, left, Place{});
    if constexpr (writes(kParam))
      param.set(k, chance_.template rounded<Param>(value[kParam], kParam, i));
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (writes(kFirstState + s)) {
        const T result = value[kFirstState + s];
        state[s].set(k, chance_.template rounded<State>(result, kFirstState + s, i));
      }
    }
#pragma unroll
    for (int s = 0; s < Stage::kSums; ++s) {
      T& lane = lanes[s * kLanes + i % kLanes];
      lane = lane + left[s];
    }
  }

  // V elements of the average, behind the parameter that this thread has written: in `move`, what
  // few ask for would take registers of all.
  template <int V>
  __device__ __forceinline__ void move_average(int i) const {
    const Pack<Param, V> param = read<Param, V>(param_ + i);
    Pack<T, V> average = read<T, V>(average_ + i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      average.set(k, text::averaged<T>(average.get(k), load(param.get(k)), ema_weight_));
    }
    write(average, average_ + i);
  }

  Param* param_;
  const Grad* grad_;
  State* state_[kStates + 1];
  T* average_;  // null for none
  int64_t misaligned_;
  Taken<T> taken_;
  T ema_weight_;
  T hyper_[Stage::kHypers + 1];
  T per_tensor_[Stage::kPerTensorRead + 1];
  Chance chance_;
  Chunk chunk_;
  bool skipped_;
};

// ----- what a row needs

// The step counter and the counted scalars.
template <class Rule>
__device__ __forceinline__ void advance(const Tables& tables, int64_t r) {
  const Row& row = tables.rows[r];
  const HyperRow& hyper = tables.hyper_rows[row.hyper];
  if (row.step != 0) store_scalar(row.step, static_cast<double>(hyper.step));
#pragma unroll
  for (int k = 0; k < Rule::kCounted; ++k) {
    store_scalar(tables.scalars[r * tables.scalars_width + k],
                 tables.hypers[hyper.offset + Rule::kHypers + k]);
  }
}

// What happens once a row when a stage is over; by one thread.
template <class Rule, class Stage>
__device__ __forceinline__ void turn(const Tables& tables, int64_t r) {
  const Row& row = tables.rows[r];
  const int64_t* at = tables.scalars + r * tables.scalars_width;
  double scalars[kMaxScalars] = {};
#pragma unroll
  for (int k = Rule::kCounted; k < Rule::kScalars; ++k) scalars[k] = load_scalar(at[k]);
  Stage::turn(tables.hypers + tables.hyper_rows[row.hyper].offset, static_cast<double>(row.size),
              tables.row_sums + r * tables.per_tensor, scalars);
#pragma unroll
  for (int k = Rule::kCounted; k < Rule::kScalars; ++k) store_scalar(at[k], scalars[k]);
}

// The sums that a stage left in the lanes: of the chunk, then, with its last chunk, of the row.
template <class Rule, class Stage, class T>
__device__ __forceinline__ void leave_sums(const Tables& tables, const Chunk& chunk, T* lanes,
                                           double (&tree)[kThreads]) {
  const Row& row = tables.rows[chunk.row];
  const int64_t chunks = chunks_of(row.size);
  const auto sums = [&](int k) {
    return tables.chunk_sums + (Stage::kFirstSum + k) * tables.chunks + row.chunk;
  };
#pragma unroll
  for (int k = 0; k < Stage::kSums; ++k) {
    const double sum = join_lanes(lanes + k * kLanes, tree, Added());
    if (threadIdx.x == 0) sums(k)[chunk.index] = sum;
  }
  if (threadIdx.x >= kWarp || !is_last(tables.row_tickets + chunk.row, chunks)) return;
#pragma unroll
  for (int k = 0; k < Stage::kSums; ++k) {
    const double total = join_chunks(sums(k), chunks, Added());
    if (threadIdx.x != 0) continue;
    tables.row_sums[chunk.row * tables.per_tensor + Stage::kFirstSum + k] = total;
  }
  if (threadIdx.x == 0 && Stage::kTurns) turn<Rule, Stage>(tables, chunk.row);
}

// ----- the kernel

// Blocks that a multiprocessor is to hold at once: 4 leave a thread 64 registers. Numbers of fp64
// are two registers each, so there it is less.
template <class Storage>
constexpr int kBlocks = sizeof(typename Storage::Compute) == 4 ? 4 : 2;

// A block then reads no table.
__device__ __forceinline__ bool all_skipped(const Tables& tables) {
  for (int64_t member = 0; member < tables.member_count; ++member) {
    if (tables.control[member].skip == 0) return false;
  }
  return true;
}

template <class Rule, class Stage, int kStage, class Storage>
__global__ void __launch_bounds__(kThreads, kBlocks<Storage>) apply_kernel(const Apply work) {
  using T = typename Storage::Compute;
  constexpr bool kEnds = Stage::kSums > 0 || Stage::kTurns;
  alignas(16) __shared__ T lanes[Stage::kSums * kLanes + 1];
  __shared__ double tree[kThreads];
  __shared__ Step<Rule, Stage, kStage, Storage> steps[2];
  const Tables& tables = work.tables;
  if (all_skipped(tables)) return;
  if constexpr (kEnds) {
    for (int i = static_cast<int>(threadIdx.x); i < Stage::kSums * kLanes; i += kThreads) {
      lanes[i] = T(0);
    }
    __syncthreads();
  }
  bool odd = false;  // two of them: whoever is done fills the other one
  for (int64_t item = work.begin + blockIdx.x; item < work.end; item += gridDim.x) {
    const int64_t mirrored = work.begin + work.end - 1 - item;
    steps[odd].fill(tables, Chunk::of(tables, work.backwards ? mirrored : item));
    __syncthreads();
    const auto& step = steps[odd];
    odd = !odd;
    if (step.skipped()) continue;
    step.run(lanes);
    const Chunk& chunk = step.chunk();
    if (kStage == 0 && chunk.index == 0 && threadIdx.x == 0) advance<Rule>(tables, chunk.row);
    if constexpr (kEnds) leave_sums<Rule, Stage>(tables, chunk, lanes, tree);
  }
}

}  // namespace pyupdate::cuda
