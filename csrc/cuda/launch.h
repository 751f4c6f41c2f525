// SPDX-License-Identifier: Apache-2.0
// The CUDA passes as their caller sees them: tables in device memory, and functions that launch.
// No framework and no CUDA header is needed to include this file.
//
// A step is, on one stream and without ever waiting for the device:
//
//   reduce(...)   one launch, whatever the storages: looks for inf and nan and takes the norm where
//                 asked to. Its last block makes the multiplier and the skip, counts the step, and
//                 runs each rule's prepare, one thread a hyper row. A plain step needs it too, for
//                 that tail alone: a launch of one block over no items.
//   apply(...)    one launch a bucket and stage: `bucket` is a rule and a storage. Stages of a
//   bucket
//                 in order, buckets in any. Rows of one bucket may be aligned or not: a kernel sees
//                 it from the addresses.
//
// The lr, the scale of a scaler, what others found (found_inf), step counts, scalars, multiplier
// and skip are read and written in device memory, so a step can be captured in a graph and
// replayed. All tables belong to the caller, who may send them anew, in the order of the stream and
// not while it is captured. What is passed by value (Request, Bucket, the pointers of Tables) a
// capture keeps.
//
// Bits are those of the cpu back end: reduce.h's order, element.h's body, the same generated text.
#pragma once
#include <stdint.h>

#include <limits>

#include "../plan.h"
#include "../types.h"

namespace pyupdate::cuda {

// What prepare takes for a hyper row: its rule's numbers without the step, in the rule's order.
// Its count and its counted scalars are read from row `row`, one of those that have this hyper row;
// where that row has no step counter (Row::step == 0), HyperRow::step is the plan's own count.
struct HyperSource {
  int64_t row;
  int64_t numbers;  // offset of the first one in Tables::numbers and number_at
};

// What a step did, for the host to read when it wants to. The floats are 0 or 1; found_inf is what
// torch's GradScaler reads.
struct Outcome {
  double norm;  // of the unscaled gradients, -1 if it was not taken
  double multiplier;
  float found_inf;  // an inf or nan in the gradients, or *Request::found_inf was not 0
  float skipped;
};

struct Request {
  // Not 0: what the flags of cpu/run.h's Request say.
  int32_t reduce = 0;
  int32_t skip_nonfinite = 0;
  int32_t finite_norm = 0;
  int32_t inf_norm = 0;
  int32_t stochastic = 0;
  // Not 0 where `reduce` stops at grad_sums and tickets[1], for a norm over several devices: their
  // grad_sums are brought together in plan order, and `finish` makes the rest of them.
  int32_t leave_open = 0;
  int64_t seed = 0;
  double unscale = 1.0;
  // fp32 on the device, or null. The gradients are multiplied by unscale * float(1 / *scale): the
  // reciprocal is taken in fp64 and rounded to fp32, as torch's scaler does.
  const float* scale = nullptr;
  // fp32 on the device, or null: somebody has found an inf or nan, so nothing is written.
  const float* found_inf = nullptr;
  double max_norm = -1.0;  // no clip below zero
  double clip_value = std::numeric_limits<double>::infinity();
  double ema_weight = 0.0;
  double multiplier = 1.0;  // times what unscales, where `reduce` is 0
};

// One of the plans that are stepped as one: a norm, a multiplier and a skip of its own.
struct Member {
  Request request;
  int64_t rows_end;  // index behind its last row; the next one's rows follow
};

// Pointers into device memory, all aligned to 16 bytes. "Zeroed" ones are set to zero once when
// they are made, and left as they were by every launch.
struct Tables {
  // ----- sent by the host
  const Row* rows;             // in plan order; Row::layout must be -1 (see below)
  const int64_t* addresses;    // `width` of them a row (Role); the average, if any, is the last
  const int64_t* scalars;      // `scalars_width` of them a row: addresses, tagged like Row::step
  const int64_t* items;        // work: row << 32 | chunk of the row, those of a bucket together
  HyperRow* hyper_rows;        // `step` is written: the step that is made
  const HyperSource* sources;  // a hyper row each
  // A number is numbers[i], or what stands at number_at[i], a tagged address, where that is not 0.
  const double* numbers;
  const int64_t* number_at;
  const int64_t* identities;  // a row each, of stochastic rounding (cpu/run.h); null without
  const Member* members;      // where there are several; null where a launch's Request is all
  // ----- written on the device
  double* hypers;         // as in plan.h: at HyperRow::offset, hypers and then counted scalars
  double* chunk_sums;     // `chunks` x max(1, per_tensor)
  double* grad_sums;      // a row each: its part of the norm
  double* row_sums;       // `per_tensor` a row: sums and values of turns
  uint32_t* row_tickets;  // a row each, zeroed
  uint32_t* tickets;      // zeroed: blocks that are done; a member each: whether one met inf or nan
  Control* control;       // a member each
  Outcome* outcome;       // a member each
  // ----- how many
  int64_t row_count, width, scalars_width, hyper_count;
  int64_t chunks;      // of all rows: the last row's Row::chunk + chunks_of(its size)
  int64_t per_tensor;  // the most that a rule of the plan has
  int64_t averages;    // not 0: the last of the addresses is that of an average, or 0 for none
  int64_t member_count;
};

// Every role of a row is flat memory in one element order: the kernels know no strides. A row that
// is not (a gradient with other strides than its parameter) the caller gathers first, or leaves to
// the reference back end.

PYUPDATE_HD int64_t chunks_of(int64_t size) { return size <= 0 ? 1 : (size + kChunk - 1) / kChunk; }

// Rows of one rule and storage: items [begin, end).
struct Bucket {
  int32_t rule;     // index into the rules, as in HyperRow
  int32_t storage;  // index into Storages
  int64_t begin, end;
};

// What a launch came to: code is a cudaError_t, 0 for none; the texts live as long as the module.
struct Launched {
  int code;
  const char* kernel;
  const char* text;
};

// `blocks` is the most that a launch takes, a multiple of the device's multiprocessors; `stream` a
// cudaStream_t of the current device. The items of a reduce are all of them, [0, items).
Launched reduce(const Tables& tables, const Request& request, int64_t items, int blocks,
                void* stream);

// The tail of a reduce alone, from the parts of the norm that stand at `grad_sums`, `count` of
// them. `nonfinite` is a flag like tickets[1].
Launched finish(const Tables& tables, const Request& request, double* grad_sums, int64_t count,
                uint32_t* nonfinite, void* stream);

// One stage of a bucket. `backwards` after a reduce: what it read last is still in the cache.
Launched apply(const Tables& tables, const Bucket& bucket, int stage, bool backwards, int blocks,
               void* stream);

// What is compiled in: the order of rules is that of HyperRow::rule, that of storages Storages'.
struct RuleInfo {
  const char* name;
  const char* digest;  // of the text that it was compiled from
  int states, scalars, counted, numbers, hypers, per_tensor, stages;
  struct Stage {
    unsigned reads, writes;  // bit k: role k
    int sums;
  } stage[kMaxStages];
};
int rule_count();
const RuleInfo& rule_info(int rule);

}  // namespace pyupdate::cuda
