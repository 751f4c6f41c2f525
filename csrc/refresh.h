// SPDX-License-Identifier: Apache-2.0
// A plan of torch parameters: re-reads every tensor at every step, and trusts nothing it has not
// read in this step. Rows that it cannot vouch for go back to Python, which says what is wrong.
#pragma once
#include <pybind11/pytypes.h>

#include <string>
#include <utility>
#include <vector>

#include "ahead.h"
#include "cpu/run.h"
#include "dlpack.h"

namespace pyupdate {

namespace py = pybind11;

// What a refresh found; anything but kReady means that nothing was written.
enum class Found {
  kReady,
  kFresh,    // some rows have no state yet: Python makes it
  kStale,    // the optimizer's parameters are not those of the plan: Python makes a new plan
  kSuspect,  // a row is not plainly right: Python checks it, and says why or what to do
  kOverlap,  // memory may be shared: Python checks exactly, then vouches for it
};

// One optimizer group as the rule sees it.
struct GroupRule {
  int64_t rule;  // index into the module's rules
  int numbers, counted, hypers;
  void (*prepare)(const double* number, double* hyper);  // null where the device runs it
  std::vector<PyObject*> state_keys;   // torch's keys, interned, in the rule's order
  std::vector<PyObject*> scalar_keys;  // likewise
  bool has_step;
  bool idle;  // none of its parameters is in the plan
};

// How DLPack says a dtype.
struct DataType {
  uint8_t code, bits;
  bool operator==(const DataType&) const = default;
};
constexpr DataType kFloat64{dlpack::kFloat, 64}, kFloat32{dlpack::kFloat, 32},
    kBfloat16{dlpack::kBfloat, 16}, kFloat16{dlpack::kFloat, 16};

// Along Storages of types.h: the dtype of the parameter and its gradient, and that of the state.
struct StorageType {
  DataType param, state;
};
constexpr StorageType kStorageTypes[cpu::kStorages] = {
    {kFloat64, kFloat64}, {kFloat32, kFloat32},  {kBfloat16, kBfloat16},
    {kFloat16, kFloat16}, {kBfloat16, kFloat32}, {kFloat16, kFloat32}};

// Elements from which a row is asked at every step whether its tensors lie within their storages: 2
// us beside 60. Of a small one that would double what it takes.
constexpr int64_t kAskedAnew = int64_t{1} << 16;

class Plan {
 public:
  struct Interface {  // what the plan needs of torch
    const dlpack::ExchangeApi* exchange;
    PyObject* grad;                    // the descriptor of Tensor.grad
    PyObject* is_neg;                  // Tensor.is_neg: a lazily negated view has the wrong bytes
    PyObject* increment_version;       // torch._C._increment_version
    PyObject* tensor_list;             // makes a list of torch's own from tensors, or None
    std::vector<PyTypeObject*> types;  // those whose memory is theirs, no dispatching subclass
    dlpack::Device device{dlpack::kCpu, 0};
    // A remote plan never reads a number of a tensor: what it takes waits for a device. So it does
    // not know its step counts, and takes no strides (see remote.cpp).
    bool remote = false;
  };

  // `positions` says where in its group each parameter stands, `averages` whether each has an
  // average beside its state. Takes references.
  Plan(Interface interface, std::vector<GroupRule> groups, std::vector<PyObject*> params,
       std::vector<int64_t> storages, std::vector<int32_t> group_of, std::vector<int32_t> positions,
       bool averages);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // `groups`: the optimizer's list of dicts; `state`: its dict; `numbers`: a group each, the sign
  // of the gradient and then what the rule's prepare takes.
  Found refresh(PyObject* groups, PyObject* state, const std::vector<std::vector<double>>& numbers);

  // The row that a refresh stopped at, or that has no state yet, one by one.
  const std::vector<int64_t>& noticed() const { return noticed_; }
  // Of the last refresh against the one before: whether rows or what they write are others, and
  // whether a gradient lies elsewhere.
  bool rows_moved() const { return rows_changed_ || written_moved_; }
  bool grads_moved() const { return grads_moved_; }
  // Whether several plans, all refreshed just now, can run together: see written.cpp.
  static bool apart(const std::vector<const Plan*>& plans);
  // The memory as it was last refreshed shares nothing: checked by somebody more patient.
  void vouch() { vouched_ = fingerprint(); }

