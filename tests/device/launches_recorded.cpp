// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch.h without kernels: a launch looks at nothing and succeeds, so that the time of a
// step is that of the host. With PYUPDATE_TEST_NO_LAUNCH in the environment every launch fails, by
// the error of that number.
#include <cstdlib>

#include "cuda/launch.h"
#include "rules_generated.h"

namespace pyupdate::cuda {

namespace {

template <class Rule, class... Stage>
RuleInfo info_of(List<Stage...>) {
  RuleInfo info{Rule::kName,
                Rule::kDigest,
                Rule::kStates,
                Rule::kScalars,
                Rule::kCounted,
                Rule::kNumbers,
                Rule::kHypers,
                Rule::kPerTensor,
                static_cast<int>(sizeof...(Stage)),
                {}};
  int stage = 0;
  ((info.stage[stage++] = {Stage::kReads, Stage::kWrites, Stage::kSums}), ...);
  return info;
}

template <class... Rule>
const RuleInfo* infos_of(List<Rule...>) {
  static const RuleInfo infos[] = {info_of<Rule>(typename Rule::Stages{})...};
  return infos;
}

Launched launched(const char* kernel) {
  const char* error = std::getenv("PYUPDATE_TEST_NO_LAUNCH");
  return {error == nullptr ? 0 : std::atoi(error), kernel, "CUDA's own words"};
}

}  // namespace

int rule_count() { return Rules::size; }
const RuleInfo& rule_info(int rule) { return infos_of(Rules{})[rule]; }

Launched reduce(const Tables&, const Request&, int64_t, int, void*) { return launched("reduce"); }
Launched finish(const Tables&, const Request&, double*, int64_t, uint32_t*, void*) {
  return launched("finish");
}
Launched apply(const Tables&, const Bucket& bucket, int, bool, int, void*) {
  return launched(rule_info(bucket.rule).name);
}

}  // namespace pyupdate::cuda
