// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime, linked statically: it shares torch's context of a device, and its streams.
#include "runtime.h"

#include <cuda_runtime_api.h>

namespace pyupdate::cuda {

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // it would be told again by the next launch
    return cudaGetErrorString(error);
  }
  return count == 0 ? "the driver shows none" : "";
}

int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

OnDevice::OnDevice(int device) : before_(device) {
  (void)cudaGetDevice(&before_);
  if (before_ != device) (void)cudaSetDevice(device);
}

OnDevice::~OnDevice() { (void)cudaSetDevice(before_); }

}  // namespace pyupdate::cuda