  cpu::Tables& tables() { return tables_; }
  const cpu::Tables& tables() const { return tables_; }
  const std::vector<int32_t>& active() const { return active_; }
  // A new list of every tensor that the step writes; null with a Python error.
  PyObject* written() const;
  PyObject* increment_version() const { return interface_.increment_version; }
  void count_step();
  // Of a remote plan. Where its own step counts stand on the device: an fp64 each record, for rules
  // without torch's counter.
  void set_counts(int64_t address) { counts_ = address; }
  // The records whose own count must be set, and to what; the caller empties it.
  std::vector<std::pair<int32_t, double>>& recounts() { return recounts_; }
  // What the last refresh found absent is made now, in a first step.
  void state_was_made(bool made) { made_ = made; }
  int64_t count_at(size_t k) const;
  // After its launches: counts, and lets autograd know what was written.
  void stepped();
  // The row that a hyper row's count is read of, and the group that it belongs to.
  struct Source {
    int64_t row, group;
    int64_t rows;  // how many have this hyper row
  };
  const std::vector<Source>& sources() const { return sources_; }
  const GroupRule& group(int64_t g) const { return groups_[static_cast<size_t>(g)]; }
  int64_t group_count() const { return static_cast<int64_t>(groups_.size()); }
  // Of each record, rule * kStorages + storage: before its first refresh, by its parameter's dtype.
  std::vector<int64_t> kinds() const;
  int64_t record_count() const { return static_cast<int64_t>(records_.size()); }
  const dlpack::ExchangeApi& exchange() const { return *interface_.exchange; }
  const dlpack::Device& device() const { return interface_.device; }
  void identify();
  void settle();
  py::object to_bump() const;
  int64_t bytes() const;
  int traverse(visitproc visit, void* arg) const;
  void clear();

  bool busy = false;  // a step is running: a second one would tear it

  // The history of a row that has made no step. No small number: those are mixed into it.
  static constexpr uint64_t kFresh = 0x51a3c96f8be2d407ull;

 private:
  struct Record {
    PyObject* param;  // owned
    int64_t counter;  // steps made, -1 before the state was seen
  };
  struct Interval {
    int64_t start, end;
  };
  // A column of a row that is written: the parameter, its states, the step counter, its scalars.
  using Written = uint32_t;
  // One tensor as it was read; what the exchange API fills in stays torch's.
  struct Read {
    dlpack::Tensor tensor;
    int64_t address;
    bool contiguous;
  };

  // A row with a gradient, on its way into the tables. Owns what the state's dict lends.
  struct Pending {
    size_t r, g;
    PyObject* grad;  // owned by grads_
    bool known_grad;
    py::object inner;
    PyObject* found[kMaxStates + 1 + kMaxScalars + 1];
    size_t present;
    Read roles[kMaxRoles];
    int64_t storage;  // by the dtypes of the parameter and of the state that is there
    int64_t step;
    int64_t scalars[kMaxScalars];

    void release();
  };

