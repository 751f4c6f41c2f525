// SPDX-License-Identifier: Apache-2.0
// A plan whose tensors are on a device that nobody waits for: what it does in the place of reading
// step counts.
//
// Rows of one group that have made the same steps share a hyper row. Here the counts stand on the
// device, which alone knows what was skipped, so a row has a history instead: all rows that were
// made together begin with one, and a step changes that of every row in it alike. A row that comes
// with state of unknown age has one of its own. Equal histories mean equal counts, whatever was
// skipped.
#include <algorithm>
#include <map>
#include <tuple>

#include "refresh.h"

namespace pyupdate {

namespace {

// Of a rule without torch's counter, where a buffer was found: it counts as one step.
constexpr uint64_t kFound = 0xb7e81f42d05a693dull;

}  // namespace

// Called before the state that was found is held.
void Plan::note_history(size_t r, const GroupRule& group, PyObject* const* found) {
  uint64_t& history = histories_[r];
  PyObject* const* held = &held_[r * static_cast<size_t>(columns())];
  if (group.has_step) {
    const auto from = static_cast<size_t>(states_);
    const size_t to = from + 1 + group.scalar_keys.size();
    if (std::equal(found + from, found + to, held + from)) return;
    history = kFresh;
    if (found[from] != nullptr && !made_) be_of_unknown_age(r);
    return;
  }
  if (std::equal(found, found + group.state_keys.size(), held)) return;
  const bool counts = found[0] != nullptr && !made_;
  history = counts ? kFound : kFresh;
  recounts_.emplace_back(static_cast<int32_t>(r), counts ? 1.0 : 0.0);
}

// Counters that were made together share one version counter (pytorch/rows.py), so after a step the
// version of one of them stands for all rows of its history.
void Plan::watch_counts() {
  watched_.clear();
  for (const Source& source : sources_) {
    if (source.rows < 2 || !group(source.group).has_step) continue;
    const auto r = static_cast<size_t>(active_[static_cast<size_t>(source.row)]);
    PyObject* step = held_[r * static_cast<size_t>(columns()) + static_cast<size_t>(states_)];
    watched_.push_back({py::reinterpret_borrow<py::object>(step), version(step), histories_[r]});
  }
}

void Plan::stepped() {
  count_step();
  const py::object written = to_bump();
  if (!written || !py::reinterpret_steal<py::object>(
                      PyObject_CallOneArg(interface_.increment_version, written.ptr()))) {
    throw py::error_already_set();
  }
  settle();
  watch_counts();
}

// Somebody has written into a counter since: its rows are of unknown age.
void Plan::part_written_counts() {
  for (Watched& watched : watched_) {
    const int64_t now = version(watched.step.ptr());
    if (now == watched.version) continue;
    watched.version = now;
    for (size_t r = 0; r < records_.size(); ++r) {
      if (histories_[r] == watched.history) be_of_unknown_age(r);
    }
  }
}

void Plan::be_of_unknown_age(size_t r) {
  histories_[r] = kFresh;
  mix(&histories_[r], ++serial_);  // which no step has had or will have
}

// Where the count of an active row stands.
int64_t Plan::count_at(size_t k) const {
  const int64_t r = active_[k];
  const auto after = std::upper_bound(group_ends_.begin(), group_ends_.end(), r);
  const auto g = static_cast<size_t>(after - group_ends_.begin());
  if (groups_[g].has_step) return tables_.rows[k].step;
  return (counts_ + r * static_cast<int64_t>(sizeof(double))) | 1;
}

void Plan::fill_sources(const std::vector<std::vector<double>>& numbers) {
  using Key = std::tuple<size_t, int64_t, uint64_t>;
  std::map<Key, int32_t> known;
  Key last{SIZE_MAX, -1, 0};
  size_t group = 0;
  int32_t index = -1;
  int64_t offset = 0;
  tables_.hyper_rows.clear();
  sources_.clear();
  for (size_t k = 0; k < active_.size(); ++k) {
    const auto r = static_cast<size_t>(active_[k]);
    while (static_cast<int32_t>(r) >= group_ends_[group]) ++group;
    const Key key{group, storages_[r], histories_[r]};
    if (key != last) {
      const auto [place, is_new] =
          known.try_emplace(key, static_cast<int32_t>(tables_.hyper_rows.size()));
      last = key;
      index = place->second;
      if (is_new) {
        const GroupRule& rule = groups_[group];
        tables_.hyper_rows.push_back({rule.rule, storages_[r], offset, 0, numbers[group][0]});
        sources_.push_back({static_cast<int64_t>(k), static_cast<int64_t>(group), 0});
        offset += rule.hypers + rule.counted;
      }
    }
    ++sources_[static_cast<size_t>(index)].rows;
    tables_.rows[k].hyper = index;
  }
  tables_.hypers.resize(static_cast<size_t>(offset));
}

}  // namespace pyupdate
