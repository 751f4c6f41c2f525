// SPDX-License-Identifier: Apache-2.0
// The least that a step reads which trusts no pointer of the step before: every tensor of every row
// through torch's DLPack exchange API, and each parameter's `.grad`. Nothing is checked, compared,
// counted or launched; benchmarks/host_time.py times it as what no host time can be below.
#include <Python.h>
#include <stdint.h>

#include "ahead.h"
#include "dlpack.h"

using pyupdate::dlpack::ExchangeApi;
namespace ahead = pyupdate::ahead;

// `tensors`: a list, `columns` of them a row, the parameter first. Returns a sum of the addresses,
// or -1 with a Python error.
extern "C" int64_t read_alone(PyObject* tensors, int64_t columns, PyObject* capsule,
                              PyObject* grad_descriptor) {
  const auto* api = static_cast<const ExchangeApi*>(
      PyCapsule_GetPointer(capsule, pyupdate::dlpack::kCapsuleName));
  if (api == nullptr) return -1;
  const Py_ssize_t count = PyList_GET_SIZE(tensors);
  const auto at = [&](Py_ssize_t i) { return PyList_GET_ITEM(tensors, i); };
  const bool leads = count > 0 && ahead::lead_to(at(0));
  int64_t sum = 0;
  pyupdate::dlpack::Tensor view;
  for (Py_ssize_t row = 0; row + columns <= count; row += columns) {
    const Py_ssize_t far = columns * static_cast<Py_ssize_t>(ahead::kRows);
    for (Py_ssize_t c = row; leads && c < row + columns; ++c) {
      if (c + 3 * far < count) ahead::object(at(c + 3 * far));
      if (c + 2 * far < count) ahead::implementation(at(c + 2 * far));
      if (c + far < count) ahead::storage(at(c + far));
    }
    if (leads && row + far < count) ahead::autograd(at(row + far));
    PyObject* param = at(row);
    PyObject* grad =
        Py_TYPE(grad_descriptor)
            ->tp_descr_get(grad_descriptor, param, reinterpret_cast<PyObject*>(Py_TYPE(param)));
    if (grad == nullptr || api->tensor_from_object(grad, &view) != 0) return -1;
    sum += reinterpret_cast<int64_t>(view.data);
    Py_DECREF(grad);
    for (Py_ssize_t c = row; c < row + columns; ++c) {
      if (api->tensor_from_object(at(c), &view) != 0) return -1;
      sum += reinterpret_cast<int64_t>(view.data);
    }
  }
  return sum;
}
