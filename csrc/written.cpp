// SPDX-License-Identifier: Apache-2.0
// What a plan writes: that no byte of it is shared or outside of its storage, and how autograd
// hears of it.
#include <pybind11/cast.h>

#include <algorithm>
#include <utility>

#include "refresh.h"

namespace pyupdate {

namespace {

constexpr int64_t kBytesOfKept = 16;  // an entry of torch's list, beside the tensor itself

}  // namespace

// ----- what is written, and that none of it is shared

PyObject* Plan::written() const {
  const auto columns = static_cast<size_t>(this->columns());
  size_t count = 0;
  for (const int32_t r : active_) {
    ++count;
    for (size_t c = 0; c < columns; ++c)
      count += held_[static_cast<size_t>(r) * columns + c] != nullptr;
  }
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(count));
  if (list == nullptr) return nullptr;
  Py_ssize_t at = 0;
  const auto add = [&](PyObject* object) {
    if (object == nullptr) return;
    Py_INCREF(object);
    PyList_SET_ITEM(list, at++, object);
  };
  for (const int32_t r : active_) {
    add(records_[static_cast<size_t>(r)].param);
    for (size_t c = 0; c < columns; ++c) add(held_[static_cast<size_t>(r) * columns + c]);
  }
  return list;
}

// A new list of the parameters that are written, and more; null with a Python error.
PyObject* Plan::with_params(const py::object& more) const {
  const auto params = static_cast<Py_ssize_t>(active_.size());
  const Py_ssize_t others = PyList_GET_SIZE(more.ptr());
  PyObject* list = PyList_New(params + others);
  if (list == nullptr) return nullptr;
  const auto put = [list](Py_ssize_t at, PyObject* object) {
    Py_INCREF(object);
    PyList_SET_ITEM(list, at, object);
  };
  for (Py_ssize_t k = 0; k < params; ++k) {
    put(k, records_[static_cast<size_t>(active_[static_cast<size_t>(k)])].param);
  }
  for (Py_ssize_t i = 0; i < others; ++i) put(params + i, PyList_GET_ITEM(more.ptr(), i));
  return list;
}

int64_t Plan::itemsize(size_t k, int64_t role) const {
  const StorageType& type = kStorageTypes[storages_[static_cast<size_t>(active_[k])]];
  if (averages_ && role + 1 == tables_.width()) return type.param == kFloat64 ? 8 : 4;
  return (role < kFirstState ? type.param : type.state).bits / 8;
}

// The bytes between the first and the last element of a role.
Plan::Interval Plan::interval(size_t k, int64_t role) const {
  const Row& row = tables_.rows[k];
  const int64_t start =
      tables_.addresses[k * static_cast<size_t>(tables_.width()) + static_cast<size_t>(role)];
  const int64_t size = itemsize(k, role);
  if (row.layout < 0) return {start, start + row.size * size};
  const int64_t* layout = &tables_.layouts[static_cast<size_t>(row.layout)];
  const int64_t dims = layout[Layout::kDims];
  const int64_t* sizes = layout + Layout::kSizes;
  const int64_t* strides = sizes + dims * (1 + role);
  int64_t end = start + size;
  for (int64_t d = 0; d < dims; ++d) end += (sizes[d] - 1) * strides[d];
  return {start, end};
}

