// SPDX-License-Identifier: Apache-2.0
// What is compiled in, and the launches of the apply pass.
#include <algorithm>

#include "apply.cuh"
#include "apply_table.h"

namespace pyupdate::cuda {

// Each is in its storage's build of apply.cu.
template <>
const ApplyRow* apply_rows<0>();
template <>
const ApplyRow* apply_rows<1>();
template <>
const ApplyRow* apply_rows<2>();
template <>
const ApplyRow* apply_rows<3>();
template <>
const ApplyRow* apply_rows<4>();
template <>
const ApplyRow* apply_rows<5>();
static_assert(Storages::size == 6);

namespace {

template <class Rule, class... Stage>
constexpr RuleInfo info_of(List<Stage...>) {
  static_assert(Rule::kStates <= kMaxStates && Rule::kScalars <= kMaxScalars);
  static_assert(sizeof...(Stage) <= kMaxStages && Rule::kPerTensor <= kMaxPerTensor);
  RuleInfo info{Rule::kName,    Rule::kDigest, Rule::kStates,    Rule::kScalars,   Rule::kCounted,
                Rule::kNumbers, Rule::kHypers, Rule::kPerTensor, sizeof...(Stage), {}};
  int stage = 0;
  ((info.stage[stage++] = {Stage::kReads, Stage::kWrites, Stage::kSums}), ...);
  return info;
}

template <class... Rule>
struct InfoTable {
  static constexpr RuleInfo rows[] = {info_of<Rule>(typename Rule::Stages{})...};
};
template <class... Rule>
constexpr const RuleInfo* info_table(List<Rule...>) {
  return InfoTable<Rule...>::rows;
}

const ApplyRow* rows_of(int storage) {
  static const ApplyRow* const rows[] = {apply_rows<0>(), apply_rows<1>(), apply_rows<2>(),
                                         apply_rows<3>(), apply_rows<4>(), apply_rows<5>()};
  return rows[storage];
}

}  // namespace

int rule_count() { return Rules::size; }
const RuleInfo& rule_info(int rule) { return info_table(Rules{})[rule]; }

Launched apply(const Tables& tables, const Bucket& bucket, int stage, bool backwards, int blocks,
               void* stream) {
  const int64_t items = bucket.end - bucket.begin;
  const char* name = rule_info(bucket.rule).name;
  if (items <= 0) return {0, name, ""};
  return launched(name, rows_of(bucket.storage)[bucket.rule].stage[stage],
                  std::min<int64_t>(items, blocks), stream,
                  Apply{tables, bucket.begin, bucket.end, backwards});
}

}  // namespace pyupdate::cuda
