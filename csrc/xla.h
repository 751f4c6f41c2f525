// SPDX-License-Identifier: Apache-2.0
// The CPU passes as functions that XLA calls, so that a step which XLA compiles moves parameter and
// state in place and once, where XLA's own loops read the moments twice.
#pragma once
#include <stdint.h>

#include <string>

#include "cpu/passes.h"

namespace pyupdate::xla {

// Registers both handlers for the CPU, "<prefix>_measure" and "<prefix>_step".
//
// measure: (unscale: fp64, gradients...) -> fp64[2 + gradients]: the norm of the unscaled
// gradients, 1 if there is an inf or nan, and each gradient's sum of squares.
//
// step, with the attribute `rule`: (control: fp64[3 + numbers], multiplier: fp64[1] or one a row,
// parameters..., states..., gradients...) -> parameters and states, in the same memory. Control is
// whether to skip, the bound of each multiplied element, the step count that is made, and what
// the rule's prepare takes. States are all rows' first ones, then all rows' second ones.
//
// `api` is what XLA's GetXlaFfiApi returns. Returns why they could not be registered, or nothing.
std::string register_handlers(uintptr_t api, const std::string& prefix,
                              const cpu::Passes& (*passes)());

}  // namespace pyupdate::xla
