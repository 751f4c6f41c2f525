// SPDX-License-Identifier: Apache-2.0
// A number in a tensor of one element, fp32 or fp64: its address, with 1 added where it is fp64.
// Host and device.
#pragma once
#include "types.h"

namespace pyupdate {
inline namespace PYUPDATE_ISA {

PYUPDATE_HD double load_scalar(int64_t tagged) {
  return tagged & 1 ? *reinterpret_cast<const double*>(tagged - 1)
                    : static_cast<double>(*reinterpret_cast<const float*>(tagged));
}

PYUPDATE_HD void store_scalar(int64_t tagged, double value) {
  if (tagged & 1) {
    *reinterpret_cast<double*>(tagged - 1) = value;
  } else {
    *reinterpret_cast<float*>(tagged) = static_cast<float>(value);
  }
}

}  // namespace PYUPDATE_ISA
}  // namespace pyupdate
