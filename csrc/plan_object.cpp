// SPDX-License-Identifier: Apache-2.0
// Makes plans from what Python gives: everything is checked here, once a plan.
#include "plan_object.h"

#include <algorithm>
#include <array>
#include <utility>

namespace pyupdate {

namespace {

const RuleShape& rule_named(const std::vector<RuleShape>& rules, const std::string& name) {
  const auto found = std::find_if(rules.begin(), rules.end(),
                                  [&](const RuleShape& rule) { return name == rule.name; });
  if (found == rules.end()) throw py::value_error("no compiled rule is named '" + name + "'");
  return *found;
}

// The first storage of parameters of a dtype, in which all roles have it.
int64_t index_of_storage(const std::string& name) {
  constexpr std::array<const char*, 4> kNames = {"float64", "float32", "bfloat16", "float16"};
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  if (found == kNames.end()) throw py::value_error("no compiled storage is named '" + name + "'");
  return found - kNames.begin();
}

GroupRule group_of_spec(const std::vector<RuleShape>& rules, const GroupSpec& spec) {
  const auto& [name, keys, scalar_keys, has_step] = spec;
  // A group of whose parameters the plan has none may name no rule.
  if (name.empty()) return {0, 0, 0, 0, nullptr, {}, {}, has_step, true};
  const RuleShape& rule = rule_named(rules, name);
  if (keys.size() != static_cast<size_t>(rule.states) ||
      scalar_keys.size() != static_cast<size_t>(rule.scalars)) {
    throw py::value_error("rule '" + name + "' was compiled with another number of states");
  }
  GroupRule group{&rule - rules.data(),
                  rule.numbers,
                  rule.counted,
                  rule.hypers,
                  rule.prepare,
                  {},
                  {},
                  has_step,
                  false};
  for (const std::string& key : scalar_keys) {
    group.scalar_keys.push_back(PyUnicode_InternFromString(key.c_str()));
  }
  for (const std::string& key : keys) {
    group.state_keys.push_back(PyUnicode_InternFromString(key.c_str()));
  }
  return group;
}

}  // namespace

Plan::Interface interface_of(const py::handle& tensor_type, const py::list& types,
                             const py::handle& increment_version, const py::handle& tensor_list) {
  Plan::Interface interface;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  interface.exchange = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (interface.exchange == nullptr) throw py::error_already_set();
  if (interface.exchange->version.major != dlpack::kMajorVersion ||
      interface.exchange->tensor_from_object == nullptr) {
    throw py::value_error("this torch's DLPack exchange API is not of major version 1");
  }
  const py::object grad = tensor_type.attr("grad");
  const py::object is_neg = tensor_type.attr("is_neg");
  if (Py_TYPE(grad.ptr())->tp_descr_get == nullptr) {
    throw py::type_error("Tensor.grad is no descriptor");
  }
  interface.grad = grad.ptr();
  interface.is_neg = is_neg.ptr();
  interface.increment_version = increment_version.ptr();
  interface.tensor_list = tensor_list.ptr();
  for (const py::handle type : types) {
    if (!PyType_Check(type.ptr())) throw py::type_error("types must be types");
    interface.types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
  return interface;
}

std::unique_ptr<Plan> make_plan(Plan::Interface interface, const std::vector<RuleShape>& rules,
                                const std::vector<GroupSpec>& groups, const py::list& params,
                                const std::vector<std::string>& storages,
                                const std::vector<int32_t>& group_of,
                                const std::vector<int32_t>& positions, bool averages) {
  const size_t rows = params.size();
  if (storages.size() != rows || group_of.size() != rows || positions.size() != rows) {
    throw py::value_error("a plan needs a storage, a group and a position for each parameter");
  }
  std::vector<GroupRule> of_groups;
  for (const GroupSpec& spec : groups) of_groups.push_back(group_of_spec(rules, spec));
  std::vector<PyObject*> objects;
  std::vector<int64_t> storage;
  for (size_t r = 0; r < rows; ++r) {
    if (group_of[r] < 0 || static_cast<size_t>(group_of[r]) >= of_groups.size() ||
        positions[r] < 0 || (r > 0 && group_of[r] < group_of[r - 1])) {
      throw py::value_error("groups must be in order and positions not negative");
    }
    objects.push_back(params[r].ptr());
    storage.push_back(index_of_storage(storages[r]));
  }
  return std::make_unique<Plan>(std::move(interface), std::move(of_groups), std::move(objects),
                                std::move(storage), group_of, positions, averages);
}

}  // namespace pyupdate
