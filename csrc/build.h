// SPDX-License-Identifier: Apache-2.0
// What module.cpp alone is compiled with, for the bindings.
#pragma once
#include <Python.h>

extern "C" PyObject* PyInit_pyupdate_module();  // each module's bindings.cpp defines it

namespace pyupdate::build {

extern const char* const kCompiler;  // null where CMake did not say
extern const char* const kFlags;

}  // namespace pyupdate::build
