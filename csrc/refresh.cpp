// SPDX-License-Identifier: Apache-2.0
// One refresh of a plan: which rows have a gradient, what their hypers are, and whether it is
// plainly right. rows.cpp reads the tensors, written.cpp looks at memory. The GIL is held
// throughout.
#include "refresh.h"

#include <pybind11/cast.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <utility>

#include "ahead.h"
#include "cpu/parallel.h"

namespace pyupdate {

Plan::Plan(Interface interface, std::vector<GroupRule> groups, std::vector<PyObject*> params,
           std::vector<int64_t> storages, std::vector<int32_t> group_of,
           std::vector<int32_t> positions, bool averages)
    : interface_(std::move(interface)),
      groups_(std::move(groups)),
      averages_(averages),
      tables_(0) {
  size_t states = 0, scalars = 0;
  for (const GroupRule& group : groups_) {
    states = std::max(states, group.state_keys.size());
    scalars = std::max(scalars, group.scalar_keys.size());
    for (PyObject* key : group.state_keys) Py_INCREF(key);
    for (PyObject* key : group.scalar_keys) Py_INCREF(key);
  }
  states_ = static_cast<int64_t>(states);
  scalars_ = static_cast<int64_t>(scalars);
  tables_ = cpu::Tables(kFirstState + states_ + (averages ? 1 : 0), scalars_, averages);
  const size_t rows = params.size();
  records_.reserve(rows);
  storages_.reserve(rows);
  for (size_t r = 0; r < rows; ++r) {
    Py_INCREF(params[r]);
    records_.push_back({params[r], -1});
    storages_.push_back(static_cast<uint8_t>(storages[r]));
  }
  leads_ = ahead::leads();
  if (interface_.remote) histories_.assign(rows, kFresh);
  group_ends_.assign(groups_.size(), 0);
  bool whole = true;
  for (size_t r = 0; r < rows; ++r) {
    const auto g = static_cast<size_t>(group_of[r]);
    const int32_t start = g == 0 ? 0 : group_ends_[g - 1];
    whole = whole && positions[r] == static_cast<int32_t>(r) - start;
    for (size_t later = g; later < groups_.size(); ++later) {
      group_ends_[later] = static_cast<int32_t>(r) + 1;
    }
  }
  if (!whole) positions_ = positions;
  held_.assign(rows * static_cast<size_t>(columns()), nullptr);
  within_.assign(rows, 0);
  active_.reserve(rows);
  tables_.rows.reserve(rows);
  tables_.addresses.reserve(rows * static_cast<size_t>(tables_.width()));
  grads_.reserve(rows);
  tables_.scalars.reserve(rows * scalars);
  written_.reserve(rows * static_cast<size_t>(columns() + 1));
  Py_INCREF(interface_.grad);
  Py_INCREF(interface_.is_neg);
  Py_INCREF(interface_.increment_version);
  Py_INCREF(interface_.tensor_list);
  for (PyTypeObject* type : interface_.types) Py_INCREF(type);
}

Plan::~Plan() {
  for (Record& record : records_) Py_DECREF(record.param);
  for (PyObject* object : held_) Py_XDECREF(object);
  release_grads();
  for (const GroupRule& group : groups_) {
    for (PyObject* key : group.state_keys) Py_DECREF(key);
    for (PyObject* key : group.scalar_keys) Py_DECREF(key);
  }
  Py_DECREF(interface_.grad);
  Py_DECREF(interface_.is_neg);
  Py_DECREF(interface_.increment_version);
  Py_DECREF(interface_.tensor_list);
  for (PyTypeObject* type : interface_.types) Py_DECREF(type);
}

// The gradients are the user's to free; what stays of them is which objects they were.
void Plan::release_grads() {
  if (!grads_owned_) return;
  // What is freed here may have Python called back, which may step this plan or collect garbage.
  grads_owned_ = false;
  const std::vector<PyObject*> owned = grads_;
  for (PyObject* grad : owned) Py_XDECREF(grad);
}

GradientsHeld::~GradientsHeld() { plan_.release_grads(); }

// ----- the whole plan

Found Plan::refresh(PyObject* groups, PyObject* state,
                    const std::vector<std::vector<double>>& numbers) {
  if (interface_.remote) part_written_counts();
  const auto start_anew = [this] {  // what is half read
    active_.clear();
    tables_.clear_rows();
  };
  Found found;
  try {
    found = read_rows(groups, state, numbers);
  } catch (...) {
    start_anew();
    throw;
  }
  if (found != Found::kReady && found != Found::kFresh) {
    start_anew();
    return found;
  }
  if (rows_changed_) {
    tables_.cut();
    settled_ = false;
  }
  if (!settled_) kept_ = bumped_ = py::object();
  if (written_moved_) written_apart_ = written_apart();
  if (written_moved_ || grads_moved_) grads_apart_ = grads_apart();
  if (!(written_apart_ && grads_apart_) && fingerprint() != vouched_) return Found::kOverlap;
  made_ = false;
  if (interface_.remote) {
    fill_sources(numbers);
  } else {
    fill_hypers(numbers);
  }
  return found;
}

Found Plan::read_rows(PyObject* groups, PyObject* state,
                      const std::vector<std::vector<double>>& numbers) {
  std::vector<int64_t>().swap(noticed_);  // a first step notices every row
  tables_.layouts.clear();
  rows_changed_ = written_moved_ = grads_moved_ = active_.empty();
  release_grads();
  std::vector<PyObject*> grads_before = std::move(grads_);  // not owned: addresses to compare with
  grads_.clear();
  grads_.reserve(records_.size());
  grads_owned_ = true;

  std::vector<py::object> lists;  // owned: an allocation may run a finalizer, which may do anything
  uint64_t listed = 1;
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  if (PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) return Found::kStale;
  if (numbers.size() != groups_.size()) return Found::kStale;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const auto wanted = static_cast<size_t>(groups_[g].numbers);
    if (!groups_[g].idle && numbers[g].size() != wanted) return Found::kStale;
  }
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, params_key) : nullptr;
    if (list == nullptr || !PyList_Check(list)) return Found::kStale;
    lists.push_back(py::reinterpret_borrow<py::object>(list));
    mix(&listed, static_cast<uint64_t>(PyList_GET_SIZE(list)));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      mix(&listed, reinterpret_cast<uint64_t>(PyList_GET_ITEM(list, i)));
    }
  }
  // Also what is none of the plan's rows: a parameter that was put into a group by hand.
  if (listed_ == 0) listed_ = listed;
  if (listed_ != listed) return Found::kStale;

  // The state's order is mostly that of the rows, so it is walked beside them instead of hashed.
  Py_ssize_t walk = 0;
  py::object key, value;
  const auto walk_on = [&] {
    PyObject *next_key = nullptr, *next_value = nullptr;
    PyDict_Next(state, &walk, &next_key, &next_value);
    key = py::reinterpret_borrow<py::object>(next_key);
    value = py::reinterpret_borrow<py::object>(next_value);
  };
  walk_on();
  ahead::Walk dicts(state);
  struct Block {
    Pending rows[ahead::kRows];
    size_t count = 0;
    void release() {
      for (size_t i = 0; i < count; ++i) rows[i].release();
      count = 0;
    }
    ~Block() { release(); }
  } block;
  entered_ = 0;
  size_t g = 0;
  for (size_t r = 0; r < records_.size(); ++r) {
    const Record& record = records_[r];
    if (r % ahead::kRows == 0) bring(r, &dicts);
    while (static_cast<int32_t>(r) >= group_ends_[g]) ++g;
    const int32_t start = g == 0 ? 0 : group_ends_[g - 1];
    const Py_ssize_t position =
        positions_.empty() ? static_cast<Py_ssize_t>(r) - start : positions_[r];
    if (position >= PyList_GET_SIZE(lists[g].ptr()) ||
        PyList_GET_ITEM(lists[g].ptr(), position) != record.param) {
      return Found::kStale;
    }
    py::object inner;
    if (key.ptr() == record.param) {
      inner = std::move(value);
      walk_on();
    } else {
      inner = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(state, record.param));
      // A tensor's hash is made by Python, where a signal may raise.
      if (!inner && PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
    if (inner && !PyDict_Check(inner.ptr())) inner = py::object();
    PyObject* grad = gradient(record.param);
    if (grad == Py_None) {
      Py_DECREF(grad);
      continue;
    }
    if (grad == nullptr) {
      PyErr_Clear();
      noticed_.assign(1, static_cast<int64_t>(r));
      return Found::kSuspect;
    }
    const size_t k = grads_.size();
    const bool known = k < grads_before.size() && grads_before[k] == grad;
    grads_.push_back(grad);
    Pending& row = block.rows[block.count++];
    row.r = r;
    row.g = g;
    row.grad = grad;
    row.known_grad = known;
    row.inner = std::move(inner);
    std::fill(std::begin(row.found), std::end(row.found), nullptr);
    row.present = 0;
    row.step = 0;
    std::fill(std::begin(row.scalars), std::end(row.scalars), 0);
    if (block.count == ahead::kRows) {
      if (!read_block(block.rows, block.count)) return Found::kSuspect;
      block.release();
    }
  }
  if (!read_block(block.rows, block.count)) return Found::kSuspect;
  block.release();
  if (entered_ < tables_.rows.size()) drop_rows_from(entered_);
  return noticed_.empty() ? Found::kReady : Found::kFresh;
}

