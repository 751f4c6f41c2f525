// SPDX-License-Identifier: Apache-2.0
// The name of a module and of its build, apart from what it offers: modules that differ in these
// alone, as those of other rules do, have all other objects in common.
#include "build.h"

namespace pyupdate::build {

#ifdef PYUPDATE_COMPILER
const char* const kCompiler = PYUPDATE_COMPILER;
#else
const char* const kCompiler = nullptr;
#endif
#ifdef PYUPDATE_FLAGS
const char* const kFlags = PYUPDATE_FLAGS;
#else
const char* const kFlags = nullptr;
#endif

}  // namespace pyupdate::build

#define PYUPDATE_INIT_OF(name) PyInit_##name
#define PYUPDATE_INIT(name) PYUPDATE_INIT_OF(name)

PyMODINIT_FUNC PYUPDATE_INIT(PYUPDATE_MODULE_NAME)() { return PyInit_pyupdate_module(); }
