// SPDX-License-Identifier: Apache-2.0
// Brings into the cache what a refresh will look at some rows later.
//
// The forward and backward pass leave an optimizer's Python objects far from the processor, and a
// refresh follows pointer after pointer to about 40 cache lines a row. These are hints: they change
// no result. What is read on the way is read of live objects only, and only where torch itself has
// said that it stands there (`lead_to`).
#pragma once
#include <Python.h>
#include <stddef.h>

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pyupdate::ahead {

constexpr size_t kLine = 64;

// From one turn of a tensor to the next. A row takes 0.3 us and memory answers in 0.15; hints that
// come in bursts are dropped (measured: of 20,000 at once, more than half).
constexpr size_t kRows = 4;

// Where torch 2.10 to 2.13 keeps what a tensor's Python object leads to, in bytes.
constexpr size_t kImplOfObject = 16;
constexpr size_t kStorageOfImpl = 16;
constexpr size_t kAutogradOfImpl = 24;

inline const char* pointer_at(const void* object, size_t offset) {
  return *reinterpret_cast<const char* const*>(static_cast<const char*>(object) + offset);
}

inline void fetch(const void* place, size_t lines) {
  for (size_t i = 0; i < lines; ++i) {
    __builtin_prefetch(static_cast<const char*>(place) + i * kLine);
  }
}

// Whether a tensor's object leads to its implementation, as torch says where that is. False without
// a Python error where torch does not say.
inline bool lead_to(PyObject* tensor) {
  constexpr auto needed = static_cast<Py_ssize_t>(kImplOfObject + sizeof(void*));
  if (Py_TYPE(tensor)->tp_basicsize < needed) return false;
  PyObject* said = PyObject_GetAttrString(tensor, "_cdata");
  const void* impl = said != nullptr ? PyLong_AsVoidPtr(said) : nullptr;
  Py_XDECREF(said);
  PyErr_Clear();
  return impl != nullptr && impl == pointer_at(tensor, kImplOfObject);
}

// The turns of a tensor, each some rows after the one before: it reads what that one has fetched.
inline void object(const PyObject* tensor) { fetch(tensor, 1); }
inline void implementation(const PyObject* tensor) { fetch(pointer_at(tensor, kImplOfObject), 4); }
inline void storage(const PyObject* tensor) {
  fetch(pointer_at(pointer_at(tensor, kImplOfObject), kStorageOfImpl), 2);
}
inline void autograd(const PyObject* tensor) {
  fetch(pointer_at(pointer_at(tensor, kImplOfObject), kAutogradOfImpl), 2);
}

// Walks a dict of dicts some entries before its reader, and fetches what looking into one of them
// touches. `Depth::kDict` must walk before `kKeys`.
class Walk {
 public:
  enum class Depth { kDict, kKeys };
  Walk(PyObject* dict, Depth depth) : dict_(dict), depth_(depth) {}

  void on() {
    PyObject *key = nullptr, *value = nullptr;
    if (!PyDict_Next(dict_, &at_, &key, &value)) return;
    if (depth_ == Depth::kDict) {
      fetch(value, 1);
    } else if (PyDict_Check(value)) {
      fetch(reinterpret_cast<PyDictObject*>(value)->ma_keys, 2);
    }
  }

 private:
  PyObject* dict_;
  Depth depth_;
  Py_ssize_t at_ = 0;
};

// Tensors whose objects are read as a refresh reads them, and nothing is done with it: what that
// costs at least, for benchmarks.
class Objects {
 public:
  explicit Objects(std::vector<PyObject*> tensors) : tensors_(std::move(tensors)) {
    for (PyObject* tensor : tensors_) {
      if (!lead_to(tensor)) throw std::invalid_argument("torch does not say where an object leads");
    }
    for (PyObject* tensor : tensors_) Py_INCREF(tensor);
  }
  ~Objects() {
    for (PyObject* tensor : tensors_) Py_DECREF(tensor);
  }
  Objects(const Objects&) = delete;
  Objects& operator=(const Objects&) = delete;

  // How many of them have a storage.
  size_t read() const {
    size_t seen = 0;
    for (size_t start = 0; start < tensors_.size(); start += kTogether) {
      const size_t end = std::min(start + kTogether, tensors_.size());
      for (size_t i = start; i < end; ++i) object(tensors_[i]);
      for (size_t i = start; i < end; ++i) implementation(tensors_[i]);
      for (size_t i = start; i < end; ++i) storage(tensors_[i]);
      for (size_t i = start; i < end; ++i) {
        const char* found = pointer_at(pointer_at(tensors_[i], kImplOfObject), kStorageOfImpl);
        seen += found != nullptr && pointer_at(found, 0) != nullptr ? 1 : 0;
      }
    }
    return seen;
  }

 private:
  static constexpr size_t kTogether = 16;  // of which each turn is made before the next one
  std::vector<PyObject*> tensors_;
};

}  // namespace pyupdate::ahead
