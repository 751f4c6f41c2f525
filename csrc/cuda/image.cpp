// SPDX-License-Identifier: Apache-2.0
#include "image.h"

#include <algorithm>
#include <cstring>

namespace pyupdate::cuda {

namespace {

constexpr int64_t kAligned = 16;

int64_t rounded(int64_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

template <class T>
int64_t bytes_of(const std::vector<T>& v) {
  return static_cast<int64_t>(v.size() * sizeof(T));
}

}  // namespace

// ----- work

std::vector<Bucket> buckets_of(const std::vector<int64_t>& kinds) {
  std::vector<Bucket> buckets;
  std::vector<int64_t> known;
  for (const int64_t kind : kinds) {
    if (std::find(known.begin(), known.end(), kind) != known.end()) continue;
    known.push_back(kind);
    buckets.push_back({static_cast<int32_t>(kind / cpu::kStorages),
                       static_cast<int32_t>(kind % cpu::kStorages), 0, 0});
  }
  return buckets;
}

// The rows of a bucket one after the other, chunk by chunk.
void Image::cut(const cpu::Tables& tables) {
  std::vector<int64_t> kinds, sizes;
  for (const Row& row : tables.rows) {
    const HyperRow& hyper = tables.hyper_rows[static_cast<size_t>(row.hyper)];
    kinds.push_back(hyper.rule * cpu::kStorages + hyper.storage);
    sizes.push_back(row.size);
  }
  if (kinds == kinds_ && sizes == sizes_) return;
  kinds_.swap(kinds);
  sizes_.swap(sizes);
  items_.clear();
  buckets_ = buckets_of(kinds_);
  for (Bucket& bucket : buckets_) {
    bucket.begin = static_cast<int64_t>(items_.size());
    for (size_t k = 0; k < kinds_.size(); ++k) {
      if (kinds_[k] != bucket.rule * cpu::kStorages + bucket.storage) continue;
      for (int64_t chunk = 0; chunk < chunks_of(sizes_[k]); ++chunk) {
        items_.push_back(static_cast<int64_t>(k) << 32 | chunk);
      }
    }
    bucket.end = static_cast<int64_t>(items_.size());
  }
}

// ----- drawing

void Image::lay_out(const int64_t (&sizes)[kSections]) {
  if (std::equal(sizes, sizes + kSections, size_)) return;
  if (!all_) moved_ = "the set of parameters that have a gradient, or of step counts";
  all_ = true;
  std::copy(sizes, sizes + kSections, size_);
  int64_t offset = 0;
  for (int section = 0; section < kSections; ++section) {
    offset_[section] = offset;
    offset += rounded(sizes[section]);
  }
  offset_[kSections] = offset;
  bytes_.assign(static_cast<size_t>(offset), 0);
}

// Writes a section where it is another one. `width` 8-byte words of it are one row's, 0: nobody's.
void Image::put(Section section, const void* from, const char* moved, int64_t width) {
  char* stands = bytes_.data() + offset_[section];
  const auto size = static_cast<size_t>(size_[section]);
  if (size == 0 || std::memcmp(stands, from, size) == 0) return;
  if (moved_.empty()) {
    moved_ = moved;
    const auto* now = static_cast<const char*>(from);
    const auto at = std::mismatch(now, now + size, stands).first - now;
    if (width > 0) moved_row_ = at / 8 / width;
    if (section == kAddresses) {
      const int64_t role = at / 8 % width;
      moved_ = role == kParam                                     ? "the memory of the parameter"
               : role == kGrad                                    ? "the memory of the gradient"
               : shape_.averages != 0 && role + 1 == shape_.width ? "the memory of the average"
                                                                  : "the memory of the state";
    }
  }
  std::memcpy(stands, from, size);
  begin_ = std::min(begin_, offset_[section]);
  end_ = std::max(end_, offset_[section + 1]);
}

// What the tables of the plans leave to the device: numbers, counts, and where they come from.
void Image::gather(std::span<const Drawn> plans, const cpu::Tables& tables) {
  numbers_.clear();
  number_at_.clear();
  sources_.clear();
  rows_ = tables.rows;
  records_ = 0;
  int64_t rows = 0;  // of the plans before
  for (const auto& [plan, numbers] : plans) {
    first_.clear();
    for (size_t g = 0; g < numbers.values.size(); ++g) {
      first_.push_back(static_cast<int64_t>(numbers_.size()));
      for (size_t i = 1; i < numbers.values[g].size(); ++i) {
        const int64_t at = i < numbers.at[g].size() ? numbers.at[g][i] : 0;
        numbers_.push_back(at == 0 ? numbers.values[g][i] : 0.0);
        number_at_.push_back(at);
      }
    }
    for (const Plan::Source& source : plan.sources()) {
      sources_.push_back({rows + source.row, first_[static_cast<size_t>(source.group)]});
    }
    const size_t own = plan.active().size();
    for (size_t k = 0; k < own; ++k) rows_[static_cast<size_t>(rows) + k].step = plan.count_at(k);
    rows += static_cast<int64_t>(own);
    records_ += plan.record_count();
  }
}

void Image::draw(std::span<const Drawn> plans, cpu::Tables& tables, std::span<const Member> members,
                 bool stochastic) {
  gather(plans, tables);
  cut(tables);
  if (!stochastic) tables.identities.clear();

  shape_.row_count = static_cast<int64_t>(rows_.size());
  shape_.width = tables.width();
  shape_.scalars_width = tables.scalars_width();
  shape_.hyper_count = static_cast<int64_t>(tables.hyper_rows.size());
  shape_.chunks = tables.chunks();
  shape_.averages = tables.averages() ? 1 : 0;
  shape_.per_tensor = 0;
  for (const HyperRow& hyper : tables.hyper_rows) {
    const int64_t wanted = rule_info(static_cast<int>(hyper.rule)).per_tensor;
    shape_.per_tensor = std::max(shape_.per_tensor, wanted);
  }
  hypers_ = static_cast<int64_t>(tables.hypers.size());
  shape_.member_count = static_cast<int64_t>(plans.size());
  several_ = !members.empty();
  stochastic_ = stochastic;

  Tables unplaced;
  scratch_bytes_ = place(nullptr, &unplaced);

  moved_.clear();
  moved_row_ = -1;
  lay_out({bytes_of(numbers_), bytes_of(number_at_), static_cast<int64_t>(members.size_bytes()),
           bytes_of(tables.addresses), bytes_of(rows_), bytes_of(tables.scalars),
           bytes_of(tables.hyper_rows), bytes_of(sources_), bytes_of(tables.identities),
           bytes_of(items_)});
  begin_ = table_bytes();
  end_ = 0;
  put(kNumbers, numbers_.data(), "a number of a group (lr, betas, weight_decay ...)", 0);
  put(kNumberAt, number_at_.data(), "the tensor of a group's number", 0);
  put(kMembers, members.data(), "what one of the models is asked for (max_norm, a scale ...)", 0);
  put(kAddresses, tables.addresses.data(), "memory", tables.width());
  put(kRows, rows_.data(), "the size or the step counter of the parameter",
      static_cast<int64_t>(sizeof(Row) / 8));
  put(kScalars, tables.scalars.data(), "the scalar state of the parameter",
      std::max<int64_t>(1, tables.scalars_width()));
  put(kHyperRows, tables.hyper_rows.data(), "the sign or the rule of a group", 0);
  put(kSources, sources_.data(), "which parameters have made the same steps", 0);
  put(kIdentities, tables.identities.data(), "the place of the parameter in its group", 1);
  put(kItems, items_.data(), "the sizes of the parameters", 0);
  if (all_) {
    begin_ = 0;
    end_ = table_bytes();
    if (moved_.empty()) moved_ = "everything, in a first step";
  }
  if (end_ <= begin_) begin_ = end_ = 0;
}

void Image::was_sent() {
  all_ = false;
  begin_ = end_ = 0;
}

// ----- on the device

Tables Image::at(char* tables, char* scratch, Outcome* outcome) const {
  Tables made = shape_;
  const auto from = [&](Section section) -> void* { return tables + offset_[section]; };
  made.numbers = static_cast<const double*>(from(kNumbers));
  made.number_at = static_cast<const int64_t*>(from(kNumberAt));
  made.addresses = static_cast<const int64_t*>(from(kAddresses));
  made.rows = static_cast<const Row*>(from(kRows));
  made.scalars = static_cast<const int64_t*>(from(kScalars));
  made.hyper_rows = static_cast<HyperRow*>(from(kHyperRows));
  made.sources = static_cast<const HyperSource*>(from(kSources));
  made.identities = stochastic_ ? static_cast<const int64_t*>(from(kIdentities)) : nullptr;
  made.items = static_cast<const int64_t*>(from(kItems));
  made.members = several_ ? static_cast<const Member*>(from(kMembers)) : nullptr;
  place(scratch, &made);
  made.outcome = outcome;
  return made;
}

// What must be zero between launches comes first, where no other size can move it.
int64_t Image::place(char* scratch, Tables* made) const {
  int64_t offset = 0;
  const auto next = [&](int64_t bytes) -> void* {
    void* at = scratch + offset;
    offset += rounded(bytes);
    return at;
  };
  const int64_t members = shape_.member_count;
  made->tickets = static_cast<uint32_t*>(next((1 + members) * int64_t{sizeof(uint32_t)}));
  made->row_tickets = static_cast<uint32_t*>(next(records_ * int64_t{sizeof(uint32_t)}));
  made->control = static_cast<Control*>(next(members * int64_t{sizeof(Control)}));
  made->grad_sums = static_cast<double*>(next(records_ * int64_t{sizeof(double)}));
  made->row_sums = static_cast<double*>(next(shape_.row_count * shape_.per_tensor * 8));
  made->hypers = static_cast<double*>(next(hypers_ * int64_t{sizeof(double)}));
  const int64_t width = std::max<int64_t>(1, shape_.per_tensor);
  made->chunk_sums = static_cast<double*>(next(shape_.chunks * width * 8));
  return offset;
}

}  // namespace pyupdate::cuda
