// SPDX-License-Identifier: Apache-2.0
// What the bindings of every module have in common. They alone include pybind11.h: with it an empty
// file takes some 13 seconds to compile, and with the parts that others need two to four.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "build.h"
#include "plan_object.h"

// PYBIND11_MODULE(pyupdate_module, m) defines what module.cpp offers to Python under its own name;
// in itself it is of this module alone.
#undef PYBIND11_EXPORT
#define PYBIND11_EXPORT

namespace pyupdate {

// The enum `Found` of a module.
inline void name_found(py::module_& m) {
  py::enum_<Found>(m, "Found", py::module_local())
      .value("READY", Found::kReady)
      .value("FRESH", Found::kFresh)
      .value("STALE", Found::kStale)
      .value("SUSPECT", Found::kSuspect)
      .value("OVERLAP", Found::kOverlap);
}

// What `python -m pyupdate` shows of a build.
inline std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  if (build::kCompiler != nullptr) info["compiler"] = build::kCompiler;
  if (build::kFlags != nullptr) info["flags"] = build::kFlags;
  return info;
}

// Lets Python's garbage collector see through a plan to the parameters.
template <class P>
void collectable(PyHeapTypeObject* heap) {
  PyTypeObject& type = heap->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<P&>(py::handle(self)).traverse(visit, arg);
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<P&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace pyupdate
