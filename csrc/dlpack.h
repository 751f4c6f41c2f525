// SPDX-License-Identifier: Apache-2.0
// The few structs of DLPack 1.3 that a consumer of its C exchange API needs, declared by hand from
// the specification (https://dmlc.github.io/dlpack/latest/c_api.html): no framework header, no link
// to a framework, so one binary serves every torch from 2.10 on.
#pragma once
#include <stdint.h>

namespace pyupdate::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // owned by the producer
  int64_t* strides;  // in elements; null means contiguous before version 1.2
  uint64_t byte_offset;
};

// Found as a capsule named kCapsuleName in `type(tensor).__dlpack_c_exchange_api__`.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  // Fills in a view of a tensor object without taking ownership. Not 0: a Python error is set.
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

}  // namespace pyupdate::dlpack
