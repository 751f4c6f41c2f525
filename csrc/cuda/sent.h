// SPDX-License-Identifier: Apache-2.0
// Tables that stand on a device, and the launches over them: of one plan, or of several at once.
// Nothing here waits for the device. Memory on it belongs to Python.
#pragma once
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "../plan_object.h"
#include "image.h"
#include "launch.h"

namespace pyupdate::cuda {

// Addresses on the device: of the Outcome, the scale and found_inf of a step; 0 for none.
using Places = std::tuple<int64_t, int64_t, int64_t>;
using NumberAt = std::vector<std::vector<int64_t>>;

Request request_of(const Wanted& wanted, const Places& places);

// A launch that failed says which kernel it was.
void check(const Launched& launched);

// The stream that torch puts its own work on; null for the default one.
void* stream_of(const Plan& plan);

// The most blocks that a launch takes on a device.
int most_blocks(int device);

class Sent {
 public:
  explicit Sent(int blocks) : blocks_(blocks) {}

  // The tables for a launch, of plans that were refreshed just now; see Image::draw. Where they are
  // not as they were sent, `send` is asked to make it so: (bytes of the tables, bytes of the
  // device's own, begin, end, whether a graph is captured, what moved, the record it moved of or
  // -1, counts to set) -> addresses of both pieces of memory. Records are counted over the plans.
  Tables ready(std::span<const Drawn> plans, cpu::Tables& tables, std::span<const Member> members,
               bool stochastic, Outcome* outcome, const py::function& send);

  // As they were last sent.
  Tables tables(Outcome* outcome) const { return image_.at(tables_, scratch_, outcome); }

  void reduce(const Tables& tables, const Request& request, void* stream) const;
  // Every stage of every bucket; `reduced` where a reduce pass has read the gradients.
  void apply(const Tables& tables, bool reduced, void* stream) const;

  const Image& image() const { return image_; }
  const char* scratch() const { return scratch_; }
  // The bytes [begin, end) of the tables, for whoever sends them.
  void copy(int64_t to, int64_t begin, int64_t end) const;

 private:
  Image image_;
  int blocks_;
  char* tables_ = nullptr;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
};

// The tables of several plans that are stepped as one. It holds no plan: who calls it has them.
class Joint {
 public:
  explicit Joint(int device) : device_(device), sent_(most_blocks(device)) {}

  struct Step {
    Plan& plan;
    const py::list& groups;
    const py::dict& state;
    const Numbers& numbers;
    const NumberAt& number_at;
    Request request;
  };

  // Whole steps, the outcomes one behind the other. If one of them is not plainly right, or they
  // share memory, nothing is done and the answer is no.
  bool step(std::span<const Step> steps, Outcome* outcomes, const py::function& send);

  void copy(int64_t to, int64_t begin, int64_t end) const { sent_.copy(to, begin, end); }
  int64_t bytes() const { return sent_.image().table_bytes(); }

 private:
  int device_;
  Sent sent_;
};

}  // namespace pyupdate::cuda
