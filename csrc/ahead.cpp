// SPDX-License-Identifier: Apache-2.0
#include "ahead.h"

#include <pybind11/cast.h>

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

// A place, and what stands there.
struct Sample {
  const void* in;
  const void* wanted;
};

// The first offset at which all samples have what is wanted. One will not do: memory that torch has
// not written to may hold the very pointer, from before it was freed.
std::optional<size_t> find(size_t end, const std::vector<Sample>& samples) {
  for (size_t offset = kBegin; offset < end; offset += sizeof(void*)) {
    if (std::all_of(samples.begin(), samples.end(), [&](const Sample& sample) {
          return sample.wanted != nullptr && pointer_at(sample.in, offset) == sample.wanted;
        })) {
      return offset;
    }
  }
  return std::nullopt;
}

const void* said(const py::handle& object, const char* name) {
  return PyLong_AsVoidPtr(py::object(object.attr(name)).ptr());
}

std::optional<Leads> look() {
  const auto torch = py::reinterpret_steal<py::object>(PyImport_ImportModule("torch"));
  if (!torch) throw py::error_already_set();
  const auto made = [&](bool leaf) -> py::object {
    return torch.attr("zeros")(1, py::arg("device") = "cpu", py::arg("requires_grad") = leaf);
  };
  const py::object plain = made(false), leaf = made(true), other = made(false), twin = made(true);
  leaf.attr("grad") = plain;
  twin.attr("grad") = other;
  const py::object alias = plain.attr("detach")();  // of the same storage and version counter
  const void* impl = said(plain, "_cdata");
  const void* of_leaf = said(leaf, "_cdata");
  const void* of_other = said(other, "_cdata");
  const void* of_twin = said(twin, "_cdata");
  const void* of_alias = said(alias, "_cdata");
  const auto storage = [](const py::object& tensor) {
    return said(tensor.attr("untyped_storage")(), "_cdata");
  };
  const auto implementation =
      find(static_cast<size_t>(Py_TYPE(plain.ptr())->tp_basicsize),
           {{plain.ptr(), impl}, {leaf.ptr(), of_leaf}, {other.ptr(), of_other}});
  const auto to_storage =
      find(kEndOfImplementation,
           {{impl, storage(plain)}, {of_leaf, storage(leaf)}, {of_other, storage(other)}});
  const auto object = find(kEndOfImplementation,
                           {{impl, plain.ptr()}, {of_leaf, leaf.ptr()}, {of_other, other.ptr()}});
  if (!implementation || !to_storage || !object) return std::nullopt;
  // What only a leaf that needs a gradient has, and what a tensor has in common with its alias.
  std::optional<size_t> autograd, version;
  for (size_t at = *to_storage + sizeof(void*); at < kEndOfImplementation; at += sizeof(void*)) {
    const auto there = [at](const void* of) { return pointer_at(of, at); };
    const bool of_leaves = there(impl) == nullptr && there(of_other) == nullptr &&
                           there(of_leaf) != nullptr && there(of_twin) != nullptr &&
                           there(of_leaf) != there(of_twin);
    if (!autograd && of_leaves) autograd = at;
    // And with no other tensor: its number of dimensions it has in common with many.
    const bool shared = there(of_alias) == there(impl) && there(of_leaf) != there(impl) &&
                        there(of_other) != there(impl);
    if (!version && there(impl) != nullptr && shared) version = at;
  }
  if (!autograd || !version) return std::nullopt;
  const auto grad = find(kEndOfAutograd, {{pointer_at(of_leaf, *autograd), impl},
                                          {pointer_at(of_twin, *autograd), of_other}});
  if (!grad) return std::nullopt;
  leaf.attr("grad") = other;  // what was found by chance does not follow
  if (pointer_at(pointer_at(of_leaf, *autograd), *grad) != of_other) return std::nullopt;
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
inline void load_implementation(const void* impl) { load(impl, 0, 64, 128, 168); }
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

Reader::Reader(const dlpack::ExchangeApi* exchange, PyObject* grad, std::vector<PyObject*> tensors,
               size_t width)
    : exchange_(exchange), grad_(grad), width_(width) {
  if (width == 0 || tensors.size() % width != 0) {
    throw std::invalid_argument("rows of tensors must be of one width");
  }
  dlpack::Tensor view;
  for (PyObject* tensor : tensors) {  // what has no memory is refused now
    if (exchange->tensor_from_object(tensor, &view) != 0) throw py::error_already_set();
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    Py_INCREF(tensors[i]);
    (i % width == 0 ? params_ : states_).push_back(tensors[i]);
  }
  Py_INCREF(grad_);
}

Reader::~Reader() {
  for (PyObject* tensor : params_) Py_DECREF(tensor);
  for (PyObject* tensor : states_) Py_DECREF(tensor);
  Py_DECREF(grad_);
}

void Reader::bring(size_t first) const {
  const Leads* found = leads();
  if (found == nullptr) return;
  Rows rows;
  rows.width = width_ - 1;
  rows.states = states_.data() + first * rows.width;
  for (size_t r = first; r < params_.size() && rows.count < kRows; ++r, ++rows.count) {
    rows.params[rows.count] = params_[r];
    rows.dicts[rows.count] = nullptr;
  }
  ahead::bring(*found, rows);
}

size_t Reader::read(PyObject* tensor) const {
  dlpack::Tensor view;
  if (exchange_->tensor_from_object(tensor, &view) != 0) throw py::error_already_set();
  return 1;
}

size_t Reader::read() const {
  size_t count = 0;
  for (size_t r = 0; r < params_.size(); ++r) {
    if (r % kRows == 0) bring(r);
    PyObject* const param = params_[r];
    const py::object grad = py::reinterpret_steal<py::object>(
        Py_TYPE(grad_)->tp_descr_get(grad_, param, reinterpret_cast<PyObject*>(Py_TYPE(param))));
    if (!grad) throw py::error_already_set();
    if (!grad.is_none()) count += read(grad.ptr());
    count += read(param);
    for (size_t c = 0; c + 1 < width_; ++c) count += read(states_[r * (width_ - 1) + c]);
  }
  return count;
}

}  // namespace pyupdate::ahead