// Whether no two elements of a role share memory, as far as the strides say so plainly: each
// stride passes over everything that the smaller ones reach.
bool Plan::plainly_injective(size_t k, int64_t role) const {
  const Row& row = tables_.rows[k];
  if (row.layout < 0) return true;
  const int64_t* layout = &tables_.layouts[static_cast<size_t>(row.layout)];
  const int64_t dims = layout[Layout::kDims];
  const int64_t* sizes = layout + Layout::kSizes;
  const int64_t* strides = sizes + dims * (1 + role);
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t d = 0; d < dims; ++d) order.emplace_back(strides[d], sizes[d]);
  std::sort(order.begin(), order.end());
  int64_t reach = itemsize(k, role);
  for (const auto& [stride, size] : order) {
    if (stride < reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

// The role of a column of what is written, -1 for a scalar.
int64_t Plan::role_of(int64_t column) const {
  if (column <= states_) return column == 0 ? int64_t{kParam} : kGrad + column;
  return averages_ && column == columns() ? tables_.width() - 1 : -1;
}

Plan::Interval Plan::interval(Written written) const {
  const auto columns = static_cast<uint32_t>(this->columns() + 1);
  const size_t k = written / columns;
  const auto column = static_cast<int64_t>(written % columns);
  const int64_t role = role_of(column);
  if (role >= 0) return interval(k, role);
  const int64_t scalar = column - states_ - 2;  // -1 is the step counter
  const int64_t at =
      scalar < 0 ? tables_.rows[k].step
                 : tables_.scalars[k * static_cast<size_t>(scalars_) + static_cast<size_t>(scalar)];
  return {at & ~int64_t{1}, (at & ~int64_t{1}) + (at & 1 ? 8 : 4)};
}

// Sorts everything that is written; false if two intervals meet or one meets itself.
bool Plan::written_apart() {
  written_.clear();
  const auto columns = static_cast<uint32_t>(this->columns() + 1);
  std::vector<std::pair<Interval, Written>> sorted;
  bool apart = true;
  for (size_t k = 0; k < active_.size(); ++k) {
    for (uint32_t column = 0; column < columns; ++column) {
      if (tables_.rows[k].size == 0 && role_of(column) >= 0) continue;  // but its step is counted
      const Written written = static_cast<uint32_t>(k) * columns + column;
      const Interval at = interval(written);
      if (at.start == 0) continue;  // state that is not there yet, a rule without a counter
      if (role_of(column) >= 0) apart = apart && plainly_injective(k, role_of(column));
      sorted.emplace_back(at, written);
    }
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.first.start < b.first.start; });
  for (size_t i = 0; i < sorted.size(); ++i) {
    written_.push_back(sorted[i].second);
    apart = apart && (i == 0 || sorted[i - 1].first.end <= sorted[i].first.start);
  }
  return apart;
}

// Whether every gradient lies in a gap between what is written. Gradients mostly lie near the one
// before, so the gap that was found last is tried first.
bool Plan::grads_apart() const {
  int64_t gap_start = INT64_MAX;
  int64_t gap_end = INT64_MIN;
  for (size_t k = 0; k < active_.size(); ++k) {
    if (tables_.rows[k].size == 0) continue;
    const Interval grad = interval(k, kGrad);
    if (grad.start >= gap_start && grad.end <= gap_end) continue;
    const auto next = std::upper_bound(
        written_.begin(), written_.end(), grad.start,
        [this](int64_t start, Written written) { return start < interval(written).start; });
    gap_start = next == written_.begin() ? INT64_MIN : interval(next[-1]).end;
    gap_end = next == written_.end() ? INT64_MAX : interval(*next).start;
    if (grad.start < gap_start || grad.end > gap_end) return false;
  }
  return true;
}

// Whether nothing that one of several plans writes is written or read by another one, as far as
// their extents say so. Each plan was refreshed, and found right by itself.
bool Plan::apart(const std::vector<const Plan*>& plans) {
  std::vector<Interval> all;
  const auto before = [](const Interval& a, const Interval& b) { return a.start < b.start; };
  for (const Plan* plan : plans) {
    const auto middle = static_cast<std::ptrdiff_t>(all.size());
    for (const Written written : plan->written_) all.push_back(plan->interval(written));
    std::inplace_merge(all.begin(), all.begin() + middle, all.end(), before);
  }
  for (size_t i = 1; i < all.size(); ++i) {
    if (all[i - 1].end > all[i].start) return false;
  }
  for (const Plan* plan : plans) {
    Interval gap{INT64_MAX, INT64_MIN};
    for (size_t k = 0; k < plan->active_.size(); ++k) {
      if (plan->tables_.rows[k].size == 0) continue;
      const Interval grad = plan->interval(k, kGrad);
      if (grad.start >= gap.start && grad.end <= gap.end) continue;
      const auto next = std::upper_bound(all.begin(), all.end(), grad, before);
      gap.start = next == all.begin() ? INT64_MIN : next[-1].end;
      gap.end = next == all.end() ? INT64_MAX : next->start;
      if (grad.start < gap.start || grad.end > gap.end) return false;
    }
  }
  return true;
}

// Whether a tensor's elements are in its storage: if that is resized, tensors stay as they are.
bool Plan::lies_within(PyObject* tensor, const Read& read) {
  const dlpack::Tensor& t = read.tensor;
  int64_t reach = 1;
  for (int32_t d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return true;
    reach += (t.shape[d] - 1) * t.strides[d];
  }
  try {
    const py::handle asked(tensor);
    const auto offset = asked.attr("storage_offset")().cast<int64_t>();
    const auto bytes = asked.attr("untyped_storage")().attr("nbytes")().cast<int64_t>();
    return (offset + reach) * (t.dtype.bits / 8) <= bytes;
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // KeyboardInterrupt
    return false;
  } catch (const py::cast_error&) {
    return false;
  }
}

// The same of all that a row writes. A storage that is resized mostly moves, so this is asked again
// where something has moved, and of a large row at every step.
bool Plan::all_lie_within(const Pending& row, uint32_t present, const int64_t* addresses) {
  uint64_t where = 1;
  mix(&where, static_cast<uint64_t>(size_of(row.roles[kParam].tensor)) << 3 |
                  static_cast<uint64_t>(row.storage));
  for (int64_t role = 0; role < tables_.width(); ++role) {
    if (role != kGrad) mix(&where, static_cast<uint64_t>(addresses[role]));
  }
  const auto hash = static_cast<uint32_t>(where >> 32) | 1u;
  if (within_[row.r] == hash && size_of(row.roles[kParam].tensor) < kAskedAnew) return true;
  for (int64_t role = 0; role < tables_.width(); ++role) {
    if (role == kGrad || (present >> role & 1u) == 0) continue;
    const bool average = averages_ && role + 1 == tables_.width();
    PyObject* tensor = role == kParam ? records_[row.r].param
                                      : row.found[average ? columns() - 1 : role - kFirstState];
    if (!lies_within(tensor, row.roles[role])) return false;
  }
  within_[row.r] = hash;
  return true;
}

uint64_t Plan::fingerprint() const {
  uint64_t hash = 1;
  for (const Row& row : tables_.rows) {
    mix(&hash, static_cast<uint64_t>(row.size));
    mix(&hash, static_cast<uint64_t>(row.step));
    mix(&hash, static_cast<uint64_t>(row.layout));
  }
  for (const int64_t address : tables_.addresses) mix(&hash, static_cast<uint64_t>(address));
  for (const int64_t scalar : tables_.scalars) mix(&hash, static_cast<uint64_t>(scalar));
  for (const int32_t r : active_) mix(&hash, storages_[static_cast<size_t>(r)]);
  for (const int64_t entry : tables_.layouts) mix(&hash, static_cast<uint64_t>(entry));
  return hash == 0 ? 1 : hash;
}

int64_t Plan::bytes() const {
  const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
  return static_cast<int64_t>(sizeof(Plan)) + of(groups_) + of(records_) + of(storages_) +
         of(held_) + of(within_) + of(histories_) + of(active_) + of(grads_) + of(written_) +
         of(noticed_) + of(positions_) + of(group_ends_) + tables_.bytes() +
         (kept_ ? kept_count_ * kBytesOfKept : 0) +
         (bumped_ ? PyList_GET_SIZE(bumped_.ptr()) * int64_t{sizeof(PyObject*)} : 0);
}

// ----- version counters

// What is found out once, after a first step with these tensors, to make the next ones cheap.
void Plan::settle() {
  if (settled_) return;
  settled_ = true;
  find_shared_counters();
  if (interface_.tensor_list == Py_None) return;
  // A tensor that only Python refers to pays a reference transition whenever C++ looks at it: 38 ns
  // a look instead of 18. One list of torch's refers to all of the state. Not to the parameters:
  // a hook of theirs may lead back here, and Python's garbage collector cannot see through the
  // list.
  py::list states;
  const auto columns = static_cast<size_t>(this->columns());
  for (const int32_t r : active_) {
    for (size_t c = 0; c < columns; ++c) {
      if (PyObject* object = held_[static_cast<size_t>(r) * columns + c]) {
        states.append(py::handle(object));
      }
    }
  }
  if (states.empty()) return;
  kept_ =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(interface_.tensor_list, states.ptr()));
  if (!kept_) throw py::error_already_set();
  kept_count_ = static_cast<int64_t>(states.size());
}

