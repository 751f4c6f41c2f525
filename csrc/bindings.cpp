// SPDX-License-Identifier: Apache-2.0
// The Python module: builds plans, checks everything with the GIL held, then runs without it.
#include "bindings.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ahead.h"
#include "cpu/parallel.h"
#include "cpu/stream.h"
#include "watch.h"
#include "xla.h"

namespace py = pybind11;

namespace pyupdate {
namespace {

// ----- the instruction set, chosen when the module is loaded

const cpu::Builds& builds() {
  static const cpu::Builds found = cpu::runnable_builds();
  return found;
}

const cpu::Passes* chosen = nullptr;

const cpu::Passes& passes() {
  if (chosen == nullptr) chosen = builds().passes[builds().count - 1];
  return *chosen;
}

void use_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i < builds().count; ++i) {
    if (name == builds().passes[i]->isa) {
      chosen = builds().passes[i];
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + builds().passes[i]->isa;
  }
  throw py::value_error("instruction set '" + name +
                        "' is not built or cannot run here; there are: " + known);
}

int64_t index_of_rule(const std::string& name) {
  for (int i = 0; i < passes().rule_count; ++i) {
    if (name == passes().rules[i].name) return i;
  }
  throw py::value_error("no compiled rule is named '" + name + "'");
}

// ----- plans

std::vector<RuleShape> shapes() {
  std::vector<RuleShape> found;
  for (int i = 0; i < passes().rule_count; ++i) {
    const cpu::RuleInfo& rule = passes().rules[i];
    found.push_back({rule.name, rule.states, rule.scalars, rule.numbers, rule.counted, rule.hypers,
                     rule.prepare});
  }
  return found;
}

std::unique_ptr<Plan> make(const py::handle& tensor_type, const py::list& types,
                           const py::handle& increment_version, const py::handle& tensor_list,
                           const std::vector<GroupSpec>& groups, const py::list& params,
                           const std::vector<std::string>& storages,
                           const std::vector<int32_t>& group_of,
                           const std::vector<int32_t>& positions, bool averages) {
  Plan::Interface interface = interface_of(tensor_type, types, increment_version, tensor_list);
  return make_plan(std::move(interface), shapes(), groups, params, storages, group_of, positions,
                   averages);
}

std::unique_ptr<ahead::Reader> make_reader(const py::handle& tensor_type,
                                           const std::vector<py::list>& rows) {
  std::vector<PyObject*> tensors;
  for (const py::list& row : rows) {
    if (row.size() != rows[0].size()) throw py::value_error("rows must be of one width");
    for (const py::handle tensor : row) tensors.push_back(tensor.ptr());
  }
  const Plan::Interface torch = interface_of(tensor_type, py::list(), py::none(), py::none());
  return std::make_unique<ahead::Reader>(torch.exchange, torch.grad, std::move(tensors),
                                         rows.empty() ? 1 : rows[0].size());
}

using Numbers = std::vector<std::vector<double>>;

Found refresh(Plan& plan, const py::list& groups, const py::dict& state, const Numbers& numbers) {
  return plan.refresh(groups.ptr(), state.ptr(), numbers);
}

// The GIL while a region runs: dropped at once where there is a reduce pass, else after the version
// counters were bumped, which the calling thread does while the others begin to write.
struct Gil {
  const std::vector<Plan*>& plans;
  const std::vector<cpu::Member>& members;
  PyThreadState* saved = nullptr;
  std::optional<py::error_already_set> error;

