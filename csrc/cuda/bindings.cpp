// SPDX-License-Identifier: Apache-2.0
// What pyupdate._cuda offers to Python: refreshes a plan as the CPU's does, sends what moved, and
// launches. Nothing here waits for the device. Memory on the device belongs to Python.
#include "../bindings.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime.h"
#include "sent.h"

namespace pyupdate::cuda {
namespace {

std::vector<RuleShape> shapes() {
  std::vector<RuleShape> found;
  for (int i = 0; i < rule_count(); ++i) {
    const RuleInfo& rule = rule_info(i);
    found.push_back(
        {rule.name, rule.states, rule.scalars, rule.numbers, rule.counted, rule.hypers, nullptr});
  }
  return found;
}

class DevicePlan {
 public:
  explicit DevicePlan(std::unique_ptr<Plan> plan)
      : plan_(std::move(plan)), sent_(most_blocks(plan_->device().id)) {}

  using Noticed = std::pair<Found, std::vector<int64_t>>;

  // The whole step. `send` is called only where something moved; see Sent::ready.
  Noticed step(const py::list& groups, const py::dict& state, const Numbers& numbers,
               const NumberAt& number_at, const Wanted& wanted, const Places& places,
               const py::function& send) {
    const Busy busy(*plan_);
    const GradientsHeld held(*plan_);
    const Found found = plan_->refresh(groups.ptr(), state.ptr(), numbers);
    if (found != Found::kReady) return {found, plan_->noticed()};
    run(numbers, number_at, request_of(wanted, places), places, send);
    return {found, {}};
  }

  Noticed look(const py::list& groups, const py::dict& state, const Numbers& numbers) {
    const Busy busy(*plan_);
    const GradientsHeld held(*plan_);
    const Found found = plan_->refresh(groups.ptr(), state.ptr(), numbers);
    return {found, plan_->noticed()};
  }

  // The reduce pass alone. Returns where in the device's own memory the rows' sums begin; the flag
  // is its second 4 bytes, and the caller's to clear.
  int64_t reduce(const py::list& groups, const py::dict& state, const Numbers& numbers,
                 const NumberAt& number_at, const Wanted& wanted, const Places& places,
                 const py::function& send) {
    const Busy busy(*plan_);
    const GradientsHeld held(*plan_);
    refresh_again(groups, state, numbers, true);
    Request request = request_of(wanted, places);
    request.reduce = request.leave_open = 1;
    const OnDevice current(plan_->device().id);
    const Tables tables = ready(numbers, number_at, request, places, send);
    sent_.reduce(tables, request, stream_of(*plan_));
    return reinterpret_cast<const char*>(tables.grad_sums) - sent_.scratch();
  }

  // The rest of a step after `reduce`, by the sums of several plans' rows, `count` of them at an
  // address on the device, and a flag like a reduce pass's own.
  void finish(const Wanted& wanted, const Places& places, int64_t sums, int64_t count,
              int64_t nonfinite) {
    const Busy busy(*plan_);
    const Request request = request_of(wanted, places);
    const OnDevice current(plan_->device().id);
    const Tables tables = sent_.tables(reinterpret_cast<Outcome*>(std::get<0>(places)));
    void* const stream = stream_of(*plan_);
    check(cuda::finish(tables, request, reinterpret_cast<double*>(sums), count,
                       reinterpret_cast<uint32_t*>(nonfinite), stream));
    sent_.apply(tables, request.reduce != 0, stream);
    plan_->stepped();
  }

  // The apply pass alone, with a multiplier that somebody made of several plans' sums.
  void apply(const py::list& groups, const py::dict& state, const Numbers& numbers,
             const NumberAt& number_at, const Wanted& wanted, double multiplier,
             const Places& places, const py::function& send) {
    const Busy busy(*plan_);
    const GradientsHeld held(*plan_);
    refresh_again(groups, state, numbers, false);
    Request request = request_of(wanted, places);
    request.reduce = request.skip_nonfinite = request.finite_norm = 0;
    request.unscale = 1.0;
    request.multiplier = multiplier;
    run(numbers, number_at, request, places, send);
  }

