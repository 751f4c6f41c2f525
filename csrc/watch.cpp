// SPDX-License-Identifier: Apache-2.0
// Watches: see watch.h.
#include "watch.h"

#include <algorithm>

namespace pyupdate {

namespace {

constexpr int64_t kAligned = 16;  // bytes; rows whose addresses all are have launches of their own

}  // namespace

std::tuple<Found, std::vector<int64_t>, int> Watch::look(const py::list& groups,
                                                         const py::dict& state,
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

void Watch::was_drawn() {
  moved_ = kNothing;
  hypers_.clear();
  grads_.clear();
  for (size_t k = 0; k < plan_->active().size(); ++k) {
    hypers_.push_back(plan_->tables().rows[k].hyper);
    grads_.push_back(gradient(k));
  }
}

void Watch::gradients(int64_t to) const {
  auto* place = reinterpret_cast<int64_t*>(to);
  for (size_t k = 0; k < plan_->active().size(); ++k) place[k] = gradient(k);
}

std::vector<int32_t> Watch::classes() const {
  std::vector<int32_t> found;
  for (const Row& row : plan_->tables().rows) found.push_back(row.hyper);
  return found;
}

std::vector<std::pair<int32_t, double>> Watch::recounts() {
  return std::exchange(plan_->recounts(), {});
}

void Watch::stepped() {
  const Busy busy(*plan_);
  plan_->stepped();
}

int64_t Watch::gradient(size_t k) const {
  const cpu::Tables& tables = plan_->tables();
  return tables.addresses[k * static_cast<size_t>(tables.width()) + kGrad];
}

bool Watch::alike() const {
  const std::vector<Row>& rows = plan_->tables().rows;
  return std::equal(rows.begin(), rows.end(), hypers_.begin(), hypers_.end(),
                    [](const Row& row, int32_t hyper) { return row.hyper == hyper; });
}

bool Watch::aligned_as_before() const {
  for (size_t k = 0; k < grads_.size(); ++k) {
    if ((gradient(k) - grads_[k]) % kAligned != 0) return false;
  }
  return true;
}

std::unique_ptr<Watch> make_watch(const std::vector<Shape>& shapes, const py::handle& tensor_type,
                                  const py::list& types, const py::handle& increment_version,
                                  const py::handle& tensor_list,
                                  const std::vector<GroupSpec>& groups, const py::list& params,
                                  const std::vector<std::string>& storages,
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

}  // namespace pyupdate
