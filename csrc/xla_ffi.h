// SPDX-License-Identifier: Apache-2.0
// The structs of XLA's foreign function interface that a CPU handler needs, declared by hand from
// its C header (xla/ffi/api/c_api.h, version 0.2), as dlpack.h is: no framework header, no link.
//
// The version is 0.x, so that another one may lay them out otherwise: it is refused when handlers
// are registered (xla.cpp), and what XLA passes says how long it is.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace pyupdate::xla::ffi {

constexpr int kMajorVersion = 0;
constexpr int kMinorVersion = 2;

enum ExtensionType : int32_t { kMetadataExtension = 1 };
enum DataType : int32_t { kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16 };
enum AttributeType : int32_t { kString = 4 };
enum ErrorCode : int32_t { kInvalidArgument = 3, kInternal = 13 };

struct Error;
struct Context;
struct Api;
struct CallFrame;
using Handler = Error*(CallFrame*);

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int major, minor;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

// Arguments and results: every one is a buffer, as XLA has nothing else yet.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  Buffer** at;
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttributeType* types;
  ByteSpan** names;
  void** values;  // a string's is a ByteSpan
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int32_t stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
  void* future;
};

// In the place of a call: XLA asks what the handler was written for.
struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
  int64_t state_type;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct CreateError {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};
struct ErrorMessage {
  size_t struct_size;
  Extension* extensions;
  Error* error;
  const char* message;  // set by the call
};
struct DestroyError {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};
struct Bundle {
  Handler *instantiate, *prepare, *initialize, *execute;
};
struct Register {
  size_t struct_size;
  Extension* extensions;
  ByteSpan name;
  ByteSpan platform;
  Bundle handlers;
  uint32_t traits;
};
struct CountThreads {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  int64_t* count;  // set by the call
};

// What XLA offers; the functions that nothing here calls are left untyped.
struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*error_message)(ErrorMessage*);
  void (*destroy_error)(DestroyError*);
  Error* (*register_handler)(Register*);
  void* unused[8];  // streams, types, contexts, states, memory, tasks
  Error* (*count_threads)(CountThreads*);
};

}  // namespace pyupdate::xla::ffi