  // What a step of all records launches: the kernel, its stage, and of each record that it steps
  // the bytes that one element moves. `reduce` is the request's.
  using Moved = std::vector<std::pair<int64_t, int64_t>>;
  std::vector<std::tuple<std::string, int, Moved>> launches(bool reduce) const {
    const std::vector<int64_t> kinds = plan_->kinds();
    Moved read;
    for (size_t r = 0; reduce && r < kinds.size(); ++r) {
      read.emplace_back(r, bytes_of_type(kStorageTypes[kinds[r] % cpu::kStorages].param));
    }
    std::vector<std::tuple<std::string, int, Moved>> found{{"reduce", 0, read}};
    each_stage(buckets_of(kinds), [&](const Bucket& bucket, int stage) {
      const RuleInfo& rule = rule_info(bucket.rule);
      const bool is_last = stage + 1 == rule.stages;
      const int64_t bytes = moved_by(rule.stage[stage], bucket.storage) +
                            (is_last && plan_->tables().averages() ? average(bucket.storage) : 0);
      Moved moved;
      for (size_t r = 0; r < kinds.size(); ++r) {
        if (kinds[r] == bucket.rule * cpu::kStorages + bucket.storage) moved.emplace_back(r, bytes);
      }
      found.emplace_back(rule.name, stage, std::move(moved));
    });
    return found;
  }

  void copy(int64_t to, int64_t begin, int64_t end) const { sent_.copy(to, begin, end); }

  Plan& plan() { return *plan_; }
  bool capturing() const {
    const OnDevice current(plan_->device().id);
    return is_capturing(stream_of(*plan_));
  }
  void set_counts(int64_t address) { plan_->set_counts(address); }
  void state_was_made(bool made) { plan_->state_was_made(made); }
  void vouch() { plan_->vouch(); }
  std::vector<int32_t> active() const { return plan_->active(); }
  int64_t bytes() const { return plan_->bytes() + sent_.image().table_bytes(); }
  int traverse(visitproc visit, void* arg) const { return plan_->traverse(visit, arg); }
  void clear() { plan_->clear(); }

 private:
  static int64_t bytes_of_type(DataType type) { return type.bits / 8; }

  // An element of every role that a stage reads, and of every one that it writes.
  static int64_t moved_by(const RuleInfo::Stage& stage, int32_t storage) {
    const StorageType& type = kStorageTypes[storage];
    int64_t bytes = 0;
    for (int role = 0; role < kMaxRoles; ++role) {
      const int64_t times = (stage.reads >> role & 1u) + (stage.writes >> role & 1u);
      bytes += times * bytes_of_type(role < kFirstState ? type.param : type.state);
    }
    return bytes;
  }

  // An average is read and written, in the type that the storage is computed in.
  static int64_t average(int32_t storage) {
    return 2 * std::max<int64_t>(4, bytes_of_type(kStorageTypes[storage].param));
  }

  void refresh_again(const py::list& groups, const py::dict& state, const Numbers& numbers,
                     bool fresh_is_fine) {
    const Found found = plan_->refresh(groups.ptr(), state.ptr(), numbers);
    if (found == Found::kReady || (fresh_is_fine && found == Found::kFresh)) return;
    throw std::runtime_error("the optimizer was changed by another thread during its step");
  }

  Tables ready(const Numbers& numbers, const NumberAt& number_at, const Request& request,
               const Places& places, const py::function& send) {
    if (request.stochastic != 0) plan_->identify();
    const Drawn drawn{*plan_, {numbers, number_at}};
    return sent_.ready({&drawn, 1}, plan_->tables(), {}, request.stochastic != 0,
                       reinterpret_cast<Outcome*>(std::get<0>(places)), send);
  }

  void run(const Numbers& numbers, const NumberAt& number_at, const Request& request,
           const Places& places, const py::function& send) {
    const OnDevice current(plan_->device().id);
    const Tables tables = ready(numbers, number_at, request, places, send);
    void* const stream = stream_of(*plan_);
    sent_.reduce(tables, request, stream);
    sent_.apply(tables, request.reduce != 0, stream);
    plan_->stepped();
  }