  void drop() { saved = PyEval_SaveThread(); }
  void take() {
    if (saved != nullptr) PyEval_RestoreThread(saved);
    saved = nullptr;
  }
  void bump() {
    for (size_t m = 0; m < plans.size(); ++m) {
      if (members[m].outcome.skipped) continue;
      const py::object written = plans[m]->to_bump();
      const py::object done = py::reinterpret_steal<py::object>(
          written ? PyObject_CallOneArg(plans[m]->increment_version(), written.ptr()) : nullptr);
      if (!done) error.emplace();
    }
  }
};

// Runs plans that were refreshed just now; `tables` holds the rows of all of them.
void run(const std::vector<Plan*>& plans, cpu::Tables& tables, std::vector<cpu::Member>& members) {
  Gil gil{plans, members, nullptr, {}};
  cpu::Request& request = members[0].request;
  request.context = &gil;
  request.before_writing = [](void* context) {
    Gil& held = *static_cast<Gil*>(context);
    held.take();
    held.bump();
    held.drop();
  };
  for (const cpu::Member& member : members) {
    if (member.request.reduce && gil.saved == nullptr) gil.drop();
  }
  cpu::run(passes(), tables, members);
  gil.take();
  for (size_t m = 0; m < plans.size(); ++m) {
    if (!members[m].outcome.skipped) plans[m]->count_step();
  }
  if (gil.error) throw std::move(*gil.error);
}

cpu::Outcome run(Plan& plan, const cpu::Request& request) {
  if (request.stochastic) plan.identify();
  std::vector<cpu::Member> alone{{request, plan.tables().rows.size(), {}}};
  run({&plan}, plan.tables(), alone);
  return alone[0].outcome;
}

// (what the refresh found, the rows that it noticed, norm, non-finite, skipped, multiplier)
using Answer = std::tuple<Found, std::vector<int64_t>, double, bool, bool, double>;

Answer answer(Found found, const Plan& plan, const cpu::Outcome& outcome) {
  return {found,           plan.noticed(),    outcome.norm, outcome.nonfinite,
          outcome.skipped, outcome.multiplier};
}

cpu::Request request_of(const Wanted& wanted, int threads) {
  cpu::Request request;
  std::tie(request.reduce, request.skip_nonfinite, request.finite_norm, request.inf_norm,
           request.unscale, request.max_norm, request.clip_value, request.ema_weight,
           request.stochastic, request.seed) = wanted;
  request.multiplier = request.unscale;
  request.threads = threads;
  return request;
}

Answer step(Plan& plan, const py::list& groups, const py::dict& state, const Numbers& numbers,
            const Wanted& wanted, int threads) {
  const Busy busy(plan);
  const GradientsHeld held(plan);
  const Found found = refresh(plan, groups, state, numbers);
  if (found != Found::kReady) return answer(found, plan, {});
  const cpu::Outcome outcome = run(plan, request_of(wanted, threads));
  if (!outcome.skipped) plan.settle();
  return answer(found, plan, outcome);
}

// (plan, groups, state, numbers, request)
using Step = std::tuple<Plan*, py::list, py::dict, Numbers, Wanted>;

// The steps of several plans in one region. If one of them is not plainly right, or they share
// memory, nothing is done and nothing is answered: whoever steps them one by one is told why.
std::vector<Answer> step_together(const std::vector<Step>& steps, int threads) {
  std::vector<std::unique_ptr<Busy>> busy;
  std::vector<std::unique_ptr<GradientsHeld>> held;
  std::vector<Plan*> plans;
  for (const auto& [plan, groups, state, numbers, wanted] : steps) {
    busy.push_back(std::make_unique<Busy>(*plan));
    held.push_back(std::make_unique<GradientsHeld>(*plan));
    if (refresh(*plan, groups, state, numbers) != Found::kReady) return {};
    plans.push_back(plan);
  }
  if (plans.empty() || !Plan::apart({plans.begin(), plans.end()})) return {};
  std::vector<const cpu::Tables*> all;
  for (Plan* plan : plans) all.push_back(&plan->tables());
  cpu::Tables tables = cpu::Tables::for_all(all);
  std::vector<cpu::Member> members;
  for (const Step& step : steps) {
    Plan& plan = *std::get<Plan*>(step);
    const cpu::Request request = request_of(std::get<Wanted>(step), threads);
    if (request.stochastic) plan.identify();
    tables.append(plan.tables(), static_cast<int64_t>(members.size()));
    members.push_back({request, tables.rows.size(), {}});
  }
  tables.cut();
  run(plans, tables, members);
  std::vector<Answer> answers;
  for (size_t m = 0; m < plans.size(); ++m) {
    if (!members[m].outcome.skipped) plans[m]->settle();
    answers.push_back(answer(Found::kReady, *plans[m], members[m].outcome));
  }
  return answers;
}

// The refresh alone.
std::tuple<Found, std::vector<int64_t>> check(Plan& plan, const py::list& groups,
                                              const py::dict& state, const Numbers& numbers) {
  const Busy busy(plan);
  const GradientsHeld held(plan);
  const Found found = refresh(plan, groups, state, numbers);
  return {found, plan.noticed()};
}

// What a `check` has just found right is refreshed again: nothing is ever taken on trust.
void refresh_again(Plan& plan, const py::list& groups, const py::dict& state,
                   const Numbers& numbers, bool fresh_is_fine) {
  const Found found = refresh(plan, groups, state, numbers);
  if (found == Found::kReady || (fresh_is_fine && found == Found::kFresh)) return;
  throw std::runtime_error("the optimizer was changed by another thread during its step");
}

// The reduce pass alone: whether an inf or nan was found, the rows that have a gradient, and the
// sum of squares (inf norm: the largest magnitude) of each.
std::tuple<bool, std::vector<int32_t>, std::vector<double>> reduce(
    Plan& plan, const py::list& groups, const py::dict& state, const Numbers& numbers,
    const Wanted& wanted, int threads) {
  const Busy busy(plan);
  const GradientsHeld held(plan);
  refresh_again(plan, groups, state, numbers, true);
  cpu::Request request = request_of(wanted, threads);
  request.apply = false;
  std::vector<double> sums;
  cpu::Outcome outcome;
  {
    py::gil_scoped_release release;
    outcome = cpu::reduce_rows(passes(), plan.tables(), request, sums);
  }
  return {outcome.nonfinite, plan.active(), sums};
}

// The apply pass alone, with a multiplier that somebody made of several plans' sums.
void apply(Plan& plan, const py::list& groups, const py::dict& state, const Numbers& numbers,
           const Wanted& wanted, double multiplier, int threads) {
  const Busy busy(plan);
  const GradientsHeld held(plan);
  refresh_again(plan, groups, state, numbers, false);
  cpu::Request request = request_of(wanted, threads);
  request.reduce = false;
  request.multiplier = multiplier;
  run(plan, request);
}

// Why XLA cannot call the passes; empty once it can.
std::string register_with_xla(uintptr_t api, const std::string& prefix) {
  return xla::register_handlers(api, prefix, &passes);
}

std::vector<std::string> names_of_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < builds().count; ++i) names.emplace_back(builds().passes[i]->isa);
  return names;
}

