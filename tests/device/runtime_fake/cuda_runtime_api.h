// SPDX-License-Identifier: Apache-2.0
// As much of the CUDA runtime as csrc/cuda/runtime.cpp takes, over devices that are numbers: which
// of them has a context, which context a thread has, and what two copies of the runtime in one
// process (torch's and ours) take for the current device.
//
// A copy remembers the device that it was last told. What it answers is the device of the thread's
// context, if there is one. To set a device makes its context, and so does a launch without one.
#pragma once
#include <cstring>
#include <utility>

namespace fake {

inline constexpr int kDevices = 4;
// Their addresses are the contexts: a device's own, and behind those one that its user made.
static int contexts[2 * kDevices];
static bool has_context[kDevices];
static int* current = nullptr;
struct Copy {
  int told = 0;
};
static Copy ours, torchs;
static bool has_driver = true;
static int error = 0;       // of a call that sets a device
static int last_error = 0;  // of our copy

static void enter(int device) {
  has_context[device] = true;
  current = &contexts[device];
}
static int device_of(const Copy& copy) {
  return current == nullptr ? copy.told : static_cast<int>(current - contexts) % kDevices;
}
static int set_device(Copy* copy, int device) {
  if (error != 0) return error;
  copy->told = device;
  enter(device);
  return 0;
}
// Where a kernel runs that this copy launches.
static int launch(const Copy& copy) {
  if (current == nullptr) enter(copy.told);
  return device_of(copy);
}

static int get_current(void** context) {
  *context = current;
  return 0;
}
static int set_current(void* context) {
  current = static_cast<int*>(context);
  return 0;
}

}  // namespace fake

#define CUDART_VERSION 13000
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorNoDevice = 100 };
enum { cudaDevAttrMultiProcessorCount = 16, cudaEnableDefault = 0 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};

static cudaError_t cudaGetLastError() { return std::exchange(fake::last_error, 0); }
static const char* cudaGetErrorString(cudaError_t) { return "CUDA's own words"; }
static cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake::kDevices;
  return cudaSuccess;
}
static cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 132;
  return cudaSuccess;
}
static cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  fake::launch(fake::ours);  // it needs a context
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static cudaError_t cudaGetDevice(int* device) {
  *device = fake::device_of(fake::ours);
  return cudaSuccess;
}
static cudaError_t cudaSetDevice(int device) {
  return fake::last_error = fake::set_device(&fake::ours, device);
}
static cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
  *found = nullptr;
  *status = cudaDriverEntryPointSymbolNotFound;
  if (!fake::has_driver) return fake::last_error = cudaErrorNoDevice;
  if (std::strcmp(name, "cuCtxGetCurrent") == 0)
    *found = reinterpret_cast<void*>(fake::get_current);
  if (std::strcmp(name, "cuCtxSetCurrent") == 0)
    *found = reinterpret_cast<void*>(fake::set_current);
  if (*found != nullptr) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
