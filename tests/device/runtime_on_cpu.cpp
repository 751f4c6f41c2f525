// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/runtime.h where the CPU is the device. Tests say when a graph is being captured, by
// PYUPDATE_TEST_CAPTURING=1.
#include <cstdlib>

#include "cuda/runtime.h"

namespace pyupdate::cuda {

std::string why_no_device() { return ""; }

int multiprocessors(int) { return 2; }

bool is_capturing(void*) { return std::getenv("PYUPDATE_TEST_CAPTURING") != nullptr; }

OnDevice::OnDevice(int) {}

OnDevice::~OnDevice() = default;

}  // namespace pyupdate::cuda
