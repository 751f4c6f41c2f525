// SPDX-License-Identifier: Apache-2.0
// Reads the tensors of some rows through torch's DLPack C exchange API and enters them in the
// tables.
//
// Measured (torch 2.13, EPYC): a call of the exchange API takes 18 ns for a tensor that C++ holds
// beside Python, 38 ns for one that only Python holds (a reference transition); `.grad` 43 ns as an
// attribute, less through its descriptor. So the order here is: one read per tensor, no Python
// frame.
#include <algorithm>
#include <cmath>

#include "refresh.h"

namespace pyupdate {

namespace {

bool lies_on(const dlpack::Device& device, const dlpack::Tensor& t) {
  if (device.type == dlpack::kCpu) {
    return t.device.type == dlpack::kCpu || t.device.type == dlpack::kCudaHost;
  }
  return t.device.type == device.type && t.device.id == device.id;
}

bool is_contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1) {
      if (t.strides[d] != expected) return false;
      expected *= t.shape[d];
    }
  }
  return true;
}

// Of a few elements: std::equal calls memcmp, which takes longer than they do.
template <class T>
bool same(const T* a, const T* b, size_t count) {
  bool all = true;
  for (size_t i = 0; i < count; ++i) all &= a[i] == b[i];
  return all;
}

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && same(a.shape, b.shape, static_cast<size_t>(a.ndim));
}

DataType type_of(const dlpack::Tensor& t) { return {t.dtype.code, t.dtype.bits}; }

// The storage of parameters like those of `storage` and of state of another dtype, -1 if none is.
int64_t storage_with(int64_t storage, DataType state) {
  for (int64_t other = 0; other < cpu::kStorages; ++other) {
    if (kStorageTypes[other].param == kStorageTypes[storage].param &&
        kStorageTypes[other].state == state) {
      return other;
    }
  }
  return -1;
}

void hold(PyObject** place, PyObject* object) {
  Py_XINCREF(object);
  PyObject* before = *place;
  *place = object;
  Py_XDECREF(before);
}

}  // namespace

// ----- one tensor

bool Plan::read(PyObject* object, Read* out) const {
  const auto& types = interface_.types;
  if (std::find(types.begin(), types.end(), Py_TYPE(object)) == types.end()) return false;
  if (interface_.exchange->tensor_from_object(object, &out->tensor) != 0) {
    PyErr_Clear();  // sparse, quantised, meta, nested: Python will say which
    return false;
  }
  const dlpack::Tensor& t = out->tensor;
  if (t.dtype.lanes != 1) return false;
  if (!lies_on(interface_.device, t) || (t.strides == nullptr && t.ndim != 0)) return false;
  out->address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
  out->contiguous = is_contiguous(t);
  return t.data != nullptr || size_of(t) == 0;
}

bool Plan::read(PyObject* object, DataType type, Read* out) const {
  return read(object, out) && type_of(out->tensor) == type;
}

// The first state decides which storage the row has; the others must be of its dtype.
bool Plan::read_state(size_t s, Pending* row) const {
  Read& out = row->roles[kFirstState + s];
  if (!read(row->found[s], &out)) return false;
  if (s == 0) row->storage = storage_with(row->storage, type_of(out.tensor));
  return row->storage >= 0 && type_of(out.tensor) == kStorageTypes[row->storage].state;
}

// Through the descriptor: an attribute look-up would walk the type's bases first.
PyObject* Plan::gradient(PyObject* param) const {
  return Py_TYPE(interface_.grad)
      ->tp_descr_get(interface_.grad, param, reinterpret_cast<PyObject*>(Py_TYPE(param)));
}

// Torch keeps a scalar as a tensor of one fp32 (fp64 under that default dtype).
bool Plan::read_scalar(PyObject* scalar, int64_t* tagged) const {
  Read at;
  if (!read(scalar, &at)) return false;
  const bool is_double = type_of(at.tensor) == kFloat64;
  if (!is_double && !(type_of(at.tensor) == kFloat32)) return false;
  const size_t itemsize = is_double ? sizeof(double) : sizeof(float);
  if (size_of(at.tensor) != 1 || at.address % static_cast<int64_t>(itemsize) != 0) return false;
  *tagged = at.address | (is_double ? 1 : 0);
  return true;
}

