// SPDX-License-Identifier: Apache-2.0
// What one instruction set's build of passes.cpp offers: its rules, each with its compiled stages.
#pragma once
#include "../plan.h"

namespace pyupdate::cpu {

// A run of elements of one row, laid flat.
struct Block {
  void* role[kMaxRoles];  // first element of each role; unused ones may be null
  int64_t count;
  int64_t element;           // index in its row of the first element
  int64_t step;              // the step count, for a store that draws
  int64_t seed;              // likewise
  double multiplier;         // of the gradient
  double clip_value;         // bound of the multiplied gradient, infinite for none
  const double* hyper;       // the hypers of the row's hyper row
  const double* per_tensor;  // the row's numbers that earlier stages and turns left
  void* lanes;  // kMaxSums x kLanes of the compute type; a stage with sums adds to them
};

// One stage, compiled for one storage.
struct Kernel {
  void (*run)(const Block&) = nullptr;
  unsigned reads = 0;   // bit k: role k
  unsigned writes = 0;  // likewise
  int sums = 0;         // how many it leaves
  int first_sum = 0;    // index of the first of them among the rule's per-tensor numbers
};

constexpr int kStorages = 6;

struct StorageInfo {
  const char* name;  // of the parameter's type; the first of a name has all roles of it
  int64_t itemsize[kMaxRoles];
  int64_t compute_size;
  // Lane arrays are of the compute type: clear the first n lanes, add up those of n elements.
  void (*clear)(void* lanes, int64_t n);
  double (*sum)(const void* lanes, int64_t n);
  double (*largest)(const void* lanes, int64_t n);  // likewise, for the inf norm
  // Moves the averages (compute type) of n parameters towards what was stored.
  void (*average)(const void* param, void* average, int64_t n, double weight);
  Kernel squared;    // the reduce pass for the 2-norm
  Kernel magnitude;  // and for the inf norm
  Kernel nonfinite;  // its second look, where a sum is not finite
  // For stochastic rounding (scratch.h), of the halves alone: the storage whose kernels step them
  // once they are widened, -1 for none, and both ways of converting n elements. `element` is the
  // first one's index in its row, `key` rounding.h's.
  int fp32;
  void (*widen)(const void* half, float* wide, int64_t n);
  void (*round)(const float* wide, void* half, int64_t n, uint64_t key, int64_t element);
};

struct RuleInfo {
  const char* name;
  const char* digest;  // of the text that it was compiled from
  int states, scalars, counted, numbers, hypers, per_tensor, stages;
  // Takes the step count, the group's numbers and the counted scalars; leaves the hypers and the
  // scalars' new values.
  void (*prepare)(const double* number, double* hyper);
  Kernel kernels[kMaxStages][kStorages];
  // Runs once a row when a stage is over; null where nothing happens there.
  void (*turns[kMaxStages])(const double* hyper, double numel, double* per_tensor, double* scalar);
};

struct Passes {
  const char* isa;
  int rule_count;
  const RuleInfo* rules;
  const StorageInfo* storages;  // kStorages of them
  using Tree = double (*)(double* x, int64_t n);
  Tree halving_tree;
  Tree largest;
  double (*multiplier)(double norm, double unscale, double max_norm);
};

// The builds that exist, best last; those that this machine cannot run are left out.
struct Builds {
  const Passes* passes[3];
  int count;
};
Builds runnable_builds();

}  // namespace pyupdate::cpu
