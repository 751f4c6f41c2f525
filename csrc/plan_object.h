// SPDX-License-Identifier: Apache-2.0
// A plan as a module shows it to Python: how it is made, and who may step it. For every compiled
// module.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "refresh.h"

namespace pyupdate {

// What a plan must know of a compiled rule.
struct RuleShape {
  const char* name;
  int states, scalars, numbers, counted, hypers;
  void (*prepare)(const double* number, double* hyper);
};

// (rule, state keys, scalar keys, whether torch counts its steps), a group each.
using Keys = std::vector<std::string>;
using GroupSpec = std::tuple<std::string, Keys, Keys, bool>;

// Numbers of a step, a group each: the sign of the gradient, then what the rule's prepare takes.
using Numbers = std::vector<std::vector<double>>;

Plan::Interface interface_of(const py::handle& tensor_type, const py::list& types,
                             const py::handle& increment_version, const py::handle& tensor_list);

std::unique_ptr<Plan> make_plan(Plan::Interface interface, const std::vector<RuleShape>& rules,
                                const std::vector<GroupSpec>& groups, const py::list& params,
                                const std::vector<std::string>& storages,
                                const std::vector<int32_t>& group_of,
                                const std::vector<int32_t>& positions, bool averages);

// pyupdate/pytorch/request.py's Request, in its order.
using Wanted = std::tuple<bool, bool, bool, bool, double, double, double, double, bool, int64_t>;

// Makes a plan unusable for a second step while one runs.
class Busy {
 public:
  explicit Busy(Plan& plan) : plan_(plan) {
    if (plan.busy) throw std::runtime_error("this optimizer is being stepped by another thread");
    plan.busy = true;
  }
  ~Busy() { plan_.busy = false; }
  Busy(const Busy&) = delete;

 private:
  Plan& plan_;
};

}  // namespace pyupdate
