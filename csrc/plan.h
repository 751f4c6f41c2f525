// SPDX-License-Identifier: Apache-2.0
// What a step needs to know about a model: plain integer and fp64 tables, the same on every device.
//
// A row is one parameter with its gradient and state. Rows are in the order of the parameters.
// Addresses stand apart, `width` of them a row (Role). Work is cut into chunks of kChunk elements,
// which is part of the numeric contract (reduce.h), not a tuning knob.
#pragma once
#include <stdint.h>

namespace pyupdate {

constexpr int64_t kChunk = 16384;  // elements
constexpr int kMaxStates = 4;      // Adan keeps three and the gradient before
constexpr int kMaxSums = 4;        // that one stage leaves
constexpr int kMaxStages = 3;
constexpr int kMaxPerTensor = 8;  // sums and values of turns
constexpr int kMaxScalars = 2;    // ASGD keeps eta and mu

// The columns of the address table.
enum Role : int64_t { kParam = 0, kGrad = 1, kFirstState = 2 };
constexpr int kMaxRoles = kFirstState + kMaxStates + 1;  // the average comes last

struct Row {
  int64_t size;    // elements
  int64_t chunk;   // index of its first chunk, counted over the rows
  int64_t step;    // address of torch's step counter (+ 1 if it is fp64), 0 where there is none
  int32_t hyper;   // index of its hyper row: the numbers of this step
  int32_t layout;  // index into the layout table, -1 where every role is flat in one order
};

// What one (group, step count, counted scalars, storage) has in common. The hypers themselves are
// fp64, `kHypers` of them from `offset`; a kernel rounds them to its compute type. Behind them
// stand the new values of the counted scalars.
struct HyperRow {
  int64_t rule;        // index into the rules of the module
  int64_t storage;     // index into Storages
  int64_t offset;      // into the hyper table
  int64_t step;        // the step count that this step makes
  double sign;         // -1 where the group maximizes
  int64_t member = 0;  // of the plans that run in one region
};

// What is known only when the reduce pass is over. Kernels read it through memory, never by value.
struct Control {
  double multiplier;  // unscale x clip
  int64_t skip;       // not zero: nothing is written
  double clip_value;  // bound of each multiplied gradient element, infinite for none
  double ema_weight;  // weight of the new parameter in its average
  // A slot of the complete step; the passes do not read it yet.
  int64_t seed;  // of stochastic rounding; a store knows (seed, step, element index)
};

// A strided row: dims, then the sizes, then per role the strides in bytes. Dims are those of the
// parameter, slowest first, so that the element order is the order of the parameter's memory.
struct Layout {
  static constexpr int kDims = 0, kSizes = 1;
  static int64_t length(int64_t dims, int64_t roles) { return 1 + dims * (1 + roles); }
};

}  // namespace pyupdate
