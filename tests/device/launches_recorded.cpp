// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/launch.h without kernels: a launch looks at nothing and succeeds, so that the time of a
// step is that of the host. With PYUPDATE_TEST_NO_LAUNCH in the environment every launch fails, by
// the error of that number.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

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

// The last launches, oldest first: the kernel, its stage, its storage (-1: of any), its items.
struct Recorded {
  const char* kernel;
  int stage, storage;
  int64_t items;
};
constexpr size_t kKept = 256;
std::vector<Recorded> recorded;

Launched launched(const char* kernel, int stage = 0, int storage = -1, int64_t items = 0) {
  if (recorded.size() == kKept) recorded.clear();
  recorded.push_back({kernel, stage, storage, items});
  const char* error = std::getenv("PYUPDATE_TEST_NO_LAUNCH");
  return {error == nullptr ? 0 : std::atoi(error), kernel, "CUDA's own words"};
}

}  // namespace

int rule_count() { return Rules::size; }
const RuleInfo& rule_info(int rule) { return infos_of(Rules{})[rule]; }

Launched reduce(const Tables&, const Request&, int64_t items, int, void*) {
  return launched("reduce", 0, -1, items);
}
Launched finish(const Tables&, const Request&, double*, int64_t, uint32_t*, void*) {
  return launched("finish");
}
Launched apply(const Tables&, const Bucket& bucket, int stage, bool, int, void*) {
  return launched(rule_info(bucket.rule).name, stage, bucket.storage, bucket.end - bucket.begin);
}

}  // namespace pyupdate::cuda

// A line each, of what was launched since it was asked last. Longer than `size` is cut.
extern "C" __attribute__((visibility("default"))) void recorded_launches(char* text, int64_t size) {
  std::string found;
  for (const auto& [kernel, stage, storage, items] : pyupdate::cuda::recorded) {
    found += std::string(kernel) + " " + std::to_string(stage) + " " + std::to_string(storage) +
             " " + std::to_string(items) + "\n";
  }
  pyupdate::cuda::recorded.clear();
  std::strncpy(text, found.c_str(), static_cast<size_t>(size));
}
