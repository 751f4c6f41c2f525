// SPDX-License-Identifier: Apache-2.0
// The Python module of the CUDA passes: refreshes a plan as the CPU's does, sends what moved, and
// launches. Nothing here waits for the device. Memory on the device belongs to Python.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../plan_object.h"
#include "failure.h"
#include "image.h"
#include "launch.h"
#include "runtime.h"

#ifndef PYUPDATE_MODULE_NAME
#define PYUPDATE_MODULE_NAME _cuda
#endif

namespace pyupdate::cuda {
namespace {

// Blocks that are resident on a multiprocessor: of 256 threads with 64 registers each.
constexpr int kBlocks = 4;

std::vector<RuleShape> shapes() {
  std::vector<RuleShape> found;
  for (int i = 0; i < rule_count(); ++i) {
    const RuleInfo& rule = rule_info(i);
    found.push_back(
        {rule.name, rule.states, rule.scalars, rule.numbers, rule.counted, rule.hypers, nullptr});
  }
  return found;
}

// A launch that failed says which kernel it was.
void check(const Launched& launched) {
  if (launched.code == 0) return;
  throw failure(std::string("CUDA kernel '") + launched.kernel + "' could not be launched",
                launched.code, launched.text);
}

// Addresses on the device: of the Outcome, the scale and found_inf of a step; 0 for none.
using Places = std::tuple<int64_t, int64_t, int64_t>;

class DevicePlan {
 public:
  explicit DevicePlan(std::unique_ptr<Plan> plan)
      : plan_(std::move(plan)),
        blocks_(kBlocks * std::max(1, multiprocessors(plan_->device().id))) {}

  using Noticed = std::pair<Found, std::vector<int64_t>>;
  using NumberAt = std::vector<std::vector<int64_t>>;

  // The whole step. `send` is called only where something moved; see `ready`.
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
    check(cuda::reduce(tables, request, image_.items(), blocks_, stream()));
    return reinterpret_cast<char*>(tables.grad_sums) - scratch_;
  }