  Found read_rows(PyObject* groups, PyObject* state,
                  const std::vector<std::vector<double>>& numbers);
  bool read(PyObject* object, Read* out) const;
  bool read(PyObject* object, DataType type, Read* out) const;
  bool read_state(size_t s, Pending* row) const;
  bool read_block(Pending* block, size_t count);
  bool enter_row(Pending& row);
  void release_grads();
  bool read_scalar(PyObject* scalar, int64_t* tagged) const;
  bool read_step(size_t r, PyObject* step, int64_t* tagged);
  bool add_layout(const Read* roles, uint32_t present, Row* row);
  PyObject* gradient(PyObject* param) const;
  size_t find_state(PyObject* inner, const GroupRule& group, PyObject** found) const;
  bool stands_at(size_t r, size_t k, int64_t role, int64_t address) const;
  bool is_negated(PyObject* tensor) const;
  bool any_negated(PyObject* const* tensors, size_t count) const;
  static bool lies_within(PyObject* tensor, const Read& read);
  bool all_lie_within(const Pending& row, uint32_t present, const int64_t* addresses);
  void drop_rows_from(size_t k);
  void bring(size_t first, ahead::Walk* dicts) const;
  void find_shared_counters();
  static int64_t version(PyObject* tensor);
  PyObject* with_params(const py::object& more) const;
  void fill_hypers(const std::vector<std::vector<double>>& numbers);
  void add_hyper_row(int64_t group, int64_t storage, int64_t step, const double* counted,
                     const std::vector<std::vector<double>>& numbers);
  void fill_sources(const std::vector<std::vector<double>>& numbers);
  void part_written_counts();
  void watch_counts();
  void be_of_unknown_age(size_t r);
  void note_history(size_t r, const GroupRule& group, PyObject* const* found);
  int64_t columns() const { return states_ + 1 + scalars_ + (averages_ ? 1 : 0); }
  int64_t itemsize(size_t k, int64_t role) const;
  Interval interval(size_t k, int64_t role) const;
  int64_t role_of(int64_t column) const;
  Interval interval(Written written) const;
  bool plainly_injective(size_t k, int64_t role) const;
  bool written_apart();
  bool grads_apart() const;
  uint64_t fingerprint() const;

  Interface interface_;
  std::vector<GroupRule> groups_;
  std::vector<int32_t> group_ends_;  // index behind the last row of each group
  std::vector<int32_t> positions_;   // in its group's list; empty if every group is whole
  std::vector<Record> records_;
  std::vector<uint8_t> storages_;
  int64_t states_;  // columns of held_: states, then the step counter, then scalars, then average
  int64_t scalars_;
  bool averages_;
  std::vector<PyObject*> held_;   // owned; what was found in the state at the last refresh
  std::vector<uint32_t> within_;  // of each row, where all it writes lay within its storage: a hash
  const ahead::Leads* leads_;     // null where nothing can be brought
  bool settled_ = false;          // whether the next two are those of the tensors that are held
  py::object kept_;
  py::object bumped_;  // a list, one of all tensors of state that share a version counter
  int64_t kept_count_ = 0;
  std::vector<int32_t> active_;   // rows with a gradient, in order
  std::vector<PyObject*> grads_;  // of the active rows; owned during a refresh and a run
  bool grads_owned_ = false;
  cpu::Tables tables_;
  std::vector<Written> written_;  // sorted by address: everything that is written
  std::vector<int64_t> noticed_;
  size_t entered_ = 0;  // rows of this refresh that stand in the tables
  // Against the last refresh: which rows there are, where what is written lies, where gradients
  // lie.
  bool rows_changed_ = true;
  bool written_moved_ = true;
  bool grads_moved_ = true;
  bool written_apart_ = false;
  bool grads_apart_ = false;
  // A step counter whose rows share a hyper row: whoever writes into one of them is noticed.
  struct Watched {
    py::object step;
    int64_t version;
    uint64_t history;
  };
  // These are a remote plan's. Records of one history have made the same steps.
  std::vector<uint64_t> histories_;
  std::vector<Watched> watched_;
  std::vector<Source> sources_;
  std::vector<std::pair<int32_t, double>> recounts_;
  int64_t counts_ = 0;
  uint64_t serial_ = 0;
  bool made_ = false;
  uint64_t vouched_ = 0;
  uint64_t listed_ = 0;  // a hash of which parameters the groups list, 0 before the first refresh

  friend class GradientsHeld;
};

inline int64_t size_of(const dlpack::Tensor& t) {
  int64_t size = 1;
  for (int32_t d = 0; d < t.ndim; ++d) size *= t.shape[d];
  return size;
}

// Adds a value to a hash.
inline void mix(uint64_t* hash, uint64_t value) {
  *hash = (*hash ^ value) * 0x9e3779b97f4a7c15ull;
  *hash ^= *hash >> 29;
}

// Releases the gradients that a refresh holds when a step is over.
class GradientsHeld {
 public:
  explicit GradientsHeld(Plan& plan) : plan_(plan) {}
  ~GradientsHeld();

 private:
  Plan& plan_;
};

}  // namespace pyupdate
