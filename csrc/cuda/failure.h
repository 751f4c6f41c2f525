// SPDX-License-Identifier: Apache-2.0
// A CUDA call that failed, in words, and by whose fault. No CUDA header is needed to include this.
#pragma once
#include <stdexcept>
#include <string>

namespace pyupdate::cuda {

// Whether an error (a cudaError_t) can only be that of work which runs already: memory that failed,
// an address, a timeout, an assertion, an instruction. Whoever calls next is told of it, and so is
// every call after that, for the device's context is lost.
inline bool is_of_earlier_work(int code) {
  switch (code) {
    case 214:  // cudaErrorECCUncorrectable
    case 220:  // cudaErrorNvlinkUncorrectable
    case 226:  // cudaErrorContained
    case 700:  // cudaErrorIllegalAddress
    case 702:  // cudaErrorLaunchTimeout
    case 710:  // cudaErrorAssert
    case 714:  // cudaErrorHardwareStackError
    case 715:  // cudaErrorIllegalInstruction
    case 716:  // cudaErrorMisalignedAddress
    case 717:  // cudaErrorInvalidAddressSpace
    case 718:  // cudaErrorInvalidPc
    case 719:  // cudaErrorLaunchFailure
    case 721:  // cudaErrorTensorMemoryLeak
    case 911:  // cudaErrorExternalDevice
      return true;
    default:
      return false;
  }
}

// `what` cannot be done: "CUDA kernel 'adamw' could not be launched".
inline std::runtime_error failure(const std::string& what, int code, const char* text) {
  std::string said = what + ": " + text + " (error " + std::to_string(code) + ")";
  if (is_of_earlier_work(code)) {
    said +=
        ". The fault is of work that was launched before, by pyupdate or by others, and CUDA tells "
        "it to whoever calls next; with CUDA_LAUNCH_BLOCKING=1 in the environment it is told where "
        "that work is launched";
  }
  return std::runtime_error(said);
}

}  // namespace pyupdate::cuda