  std::unique_ptr<Plan> plan_;
  Sent sent_;
};

// A plan's part of a joint step: what a step of its own is given.
using Joined = std::tuple<DevicePlan*, py::list, py::dict, Numbers, NumberAt, Wanted, Places>;

bool step_together(Joint& joint, const std::vector<Joined>& joined, int64_t outcomes,
                   const py::function& send) {
  std::vector<Joint::Step> steps;
  for (const auto& [plan, groups, state, numbers, number_at, wanted, places] : joined) {
    steps.push_back({plan->plan(), groups, state, numbers, number_at, request_of(wanted, places)});
  }
  return joint.step(steps, reinterpret_cast<Outcome*>(outcomes), send);
}

std::unique_ptr<DevicePlan> make(const std::pair<int32_t, int32_t>& device,
                                 const py::handle& tensor_type, const py::list& types,
                                 const py::handle& increment_version, const py::handle& tensor_list,
                                 const std::vector<GroupSpec>& groups, const py::list& params,
                                 const std::vector<std::string>& storages,
                                 const std::vector<int32_t>& group_of,
                                 const std::vector<int32_t>& positions, bool averages) {
  Plan::Interface interface = interface_of(tensor_type, types, increment_version, tensor_list);
  interface.device = {device.first, device.second};
  interface.remote = true;
  return std::make_unique<DevicePlan>(make_plan(std::move(interface), shapes(), groups, params,
                                                storages, group_of, positions, averages));
}

std::map<std::string, std::string> digests() {
  std::map<std::string, std::string> found;
  for (int i = 0; i < rule_count(); ++i) found.emplace(rule_info(i).name, rule_info(i).digest);
  return found;
}

}  // namespace
}  // namespace pyupdate::cuda

PYBIND11_MODULE(pyupdate_module, m) {
  using namespace pyupdate;
  using cuda::DevicePlan;
  using cuda::Joint;
  m.doc() = "CUDA passes of pyupdate: plans of torch parameters on one device, stepped there.";

  name_found(m);

  py::class_<DevicePlan>(m, "Plan", py::module_local(),
                         py::custom_type_setup(collectable<DevicePlan>))
      .def(py::init(&cuda::make), py::kw_only(), py::arg("device"), py::arg("tensor_type"),
           py::arg("types"), py::arg("increment_version"), py::arg("tensor_list"),
           py::arg("groups"), py::arg("params"), py::arg("storages"), py::arg("group_of"),
           py::arg("positions"), py::arg("averages"))
      .def("step", &DevicePlan::step, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("number_at"), py::arg("request"), py::arg("places"), py::arg("send"))
      .def("check", &DevicePlan::look, py::arg("groups"), py::arg("state"), py::arg("numbers"))
      .def("reduce", &DevicePlan::reduce, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("number_at"), py::arg("request"), py::arg("places"), py::arg("send"))
      .def("finish", &DevicePlan::finish, py::arg("request"), py::arg("places"), py::arg("sums"),
           py::arg("count"), py::arg("nonfinite"))
      .def("apply", &DevicePlan::apply, py::arg("groups"), py::arg("state"), py::arg("numbers"),
           py::arg("number_at"), py::arg("request"), py::arg("multiplier"), py::arg("places"),
           py::arg("send"))
      .def("launches", &DevicePlan::launches, py::arg("reduce"))
      .def("copy", &DevicePlan::copy, py::arg("to"), py::arg("begin"), py::arg("end"))
      .def("capturing", &DevicePlan::capturing)
      .def("set_counts", &DevicePlan::set_counts, py::arg("address"))
      .def("state_was_made", &DevicePlan::state_was_made, py::arg("made"))
      .def("vouch", &DevicePlan::vouch)
      .def("active", &DevicePlan::active)
      .def("nbytes", &DevicePlan::bytes);

  py::class_<Joint>(m, "Joint", py::module_local())
      .def(py::init<int>(), py::arg("device"))
      .def("step", &cuda::step_together, py::arg("joined"), py::arg("outcomes"), py::arg("send"))
      .def("copy", &Joint::copy, py::arg("to"), py::arg("begin"), py::arg("end"))
      .def("nbytes", &Joint::bytes);

  m.def("why_no_device", &cuda::why_no_device);
  m.def("digests", &cuda::digests);
  m.def("build_info", &build_info);
}
