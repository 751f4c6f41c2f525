// SPDX-License-Identifier: Apache-2.0
// Runs a plan on the CPU: one parallel region a step, over a flat list of (row, chunk).
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../plan.h"
#include "../tagged.h"
#include "passes.h"

namespace pyupdate::cpu {

inline int64_t chunks_of(int64_t size) {
  return std::max<int64_t>(1, (size + kChunk - 1) / kChunk);
}

// The tables of plan.h with what this back end needs beside them: the list of work and the sums.
class Tables {
 public:
  // `averages`: whether the last of the `width` addresses of a row is that of its average, of the
  // compute type; 0 where it has none.
  explicit Tables(int64_t width, int64_t scalars = 0, bool averages = false)
      : width_(width), scalars_(scalars), averages_(averages) {}

  // Rows are added one by one; `addresses` are `width` of them, `scalars` those of the scalars,
  // each said as Row::step is.
  void clear_rows();
  void add_row(const Row& row, const int64_t* addresses, const int64_t* scalars);
  // Several models updated as one plan: tables that are wide enough for these, and the rows of one
  // of them behind those that are there, as the rows of `member`.
  static Tables for_all(const std::vector<const Tables*>& others);
  void append(const Tables& other, int64_t member);
  // Cuts the rows into work; call it after rows were added, before `run`.
  void cut();

  int64_t width() const { return width_; }
  int64_t scalars_width() const { return scalars_; }
  bool averages() const { return averages_; }
  int64_t bytes() const;
  int64_t elements() const;
  int64_t chunks() const;

  std::vector<Row> rows;
  std::vector<int64_t> addresses;
  std::vector<int64_t> scalars;
  std::vector<HyperRow> hyper_rows;
  std::vector<double> hypers;
  std::vector<int64_t> layouts;
  // Which parameter a row is, wherever it stands: its group's index x 2^32 + its position there.
  // Only for stochastic rounding, else empty.
  std::vector<int64_t> identities;

 private:
  friend class Region;
  int32_t append_layout(const Tables& other, int32_t layout);
  int64_t width_;
  int64_t scalars_;
  bool averages_;
  // Work: runs of chunks of about kChunk elements. An item is (row << 32 | chunk of the row) where
  // the run starts; it ends where the next one starts.
  std::vector<int64_t> items_;
  // The items at which a wave begins: rows that a rule of several stages takes through all of them
  // before it goes on, while their memory is still in the last cache.
  std::vector<int64_t> waves_;
  std::vector<double> chunk_sums_;
  std::vector<double> row_sums_;
};

struct Request {
  bool reduce = false;          // take the norm and look for inf and nan
  bool skip_nonfinite = false;  // write nothing if there are any
  bool finite_norm = false;     // write nothing if the norm is not finite, whoever made it so
  bool inf_norm = false;        // the norm is the largest |gradient| instead of the 2-norm
  bool apply = true;
  double unscale = 1.0;
  double max_norm = -1.0;  // no clip below zero
  // Bound of every multiplied gradient element, infinite for none.
  double clip_value = std::numeric_limits<double>::infinity();
  double ema_weight = 0.0;  // of the new parameter in its average
  double multiplier = 1.0;  // used as it is if `reduce` is off
  bool stochastic = false;  // halves are rounded by chance, drawn with this seed
  int64_t seed = 0;
  int threads = 1;
  bool plain_threads = false;  // made for this region: see parallel.h
  // Called by the calling thread once it is certain that something will be written, while the
  // others may already write.
  void (*before_writing)(void* context) = nullptr;
  void* context = nullptr;
};

struct Outcome {
  double norm = -1.0;  // of the unscaled gradients, -1 if it was not taken
  bool nonfinite = false;
  bool skipped = false;
  double multiplier = 1.0;
};

// One of the plans that run in one region: a norm, a multiplier and a skip of its own. What a
// region has once (threads, apply, before_writing) is taken from the first.
struct Member {
  Request request;
  size_t rows_end;  // index behind its last row in the tables
  Outcome outcome;
};

Outcome run(const Passes& passes, Tables& tables, const Request& request);

// Leaves the outcomes in the members; at least one.
void run(const Passes& passes, Tables& tables, std::vector<Member>& members);

// The sums of squares of the unscaled gradients (inf norm: the largest of their magnitudes), row by
// row, for a norm over several plans.
Outcome reduce_rows(const Passes& passes, Tables& tables, const Request& request,
                    std::vector<double>& sums);

}  // namespace pyupdate::cpu