// State that pyupdate makes shares one version counter (pytorch/rows.py), so one bump serves all of
// it. Which tensors share is seen by bumping one and looking which counters moved.
void Plan::find_shared_counters() {
  constexpr int kCounters = 8;  // two for each of so many first steps as may have made the state
  bumped_ = py::object();
  const auto columns = static_cast<size_t>(this->columns());
  std::vector<PyObject*> open;
  for (const int32_t r : active_) {
    for (size_t c = 0; c < columns; ++c) {
      if (PyObject* object = held_[static_cast<size_t>(r) * columns + c]) open.push_back(object);
    }
  }
  py::list bumped;
  for (int turn = 0; turn < kCounters && !open.empty(); ++turn) {
    py::list one;
    one.append(py::handle(open[0]));
    std::vector<int64_t> before;
    for (PyObject* object : open) before.push_back(version(object));
    if (!py::reinterpret_steal<py::object>(
            PyObject_CallOneArg(interface_.increment_version, one.ptr()))) {
      throw py::error_already_set();
    }
    std::vector<PyObject*> rest;
    for (size_t i = 0; i < open.size(); ++i) {
      if (version(open[i]) == before[i]) rest.push_back(open[i]);
    }
    if (rest.size() == open.size()) return;  // inference tensors count nothing
    bumped.append(py::handle(open[0]));
    open.swap(rest);
  }
  if (open.empty()) bumped_ = std::move(bumped);
}

