// SPDX-License-Identifier: Apache-2.0
// A remote plan (remote.cpp) for a back end that makes its tables and launches in Python: it reads
// every tensor anew, and says whether those tables still hold. A step where nothing moved runs no
// Python a parameter.
#include "watch.h"

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan_object.h"

namespace pyupdate {
namespace {

// Against the tables: nothing is another one; gradients alone, each at an address that is aligned
// as the one before was; or more than that.
enum Moved : int { kNothing, kGradients, kMore };

constexpr int64_t kAligned = 16;  // bytes; rows whose addresses all are have launches of their own

// (states, scalars, numbers with the step, counted, hypers) of a group's rule.
using Shape = std::tuple<int, int, int, int, int>;

class Watch {
 public:
  explicit Watch(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}

  std::tuple<Found, std::vector<int64_t>, int> look(const py::list& groups, const py::dict& state,
                                                    const Numbers& numbers) {
    const Busy busy(*plan_);
    const GradientsHeld held(*plan_);
    const Found found = plan_->refresh(groups.ptr(), state.ptr(), numbers);
    // A refresh that stopped has moved what the next one is compared with.
    if (found != Found::kReady && found != Found::kFresh) moved_ = kMore;
    if (plan_->rows_moved() || !alike()) moved_ = kMore;
    if (plan_->grads_moved() && moved_ == kNothing) moved_ = kGradients;
    if (moved_ == kGradients && !aligned_as_before()) moved_ = kMore;
    return {found, plan_->noticed(), moved_};
  }

  // The tables were made of what the last look found.
  void was_drawn() {
    moved_ = kNothing;
    hypers_.clear();
    grads_.clear();
    for (size_t k = 0; k < plan_->active().size(); ++k) {
      hypers_.push_back(plan_->tables().rows[k].hyper);
      grads_.push_back(gradient(k));
    }
  }

  // Writes where the gradients of the active rows lie.
  void gradients(int64_t to) const {
    auto* place = reinterpret_cast<int64_t*>(to);
    for (size_t k = 0; k < plan_->active().size(); ++k) place[k] = gradient(k);
  }

  // Of each active row: which of them were stepped alike.
  std::vector<int32_t> classes() const {
    std::vector<int32_t> found;
    for (const Row& row : plan_->tables().rows) found.push_back(row.hyper);
    return found;
  }

  std::vector<std::pair<int32_t, double>> recounts() {
    return std::exchange(plan_->recounts(), {});
  }
  void stepped() {
    const Busy busy(*plan_);
    plan_->stepped();
  }
  void state_was_made(bool made) { plan_->state_was_made(made); }
  void vouch() { plan_->vouch(); }
  std::vector<int32_t> active() const { return plan_->active(); }
  int64_t bytes() const { return plan_->bytes(); }
  int traverse(visitproc visit, void* arg) const { return plan_->traverse(visit, arg); }
  void clear() { plan_->clear(); }

 private:
  int64_t gradient(size_t k) const {
    const cpu::Tables& tables = plan_->tables();
    return tables.addresses[k * static_cast<size_t>(tables.width()) + kGrad];
  }
  // Whether the rows that were stepped alike are those of the tables.
  bool alike() const {
    const std::vector<Row>& rows = plan_->tables().rows;
    return std::equal(rows.begin(), rows.end(), hypers_.begin(), hypers_.end(),
                      [](const Row& row, int32_t hyper) { return row.hyper == hyper; });
  }
  bool aligned_as_before() const {
    for (size_t k = 0; k < grads_.size(); ++k) {
      if ((gradient(k) - grads_[k]) % kAligned != 0) return false;
    }
    return true;
  }

  std::unique_ptr<Plan> plan_;
  int moved_ = kMore;
  std::vector<int32_t> hypers_;  // as they were drawn
  std::vector<int64_t> grads_;
};

std::unique_ptr<Watch> make(const std::vector<Shape>& shapes, const py::handle& tensor_type,
                            const py::list& types, const py::handle& increment_version,
                            const py::handle& tensor_list, const std::vector<GroupSpec>& groups,
                            const py::list& params, const std::vector<std::string>& storages,
                            const std::vector<int32_t>& group_of,
                            const std::vector<int32_t>& positions, bool averages) {
  if (params.empty() || shapes.size() != groups.size()) {
    throw py::value_error("a watch needs parameters, and a shape for each group");
  }
  std::vector<RuleShape> rules;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& [states, scalars, numbers, counted, hypers] = shapes[g];
    if (states > kMaxStates || scalars > kMaxScalars) throw py::value_error("too much state");
    rules.push_back(
        {std::get<0>(groups[g]).c_str(), states, scalars, numbers, counted, hypers, nullptr});
  }
  Plan::Interface interface = interface_of(tensor_type, types, increment_version, tensor_list);
  dlpack::Tensor first;
  if (interface.exchange->tensor_from_object(params[0].ptr(), &first) != 0) {
    throw py::error_already_set();
  }
  interface.device = first.device;
  interface.remote = true;
  return std::make_unique<Watch>(make_plan(std::move(interface), rules, groups, params, storages,
                                           group_of, positions, averages));
}

}  // namespace

void name_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch", py::module_local(), py::custom_type_setup(collectable<Watch>))
      .def(py::init(&make), py::kw_only(), py::arg("shapes"), py::arg("tensor_type"),
           py::arg("types"), py::arg("increment_version"), py::arg("tensor_list"),
           py::arg("groups"), py::arg("params"), py::arg("storages"), py::arg("group_of"),
           py::arg("positions"), py::arg("averages"))
      .def("look", &Watch::look, py::arg("groups"), py::arg("state"), py::arg("numbers"))
      .def("was_drawn", &Watch::was_drawn)
      .def("gradients", &Watch::gradients, py::arg("to"))
      .def("classes", &Watch::classes)
      .def("recounts", &Watch::recounts)
      .def("stepped", &Watch::stepped)
      .def("state_was_made", &Watch::state_was_made, py::arg("made"))
      .def("vouch", &Watch::vouch)
      .def("active", &Watch::active)
      .def("nbytes", &Watch::bytes);
}

}  // namespace pyupdate
