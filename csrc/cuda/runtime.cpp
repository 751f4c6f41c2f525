// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime, linked statically: it shares torch's context of a device, and its streams.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include "failure.h"

namespace pyupdate::cuda {

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
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

// ----- the current device

namespace {

// A function of the driver's, found at run time: the module is loaded where there is no driver. The
// version is the oldest that we would take it from.
void* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 11000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess && status == cudaDriverEntryPointSuccess ? found : nullptr;
}

// Which context a thread has; null for none, as a thread begins. 0 is success.
struct CurrentContext {
  int (*get)(void** context);
  int (*set)(void* context);
};

const CurrentContext& current_context() {
  static const CurrentContext found = {
      reinterpret_cast<int (*)(void**)>(driver_function("cuCtxGetCurrent")),
      reinterpret_cast<int (*)(void*)>(driver_function("cuCtxSetCurrent"))};
  return found;
}

}  // namespace

// A thread that has asked for no device is on device 0 by name and has no context. To name 0 again
// would make one there, of some hundred MB, though nobody uses that GPU: so the context that was is
// put back, or none, which changes neither device nor memory.
OnDevice::OnDevice(int device) {
  const CurrentContext& current = current_context();
  is_known_ = current.get != nullptr && current.set != nullptr && current.get(&context_) == 0;
  if (cudaGetDevice(&device_) != cudaSuccess) (void)cudaGetLastError();
  if (device_ == device) return;  // perhaps in a context of its user's, whose streams it is to have
  const cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  throw failure("CUDA device " + std::to_string(device) + " could not be made the current one",
                error, cudaGetErrorString(error));
}

OnDevice::~OnDevice() {
  if (is_known_) {
    (void)current_context().set(context_);
  } else {
    (void)cudaSetDevice(device_);
  }
}

}  // namespace pyupdate::cuda