// The plan's own step count is exact beyond 2^24; it is taken from torch's wherever the two
// disagree.
bool Plan::read_step(size_t r, PyObject* step, int64_t* tagged) {
  if (!read_scalar(step, tagged)) return false;
  if (interface_.remote) return true;
  const bool is_double = (*tagged & 1) != 0;
  const double value = load_scalar(*tagged);
  int64_t& counter = records_[r].counter;
  const double counted =
      is_double ? static_cast<double>(counter) : static_cast<double>(static_cast<float>(counter));
  if (value != counted || counter < 0) {  // -1 is nobody's count, but stands before the first one
    if (!(value >= 0.0 && value < 0x1p53) || value != std::floor(value)) return false;
    counter = static_cast<int64_t>(value);
  }
  return true;
}

// ----- one row

// Finds the state of a parameter in its dict: states, then at states_ the step counter and behind
// it the scalars. The dict is walked in torch's order of making it (the counter first, then
// scalars); only another order is looked up.
size_t Plan::find_state(PyObject* inner, const GroupRule& group, PyObject** found) const {
  static PyObject* const step_key = PyUnicode_InternFromString("step");
  const size_t states = group.state_keys.size();
  const size_t scalars = group.scalar_keys.size();
  const auto counter = static_cast<size_t>(states_);
  Py_ssize_t walk = 0;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  size_t present = 0;
  for (size_t turn = group.has_step ? 0 : 1; turn <= scalars + states; ++turn) {
    PyObject* const expected = turn == 0         ? step_key
                               : turn <= scalars ? group.scalar_keys[turn - 1]
                                                 : group.state_keys[turn - 1 - scalars];
    if (!PyDict_Next(inner, &walk, &key, &value) || key != expected) {
      value = PyDict_GetItemWithError(inner, expected);
      if (value == nullptr) PyErr_Clear();
    }
    if (value == nullptr || value == Py_None) continue;
    found[turn <= scalars ? counter + turn : turn - 1 - scalars] = value;
    ++present;
  }
  if (averages_) {  // put there last; a rule's state counts without it
    static PyObject* const average_key = PyUnicode_InternFromString("ema");
    if (!PyDict_Next(inner, &walk, &key, &value) || key != average_key) {
      value = PyDict_GetItemWithError(inner, average_key);
      if (value == nullptr) PyErr_Clear();
    }
    if (value != Py_None) found[columns() - 1] = value;
  }
  return present;
}

void Plan::Pending::release() {
  for (PyObject*& value : found) Py_CLEAR(value);
  inner = py::object();
}

// Reads some rows column by column: tensors of one kind were mostly made one after the other, so
// the processor fetches the next one by itself (1,000 rows of AdamW that are not in the cache: 1.2
// ms row by row). False at the first row that is not plainly right, which is then noticed.
bool Plan::read_block(Pending* block, size_t count) {
  const auto all = [&](const auto& check) {
    for (size_t i = 0; i < count; ++i) {
      if (check(block[i])) continue;
      PyErr_Clear();
      noticed_.assign(1, static_cast<int64_t>(block[i].r));
      return false;
    }
    return true;
  };
  const auto rule = [&](const Pending& row) -> const GroupRule& { return groups_[row.g]; };
  const auto wanted = [&](const Pending& row) {
    return rule(row).state_keys.size() + rule(row).scalar_keys.size() +
           (rule(row).has_step ? 1 : 0);
  };
  if (!all([&](Pending& row) {
        const DataType type = kStorageTypes[storages_[row.r]].param;
        row.storage = storage_with(storages_[row.r], type);  // own-type state, if there is none
        return read(records_[row.r].param, type, &row.roles[kParam]);
      }) ||
      !all([&](Pending& row) {
        return read(row.grad, kStorageTypes[row.storage].param, &row.roles[kGrad]);
      }) ||
      // The state: all of it there, or none of it.
      !all([&](Pending& row) {
        if (row.inner) row.present = find_state(row.inner.ptr(), rule(row), row.found);
        for (PyObject* value : row.found) Py_XINCREF(value);
        return row.present == 0 || row.present == wanted(row);
      })) {
    return false;
  }
  for (size_t s = 0; s < static_cast<size_t>(states_); ++s) {
    if (!all([&](Pending& row) {
          if (row.present == 0 || s >= rule(row).state_keys.size()) return true;
          return read_state(s, &row);
        })) {
      return false;
    }
  }
  const auto average = static_cast<size_t>(columns() - 1);
  return all([&](Pending& row) {
           if (!averages_ || row.found[average] == nullptr) return true;
           const bool wide = kStorageTypes[row.storage].param == kFloat64;
           Read& out = row.roles[tables_.width() - 1];
           return read(row.found[average], wide ? kFloat64 : kFloat32, &out);
         }) &&
         all([&](Pending& row) {
           if (row.present == 0 || !rule(row).has_step) return true;
           return read_step(row.r, row.found[states_], &row.step);
         }) &&
         all([&](Pending& row) {
           if (row.present == 0) return true;
           for (size_t s = 0; s < rule(row).scalar_keys.size(); ++s) {
             PyObject* scalar = row.found[static_cast<size_t>(states_) + 1 + s];
             if (!read_scalar(scalar, &row.scalars[s])) return false;
           }
           return true;
         }) &&
         all([&](Pending& row) {
           const bool lacks = averages_ && row.found[average] == nullptr;
           if (lacks || row.present != wanted(row)) noticed_.push_back(static_cast<int64_t>(row.r));
           return enter_row(row);
         });
}

