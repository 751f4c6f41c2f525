// SPDX-License-Identifier: Apache-2.0
// The apply kernels of one storage, for every stage of every rule. Built once for each storage,
// with PYUPDATE_STORAGE its index in Storages; launch.cu brings the tables together.
#include "apply.cuh"
#include "apply_table.h"

namespace pyupdate::cuda {
namespace {

template <int index, class First, class... Rest>
constexpr auto storage_at(List<First, Rest...>) {
  if constexpr (index == 0) {
    return First{};
  } else {
    return storage_at<index - 1>(List<Rest...>{});
  }
}
using Stored = decltype(storage_at<PYUPDATE_STORAGE>(Storages{}));

template <class Rule, class... Stage, int... index>
constexpr ApplyRow apply_row(List<Stage...>, std::integer_sequence<int, index...>) {
  return {{apply_kernel<Rule, Stage, index, Stored>...}};
}

template <class... Rule>
struct ApplyTable {
  static constexpr ApplyRow rows[] = {apply_row<Rule>(
      typename Rule::Stages{}, std::make_integer_sequence<int, Rule::Stages::size>{})...};
};
template <class... Rule>
constexpr const ApplyRow* apply_table(List<Rule...>) {
  return ApplyTable<Rule...>::rows;
}

}  // namespace

template <>
const ApplyRow* apply_rows<PYUPDATE_STORAGE>() {
  return apply_table(Rules{});
}

}  // namespace pyupdate::cuda