int64_t Plan::version(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!value) PyErr_Clear();
  return value ? PyLong_AsLongLong(value.ptr()) : -1;
}

// What to bump: the parameters and one tensor a shared counter, or all that is written; null with a
// Python error. Made for the step: kept, it would be 8 bytes a tensor.
py::object Plan::to_bump() const {
  const auto list = py::reinterpret_steal<py::object>(bumped_ ? with_params(bumped_) : written());
  if (list && leads_ != nullptr) {
    const auto count = static_cast<size_t>(PyList_GET_SIZE(list.ptr()));
    ahead::bring_versions(*leads_, PySequence_Fast_ITEMS(list.ptr()), count);
  }
  return list;
}

// ----- what Python's garbage collector may see

int Plan::traverse(visitproc visit, void* arg) const {
  for (const Record& record : records_) Py_VISIT(record.param);
  for (PyObject* object : held_) Py_VISIT(object);
  if (grads_owned_) {
    for (PyObject* grad : grads_) Py_VISIT(grad);
  }
  Py_VISIT(bumped_.ptr());
  return 0;
}

// Leaves a plan of no rows.
void Plan::clear() {
  release_grads();
  std::vector<PyObject*> objects;
  objects.swap(held_);
  for (const Record& record : records_) objects.push_back(record.param);
  records_.clear();
  within_.clear();
  active_.clear();
  group_ends_.assign(groups_.size(), 0);
  tables_.clear_rows();
  watched_.clear();
  kept_ = bumped_ = py::object();
  for (PyObject* object : objects) Py_XDECREF(object);
}

}  // namespace pyupdate
