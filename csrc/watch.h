// SPDX-License-Identifier: Apache-2.0
// A plan whose launches somebody else makes: what moved since its tables were made.
#pragma once
#include <pybind11/pybind11.h>

namespace pyupdate {

// The class `Watch` of a module.
void name_watch(pybind11::module_& m);

}  // namespace pyupdate
