// SPDX-License-Identifier: Apache-2.0
// A remote plan (remote.cpp) for a back end that makes its tables and launches in Python: it reads
// every tensor anew, and says whether those tables still hold. A step where nothing moved runs no
// Python a parameter.
#pragma once
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "plan_object.h"

namespace pyupdate {

// Against the tables: nothing is another one; gradients alone, each at an address that is aligned
// as the one before was; or more than that.
enum Moved : int { kNothing, kGradients, kMore };

class Watch {
 public:
  explicit Watch(std::unique_ptr<Plan> plan) : plan_(std::move(plan)) {}

  std::tuple<Found, std::vector<int64_t>, int> look(const py::list& groups, const py::dict& state,
                                                    const Numbers& numbers);

  // The tables were made of what the last look found.
  void was_drawn();

  // Writes where the gradients of the active rows lie.
  void gradients(int64_t to) const;

  // Of each active row: which of them were stepped alike.
  std::vector<int32_t> classes() const;

  std::vector<std::pair<int32_t, double>> recounts();
  void stepped();
  void state_was_made(bool made) { plan_->state_was_made(made); }
  void vouch() { plan_->vouch(); }
  std::vector<int32_t> active() const { return plan_->active(); }
  int64_t bytes() const { return plan_->bytes(); }
  int traverse(visitproc visit, void* arg) const { return plan_->traverse(visit, arg); }
  void clear() { plan_->clear(); }

 private:
  int64_t gradient(size_t k) const;
  // Whether the rows that were stepped alike are those of the tables.
  bool alike() const;
  bool aligned_as_before() const;

  std::unique_ptr<Plan> plan_;
  int moved_ = kMore;
  std::vector<int32_t> hypers_;  // as they were drawn
  std::vector<int64_t> grads_;
};

// (states, scalars, numbers with the step, counted, hypers) of a group's rule.
using Shape = std::tuple<int, int, int, int, int>;

std::unique_ptr<Watch> make_watch(const std::vector<Shape>& shapes, const py::handle& tensor_type,
                                  const py::list& types, const py::handle& increment_version,
                                  const py::handle& tensor_list,
                                  const std::vector<GroupSpec>& groups, const py::list& params,
                                  const std::vector<std::string>& storages,
                                  const std::vector<int32_t>& group_of,
                                  const std::vector<int32_t>& positions, bool averages);

}  // namespace pyupdate