// Compares what was read of a row with what stands in the tables, and writes it there.
bool Plan::enter_row(Pending& pending) {
  const size_t r = pending.r;
  const size_t k = entered_++;
  Record& record = records_[r];
  const GroupRule& group = groups_[pending.g];
  const size_t states = group.state_keys.size();
  const auto columns = static_cast<size_t>(this->columns());
  PyObject** held = &held_[r * columns];
  PyObject* const* found = pending.found;
  const Read* roles = pending.roles;
  const bool fresh =
      pending.present != states + group.scalar_keys.size() + (group.has_step ? 1 : 0);
  const bool moved =
      !same(found, held, states) || (averages_ && found[columns - 1] != held[columns - 1]);
  if (moved && any_negated(found, columns)) return false;
  if (interface_.remote) note_history(r, group, found);
  for (size_t s = 0; s < states; ++s) {
    if (found[s] != held[s]) {
      // A rule without torch's counter knows its first step by the buffer that was not there.
      if (!group.has_step && !(held[s] == nullptr && record.counter == 0)) {
        record.counter = found[s] == nullptr ? 0 : 1;
      }
      hold(&held[s], found[s]);
      settled_ = false;
    }
  }
  for (auto s = static_cast<size_t>(states_); s < columns; ++s) {
    if (found[s] != held[s]) {
      hold(&held[s], found[s]);
      settled_ = false;
    }
  }
  if (record.counter < 0 || (fresh && group.has_step)) record.counter = 0;

  Row row{size_of(roles[kParam].tensor), 0, pending.step, 0, -1};
  // 64 ns a question, so it is asked where the answer may be new. A public torch call makes a
  // negated view of every second element, and a dense one only of such a view; so what is dense,
  // known and where it was needs no asking.
  const bool plain = pending.known_grad && roles[kGrad].contiguous && row.size > 1 &&
                     stands_at(r, k, kGrad, roles[kGrad].address);
  if (!plain && is_negated(pending.grad)) return false;
  if ((!roles[kParam].contiguous || !stands_at(r, k, kParam, roles[kParam].address)) &&
      is_negated(record.param)) {
    return false;
  }
  const int64_t count = kFirstState + (fresh ? 0 : static_cast<int64_t>(states));
  const int64_t width = tables_.width();
  uint32_t present = (1u << count) - 1u;  // bit k: role k
  if (averages_ && found[columns - 1] != nullptr) present |= 1u << (width - 1);
  bool flat = true;
  for (int64_t role = 0; role < width; ++role) {
    if ((present >> role & 1u) == 0) continue;
    if (!same_shape(roles[kParam].tensor, roles[role].tensor)) return false;
    flat = flat && roles[role].contiguous;
  }
  if (storages_[r] != pending.storage) {
    storages_[r] = static_cast<uint8_t>(pending.storage);
    written_moved_ = true;  // the same addresses may reach further
  }
  int64_t addresses[kMaxRoles] = {};
  for (int64_t role = 0; role < width; ++role) {
    if ((present >> role & 1u) == 0) continue;
    addresses[role] = roles[role].address;
    flat = flat && roles[role].address % (roles[role].tensor.dtype.bits / 8) == 0;
  }
  if (!all_lie_within(pending, present, addresses)) return false;
  if (!flat && row.size != 0 && !add_layout(roles, present, &row)) return false;
  if (interface_.remote && row.layout >= 0) return false;
  const bool is_new = rows_changed_ || k >= tables_.rows.size() ||
                      tables_.rows[k].size != row.size || active_[k] != static_cast<int32_t>(r);
  // A small gradient that autograd has just made is taken to be within its storage.
  const bool moves =
      is_new || tables_.addresses[k * static_cast<size_t>(width) + kGrad] != addresses[kGrad];
  if (((moves && pending.known_grad) || row.size >= kAskedAnew) &&
      !lies_within(pending.grad, roles[kGrad])) {
    return false;
  }
  if (is_new) {
    if (!rows_changed_) drop_rows_from(k);  // the rest of the table is written anew
    tables_.add_row(row, addresses, pending.scalars);
    active_.push_back(static_cast<int32_t>(r));
    return true;
  }
  Row& stands = tables_.rows[k];
  int64_t* at = &tables_.addresses[k * static_cast<size_t>(width)];
  grads_moved_ = grads_moved_ || moves;
  addresses[kGrad] = at[kGrad] = roles[kGrad].address;
  if (stands.step != row.step || !same(at, addresses, static_cast<size_t>(width))) {
    written_moved_ = true;
    std::copy_n(addresses, width, at);
  }
  const auto scalars = static_cast<size_t>(scalars_);
  if (scalars > 0) {
    int64_t* stand = &tables_.scalars[k * scalars];
    written_moved_ = written_moved_ || !same(stand, pending.scalars, scalars);
    std::copy_n(pending.scalars, scalars, stand);
  }
  stands.step = row.step;
  stands.layout = row.layout;
  return true;
}

