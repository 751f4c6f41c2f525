// SPDX-License-Identifier: Apache-2.0
#include "ahead.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

namespace pyupdate::ahead {

namespace py = pybind11;

namespace {

// ----- where torch keeps it

// What is looked through of an object of torch's; each is larger in every version from 2.10 on.
constexpr size_t kBegin = 8;  // behind the table of virtual functions
constexpr size_t kEndOfImplementation = 80, kEndOfAutograd = 120;

std::optional<size_t> find(const void* in, size_t end, const void* wanted) {
  for (size_t offset = kBegin; wanted != nullptr && offset < end; offset += sizeof(void*)) {
    if (pointer_at(in, offset) == wanted) return offset;
  }
  return std::nullopt;
}

const void* said(const py::handle& object, const char* name) {
  return PyLong_AsVoidPtr(py::object(object.attr(name)).ptr());
}

std::optional<Leads> look() {
  const py::module_ torch = py::module_::import("torch");
  const auto made = [&](bool leaf) -> py::object {
    return torch.attr("zeros")(1, py::arg("device") = "cpu", py::arg("requires_grad") = leaf);
  };
  const py::object plain = made(false), leaf = made(true);
  leaf.attr("grad") = plain;
  const py::object alias = plain.attr("detach")();  // of the same storage and version counter
  const void* impl = said(plain, "_cdata");
  const void* of_leaf = said(leaf, "_cdata");
  const void* of_alias = said(alias, "_cdata");
  const py::object storage = plain.attr("untyped_storage")();
  const auto implementation =
      find(plain.ptr(), static_cast<size_t>(Py_TYPE(plain.ptr())->tp_basicsize), impl);
  const auto to_storage = find(impl, kEndOfImplementation, said(storage, "_cdata"));
  const auto object = find(impl, kEndOfImplementation, plain.ptr());
  if (!implementation || !to_storage || !object) return std::nullopt;
  // What only a leaf that needs a gradient has, and what a tensor has in common with its alias.
  std::optional<size_t> autograd, version;
  for (size_t at = *to_storage + sizeof(void*); at < kEndOfImplementation; at += sizeof(void*)) {
    const char* of_plain = pointer_at(impl, at);
    if (!autograd && of_plain == nullptr && pointer_at(of_leaf, at) != nullptr) autograd = at;
    // And with no other tensor: its number of dimensions it has in common with many.
    const bool shared = pointer_at(of_alias, at) == of_plain && pointer_at(of_leaf, at) != of_plain;
    if (!version && of_plain != nullptr && shared) version = at;
  }
  if (!autograd || !version) return std::nullopt;
  const auto grad = find(pointer_at(of_leaf, *autograd), kEndOfAutograd, impl);
  if (!grad) return std::nullopt;
  return Leads{*implementation, *to_storage, *autograd, *version, *object, *grad};
}

// ----- loads

// Loads what stands at some offsets, of which there is one in each cache line that matters.
template <class... Offsets>
inline void load(const void* from, Offsets... offsets) {
  if (from == nullptr) return;
  (static_cast<void>(*(static_cast<const volatile char*>(from) + offsets)), ...);
}

inline const char* follow(const void* from, size_t offset) {
  return from == nullptr ? nullptr : pointer_at(from, offset);
}

inline void load_object(const PyObject* tensor) { load(tensor, 0, 16); }
inline void load_implementation(const void* impl) { load(impl, 0, 64, 128, 176); }
inline void load_storage(const void* storage) { load(storage, 0, 64); }

// What stands in an optimizer's state may be no dict; the processor takes it for one meanwhile.
void load_dict(PyObject* found) {
  if (found != nullptr && PyDict_Check(found)) load(found, 40);
}
void load_keys(PyObject* found) {
  if (found == nullptr || !PyDict_Check(found)) return;
  auto* const dict = reinterpret_cast<PyDictObject*>(found);
  load(dict->ma_keys, 0, 40);
  if (dict->ma_used > 1) load(dict->ma_keys, 80);  // with room for five
}

}  // namespace

// Under the GIL, which guards this static: one of C++'s own would have its second thread wait while
// it holds the GIL. What is not found, as a version counter in inference mode, is looked for again
// by the next plan.
const Leads* leads() {
  static std::optional<Leads> found;
  if (!found) {
    try {
      found = look();
    } catch (const py::error_already_set&) {
      return nullptr;
    }
  }
  return found ? &*found : nullptr;
}

void bring(const Leads& leads, const Rows& rows) {
  const size_t states = rows.count * rows.width;
  for (size_t i = 0; i < rows.count; ++i) load_dict(rows.dicts[i]);
  for (size_t i = 0; i < rows.count; ++i) load_object(rows.params[i]);
  for (size_t i = 0; i < states; ++i) load_object(rows.states[i]);

  const char* params[kRows];
  for (size_t i = 0; i < rows.count; ++i) {
    params[i] = pointer_at(rows.params[i], leads.implementation);
    load_implementation(params[i]);
  }
  for (size_t i = 0; i < states; ++i) {
    load_implementation(follow(rows.states[i], leads.implementation));
  }
  for (size_t i = 0; i < rows.count; ++i) load_keys(rows.dicts[i]);

  const char* autograd[kRows];
  for (size_t i = 0; i < rows.count; ++i) {
    autograd[i] = follow(params[i], leads.autograd);
    load(autograd[i], 0, 64);
    load_storage(follow(params[i], leads.storage));
  }
  for (size_t i = 0; i < states; ++i) {
    load_storage(follow(follow(rows.states[i], leads.implementation), leads.storage));
  }

  const char* grads[kRows];
  for (size_t i = 0; i < rows.count; ++i) {
    grads[i] = follow(autograd[i], leads.grad);
    load_implementation(grads[i]);
  }
  for (size_t i = 0; i < rows.count; ++i) {
    load_storage(follow(grads[i], leads.storage));
    load_object(reinterpret_cast<const PyObject*>(follow(grads[i], leads.object)));
  }
}

void bring_versions(const Leads& leads, PyObject* const* tensors, size_t count) {
  for (size_t start = 0; start < count; start += kRows) {
    const size_t end = std::min(start + kRows, count);
    for (size_t i = start; i < end; ++i) load(tensors[i], 0);
    for (size_t i = start; i < end; ++i) load(follow(tensors[i], leads.implementation), 0);
    for (size_t i = start; i < end; ++i) {
      load(follow(follow(tensors[i], leads.implementation), leads.version), 0);
    }
  }
}

// ----- for benchmarks

Objects::Objects(std::vector<PyObject*> tensors) : tensors_(std::move(tensors)) {
  const Leads* found = leads();
  for (PyObject* tensor : tensors_) {
    if (found == nullptr || !py::hasattr(tensor, "_cdata") ||
        said(tensor, "_cdata") != pointer_at(tensor, found->implementation)) {
      throw std::invalid_argument("torch does not say where an object leads");
    }
  }
  for (PyObject* tensor : tensors_) Py_INCREF(tensor);
}

Objects::~Objects() {
  for (PyObject* tensor : tensors_) Py_DECREF(tensor);
}

size_t Objects::read() const {
  constexpr size_t kTogether = 32;
  size_t stored = 0;
  if (tensors_.empty()) return stored;
  const Leads& at = *leads();
  for (size_t start = 0; start < tensors_.size(); start += kTogether) {
    const size_t end = std::min(start + kTogether, tensors_.size());
    for (size_t i = start; i < end; ++i) load_object(tensors_[i]);
    for (size_t i = start; i < end; ++i) {
      load_implementation(pointer_at(tensors_[i], at.implementation));
    }
    for (size_t i = start; i < end; ++i) {
      const char* storage = follow(pointer_at(tensors_[i], at.implementation), at.storage);
      load_storage(storage);
      stored += storage != nullptr ? 1 : 0;
    }
  }
  return stored;
}

}  // namespace pyupdate::ahead
