// SPDX-License-Identifier: Apache-2.0
// What this machine's memory gives a step at most: AdamW's access patterns without AdamW. Four
// arrays are read and three of them written, with a multiply-add each; the gradient alone is read;
// an average is read and written beside them. Benchmarks compare with it.
#pragma once
#include <stdint.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "parallel.h"

namespace pyupdate::cpu {

class Stream {
 public:
  Stream(int64_t elements, bool averages) : elements_(elements), arrays_(averages ? 5 : 4) {
    if (elements < 1) throw std::invalid_argument("a stream needs at least one element");
    for (size_t k = 0; k < arrays_.size(); ++k) {
      arrays_[k].reset(new float[static_cast<size_t>(elements) + k * kApart]);
      for (int64_t i = 0; i < elements; ++i) array(k)[i] = 1.0f;
    }
  }

  // That a turn moves an element.
  int64_t bytes() const { return arrays_.size() > 4 ? 36 : 28; }
  static constexpr int64_t kBytesRead = 4;

  // One turn through the arrays.
  void run(int threads) {
    parallel(threads, [this](const Team& team) {
      float* a = array(0);
      float* b = array(1);
      float* c = array(2);
      const float* d = array(3);
      const int64_t start = start_of(team), end = end_of(team);
      if (arrays_.size() > 4) {
        float* e = array(4);
#pragma GCC ivdep
        for (int64_t i = start; i < end; ++i) {
          b[i] = b[i] * 0.75f + d[i] * 0.25f;
          c[i] = c[i] * 0.75f + d[i] * 0.25f;
          a[i] = a[i] * 0.5f + b[i] * c[i] * 0.5f;
          e[i] = e[i] * 0.75f + a[i] * 0.25f;
        }
        return;
      }
#pragma GCC ivdep
      for (int64_t i = start; i < end; ++i) {
        b[i] = b[i] * 0.75f + d[i] * 0.25f;
        c[i] = c[i] * 0.75f + d[i] * 0.25f;
        a[i] = a[i] * 0.5f + b[i] * c[i] * 0.5f;
      }
    });
  }

  // One turn through the array that is only read, into as many sums as hide an addition's latency.
  void read(int threads) {
    parallel(threads, [this](const Team& team) {
      const float* d = array(3);
      float sums[kSums] = {};
      const int64_t end = end_of(team);
      for (int64_t i = start_of(team); i + kSums <= end; i += kSums) {
        for (int k = 0; k < kSums; ++k) sums[k] += d[i + k] * d[i + k];
      }
      float total = 0.0f;
      for (const float sum : sums) total += sum;
      seen_.fetch_add(total > 0.0f ? 1 : 0,
                      std::memory_order_relaxed);  // so that it is not dropped
    });
  }

 private:
  static constexpr int kSums = 32;
  // Floats by which each array begins further into its memory. Arrays of 192 MiB behind each other
  // keep each other from memory's banks (33 GB/s instead of 52), and tensors do not lie like that.
  static constexpr size_t kApart = 25'008;

  float* array(size_t k) const { return arrays_[k].get() + k * kApart; }

  int64_t start_of(const Team& team) const { return elements_ * team.rank / team.size; }
  int64_t end_of(const Team& team) const { return elements_ * (team.rank + 1) / team.size; }

  int64_t elements_;
  std::vector<std::unique_ptr<float[]>> arrays_;
  std::atomic<int64_t> seen_{0};
};

}  // namespace pyupdate::cpu
