// SPDX-License-Identifier: Apache-2.0
#include "sent.h"

#include <pybind11/cast.h>

#include <algorithm>
#include <memory>
#include <string>

#include "failure.h"
#include "runtime.h"

namespace pyupdate::cuda {

namespace {

// Blocks that are resident on a multiprocessor: of 256 threads with 64 registers each.
constexpr int kBlocks = 4;

}  // namespace

Request request_of(const Wanted& wanted, const Places& places) {
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

void check(const Launched& launched) {
  if (launched.code == 0) return;
  throw failure(std::string("CUDA kernel '") + launched.kernel + "' could not be launched",
                launched.code, launched.text);
}

void* stream_of(const Plan& plan) {
  void* found = nullptr;
  const dlpack::Device& device = plan.device();
  const dlpack::ExchangeApi& exchange = plan.exchange();
  if (device.type != dlpack::kCuda || exchange.current_work_stream == nullptr) return nullptr;
  if (exchange.current_work_stream(device.type, device.id, &found) != 0) {
    throw py::error_already_set();
  }
  return found;
}

int most_blocks(int device) { return kBlocks * std::max(1, multiprocessors(device)); }

// ----- tables that stand on a device

Tables Sent::ready(std::span<const Drawn> plans, cpu::Tables& tables,
                   std::span<const Member> members, bool stochastic, Outcome* outcome,
                   const py::function& send) {
  for (const auto& [plan, numbers] : plans) {
    if (numbers.at.size() != numbers.values.size()) throw py::value_error("number_at: one a group");
  }
  image_.draw(plans, tables, members, stochastic);
  const bool grows = image_.scratch_bytes() > scratch_bytes_;
  const bool recounts = std::any_of(plans.begin(), plans.end(), [](const Drawn& drawn) {
    return !drawn.plan.recounts().empty();
  });
  if (image_.begin() == image_.end() && !grows && !recounts) return this->tables(outcome);
  int64_t moved = -1;
  py::list counts;
  int64_t rows = 0, records = 0;  // of the plans before
  for (const auto& [plan, ignored] : plans) {
    const int64_t k = image_.moved_row() - rows;
    const auto own = static_cast<int64_t>(plan.active().size());
    if (k >= 0 && k < own) moved = records + plan.active()[static_cast<size_t>(k)];
    for (const auto& [r, count] : plan.recounts()) {
      counts.append(py::make_tuple(records + r, count));
    }
    rows += own;
    records += plan.record_count();
  }
  try {
    const auto [to, scratch] = py::cast<std::pair<int64_t, int64_t>>(
        send(image_.table_bytes(), image_.scratch_bytes(), image_.begin(), image_.end(),
             is_capturing(stream_of(plans[0].plan)), image_.moved(), moved, counts));
    tables_ = reinterpret_cast<char*>(to);
    scratch_ = reinterpret_cast<char*>(scratch);
  } catch (...) {
    image_.must_be_sent();
    throw;
  }
  scratch_bytes_ = std::max(scratch_bytes_, image_.scratch_bytes());
  for (const auto& [plan, ignored] : plans) plan.recounts().clear();
  image_.was_sent();
  return this->tables(outcome);
}

void Sent::reduce(const Tables& tables, const Request& request, void* stream) const {
  check(cuda::reduce(tables, request, image_.items(), blocks_, stream));
}

void Sent::apply(const Tables& tables, bool reduced, void* stream) const {
  each_stage(image_.buckets(), [&](const Bucket& bucket, int stage) {
    check(cuda::apply(tables, bucket, stage, reduced, blocks_, stream));
  });
}

void Sent::copy(int64_t to, int64_t begin, int64_t end) const {
  if (begin < 0 || end > image_.table_bytes() || begin > end) throw py::index_error("bytes");
  std::copy(image_.data() + begin, image_.data() + end, reinterpret_cast<char*>(to));
}

// ----- several plans at once

bool Joint::step(std::span<const Step> steps, Outcome* outcomes, const py::function& send) {
  std::vector<std::unique_ptr<Busy>> busy;
  std::vector<std::unique_ptr<GradientsHeld>> held;
  std::vector<const Plan*> plans;
  std::vector<const cpu::Tables*> all;
  for (const Step& step : steps) {
    busy.push_back(std::make_unique<Busy>(step.plan));
    held.push_back(std::make_unique<GradientsHeld>(step.plan));
    if (step.request.stochastic != steps[0].request.stochastic) return false;
    const Found found = step.plan.refresh(step.groups.ptr(), step.state.ptr(), step.numbers);
    if (found != Found::kReady) return false;
    plans.push_back(&step.plan);
    all.push_back(&step.plan.tables());
  }
  if (plans.empty() || !Plan::apart(plans)) return false;

  const bool stochastic = steps[0].request.stochastic != 0;
  cpu::Tables tables = cpu::Tables::for_all(all);
  std::vector<Drawn> drawn;
  std::vector<Member> members;
  Request any;
  for (const Step& step : steps) {
    if (stochastic) step.plan.identify();
    tables.append(step.plan.tables(), static_cast<int64_t>(members.size()));
    drawn.push_back({step.plan, {step.numbers, step.number_at}});
    members.push_back({step.request, static_cast<int64_t>(tables.rows.size())});
    any.reduce |= step.request.reduce;
  }
  const OnDevice current(device_);
  void* const stream = stream_of(steps[0].plan);
  const Tables sent = sent_.ready(drawn, tables, members, stochastic, outcomes, send);
  sent_.reduce(sent, any, stream);
  sent_.apply(sent, any.reduce != 0, stream);
  for (const Step& step : steps) step.plan.stepped();
  return true;
}

}  // namespace pyupdate::cuda
