// SPDX-License-Identifier: Apache-2.0
// What this machine's memory gives a step at most: AdamW's access pattern without AdamW. Four
// arrays are read, three of them are written, with a multiply-add each; benchmarks compare with it.
#pragma once
#include <stdint.h>

#include <memory>
#include <stdexcept>

#include "parallel.h"

namespace pyupdate::cpu {

class Stream {
 public:
  static constexpr int64_t kBytes = 28;  // that a turn moves an element

  explicit Stream(int64_t elements) : elements_(elements) {
    if (elements < 1) throw std::invalid_argument("a stream needs at least one element");
    for (auto& array : arrays_) array.reset(new float[static_cast<size_t>(elements)]);
    for (auto& array : arrays_) {
      for (int64_t i = 0; i < elements; ++i) array[static_cast<size_t>(i)] = 1.0f;
    }
  }

  // One turn through the arrays.
  void run(int threads) {
    parallel(threads, [this](const Team& team) {
      float* a = arrays_[0].get();
      float* b = arrays_[1].get();
      float* c = arrays_[2].get();
      const float* d = arrays_[3].get();
      const int64_t end = elements_ * (team.rank + 1) / team.size;
#pragma GCC ivdep
      for (int64_t i = elements_ * team.rank / team.size; i < end; ++i) {
        b[i] = b[i] * 0.75f + d[i] * 0.25f;
        c[i] = c[i] * 0.75f + d[i] * 0.25f;
        a[i] = a[i] * 0.5f + b[i] * c[i] * 0.5f;
      }
    });
  }

 private:
  int64_t elements_;
  std::unique_ptr<float[]> arrays_[4];
};

}  // namespace pyupdate::cpu
