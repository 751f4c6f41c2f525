// SPDX-License-Identifier: Apache-2.0
// Brings into the cache what a refresh is about to look at.
//
// The forward and backward pass leave an optimizer's Python objects in memory, and a refresh
// follows pointer after pointer to about 40 cache lines a row, each of which takes 0.17 us to come.
// So some rows are gone through together, one pointer at a time: memory answers a dozen at once. By
// loads, not by prefetch hints, of which more than half are dropped where they come in bursts
// (measured, EPYC: 1,000 rows of AdamW after a step of torch's took 1.3 ms with hints and 0.65 ms
// with loads). Nothing of what is loaded is used for a result, and nothing of what tensors hold is
// loaded: it may have moved to a device since, where the host cannot read.
#pragma once
#include <Python.h>
#include <stddef.h>

#include <vector>

#include "dlpack.h"

namespace pyupdate::ahead {

// Where torch keeps what a tensor's object leads to, in bytes. Not known but looked for: in tensors
// of which torch says what they lead to.
struct Leads {
  size_t implementation;              // from the Python object
  size_t storage, autograd, version;  // from the implementation
  size_t object;                      // from there back to the Python object
  size_t grad;                        // from what autograd keeps of a leaf
};

// Null where one of them was not found; then nothing is brought.
const Leads* leads();

inline const char* pointer_at(const void* from, size_t offset) {
  return *reinterpret_cast<const char* const*>(static_cast<const char*>(from) + offset);
}

// The entries of a dict of dicts, walked beside its reader.
class Walk {
 public:
  explicit Walk(PyObject* dict) : dict_(dict) {}
  // The value of the next entry, borrowed; null behind the last.
  PyObject* next() {
    PyObject *key = nullptr, *value = nullptr;
    return PyDict_Next(dict_, &at_, &key, &value) ? value : nullptr;
  }

 private:
  PyObject* dict_;
  Py_ssize_t at_ = 0;
};

// So many rows go together: what they touch stays in the first cache until it is read.
constexpr size_t kRows = 8;

// Some rows of a plan, all of them live objects or null.
struct Rows {
  size_t count = 0;
  PyObject* params[kRows];
  PyObject* dicts[kRows];   // of their state
  PyObject* const* states;  // what was found there last time, `width` a row
  size_t width;
};

void bring(const Leads& leads, const Rows& rows);

// The version counters of some tensors.
void bring_versions(const Leads& leads, PyObject* const* tensors, size_t count);

// Rows of tensors, each a parameter and its state, that are read as a step must read them which
// trusts no pointer of the one before: brought, then every `.grad` asked for and every tensor read
// through the exchange API. Nothing is checked, compared or counted: for benchmarks, what no such
// step can be below.
class Reader {
 public:
  // `tensors`: `width` a row, the parameter first.
  Reader(const dlpack::ExchangeApi* exchange, PyObject* grad, std::vector<PyObject*> tensors,
         size_t width);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // How many tensors were read, gradients included; throws what torch says of one.
  size_t read() const;

 private:
  void bring(size_t first) const;
  size_t read(PyObject* tensor) const;

  const dlpack::ExchangeApi* exchange_;
  PyObject* grad_;                 // the descriptor of Tensor.grad
  std::vector<PyObject*> params_;  // these three are owned
  std::vector<PyObject*> states_;  // `width - 1` a row
  size_t width_;
};

}  // namespace pyupdate::ahead
