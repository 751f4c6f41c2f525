// SPDX-License-Identifier: Apache-2.0
// The few questions that a step has to the CUDA runtime, beside its launches. No CUDA header is
// needed to include this file.
#pragma once
#include <string>

namespace pyupdate::cuda {

// The reason why no kernel can run on this machine, empty if one can.
std::string why_no_device();

// Of a device; 0 and no exception where it cannot be asked.
int multiprocessors(int device);

// Whether a graph is being captured on a stream, so that nothing but launches may be put there.
bool is_capturing(void* stream);

// Makes a device the current one of this thread, and the one before current again. No context is
// made on any other device. Throws std::runtime_error where it cannot be.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  void* context_ = nullptr;  // before
  bool is_known_ = false;
  int device_ = -1;  // before
};

}  // namespace pyupdate::cuda