// The objects of the rows from `first` on, which are read next.
void Plan::bring(size_t first, ahead::Walk* dicts) const {
  if (leads_ == nullptr) return;
  ahead::Rows rows;
  rows.width = static_cast<size_t>(columns());
  rows.states = &held_[first * rows.width];
  for (size_t r = first; r < records_.size() && rows.count < ahead::kRows; ++r, ++rows.count) {
    rows.params[rows.count] = records_[r].param;
    rows.dicts[rows.count] = dicts->next();
  }
  ahead::bring(*leads_, rows);
}

void Plan::drop_rows_from(size_t k) {
  rows_changed_ = written_moved_ = grads_moved_ = true;
  tables_.rows.resize(k);
  tables_.addresses.resize(k * static_cast<size_t>(tables_.width()));
  tables_.scalars.resize(k * static_cast<size_t>(scalars_));
  active_.resize(k);
}

void Plan::fill_hypers(const std::vector<std::vector<double>>& numbers) {
  struct Key {
    int64_t group = -1, storage = -1, step = -1;
    std::array<int64_t, kMaxScalars> counted = {};  // the bits of their values
    auto operator<=>(const Key&) const = default;
  };
  const cpu::ContractMode mode;  // a subnormal scalar is none where the user flushes them
  std::map<Key, int32_t> known;
  Key last;
  size_t group = 0;
  int32_t index = -1;
  tables_.hyper_rows.clear();
  tables_.hypers.clear();
  for (size_t k = 0; k < active_.size(); ++k) {
    const auto r = static_cast<size_t>(active_[k]);
    while (static_cast<int32_t>(r) >= group_ends_[group]) ++group;
    Key key{static_cast<int64_t>(group), storages_[r], records_[r].counter + 1};
    double counted[kMaxScalars] = {};
    for (int i = 0; i < groups_[group].counted; ++i) {
      const int64_t at = tables_.scalars[k * static_cast<size_t>(scalars_) + i];
      // State that is not there yet: the hypers are made again when it is.
      counted[i] = at == 0 ? 0.0 : load_scalar(at);
      std::memcpy(&key.counted[i], &counted[i], sizeof(double));
    }
    if (key != last) {
      const auto [place, is_new] =
          known.try_emplace(key, static_cast<int32_t>(tables_.hyper_rows.size()));
      last = key;
      index = place->second;
      if (is_new) add_hyper_row(key.group, key.storage, key.step, counted, numbers);
    }
    tables_.rows[k].hyper = index;
  }
}