std::vector<std::string> names_of_rules() {
  std::vector<std::string> names;
  for (int i = 0; i < passes().rule_count; ++i) names.emplace_back(passes().rules[i].name);
  return names;
}

// The hypers of a step and the new values of the counted scalars, of the step count, the group's
// numbers and the counted scalars.
std::vector<double> prepare(const std::string& rule, const std::vector<double>& numbers) {
  const cpu::RuleInfo& info = passes().rules[index_of_rule(rule)];
  const auto taken = static_cast<size_t>(info.numbers + info.counted);
  if (numbers.size() != taken) {
    throw py::value_error("rule '" + rule + "' prepares " + std::to_string(taken) +
                          " numbers, not " + std::to_string(numbers.size()));
  }
  std::vector<double> hypers(static_cast<size_t>(info.hypers + info.counted));
  info.prepare(numbers.data(), hypers.data());
  return hypers;
}

// What each stage of a rule reads and writes, as bits: parameter, gradient, then its states.
std::vector<std::pair<unsigned, unsigned>> stages(const std::string& rule) {
  const cpu::RuleInfo& info = passes().rules[index_of_rule(rule)];
  std::vector<std::pair<unsigned, unsigned>> found;
  for (int k = 0; k < info.stages; ++k) {
    found.emplace_back(info.kernels[k][0].reads, info.kernels[k][0].writes);
  }
  return found;
}

std::map<std::string, std::string> digests_of_rules() {
  std::map<std::string, std::string> digests;
  for (int i = 0; i < passes().rule_count; ++i) {
    digests.emplace(passes().rules[i].name, passes().rules[i].digest);
  }
  return digests;
}

}  // namespace
}  // namespace pyupdate

PYBIND11_MODULE(pyupdate_module, m) {
  using namespace pyupdate;
  m.doc() = "Compiled passes of pyupdate: plans of torch parameters, stepped on the CPU.";
  cpu::watch_for_fork();

  name_found(m);

  py::class_<Plan>(m, "Plan", py::module_local(), py::custom_type_setup(collectable<Plan>))
      .def(py::init(&make), py::kw_only(), py::arg("tensor_type"), py::arg("types"),
           py::arg("increment_version"), py::arg("tensor_list"), py::arg("groups"),
           py::arg("params"), py::arg("storages"), py::arg("group_of"), py::arg("positions"),
           py::arg("averages"))
      .def("step", &step, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("request"), py::arg("threads"))
      .def("check", &check, py::arg("groups"), py::arg("state"), py::arg("numbers"))
      .def("reduce", &reduce, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("request"), py::arg("threads"))
      .def("apply", &apply, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("request"), py::arg("multiplier"), py::arg("threads"))
      .def("vouch", &Plan::vouch)
      .def("active", &Plan::active)
      .def("nbytes", &Plan::bytes)
      .def("chunks", [](Plan& plan) { return plan.tables().chunks(); });

  py::class_<Watch>(m, "Watch", py::module_local(), py::custom_type_setup(collectable<Watch>))
      .def(py::init(&make_watch), py::kw_only(), py::arg("shapes"), py::arg("tensor_type"),
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

  py::class_<cpu::Stream>(m, "Stream", py::module_local())
      .def(py::init<int64_t, bool>(), py::arg("elements"), py::arg("averages") = false)
      .def("run", &cpu::Stream::run, py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def("read", &cpu::Stream::read, py::arg("threads"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", &cpu::Stream::bytes)
      .def_property_readonly_static("BYTES_READ",
                                    [](const py::object&) { return cpu::Stream::kBytesRead; });
  py::class_<ahead::Reader>(m, "Reader", py::module_local())
      .def(py::init(&make_reader), py::arg("tensor_type"), py::arg("rows"))
      .def("read", py::overload_cast<>(&ahead::Reader::read, py::const_));

  m.def("step_together", &step_together, py::arg("steps"), py::arg("threads"));
  m.def("register_with_xla", &register_with_xla, py::arg("api"), py::arg("prefix"));
  m.def("isa", [] { return std::string(passes().isa); });
  m.def("isas", &names_of_isas);
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("rules", &names_of_rules);
  m.def("prepare", &prepare, py::arg("rule"), py::arg("numbers"));
  m.def("stages", &stages, py::arg("rule"));
  m.def("digests", &digests_of_rules);
  m.def("build_info", [] {
    std::map<std::string, std::string> info = build_info();
    info["threading"] = cpu::threading();
    return info;
  });
}
