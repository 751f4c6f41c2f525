// SPDX-License-Identifier: Apache-2.0
// What the host sends of a plan: one piece of memory with all tables of launch.h that it writes, as
// they stand on the device. A step draws it anew and learns which part is not as it was sent.
#pragma once
#include <stdint.h>

#include <span>
#include <string>
#include <vector>

#include "../refresh.h"
#include "launch.h"

namespace pyupdate::cuda {

// The numbers of the groups: values, and where one stands on the device instead (0: nowhere).
struct GroupNumbers {
  const std::vector<std::vector<double>>& values;
  const std::vector<std::vector<int64_t>>& at;
};

// A plan whose rows stand in the tables of an image, behind those of the plans before it.
struct Drawn {
  Plan& plan;
  GroupNumbers numbers;
};

// The buckets of rows of these kinds (rule * cpu::kStorages + storage), by their first rows;
// without items.
std::vector<Bucket> buckets_of(const std::vector<int64_t>& kinds);

// What a step launches behind its reduce: every stage of every bucket.
template <class F>
void each_stage(const std::vector<Bucket>& buckets, F&& launch) {
  for (const Bucket& bucket : buckets) {
    for (int stage = 0; stage < rule_info(bucket.rule).stages; ++stage) launch(bucket, stage);
  }
}

class Image {
 public:
  // Draws the tables of plans that were refreshed just now. `tables` has the rows of all of them;
  // `members` is empty where there is one plan.
  void draw(std::span<const Drawn> plans, cpu::Tables& tables, std::span<const Member> members,
            bool stochastic);

  // The bytes that are not as they were sent; none where begin == end.
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  // The first thing that was found to be another one, in words, and the active row, -1 for none.
  const std::string& moved() const { return moved_; }
  int64_t moved_row() const { return moved_row_; }

  // Sizes in bytes that the two pieces of device memory must have.
  int64_t table_bytes() const { return static_cast<int64_t>(bytes_.size()); }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  const char* data() const { return bytes_.data(); }
  void was_sent();
  void must_be_sent() { all_ = true; }

  // The tables for a launch, once everything was sent.
  Tables at(char* tables, char* scratch, Outcome* outcome) const;
  const std::vector<Bucket>& buckets() const { return buckets_; }
  int64_t items() const { return static_cast<int64_t>(items_.size()); }

 private:
  // In the order of how often they change; together they are the piece of memory.
  enum Section {
    kNumbers,
    kNumberAt,
    kMembers,
    kAddresses,
    kRows,
    kScalars,
    kHyperRows,
    kSources,
    kIdentities,
    kItems,
    kSections
  };
  void gather(std::span<const Drawn> plans, const cpu::Tables& tables);
  void lay_out(const int64_t (&sizes)[kSections]);
  void put(Section section, const void* from, const char* moved, int64_t width);
  void cut(const cpu::Tables& tables);
  // The device's own tables; returns how many bytes they need.
  int64_t place(char* scratch, Tables* made) const;

  std::vector<char> bytes_;
  int64_t offset_[kSections + 1] = {};
  int64_t size_[kSections] = {};
  int64_t begin_ = 0, end_ = 0;
  bool all_ = true;
  std::string moved_;
  int64_t moved_row_ = -1;
  bool several_ = false;  // whether there are members
  bool stochastic_ = false;
  std::vector<int64_t> items_;
  std::vector<Bucket> buckets_;
  std::vector<int64_t> kinds_, sizes_;  // of the rows: what the work was cut for
  std::vector<int64_t> first_;          // of each group of a plan, its numbers' place
  std::vector<Row> rows_;
  std::vector<double> numbers_;
  std::vector<int64_t> number_at_;
  std::vector<HyperSource> sources_;
  int64_t scratch_bytes_ = 0;
  Tables shape_ = {};  // its counts
  int64_t hypers_ = 0;
  int64_t records_ = 0;
};

}  // namespace pyupdate::cuda