void Plan::add_hyper_row(int64_t group, int64_t storage, int64_t step, const double* counted,
                         const std::vector<std::vector<double>>& numbers) {
  const GroupRule& rule = groups_[static_cast<size_t>(group)];
  const auto hypers = static_cast<size_t>(rule.hypers + rule.counted);
  std::vector<double> number = numbers[static_cast<size_t>(group)];
  const double sign = number[0];
  number[0] = static_cast<double>(step);
  number.insert(number.end(), counted, counted + rule.counted);
  const size_t offset = tables_.hypers.size();
  tables_.hypers.resize(offset + hypers);
  rule.prepare(number.data(), &tables_.hypers[offset]);
  tables_.hyper_rows.push_back({rule.rule, storage, static_cast<int64_t>(offset), step, sign});
}

// Says which parameter each row is, for rounding by chance.
void Plan::identify() {
  tables_.identities.clear();
  size_t group = 0;
  for (const int32_t r : active_) {
    while (r >= group_ends_[group]) ++group;
    const int32_t start = group == 0 ? 0 : group_ends_[group - 1];
    const int64_t position = positions_.empty() ? r - start : positions_[static_cast<size_t>(r)];
    tables_.identities.push_back(static_cast<int64_t>(group) << 32 | position);
  }
}

std::vector<int64_t> Plan::kinds() const {
  std::vector<int64_t> found;
  size_t group = 0;
  for (size_t r = 0; r < records_.size(); ++r) {
    while (static_cast<int32_t>(r) >= group_ends_[group]) ++group;
    found.push_back(groups_[group].rule * cpu::kStorages + storages_[r]);
  }
  return found;
}

void Plan::count_step() {
  ++serial_;
  for (const int32_t r : active_) {
    ++records_[static_cast<size_t>(r)].counter;
    if (interface_.remote) mix(&histories_[static_cast<size_t>(r)], serial_);
  }
}

// ----- questions that a row is asked

// Whether the last refresh found this role of the row at this address.
bool Plan::stands_at(size_t r, size_t k, int64_t role, int64_t address) const {
  const auto width = static_cast<size_t>(tables_.width());
  return !rows_changed_ && k < tables_.rows.size() && active_[k] == static_cast<int32_t>(r) &&
         tables_.addresses[k * width + static_cast<size_t>(role)] == address;
}

// A lazily negated view has the bytes of its opposite.
bool Plan::is_negated(PyObject* tensor) const {
  PyObject* negated = PyObject_CallOneArg(interface_.is_neg, tensor);
  if (negated == nullptr) throw py::error_already_set();
  Py_DECREF(negated);
  return negated != Py_False;
}

bool Plan::any_negated(PyObject* const* tensors, size_t count) const {
  std::vector<py::object> kept;  // asking lets go of the GIL
  for (size_t i = 0; i < count; ++i) kept.push_back(py::reinterpret_borrow<py::object>(tensors[i]));
  return std::any_of(kept.begin(), kept.end(), [this](const py::object& tensor) {
    return tensor && is_negated(tensor.ptr());
  });
}

}  // namespace pyupdate