// The dims of the parameter from the slowest to the fastest, for all roles. Rows whose roles all
// have the parameter's dense strides need none: their memory order is the same.
bool Plan::add_layout(const Read* roles, uint32_t present, Row* row) {
  const dlpack::Tensor& param = roles[kParam].tensor;
  int32_t order[64];
  int64_t dims = 0;
  if (param.ndim > 64) return false;
  for (int32_t d = 0; d < param.ndim; ++d) {
    if (param.shape[d] != 1) order[dims++] = d;
  }
  std::stable_sort(order, order + dims,
                   [&](int32_t a, int32_t b) { return param.strides[a] > param.strides[b]; });
  bool alike = true;
  int64_t dense = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int32_t d = order[i];
    alike = alike && param.strides[d] == dense;
    dense *= param.shape[d];
    for (int64_t role = 1; role < tables_.width(); ++role) {
      if ((present >> role & 1u) == 0) continue;
      alike = alike && roles[role].tensor.strides[d] == param.strides[d];
    }
  }
  for (int64_t role = 0; role < tables_.width(); ++role) {
    if ((present >> role & 1u) == 0) continue;
    const int64_t bytes = roles[role].tensor.dtype.bits / 8;
    alike = alike && roles[role].address % bytes == 0;
  }
  if (alike) return true;
  written_moved_ = true;  // strides are not compared with the last step's: look at memory anew
  row->layout = static_cast<int32_t>(tables_.layouts.size());
  std::vector<int64_t>& table = tables_.layouts;
  table.push_back(dims);
  for (int64_t i = 0; i < dims; ++i) table.push_back(param.shape[order[i]]);
  for (int64_t role = 0; role < tables_.width(); ++role) {
    for (int64_t i = 0; i < dims; ++i) {
      const bool known = (present >> role & 1u) != 0;
      const dlpack::Tensor& t = roles[known ? role : 0].tensor;
      table.push_back(known ? t.strides[order[i]] * (t.dtype.bits / 8) : 0);
    }
  }
  return true;
}

}  // namespace pyupdate
