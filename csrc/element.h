// SPDX-License-Identifier: Apache-2.0
// The per-element body of every pass: load, multiply, clip, rule, store. Host and device.
//
// A Stage comes from rules_generated.h: which elements it reads and writes (bit k of a mask is role
// k: parameter, gradient, states), how many per-tensor sums it leaves, and `run`, the mathematics.
#pragma once
#include "plan.h"
#include "types.h"

namespace pyupdate {
inline namespace PYUPDATE_ISA {

// What a store may need beyond the value. Rounding to nearest does not look at it; a stochastic one
// draws from (seed, step, element), so that a result depends on nothing else.
struct Place {
  int64_t seed;
  int64_t step;
  int64_t element;
};

template <class T, class S>
PYUPDATE_HD void store(T value, S* target, const Place&) {
  store(value, target);
}

// The typed addresses of one row's roles, at the first element of a block.
template <class Storage>
struct Roles {
  typename Storage::Param* param;
  const typename Storage::Grad* grad;
  typename Storage::State* state[kMaxStates];

  static PYUPDATE_HD Roles of(void* const* role) {
    Roles roles;
    roles.param = static_cast<typename Storage::Param*>(role[kParam]);
    roles.grad = static_cast<const typename Storage::Grad*>(role[kGrad]);
    for (int k = 0; k < kMaxStates; ++k) {
      roles.state[k] = static_cast<typename Storage::State*>(role[kFirstState + k]);
    }
    return roles;
  }
};

// How a stage takes the gradient: multiplied, and clipped to [-clip_value, clip_value] where it is
// a rule's. An infinite bound changes no value, so nothing is branched on.
template <class T>
struct Taken {
  T multiplier;
  T clip_value;
};

// One element. `sum_out` gets what the stage leaves to be added up over the tensor.
template <class Stage, class Storage, class T = typename Storage::Compute>
PYUPDATE_HD void element(const Roles<Storage>& at, int64_t i, Taken<T> taken, const T* hyper,
                         const T* per_tensor, T* sum_out, Place place) {
  constexpr auto reads = [](int role) { return (Stage::kReads >> role & 1u) != 0; };
  constexpr auto writes = [](int role) { return (Stage::kWrites >> role & 1u) != 0; };
  T value[kMaxRoles];
  if constexpr (reads(kParam)) value[kParam] = load(at.param[i]);
  if constexpr (reads(kGrad)) {
    value[kGrad] = load(at.grad[i]) * taken.multiplier;
    if constexpr (requires { Stage::template clip<T>(value[kGrad], taken.clip_value); }) {
      value[kGrad] = Stage::template clip<T>(value[kGrad], taken.clip_value);
    }
  }
  constexpr int kStates = Stage::kElements - kFirstState;
  each<kStates>([&](int k) {
    if (reads(kFirstState + k)) value[kFirstState + k] = load(at.state[k][i]);
  });
  Stage::template run<T>(value, hyper, per_tensor, sum_out);
  place.element += i;
  if constexpr (writes(kParam)) store(value[kParam], at.param + i, place);
  each<kStates>([&](int k) {
    if (writes(kFirstState + k)) store(value[kFirstState + k], at.state[k] + i, place);
  });
}

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