  // The rest of a step after `reduce`, by the sums of several plans' rows, `count` of them at an
  // address on the device, and a flag like a reduce pass's own.
  void finish(const Wanted& wanted, const Places& places, int64_t sums, int64_t count,
              int64_t nonfinite) {
    const Busy busy(*plan_);
    const Request request = request_of(wanted, places);
    const OnDevice current(plan_->device().id);
    const Tables tables =
        image_.at(tables_, scratch_, reinterpret_cast<Outcome*>(std::get<0>(places)));
    check(cuda::finish(tables, request, reinterpret_cast<double*>(sums), count,
                       reinterpret_cast<uint32_t*>(nonfinite), stream()));
    apply_all(tables, request);
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

  // The bytes [begin, end) of the tables, for whoever sends them.
  void copy(int64_t to, int64_t begin, int64_t end) const {
    if (begin < 0 || end > image_.table_bytes() || begin > end) throw py::index_error("bytes");
    std::copy(image_.data() + begin, image_.data() + end, reinterpret_cast<char*>(to));
  }

  bool capturing() const {
    const OnDevice current(plan_->device().id);
    return is_capturing(stream());
  }
  void set_counts(int64_t address) { plan_->set_counts(address); }
  void state_was_made(bool made) { plan_->state_was_made(made); }
  void vouch() { plan_->vouch(); }
  std::vector<int32_t> active() const { return plan_->active(); }
  int64_t bytes() const { return plan_->bytes() + image_.table_bytes(); }
  int traverse(visitproc visit, void* arg) const { return plan_->traverse(visit, arg); }
  void clear() { plan_->clear(); }

 private:
  static Request request_of(const Wanted& wanted, const Places& places) {
    Request request;
    const auto& [reduce, skip, finite_norm, inf_norm, unscale, max_norm, clip_value, ema_weight,
                 stochastic, seed] = wanted;
    request.reduce = reduce;
    request.skip_nonfinite = skip;
    request.finite_norm = finite_norm;
    request.inf_norm = inf_norm;
    request.stochastic = stochastic;
    request.seed = seed;
    request.unscale = unscale;
    request.max_norm = max_norm;
    request.clip_value = clip_value;
    request.ema_weight = ema_weight;
    request.scale = reinterpret_cast<const float*>(std::get<1>(places));
    request.found_inf = reinterpret_cast<const float*>(std::get<2>(places));
    return request;
  }

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

  void* stream() const {
    void* found = nullptr;
    const dlpack::Device& device = plan_->device();
    const dlpack::ExchangeApi& exchange = plan_->exchange();
    if (device.type != dlpack::kCuda || exchange.current_work_stream == nullptr) return nullptr;
    if (exchange.current_work_stream(device.type, device.id, &found) != 0) {
      throw py::error_already_set();
    }
    return found;
  }

  void refresh_again(const py::list& groups, const py::dict& state, const Numbers& numbers,
                     bool fresh_is_fine) {
    const Found found = plan_->refresh(groups.ptr(), state.ptr(), numbers);
    if (found == Found::kReady || (fresh_is_fine && found == Found::kFresh)) return;
    throw std::runtime_error("the optimizer was changed by another thread during its step");
  }

  // The tables for a launch. Where they are not as they were sent, `send` is asked to make it so:
  // (bytes of the tables, bytes of the device's own, begin, end, whether a graph is captured, what
  // moved, the record it moved of or -1, counts to set) -> addresses of both pieces of memory.
  Tables ready(const Numbers& numbers, const NumberAt& number_at, const Request& request,
               const Places& places, const py::function& send) {
    if (number_at.size() != numbers.size()) throw py::value_error("number_at: one a group");
    if (request.stochastic != 0) plan_->identify();
    image_.draw(*plan_, plan_->tables(), {numbers, number_at}, request.stochastic != 0);
    auto& recounts = plan_->recounts();
    const bool grows = image_.scratch_bytes() > scratch_bytes_;
    if (image_.begin() != image_.end() || grows || !recounts.empty()) {
      const int64_t k = image_.moved_row();
      const int64_t r = k < 0 ? -1 : plan_->active()[static_cast<size_t>(k)];
      try {
        const auto [tables, scratch] = py::cast<std::pair<int64_t, int64_t>>(
            send(image_.table_bytes(), image_.scratch_bytes(), image_.begin(), image_.end(),
                 capturing(), image_.moved(), r, recounts));
        tables_ = reinterpret_cast<char*>(tables);
        scratch_ = reinterpret_cast<char*>(scratch);
      } catch (...) {
        image_.must_be_sent();
        throw;
      }
      scratch_bytes_ = std::max(scratch_bytes_, image_.scratch_bytes());
      recounts.clear();
      image_.was_sent();
    }
    return image_.at(tables_, scratch_, reinterpret_cast<Outcome*>(std::get<0>(places)));
  }

  void run(const Numbers& numbers, const NumberAt& number_at, const Request& request,
           const Places& places, const py::function& send) {
    const OnDevice current(plan_->device().id);
    const Tables tables = ready(numbers, number_at, request, places, send);
    check(cuda::reduce(tables, request, image_.items(), blocks_, stream()));
    apply_all(tables, request);
  }

  void apply_all(const Tables& tables, const Request& request) {
    void* const on = stream();
    each_stage(image_.buckets(), [&](const Bucket& bucket, int stage) {
      check(cuda::apply(tables, bucket, stage, request.reduce != 0, blocks_, on));
    });
    plan_->stepped();
  }

  std::unique_ptr<Plan> plan_;
  Image image_;
  int blocks_;
  char* tables_ = nullptr;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

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

py::dict build_info() {
  py::dict info;
#ifdef PYUPDATE_COMPILER
  info["compiler"] = PYUPDATE_COMPILER;
#endif
#ifdef PYUPDATE_FLAGS
  info["flags"] = PYUPDATE_FLAGS;
#endif
  return info;
}

}  // namespace
}  // namespace pyupdate::cuda

PYBIND11_MODULE(PYUPDATE_MODULE_NAME, m) {
  using namespace pyupdate;
  using cuda::DevicePlan;
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

  m.def("why_no_device", &cuda::why_no_device);
  m.def("digests", &cuda::digests);
  m.def("build_info", &cuda::build_info);
}
