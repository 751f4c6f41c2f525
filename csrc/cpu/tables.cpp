// SPDX-License-Identifier: Apache-2.0
// The tables of a plan as the CPU runs them: rows are added, or those of other plans, and cut into
// work.
#include <algorithm>

#include "run.h"

namespace pyupdate::cpu {

namespace {

constexpr int64_t kItemElements = kChunk;

// Elements of a wave, if its rows are no longer: p, m and v of 2^19 elements of fp32 are 6 MiB,
// which the last cache of any processor in use holds. Measured on 48 x 1024 x 1024 against AdamW's
// step in the same run: LAMB 1.67x without waves, 1.39x with them; LARS 1.28x and 0.92x.
constexpr int64_t kWaveElements = 1 << 19;

}  // namespace

void Tables::clear_rows() {
  rows.clear();
  addresses.clear();
  scalars.clear();
  layouts.clear();
}

void Tables::add_row(const Row& row, const int64_t* row_addresses, const int64_t* row_scalars) {
  rows.push_back(row);
  rows.back().chunk = rows.size() == 1 ? 0 : rows.end()[-2].chunk + chunks_of(rows.end()[-2].size);
  addresses.insert(addresses.end(), row_addresses, row_addresses + width_);
  scalars.insert(scalars.end(), row_scalars, row_scalars + scalars_);
}

Tables Tables::for_all(const std::vector<const Tables*>& others) {
  int64_t roles = 0;
  int64_t scalars = 0;
  bool averages = false;
  for (const Tables* other : others) {
    roles = std::max(roles, other->width_ - (other->averages_ ? 1 : 0));
    scalars = std::max(scalars, other->scalars_);
    averages = averages || other->averages_;
  }
  return Tables(roles + (averages ? 1 : 0), scalars, averages);
}

// A rule reads and writes the roles and scalars that it has: what wider tables have beside them is
// 0, and not looked at. An average stays the last.
void Tables::append(const Tables& other, int64_t member) {
  const auto hyper_rows_before = static_cast<int64_t>(hyper_rows.size());
  const auto hypers_before = static_cast<int64_t>(hypers.size());
  const int64_t roles = other.width_ - (other.averages_ ? 1 : 0);
  for (size_t i = 0; i < other.rows.size(); ++i) {
    Row row = other.rows[i];
    row.hyper += static_cast<int32_t>(hyper_rows_before);
    if (row.layout >= 0) row.layout = append_layout(other, row.layout);
    int64_t row_addresses[kMaxRoles] = {};
    int64_t row_scalars[kMaxScalars] = {};
    const int64_t* from = other.addresses.data() + i * static_cast<size_t>(other.width_);
    std::copy_n(from, roles, row_addresses);
    if (other.averages_) row_addresses[width_ - 1] = from[roles];
    std::copy_n(other.scalars.data() + i * static_cast<size_t>(other.scalars_), other.scalars_,
                row_scalars);
    add_row(row, row_addresses, row_scalars);
  }
  for (HyperRow hyper : other.hyper_rows) {
    hyper.offset += hypers_before;
    hyper.member = member;
    hyper_rows.push_back(hyper);
  }
  hypers.insert(hypers.end(), other.hypers.begin(), other.hypers.end());
  identities.insert(identities.end(), other.identities.begin(), other.identities.end());
  identities.resize(rows.size());  // a plan that does not round by chance has none
}

int32_t Tables::append_layout(const Tables& other, int32_t layout) {
  const auto place = static_cast<int32_t>(layouts.size());
  const int64_t* from = other.layouts.data() + layout;
  const int64_t dims = from[Layout::kDims];
  const int64_t roles = other.width_ - (other.averages_ ? 1 : 0);
  const auto length = static_cast<size_t>(Layout::length(dims, width_));
  layouts.resize(static_cast<size_t>(place) + length, 0);
  int64_t* to = layouts.data() + place;
  std::copy_n(from, Layout::length(dims, roles), to);
  if (other.averages_) {
    std::copy_n(from + Layout::length(dims, roles), dims, to + Layout::length(dims, width_ - 1));
  }
  return place;
}

void Tables::cut() {
  items_.clear();
  waves_.clear();
  int64_t filled = 0;
  int64_t wave = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (waves_.empty() || wave + rows[r].size > kWaveElements) {
      waves_.push_back(static_cast<int64_t>(items_.size()));
      filled = kItemElements + 1;  // a new item, of an empty row too
      wave = 0;
    }
    wave += rows[r].size;
    for (int64_t chunk = 0; chunk < chunks_of(rows[r].size); ++chunk) {
      const int64_t count = std::min(kChunk, rows[r].size - chunk * kChunk);
      if (filled + count > kItemElements) {
        items_.push_back(static_cast<int64_t>(r) << 32 | chunk);
        filled = 0;
      }
      filled += std::max<int64_t>(count, 64);  // a tiny row costs more than its elements
    }
  }
  items_.shrink_to_fit();
  waves_.shrink_to_fit();
}

int64_t Tables::chunks() const {
  return rows.empty() ? 0 : rows.back().chunk + chunks_of(rows.back().size);
}

int64_t Tables::elements() const {
  int64_t total = 0;
  for (const Row& row : rows) total += row.size;
  return total;
}

int64_t Tables::bytes() const {
  const auto of = [](const auto& v) { return static_cast<int64_t>(v.capacity() * sizeof(v[0])); };
  return of(rows) + of(addresses) + of(scalars) + of(hyper_rows) + of(hypers) + of(layouts) +
         of(identities) + of(items_) + of(waves_) + of(chunk_sums_) + of(row_sums_);
}

}  // namespace pyupdate::cpu
