// SPDX-License-Identifier: Apache-2.0
// The table of apply kernels: a row a rule, along Rules, from each storage's build of apply.cu.
#pragma once
#include <utility>

#include "device.h"

namespace pyupdate::cuda {

struct Apply;

struct ApplyRow {
  void (*stage[kMaxStages])(Apply);
};

template <int storage>
const ApplyRow* apply_rows();

}  // namespace pyupdate::cuda
