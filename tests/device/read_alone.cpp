// SPDX-License-Identifier: Apache-2.0
// The least that a step reads which trusts no pointer of the step before: every tensor of every row
// through torch's DLPack exchange API, and each parameter's `.grad`. Nothing is checked, compared,
// counted or launched; benchmarks/host_time.py times it as what no host time can be below.
#include <Python.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "ahead.cpp"
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
  const ahead::Leads* const leads = ahead::leads();
  const auto width = static_cast<size_t>(columns - 1);
  std::vector<PyObject*> states(ahead::kRows * width);
  int64_t sum = 0;
  pyupdate::dlpack::Tensor view;
  for (Py_ssize_t row = 0; row + columns <= count; row += columns) {
    if (leads != nullptr && row % (columns * static_cast<Py_ssize_t>(ahead::kRows)) == 0) {
      ahead::Rows rows;
      rows.states = states.data();
      rows.width = width;
      for (Py_ssize_t next = row; next < count && rows.count < ahead::kRows; next += columns) {
        for (size_t c = 0; c < width; ++c) {
          states[rows.count * width + c] = at(next + 1 + static_cast<Py_ssize_t>(c));
        }
        rows.dicts[rows.count] = nullptr;
        rows.params[rows.count++] = at(next);
      }
      ahead::bring(*leads, rows);
    }
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
